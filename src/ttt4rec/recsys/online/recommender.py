"""OnlineRecommender: recommendations that follow every event as it comes."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.recsys.data import DataError, Id
from ttt4rec.recsys.online.events import Event, EventLog, is_text, is_time
from ttt4rec.recsys.online.group_commit import append_together
from ttt4rec.recsys.online.snapshot import load_snapshot, save_snapshot
from ttt4rec.recsys.online.user_states import UserStates
from ttt4rec.recsys.recommend import best_items

logger = logging.getLogger(__name__)
T = TypeVar("T")

_REFRESHED_AT_ONCE = 256  # users; small enough that the requests served meanwhile get their turn


class Batch(NamedTuple):
    """What ``OnlineRecommender.observe`` takes."""

    user_ids: Sequence[str]
    item_ids: Sequence[str]
    event_ids: Sequence[str | None] | None = None
    times: Sequence[float | None] | None = None


class OnlineRecommender:
    """Takes events, and recommends to users by what they did until now.

    The event log is the truth. An event is logged before it takes effect, and whatever is kept in memory is made
    from the log: after a crash nothing is lost that ``observe`` returned for. A recommendation is the same as by
    one pass of the model over the user's whole history in the log, up to rounding. Whether its state was kept, evicted
    or loaded from a snapshot changes nothing; ``docs/online.md`` has the details. All methods may be called from
    several threads at once.

    Args:
        model: a trained model with the TTT mixer; put into evaluation mode, its weights must not change any more.
        item_ids: original id of item code j + 1, as ``Histories.item_ids``; here, as in the log, every id is a text.
        log: the histories; a ``SQLiteEventLog``, or a store of your own.
        pool_bytes: memory for the states of users, allocated at once; while ``refresh`` works, twice as much.
        snapshot: file that ``save_snapshot`` writes, and from which states are loaded now if it is there; one that is
            damaged or another model's is passed over with a warning to ``logging``.
        horizon: the latest time that an event may have, asked at every ``observe`` and in the unit of the times, such
            as ``lambda: time.time() + 86400``. Behind an event of the far future no other would find its place at the
            history's end for long. None: any time.
        clock: the present moment, in the unit of the times, such as ``time.time``: the time of a request for a model
            with ``times="query"``, where ``recommend`` is told no other. None: the time of each user's last event.

    Raises:
        ValueError: the item ids are not the model's, pool_bytes is too little for one user, the model keeps no states
            in pools, or numbers of its items are NaN or infinite.
    """

    def __init__(
        self,
        model: TTT4Rec,
        item_ids: Sequence[Id],
        log: EventLog,
        *,
        pool_bytes: int = 1 << 30,
        snapshot: str | os.PathLike[str] | None = None,
        horizon: Callable[[], float] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.log, self._horizon, self._clock = log, horizon, clock
        self._snapshot = snapshot
        self._states = self._coming = UserStates(model, list(map(str, item_ids)), log, pool_bytes)
        self._refreshing, self._saving = threading.Lock(), threading.Lock()
        if snapshot is not None:
            load_snapshot(snapshot, self._states)

    def observe(
        self,
        user_ids: Sequence[str],
        item_ids: Sequence[str],
        *,
        event_ids: Sequence[str | None] | None = None,
        times: Sequence[float | None] | None = None,
    ) -> list[bool]:
        """Log a batch of events and let them take effect.

        Args:
            user_ids: who acted, one entry an event; a user never seen before begins a history.
            item_ids: on what.
            event_ids: see ``Event``; an event that was logged before under its id is passed over.
            times: see ``Event``; an event that comes too late is put in its place in the history.

        Returns:
            For each event whether it was new.

        Raises:
            DataError: the arguments are not of one length, an id is no text, a time no number or beyond the horizon, or
                an item is not the model's; the message names those. Nothing of the batch is logged.
            OSError: the log cannot take the batch, for a full disk perhaps. Nothing of it is logged.
        """
        (outcome,) = self.observe_many([Batch(user_ids, item_ids, event_ids, times)])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def observe_many(self, batches: Sequence[Batch]) -> list[list[bool] | Exception]:
        """As ``observe``, for the batches of several callers, which so share one write to the log.

        Returns:
            For each batch what ``observe`` returns or, of that batch alone, the error that it raises.
        """
        outcomes: list[list[bool] | Exception] = []
        good: dict[int, list[Event]] = {}
        for place, batch in enumerate(batches):
            try:
                good[place] = self._events(batch)
                outcomes.append([])
            except Exception as error:
                outcomes.append(error)
        logged: dict[str, None] = {}
        for place, outcome in zip(good, append_together(self.log.append, list(good.values())), strict=True):
            outcomes[place] = outcome
            if not isinstance(outcome, Exception):
                logged |= dict.fromkeys(batches[place].user_ids)
        try:
            self._states.advance(list(logged))
        except Exception as error:  # the events are logged, which is what the callers want to know
            logger.warning("events are logged, states will follow at the next request: %s", error, exc_info=True)
        return outcomes

    def _events(self, batch: Batch) -> list[Event]:
        """Of a batch, checked."""
        nothing = [None] * len(batch.user_ids)
        columns: list[Sequence[object]] = [
            _ids("user_ids", batch.user_ids),
            _ids("item_ids", batch.item_ids),
            nothing if batch.event_ids is None else _ids("event_ids", batch.event_ids),
            nothing if batch.times is None else batch.times,
        ]
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            raise DataError(f"user_ids, item_ids, event_ids and times must be of one length; given {lengths}")
        events = [Event(*fields) for fields in zip(*columns, strict=True)]
        self._check_times(events)
        unknown = self._states.unknown(batch.item_ids)
        if unknown:
            named = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise DataError(f"items must be of the model's catalogue; {len(unknown)} unknown: {named}")
        return events

    def _check_times(self, events: Sequence[Event]) -> None:
        latest = math.inf if self._horizon is None else self._horizon()
        for event in events:
            if event.time is not None and event.time > latest:
                raise DataError(
                    f"time must be at most {latest:.17g}, this recommender's horizon; given {event.time} of an event "
                    f"of user {event.user_id!r}; send the time at which it happened, in the horizon's unit "
                    "(ttt4rec serve --time-unit)"
                )

    def recommend(
        self, user_ids: Sequence[str], k: int = 10, *, exclude_seen: bool = True, at: float | None = None
    ) -> list[list[tuple[str, float]]]:
        """The k best items and their scores for each user, best first; equal scores in the order of the catalogue.

        Args:
            user_ids: for whom. One without history, or of whose history the model knows no item, gets an empty list.
            k: how many; fewer come back when fewer are left.
            exclude_seen: leave out every item of the history.
            at: the time of the request, for a model with ``times="query"``; others recommend the same at all times.
                None: the clock's. What is before a user's last event counts as its time.

        Raises:
            DataError: user_ids is a text, one of them is none, k is below 1 or at no finite number. ValueError: the
                model's scores are NaN. OSError: the log cannot be read.
        """
        if k < 1:
            raise DataError(f"k must be at least 1; given {k}")
        if at is not None and not is_time(at):
            raise DataError(f"at must be a finite int or float of 64 bits; given {at!r}")
        if at is None and self._clock is not None:
            at = self._clock()
        states = self._states
        best: dict[str, list[tuple[str, float]]] = {}
        everyone = list(dict.fromkeys(_users(user_ids)))
        for users, hidden, histories in states.hidden(everyone, seen=exclude_seen, at=at):
            seen = histories if exclude_seen else None
            best |= zip(users, best_items(states.model, states.index, states.item_ids, hidden, k, seen), strict=True)
        return [best.get(user, []) for user in user_ids]

    def moved(self, user_ids: Sequence[str]) -> list[float]:
        """How far the learned weights of each user are from the model's initial ones: see ``TTTLayer.moved``.

        The mean over blocks and heads; 0 for a user without history.

        Raises:
            DataError: user_ids is a text, or one of them is none. OSError: the log cannot be read.
        """
        found = self._states.moved(list(dict.fromkeys(_users(user_ids))))
        return [found.get(user, 0.0) for user in user_ids]

    def surprise(self, user_id: str) -> list[tuple[str, float]]:
        """Each item of a user's history that the model knows, and how much it surprised: see ``TTTLayer.surprise``.

        Above 1 what was learned of the user knew the item worse than the model's initial weights: so interests shift.
        The whole history is read by the model once more.

        Raises:
            DataError: user_id is no text. OSError: the log cannot be read.
        """
        (user,) = _users([user_id])
        return self._states.surprise(user)

    def forget(self, user_ids: Sequence[str]) -> None:
        """Delete the histories and states of users; they are strangers from now on.

        A snapshot that was saved before holds their states until the next one; it brings none of them back.

        Raises:
            DataError: user_ids is a text, or one of them is none. OSError: the log cannot delete, and everything is as
                before.
        """
        user_ids = _users(user_ids)
        self.log.forget(user_ids)
        for states in {self._states, self._coming}:
            states.drop(user_ids)

    def save_snapshot(self) -> int:
        """Replace the snapshot by one of now; others are served meanwhile. Returns how many users it holds.

        Raises:
            ValueError: the recommender was made without one. OSError: it cannot be written, or the log not be read; the
                old one stays whole.
        """
        if self._snapshot is None:
            raise ValueError("snapshot must be a file; this recommender was made with None")
        with self._saving:
            return save_snapshot(self._snapshot, self._states)

    @property
    def item_ids(self) -> tuple[str, ...]:
        """Of the model that serves: the same tuple until another one does."""
        return self._states.item_ids

    @property
    def reads_times(self) -> bool:
        """Whether the model that serves knows the times of events."""
        return self._states.model.event_times is not None

    def refresh(self, model: TTT4Rec, item_ids: Sequence[Id] | None = None) -> None:
        """Go over to a retrained model: read the users' histories with it, then switch in one step.

        Returns after the switch. Call it from a thread of its own: others are served by the old model meanwhile, and
        what they observe is in the log, which the new states are brought up to like all others.

        Args:
            model: as for the constructor; another shape and another catalogue are allowed.
            item_ids: its items; None: the same as before. Items of a history that it does not know are passed over.

        Raises:
            ValueError: as for the constructor. OSError: the log cannot be read. The old model stays.
        """
        with self._refreshing:
            old = self._states
            try:
                new = self._coming = UserStates(
                    model, old.item_ids if item_ids is None else list(map(str, item_ids)), self.log, old.pool_bytes
                )
                users = old.users()[-new.num_slots :]
                for start in range(0, len(users), _REFRESHED_AT_ONCE):
                    new.advance(users[start : start + _REFRESHED_AT_ONCE])
                self._states = new
            finally:
                self._coming = self._states

    def stats(self) -> dict[str, int]:
        """``users`` with a state, ``slots`` for them, and ``UserStates.counts`` since the start or the last refresh."""
        states = self._states
        return {"users": states.num_users, "slots": states.num_slots} | states.counts


def _ids(name: str, values: Sequence[T]) -> Sequence[T]:
    if isinstance(values, str):
        raise DataError(f"{name} must be a sequence of ids; given the text {values!r}")
    return values


def _users(user_ids: Sequence[str]) -> Sequence[str]:
    for user in _ids("user_ids", user_ids):
        if not is_text(user):
            raise DataError(f"user_ids must be texts of at least one character; given {user!r}")
    return user_ids
