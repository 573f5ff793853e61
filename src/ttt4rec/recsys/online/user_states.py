"""UserStates: the model's states of as many users as fit into a byte budget, a cache of the event log."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ttt4rec.checks import check_integer
from ttt4rec.models.event_times import gaps_of
from ttt4rec.models.item_index import ItemIndex
from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.recsys.data import IntArray
from ttt4rec.recsys.online import streams
from ttt4rec.recsys.online.earlier import Earlier, EarlierStates
from ttt4rec.recsys.online.events import EventLog, Known, Tail
from ttt4rec.recsys.online.seen import PART_OF_POOL, SeenItems
from ttt4rec.recsys.online.streams import Streams

T = TypeVar("T")

USERS_AT_ONCE = 512
"""Users brought up to the log together, and their hidden states handed out together."""


@dataclass
class Reading:
    """How far a user's history was read, and where the state is.

    Attributes:
        slot: among the streams.
        length: items of the history that were read, with those that the model does not know.
        mark: the log's after these, see ``events.Tail``.
        is_warm: whether the model knew one of them.
    """

    slot: int
    length: int = 0
    mark: int = 0
    is_warm: bool = False


class Turns:
    """A lock that nobody takes twice in a row while somebody waits for it."""

    def __init__(self) -> None:
        self._next, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class UserStates:
    """The states of users, each brought up to the event log whenever it is asked for.

    Nothing here is more than a cache: a state is what the model makes of a user's whole history, and it is known which
    history, and how much of it, was read. Users without a state, being new, or evicted, or having another history now,
    get one from the log, several users in one packed call of the model. The least recently used ones are evicted.
    A long history is read piece by piece, between which others have their turn; where an event was put into one, it is
    read from the last of the user's ``EarlierStates`` that is still right.

    Args:
        model: put into evaluation mode; its weights must not change any more.
        item_ids: original id of item code j + 1.
        log: where histories come from.
        pool_bytes: budget of the states, see ``Streams``.

    Attributes:
        index: of the model's items.
        counts: what was done so far: ``steps``, items read on from a state, the further pieces of a long history among
            them; ``prefills``, histories read from their beginning; ``evictions``.

    Raises:
        ValueError: the item ids are not the model's, the budget is too small, the model keeps no states in pools, or
            numbers of its items are NaN or infinite.
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
        self._is_timed = model.event_times is not None
        self.index = ItemIndex()
        self.index.prepare(model.served_items())
        self._earlier = EarlierStates(1 + self.num_slots // 32)
        self._seen = SeenItems(pool_bytes // PART_OF_POOL)
        self._free = list(range(self.num_slots))
        self._readings: OrderedDict[str, Reading] = OrderedDict()  # the least recently used first
        self._lock = Turns()
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
        users = users[-self.num_slots :]
        for start in range(0, len(users), USERS_AT_ONCE):
            with self._up_to_date(users[start : start + USERS_AT_ONCE]):
                pass

    def hidden(
        self, users: Sequence[str], *, seen: bool, at: float | None = None
    ) -> Iterator[tuple[list[str], Tensor, list[IntArray]]]:
        """Hidden states after the whole histories of users, all different, some hundred at once.

        Args:
            users: whose; those without an item that the model knows are left out.
            seen: whether the histories are wanted too.
            at: see ``Streams.hidden``.

        Yields:
            Users, at least one; their hidden states ``[n, width]``; codes of the items of their histories, if wanted.

        Raises:
            OSError: the log cannot be read.
        """
        size = min(self.num_slots, USERS_AT_ONCE)
        for start in range(0, len(users), size):
            part = users[start : start + size]
            with self._up_to_date(part):
                warm = [user for user in part if user in self._readings]
                hidden = self._streams.hidden([self._readings[user].slot for user in warm], at)
                kept = {user: self._seen.of(user) for user in warm} if seen else {}
            unknown = [user for user, codes in kept.items() if codes is None]
            rest = iter([codes for codes, _ in self._histories(unknown)] if unknown else [])
            if warm:
                yield warm, hidden, [next(rest) if codes is None else codes for codes in kept.values()]

    def moved(self, users: Sequence[str]) -> dict[str, float]:
        """How far the weights of users, all different, are from the initial ones; strangers are left out.

        Raises:
            OSError: the log cannot be read.
        """
        found: dict[str, float] = {}
        size = min(self.num_slots, USERS_AT_ONCE)
        for start in range(0, len(users), size):
            part = users[start : start + size]
            with self._up_to_date(part):
                warm = [user for user in part if user in self._readings]
                if warm:
                    far = self._streams.moved([self._readings[user].slot for user in warm])
                    found |= zip(warm, far.tolist(), strict=True)
        return found

    def surprise(self, user: str) -> list[tuple[str, float]]:
        """The items of a user's history that the model knows, and how surprising each was.

        Raises:
            OSError: the log cannot be read.
        """
        ((codes, times),) = self._histories([user])
        if not len(codes):
            return []
        device = self.model.embedding.weight.device
        gaps = gaps_of(torch.tensor([times], dtype=torch.float64)).to(device) if self._is_timed else None
        numbers = self.model.surprise(torch.from_numpy(codes)[None].to(device), gaps)[0]
        return [
            (self.item_ids[code - 1], number) for code, number in zip(codes.tolist(), numbers.tolist(), strict=True)
        ]

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
            users = [user for user in users if self._is_warm(user)]
            self._compare(users, self.log.read(users, [self._known(user) for user in users], 0))
            users = [user for user in users if user in self._readings]
            if not users:
                return [], {}
            readings = [self._readings[user] for user in users]
            tensors = self._streams.export([reading.slot for reading in readings])
            for name in ("length", "mark"):
                tensors[name] = torch.tensor([getattr(reading, name) for reading in readings], dtype=torch.int64)
        return list(users), tensors

    def load(self, users: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """Put what ``export`` gave, of other users than are there, into free slots.

        What was read is compared with the log when a user is asked for the first time, and begun again if it differs.

        Raises:
            ValueError: the tensors belong to another model. KeyError: some are missing.
        """
        with self._lock:
            slots = self._free[-len(users) :]
            marks = zip(slots, tensors["length"].tolist(), tensors["mark"].tolist(), strict=True)
            readings = [Reading(*mark, is_warm=True) for mark in marks]
            try:
                self._streams.load(slots, tensors)
            except BaseException:
                self._streams.reset(slots)
                raise
            del self._free[-len(users) :]
            self._readings.update(zip(users, readings, strict=True))

    @contextmanager
    def _up_to_date(self, users: Sequence[str]) -> Iterator[None]:
        """Hold the lock, with at most ``num_slots`` users up to the log; others have it between long histories' pieces.

        Should these evict the users again and again, the rest is read with the lock held.
        """
        lagging, turns = users, None
        while True:
            with self._lock:
                missing = self._advance(lagging)
                if not missing and len(lagging) < len(users):  # the others may have been evicted meanwhile
                    missing = self._advance(users)
                turns = 2 + sum(missing.values()) // streams.TOKENS_AT_ONCE if turns is None else turns - 1
                while missing and turns <= 0:
                    missing = self._advance(users)
                if not missing:
                    yield
                    return
                lagging = list(missing)

    def _histories(self, users: Sequence[str]) -> list[tuple[IntArray, list[float]]]:
        """Codes and times of all items in users' histories that the model knows; read piece by piece, without the lock.

        The codes are kept where a state has read as much. There are times if the model reads them.
        """
        found: list[list[int]] = [[] for _ in users]
        times: list[list[float]] = [[] for _ in users]
        known: list[tuple[Known, ...]] = [() for _ in users]
        pending = list(range(len(users)))
        while pending:
            limit = streams.TOKENS_AT_ONCE
            tails = self.log.read([users[n] for n in pending], [known[n] for n in pending], limit)
            for n, tail in zip(pending, tails, strict=True):
                found[n][tail.start :] = [self._codes.get(item, 0) for item in tail.items]
                times[n][tail.start :] = self._times(tail)
                if tail.items:
                    known[n] = (Known(len(found[n]), tail.marks[-1]),)
            pending = [n for n, tail in zip(pending, tails, strict=True) if not tail.is_whole]
        with self._lock:
            for user, beginnings, codes in zip(users, known, found, strict=True):
                if beginnings and beginnings[0] in self._known(user)[:1]:
                    self._seen.drop(user)
                    self._seen.read_on(user, 0, codes)
        return [
            (np.array(_where_known(codes, codes), dtype=np.int64), _where_known(codes, when))
            for codes, when in zip(found, times, strict=True)
        ]

    def _times(self, tail: Tail) -> Sequence[float]:
        """Of a tail's events, if the model reads times."""
        if self._is_timed and len(tail.times) != len(tail.items):
            raise ValueError(
                f"the log must give times of events for a model with times={self.model.config.times!r}; given tails "
                "without them"
            )
        return tail.times if self._is_timed else ()

    # What follows is called with the lock held.

    def _advance(self, users: Sequence[str]) -> dict[str, int]:
        """Read on, at most one call of the model's items; of whom how many are missing then."""
        tails = self.log.read(users, [self._known(user) for user in users], streams.TOKENS_AT_ONCE)
        self._compare(users, tails)
        rest: dict[str, tuple[Tail, list[int]]] = {}
        for user, tail in zip(users, tails, strict=True):
            codes = [self._codes.get(item, 0) for item in tail.items]
            if user in self._readings:
                self._readings.move_to_end(user)
            elif not any(codes) and tail.is_whole:
                continue
            if codes:
                rest[user] = tail, codes
        self._make_room(sum(user not in self._readings for user in rest))
        self._read(rest)
        self._drop([user for user, (tail, _) in rest.items() if tail.is_whole and not self._is_warm(user)])
        return {
            user: tail.length - tail.start - len(tail.items)
            for user, tail in zip(users, tails, strict=True)
            if not tail.is_whole
        }

    def _known(self, user: str) -> list[Known]:
        reading = self._readings.get(user)
        return [] if reading is None else [Known(reading.length, reading.mark), *self._earlier.known(user)]

    def _is_warm(self, user: str) -> bool:
        return user in self._readings and self._readings[user].is_warm

    def _compare(self, users: Sequence[str], tails: Sequence[Tail]) -> None:
        """Go back to the beginnings that the log's histories still have; without one, drop the state."""
        for user, tail in zip(users, tails, strict=True):
            reading = self._readings.get(user)
            if reading is None or reading.length == tail.start:
                continue
            if tail.start:
                earlier = self._earlier.go_back(user, tail.start)
                reading.length, reading.mark = earlier.known
                self._seen.go_back(user, reading.length)
                try:
                    self._streams.load([reading.slot], earlier.tensors)
                except BaseException:
                    self._drop([user])
                    raise
            else:
                self._drop([user])

    def _make_room(self, number: int) -> None:
        """Evict users until ``number`` slots are free; those moved to the end by the caller stay."""
        evicted = list(itertools.islice(self._readings, max(0, number - len(self._free))))
        self.counts["evictions"] += len(evicted)
        self._drop(evicted)

    def _read(self, rest: dict[str, tuple[Tail, list[int]]]) -> None:
        """Read on, in free slots where users have no state yet."""
        begun = {
            user: self._readings.pop(user) if user in self._readings else Reading(self._free.pop()) for user in rest
        }
        for user, (_, codes) in rest.items():
            self.counts["prefills"] += not begun[user].length
            self.counts["steps"] += begun[user].length > 0 and sum(map(bool, codes))
        cuts = {
            user: self._earlier.cuts(user, tail.start, tail.start + len(codes), tail.length)
            for user, (tail, codes) in rest.items()
        }
        try:
            while cuts:
                self._read_to({user: places.pop(0) for user, places in cuts.items()}, begun, rest)
                cuts = {user: places for user, places in cuts.items() if places}
        except BaseException:  # what the streams hold now is of no use; the log has it all
            self._readings |= begun
            self._drop(list(begun))
            raise
        self._readings |= begun

    def _read_to(
        self, places: dict[str, int], begun: dict[str, Reading], rest: dict[str, tuple[Tail, list[int]]]
    ) -> None:
        """Read each user's history on to a place, and keep the state there if it is one to keep."""
        coming, times = {}, {}
        for user, place in places.items():
            (tail, codes), reading = rest[user], begun[user]
            part = slice(reading.length - tail.start, place - tail.start)
            coming[user] = _where_known(codes[part], codes[part])
            times[user] = _where_known(codes[part], self._times(tail)[part])
            reading.is_warm |= bool(coming[user])
        moving = [user for user in places if coming[user]]
        slots = [begun[user].slot for user in moving]
        self._streams.read(slots, [coming[user] for user in moving], [times[user] for user in moving])
        for user, place in places.items():
            (tail, codes), reading = rest[user], begun[user]
            self._seen.read_on(user, reading.length, codes[reading.length - tail.start : place - tail.start])
            reading.length, reading.mark = place, tail.marks[place - tail.start - 1]
            is_cut = place < tail.start + len(codes)
            if reading.is_warm and (is_cut or self._earlier.is_due(user, place)):
                earlier = Earlier(Known(place, reading.mark), self._streams.export([reading.slot]))
                self._earlier.keep(user, earlier, tail.length)

    def _drop(self, users: Sequence[str]) -> None:
        slots = [self._readings.pop(user).slot for user in users]
        for user in users:
            self._earlier.drop(user)
            self._seen.drop(user)
        self._streams.reset(slots)
        self._free += slots


def _where_known(codes: Sequence[int], values: Sequence[T]) -> list[T]:
    """Those values, if there are any, whose codes are of items that the model knows."""
    return [value for code, value in zip(codes, values, strict=False) if code]
