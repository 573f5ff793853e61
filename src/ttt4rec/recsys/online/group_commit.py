"""Group commit: batches of several callers are written as one, which costs one flush of the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic, TypeVar

E = TypeVar("E")


def append_together(
    append: Callable[[Sequence[E]], list[bool]], batches: Sequence[Sequence[E]]
) -> list[list[bool] | Exception]:
    """Append batches as one or, should that fail, each by itself: nobody bears the error of another.

    Args:
        append: as ``EventLog.append``.
        batches: of events, in the order in which they take effect.

    Returns:
        For each batch what ``append`` returned, or the error it raised.
    """
    if not batches:
        return []
    try:
        new = iter(append(list(chain.from_iterable(batches))))
    except Exception as error:
        if len(batches) == 1:
            return [error]
        return [outcome for batch in batches for outcome in append_together(append, [batch])]
    return [list(islice(new, len(batch))) for batch in batches]


@dataclass(eq=False)
class _Caller(Generic[E]):
    """Who waits for a batch, and what came of it."""

    events: Sequence[E]
    outcome: list[bool] | Exception | None = None


class GroupCommit(Generic[E]):
    """One of the threads that append writes for all of them.

    While a write goes on, others gather. One of these then takes all that waits, whatever its number: nobody waits for
    more to come, so a single caller loses no time.

    Args:
        append: writes a batch, all of it or nothing; called by one thread at a time.
    """

    def __init__(self, append: Callable[[Sequence[E]], list[bool]]) -> None:
        self._append = append
        self._waiting: list[_Caller[E]] = []
        self._writing = False
        self._change = threading.Condition()

    def append(self, events: Sequence[E]) -> list[bool]:
        """As the function that was given."""
        mine = _Caller(events)
        with self._change:
            self._waiting.append(mine)
            try:
                self._change.wait_for(lambda: mine.outcome is not None or not self._writing)
            except BaseException:  # the caller was interrupted, and so left before its turn
                if mine in self._waiting:
                    self._waiting.remove(mine)
                raise
            group: list[_Caller[E]] = []
            if mine.outcome is None:
                group, self._waiting, self._writing = self._waiting, [], True
        if group:
            self._write(group)
        if isinstance(mine.outcome, Exception):
            raise mine.outcome
        assert mine.outcome is not None
        return mine.outcome

    def _write(self, group: list[_Caller[E]]) -> None:
        try:
            outcomes = append_together(self._append, [caller.events for caller in group])
            for caller, outcome in zip(group, outcomes, strict=True):
                caller.outcome = outcome
        finally:
            with self._change:
                for caller in group:
                    if caller.outcome is None:
                        caller.outcome = OSError("writing was interrupted; send the events again, with event ids")
                self._writing = False
                self._change.notify_all()
