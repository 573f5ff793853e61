"""Seen items: codes of what is in users' histories, kept with their states, so that nobody reads the log for them."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ttt4rec.recsys.data import IntArray

PART_OF_POOL = 8
"""All codes together take at most this part of the bytes that the states have."""


class SeenItems:
    """Codes of the histories of some users, as far as their states have read them; 0 where the model knows no item.

    Args:
        most_bytes: of all codes together. Beyond, the codes of users asked for least recently go, and their histories
            are read from the log when they are wanted again.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes // array("i").itemsize
        self._codes: OrderedDict[str, array[int]] = OrderedDict()  # the least recently used first
        self._number = 0

    @property
    def num_bytes(self) -> int:
        """Of all codes that are kept."""
        return self._number * array("i").itemsize

    def of(self, user: str) -> IntArray | None:
        """Codes of the items that the model knows, copied; None if they are not kept."""
        codes = self._codes.get(user)
        if codes is None:
            return None
        self._codes.move_to_end(user)
        found = np.array(codes, dtype=np.int64)
        return found[found > 0]

    def read_on(self, user: str, start: int, codes: Sequence[int]) -> None:
        """A state has read ``codes`` after ``start`` items. What was kept of another number is no beginning."""
        if start != len(self._codes.get(user, ())):
            self.drop(user)
            return
        self._codes.setdefault(user, array("i")).extend(codes)
        self._codes.move_to_end(user)
        self._number += len(codes)
        while self._number > self._most:
            self.drop(next(iter(self._codes)))

    def go_back(self, user: str, length: int) -> None:
        """A state has read ``length`` items only."""
        if user in self._codes:
            self._number -= len(self._codes[user]) - length
            del self._codes[user][length:]

    def drop(self, user: str) -> None:
        """Forget a user's."""
        self._number -= len(self._codes.pop(user, ()))
