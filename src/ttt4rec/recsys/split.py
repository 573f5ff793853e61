"""Histories split in time order into training, validation and test targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ttt4rec.recsys.data import Histories, IntArray

Part: TypeAlias = Literal["train", "valid", "test"]


@dataclass(frozen=True, eq=False)
class Split:
    """Which part every target belongs to.

    The targets of a user with n interactions are the history positions 1..n-1 (the first interaction has no
    prefix to be predicted from). Position p is a training target if p < train_end, a validation target if
    train_end <= p < valid_end, and a test target from there on.

    Attributes:
        histories: the histories that are split.
        train_end: int64 [num_users].
        valid_end: int64 [num_users].
    """

    histories: Histories
    train_end: IntArray
    valid_end: IntArray

    def bounds(self, part: Part) -> tuple[IntArray, IntArray]:
        """First target position and the one after the last, int64 [num_users] each; ValueError if unknown."""
        if part == "train":
            return np.ones_like(self.train_end), self.train_end
        if part == "valid":
            return self.train_end, self.valid_end
        if part == "test":
            return self.valid_end, np.maximum(np.diff(self.histories.offsets), self.valid_end)
        raise ValueError(f"expected a part out of 'train', 'valid' and 'test', got {part!r}")

    def num_targets(self, part: Part) -> int:
        """Number of targets of one part, all users together."""
        first, end = self.bounds(part)
        return int((end - first).sum())

    def train_counts(self) -> IntArray:
        """How often each item occurs in the training part, int64 [num_items]; item code j + 1 at j."""
        histories = self.histories
        position = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], np.diff(histories.offsets))
        inside = position < np.repeat(self.train_end, np.diff(histories.offsets))
        return np.bincount(histories.items[inside] - 1, minlength=histories.num_items)


def split_by_ratio(histories: Histories, ratios: tuple[int, int, int] = (3, 2, 5)) -> Split:
    """Split every user's targets in time order by whole-number ratios of train, valid and test.

    Of t targets, valid gets floor(t * valid / total), test floor(t * test / total) and train the rest. A part
    with a ratio above 0 that would be empty takes one target from training while training has more than one,
    test before valid.

    Raises:
        ValueError: the ratios are not three whole numbers, train at least 1 and the others at least 0.
    """
    whole = len(ratios) == 3 and all(isinstance(ratio, int) for ratio in ratios)
    if not whole or ratios[0] < 1 or min(ratios) < 0:
        raise ValueError(f"expected three whole-number ratios, train >= 1, valid and test >= 0, got {ratios}")
    targets = np.maximum(np.diff(histories.offsets) - 1, 0)
    valid = targets * ratios[1] // sum(ratios)
    test = targets * ratios[2] // sum(ratios)
    for count, ratio in ((test, ratios[2]), (valid, ratios[1])):
        if ratio:
            count += (count == 0) & (targets - valid - test > 1)
    train_end = 1 + targets - valid - test
    return Split(histories, train_end, train_end + valid)
