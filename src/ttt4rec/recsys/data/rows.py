"""What the readers of rows share: codes for ids, coded rows, and what to say of bad ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttt4rec.checks import printable
from ttt4rec.recsys.data.ids import Id
from ttt4rec.recsys.data.interactions import IntArray, Interactions, TimeArray
from ttt4rec.recsys.data.text import DataError
from ttt4rec.recsys.data.times import TimeChunk, join_times

_NAMED = 5  # bad rows in an error message

Codes32 = NDArray[np.int32]


class Codes(dict[Id, int]):
    """Codes 0, 1, 2, ... given out in the order in which ids first appear."""

    def __missing__(self, key: Id) -> int:
        code = self[key] = len(self)
        return code

    def encode(self, ids: Sequence[Id]) -> Codes32:
        """Codes of ids."""
        return np.fromiter(map(self.__getitem__, ids), dtype=np.int32, count=len(ids))


class Rows:
    """Rows whose ids are coded, chunk by chunk."""

    def __init__(self) -> None:
        self._users, self._items, self._times = list[Codes32](), list[Codes32](), list[TimeChunk]()

    def add(self, users: Codes32, items: Codes32, times: TimeChunk) -> None:
        """Add a chunk's rows, columns of one length."""
        self._users.append(users)
        self._items.append(items)
        self._times.append(times)

    def interactions(self, name: str, user_ids: tuple[Id, ...], item_ids: tuple[Id, ...]) -> Interactions:
        """All rows, which are gone here; DataError, with the source's name, if times would be rounded."""
        users, items = _joined(self._users), _joined(self._items)
        whole = all(chunk.dtype == np.int64 for chunk in self._times)
        times: TimeArray = _joined(self._times) if whole else join_times(name, self._times)
        return Interactions(users, items, times, user_ids, item_ids)


def _joined(chunks: list[Any]) -> IntArray:
    """One array of int64 of chunks of whole numbers, each of which is gone when it is copied."""
    whole, place = np.empty(sum(map(len, chunks)), dtype=np.int64), 0
    chunks.reverse()
    while chunks:
        chunk = chunks.pop()
        whole[place : place + len(chunk)] = chunk
        place += len(chunk)
    return whole


class Problems:
    """What is wrong with a source: the first bad row, where the next ones are, and how many. No more is kept.

    Args:
        name: of the source.
        place: what its places are called, ``"line"`` or ``"row"``.
        skip: the most bad rows to leave out.
        locate: what the first bad row is called, by its number; None: by name, place and number.
    """

    def __init__(self, name: str | Path, place: str, skip: int = 0, locate: Callable[[int], str] | None = None) -> None:
        self._place, self._skip = place, skip
        self._locate = locate or (lambda number: f"{name} {place} {number}")
        self._first, self._count = list[tuple[int, str]](), 0

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """Bad rows, the number of each and what is wrong with it."""
        for problem in found:
            self._count += 1
            if len(self._first) < _NAMED:
                self._first.append(problem)

    def report(self, good: int) -> None:
        """Raise DataError if there are more than may be left out; otherwise say which were.

        Args:
            good: how many rows are not bad; without one, leaving the bad ones out is no help.
        """
        if not self._count:
            return
        (number, what), place = self._first[0], self._place
        where = ", ".join(str(number) for number, _ in self._first) + (", ..." if self._count > _NAMED else "")
        count = f"the first of {self._count} bad {place}s: {where}" if self._count > 1 else f"the only bad {place}"
        message = f"{self._locate(number)}: {what} ({count})"
        if self._count > self._skip:
            if not good:
                raise DataError(f"{message}; no row can be understood")
            advice = "" if self._skip else f"; to leave them out: skip_bad_rows={self._count} (--skip-bad-rows)"
            raise DataError(message + (advice or f"; at most {self._skip} may be left out"))
        print(printable(f"left out {self._count} of the rows: {message}"), file=sys.stderr)
