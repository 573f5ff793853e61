"""UserStates: the model's states of as many users as fit into a byte budget, a cache of the event log."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ttt4rec.model import TTT4Rec
from ttt4rec.recsys.data import IntArray
from ttt4rec.recsys.events import NOTHING, EventLog, Known, Tail
from ttt4rec.recsys.streams import Streams
from ttt4rec.validation import check_integer

USERS_AT_ONCE = 512
"""Users whose hidden states are handed out together."""

_UNVERIFIED = -1  # version of a history that was read before a restart and not compared with the log's since
_PRIME = (1 << 61) - 1


@dataclass
class Reading:
    """How far a user's history was read, and where the state is.

    Attributes:
        slot: among the streams.
        version: of the history, see ``events.Tail``.
        length: items of it that were read, with those that the model does not know.
        digest: of the codes of these items.
    """

    slot: int
    version: int = 0
    length: int = 0
    digest: int = 0

    def go_on(self, version: int, codes: Sequence[int]) -> None:
        """Take note of more items."""
        self.version, self.length, self.digest = version, self.length + len(codes), _digest(self.digest, codes)

    def is_beginning_of(self, tail: Tail, codes: Sequence[int]) -> bool:
        """Whether the log's history goes on where this one ends; codes are those of the tail's items."""
        if self.version == _UNVERIFIED:
            return self.length <= len(codes) and self.digest == _digest(0, codes[: self.length])
        return self.version == tail.version and self.length <= tail.start + len(codes)


def _digest(digest: int, codes: Sequence[int]) -> int:
    """The digest of a history from that of its beginning and the codes of its rest; the empty one's is 0."""
    for code in codes:
        digest = (digest * 1_000_003 + code + 1) % _PRIME
    return digest


