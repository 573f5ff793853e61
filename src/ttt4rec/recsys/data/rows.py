"""What the readers of rows share: codes for ids, and what to say of bad rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ttt4rec.recsys.data.interactions import IntArray
from ttt4rec.recsys.data.text import DataError

_NAMED = 5  # bad rows in an error message


class Codes(dict[str, int]):
    """Codes 0, 1, 2, ... given out in the order in which ids first appear."""

    def __missing__(self, key: str) -> int:
        code = self[key] = len(self)
        return code

    def encode(self, ids: Sequence[str]) -> IntArray:
        """Codes of ids, int64."""
        return np.fromiter(map(self.__getitem__, ids), dtype=np.int64, count=len(ids))


class Problems:
    """What is wrong with a file: the first bad row, where the next ones are, and how many. No more is kept.

    Args:
        path: the file.
        place: what its places are called, ``"line"`` or ``"row"``.
    """

    def __init__(self, path: Path, place: str) -> None:
        self._path, self._place = path, place
        self._first, self._count = list[tuple[int, str]](), 0

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """Bad rows, the number of each and what is wrong with it."""
        for problem in found:
            self._count += 1
            if len(self._first) < _NAMED:
                self._first.append(problem)

    def report(self) -> None:
        """Raise DataError if there are any."""
        if not self._count:
            return
        (number, what), place = self._first[0], self._place
        where = ", ".join(str(number) for number, _ in self._first) + (", ..." if self._count > _NAMED else "")
        count = f"the first of {self._count} bad {place}s: {where}" if self._count > 1 else f"the only bad {place}"
        raise DataError(f"{self._path} {place} {number}: {what} ({count})")