class UserStates:
    """The states of users, each brought up to the event log whenever it is asked for.

    Nothing here is more than a cache: a state is what the model makes of a user's whole history, and it is known which
    history, and how much of it, was read. Users without a state, being new, or evicted, or having another history now,
    get one from the log, several users in one packed call of the model. The least recently used ones are evicted.

    Args:
        model: put into evaluation mode; its weights must not change any more.
        item_ids: original id of item code j + 1.
        log: where histories come from.
        pool_bytes: budget of the states, see ``Streams``.

    Attributes:
        counts: what was done so far: ``steps``, items read on from a state; ``prefills``, histories read from their
            beginning; ``evictions``.

    Raises:
        ValueError: the item ids are not the model's, the budget is too small, or the model keeps no states in pools.
    """

    def __init__(self, model: TTT4Rec, item_ids: Sequence[str], log: EventLog, pool_bytes: int) -> None:
        self.model, self.item_ids, self.log, self.pool_bytes = model.eval(), tuple(item_ids), log, pool_bytes
        check_integer("pool_bytes", pool_bytes, 1)
        self._codes = {item: code for code, item in enumerate(self.item_ids, start=1)}
        if not len(self._codes) == len(self.item_ids) == model.config.num_items:
            raise ValueError(
                f"item_ids must be {model.config.num_items} different ones, as many as the model knows; given "
                f"{len(self.item_ids)}, of which {len(self._codes)} differ"
            )
        self._streams = Streams(model, pool_bytes)
        self._free = list(range(self.num_slots))
        self._readings: OrderedDict[str, Reading] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()
        self.counts = {"steps": 0, "prefills": 0, "evictions": 0}

    @property
    def num_slots(self) -> int:
        """How many users' states fit."""
        return self._streams.num_slots

    @property
    def num_users(self) -> int:
        """How many users have a state now."""
        return len(self._readings)

    def users(self) -> list[str]:
        """Users that have a state now, the least recently used first."""
        with self._lock:
            return list(self._readings)

    def unknown(self, item_ids: Sequence[str]) -> list[str]:
        """Those items that the model does not know, each once."""
        return list(dict.fromkeys(item for item in item_ids if item not in self._codes))

    def advance(self, users: Sequence[str]) -> None:
        """Bring the states of users, all different, up to the log; where not all fit, the last ones'.

        Raises:
            OSError: the log cannot be read.
        """
        with self._lock:
            self._advance(users[-self.num_slots :], whole=False)

    def hidden(self, users: Sequence[str], *, seen: bool) -> Iterator[tuple[list[str], Tensor, list[IntArray]]]:
        """Hidden states after the whole histories of users, all different, some hundred at once.

        Args:
            users: whose; those without an item that the model knows are left out.
            seen: whether the histories are wanted too.

        Yields:
            Users, at least one; their hidden states ``[n, width]``; codes of the items of their histories, if wanted.

        Raises:
            OSError: the log cannot be read.
        """
        size = min(self.num_slots, USERS_AT_ONCE)
        for start in range(0, len(users), size):
            part = users[start : start + size]
            with self._lock:
                histories = self._advance(part, whole=seen)
                warm = [number for number, user in enumerate(part) if user in self._readings]
                hidden = self._streams.hidden([self._readings[part[number]].slot for number in warm])
            if warm:
                items = [np.array([code for code in histories[number] if code]) for number in warm] if seen else []
                yield [part[number] for number in warm], hidden, items

    def drop(self, users: Sequence[str]) -> None:
        """Wipe the states of users."""
        with self._lock:
            self._drop([user for user in dict.fromkeys(users) if user in self._readings])

    def export(self, users: Sequence[str]) -> tuple[list[str], dict[str, Tensor]]:
        """Those users that have a state, and copies of states and readings as tensors by name, if there are any.

        States whose history the log does not have any more, of users that were forgotten say, are dropped before.

        Raises:
            OSError: the log cannot be read.
        """
        with self._lock:
            users = [user for user in users if user in self._readings]
            self._compare(users, *self._rests(users, whole=False))
            users = [user for user in users if user in self._readings]
            if not users:
                return [], {}
            readings = [self._readings[user] for user in users]
            tensors = self._streams.export([reading.slot for reading in readings])
            for name in ("length", "digest"):
                tensors[name] = torch.tensor([getattr(reading, name) for reading in readings], dtype=torch.int64)
        return list(users), tensors

    def load(self, users: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """Put what ``export`` gave, of other users than are there, into free slots.

        What was read is compared with the log when a user is asked for the first time, and begun anew if it differs.

        Raises:
            ValueError: the tensors are those of another model. KeyError: some are missing.
        """
        with self._lock:
            slots = self._free[-len(users) :]
            try:
                self._streams.load(slots, tensors)
            except BaseException:
                self._streams.reset(slots)
                raise
            del self._free[-len(users) :]
            marks = zip(tensors["length"].tolist(), tensors["digest"].tolist(), strict=True)
            for user, slot, (length, digest) in zip(users, slots, marks, strict=True):
                self._readings[user] = Reading(slot, _UNVERIFIED, length, digest)

    # What follows is called with the lock held.

    def _advance(self, users: Sequence[str], *, whole: bool) -> list[list[int]]:
        """Bring at most ``num_slots`` users up to the log; codes of what was read there, histories or their rests."""
        tails, found = self._rests(users, whole=whole)
        self._compare(users, tails, found)
        rest: dict[str, tuple[int, list[int]]] = {}  # the history's version, and what of it is yet to be read
        for user, tail, codes in zip(users, tails, found, strict=True):
            reading = self._readings.get(user)
            if reading is not None:
                self._readings.move_to_end(user)
                rest[user] = tail.version, codes[reading.length - tail.start :]
            elif any(codes):
                rest[user] = tail.version, codes
        self._make_room(sum(user not in self._readings for user in rest))
        self._read(rest)
        return found

    def _rests(self, users: Sequence[str], *, whole: bool) -> tuple[list[Tail], list[list[int]]]:
        """What the log has of users beyond what was read, or all of it; also the codes of these items."""
        tails = self.log.read(users, [NOTHING if whole else self._known(user) for user in users])
        return tails, [[self._codes.get(item, 0) for item in tail.items] for tail in tails]

    def _compare(self, users: Sequence[str], tails: Sequence[Tail], found: Sequence[Sequence[int]]) -> None:
        """Drop the states of which the log's histories are no continuation."""
        for user, tail, codes in zip(users, tails, found, strict=True):
            reading = self._readings.get(user)
            if reading is None:
                continue
            if reading.is_beginning_of(tail, codes):
                reading.version = tail.version
            else:
                self._drop([user])

    def _make_room(self, number: int) -> None:
        """Evict users until so many slots are free; those moved to the end by the caller stay."""
        evicted = list(itertools.islice(self._readings, max(0, number - len(self._free))))
        self.counts["evictions"] += len(evicted)
        self._drop(evicted)

    def _read(self, rest: dict[str, tuple[int, list[int]]]) -> None:
        """Read on, in free slots where users have no state yet."""
        begun = {
            user: self._readings.pop(user) if user in self._readings else Reading(self._free.pop()) for user in rest
        }
        known = {user: [code for code in codes if code] for user, (_, codes) in rest.items()}
        moving = [user for user in rest if known[user]]
        try:
            self._streams.read([begun[user].slot for user in moving], [known[user] for user in moving])
        except BaseException:  # what the streams hold now is of no use; the log has it all
            slots = [reading.slot for reading in begun.values()]
            self._streams.reset(slots)
            self._free += slots
            raise
        for user, reading in begun.items():
            self.counts["prefills"] += not reading.length
            self.counts["steps"] += reading.length > 0 and len(known[user])
            reading.go_on(*rest[user])
            self._readings[user] = reading

    def _known(self, user: str) -> Known:
        reading = self._readings.get(user)
        return NOTHING if reading is None or reading.version == _UNVERIFIED else Known(reading.version, reading.length)

    def _drop(self, users: Sequence[str]) -> None:
        slots = [self._readings.pop(user).slot for user in users]
        self._streams.reset(slots)
        self._free += slots
