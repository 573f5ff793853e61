"""Histories split into training, validation and test targets, by each user's order or by one clock for all.

No target is ever predicted from an interaction at or after it. What else a split lets training see differs:

- by ratio and leave-one-out, as in most published work, users are cut at different times. One user's training part may
  be later than another's test part, and the filter and the mapping of items come from the whole data.
- by time, all users are cut at the same moments. The filter, the mapping of items and every count come from the
  training part alone; an item first seen later has no code, and is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np

from ttt4rec.recsys.data.ids import Id
from ttt4rec.recsys.data.interactions import Histories, IntArray, Interactions, build_histories, k_core_rows
from ttt4rec.recsys.data.text import DataError

Part: TypeAlias = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, eq=False)
class Split:
    """Which part every target belongs to.

    History position p belongs to training if train_begin <= p < train_end, to validation if train_end <= p < valid_end,
    and to the test from there on. Each is a target but position 0, which has no prefix to be predicted from. Positions
    before train_begin are only there for later ones to be predicted from.

    Attributes:
        histories: the histories that are split.
        train_begin: int64 [num_users], at least 0.
        train_end: int64 [num_users], at least train_begin.
        valid_end: int64 [num_users], at least train_end.
    """

    histories: Histories
    train_begin: IntArray
    train_end: IntArray
    valid_end: IntArray

    def __repr__(self) -> str:
        targets = " / ".join(f"{self.num_targets(part):,}" for part in PARTS)
        return f"Split({targets} {' / '.join(PARTS)} targets of {self.histories!r})"

    def bounds(self, part: Part) -> tuple[IntArray, IntArray]:
        """First target position and the one after the last, int64 [num_users] each; ValueError if unknown."""
        if part in PARTS:
            last = np.maximum(np.diff(self.histories.offsets), self.valid_end)
            edges = np.maximum(1, np.stack([self.train_begin, self.train_end, self.valid_end, last]))
            return edges[PARTS.index(part)], edges[PARTS.index(part) + 1]
        raise ValueError(f"part must be one of 'train', 'valid' and 'test'; given {part!r}")

    def num_targets(self, part: Part) -> int:
        """Number of targets of one part, all users together."""
        first, end = self.bounds(part)
        return int((end - first).sum())

    def num_new_targets(self, part: Part) -> int:
        """Number of targets of one part that are not in their user's history before."""
        places, offsets = self.histories.first_places(), self.histories.offsets
        users = np.searchsorted(offsets, places, side="right") - 1
        first, end = (edge[users] for edge in self.bounds(part))
        position = places - offsets[users]
        return int(((position >= first) & (position < end)).sum())

    def train_counts(self) -> IntArray:
        """How often each item occurs in the training part, int64 [num_items]; item code j + 1 at j."""
        histories, lengths = self.histories, np.diff(self.histories.offsets)
        position = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], lengths)
        inside = (position >= np.repeat(self.train_begin, lengths)) & (position < np.repeat(self.train_end, lengths))
        return np.bincount(histories.items[inside] - 1, minlength=histories.num_items)


def split_by_ratio(histories: Histories, ratios: tuple[int, int, int] = (3, 2, 5)) -> Split:
    """Split every user's targets in time order by whole-number ratios of train, valid and test.

    Of t targets, valid gets floor(t * valid / total), test floor(t * test / total) and train the rest. A part
    with a ratio above 0 that would be empty takes one target from training while training has more than one,
    test before valid.

    Raises:
        ValueError: the ratios are not three whole numbers, train at least 1 and the others at least 0.
    """
    _check_ratios(ratios)
    targets = np.maximum(np.diff(histories.offsets) - 1, 0)
    valid = targets * ratios[1] // sum(ratios)
    test = targets * ratios[2] // sum(ratios)
    for count, ratio in ((test, ratios[2]), (valid, ratios[1])):
        if ratio:
            count += (count == 0) & (targets - valid - test > 1)
    train_end = 1 + targets - valid - test
    return Split(histories, np.zeros_like(train_end), train_end, train_end + valid)


def split_leave_one_out(histories: Histories) -> Split:
    """Every user's last target for the test, the one before for validation; training keeps at least one.

    A user with two targets has none for validation, one with a single target none for the test either.
    """
    targets = np.maximum(np.diff(histories.offsets) - 1, 0)
    test, valid = (targets > 1).astype(np.int64), (targets > 2).astype(np.int64)
    train_end = 1 + targets - valid - test
    return Split(histories, np.zeros_like(train_end), train_end, train_end + valid)


def split_by_time(
    interactions: Interactions, ratios: tuple[int, int, int] = (8, 1, 1), *, min_user: int = 1, min_item: int = 1
) -> tuple[Split, tuple[float, float]]:
    """Cut all users at the same two moments; nothing that training uses depends on what comes after the first.

    The moments are the times of the interactions at the ratios' shares of all, in time order; an interaction at one
    of them comes after the cut. The training part is filtered to a k-core, whose items are the catalogue. Every
    other interaction with these items is kept too, whoever the user is: those before the cut as history alone,
    which later ones are predicted from but training does not learn from or count. Users outside the core come after
    those in it.

    Args:
        interactions: unfiltered.
        ratios: shares of train, valid and test among all interactions.
        min_user: users with fewer interactions in the training part are no part of it.
        min_item: drop items with fewer interactions in the training part.

    Returns:
        The split, and the times at which validation and test begin; infinity for what is nobody's.

    Raises:
        ValueError: bad ratios, or (DataError) no training interaction is left.
    """
    _check_ratios(ratios)
    clock = np.sort(interactions.times)
    valid_from, test_from = (
        clock[place].item() if (place := len(clock) * share // sum(ratios)) < len(clock) else math.inf
        for share in (ratios[0], sum(ratios[:2]))
    )
    is_early = interactions.times < valid_from
    early = np.flatnonzero(is_early)
    core = early[
        k_core_rows(interactions.users[early], interactions.items[early], min_user=min_user, min_item=min_item)
    ]
    if not len(core):
        raise DataError(
            f"there must be interactions before time {valid_from} with users of >= {min_user} and items of >= "
            f"{min_item} interactions among themselves; given none"
        )
    known = np.zeros(len(interactions.item_ids), dtype=bool)
    known[interactions.items[core]] = True
    is_other = known[interactions.items]
    is_other[core] = False
    others = [np.flatnonzero(is_other & is_early), np.flatnonzero(is_other & ~is_early)]
    rows = np.concatenate([core, *others])  # in this order, so that no code depends on what comes after the cut
    users, user_ids = _by_first_appearance(interactions.users[rows], interactions.user_ids)
    items, item_ids = _by_first_appearance(interactions.items[rows], interactions.item_ids)
    histories = build_histories(Interactions(users, items, interactions.times[rows], user_ids, item_ids))
    split = split_at(histories, valid_from, test_from)
    in_core = np.arange(histories.num_users) <= users[: len(core)].max()  # all of a user's interactions before the cut
    return replace(split, train_begin=np.where(in_core, 0, split.train_end)), (valid_from, test_from)


def split_at(histories: Histories, valid_from: float, test_from: float) -> Split:
    """Split where time reaches ``valid_from``, then ``test_from``; all that is earlier belongs to training."""
    ends = [np.r_[0, np.cumsum(histories.times < cut)][histories.offsets] for cut in (valid_from, test_from)]
    train_end = np.diff(ends[0])
    return Split(histories, np.zeros_like(train_end), train_end, np.diff(ends[1]))


def _by_first_appearance(codes: IntArray, ids: tuple[Id, ...]) -> tuple[IntArray, tuple[Id, ...]]:
    """Codes given out again in the order in which they come, and the ids of these."""
    old, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    new = np.empty_like(order)
    new[order] = np.arange(len(order))
    return new[inverse], tuple(ids[code] for code in old[order])


def _check_ratios(ratios: tuple[int, int, int]) -> None:
    whole = len(ratios) == 3 and all(isinstance(ratio, int) for ratio in ratios)
    if not whole or ratios[0] < 1 or min(ratios) < 0:
        raise ValueError(f"ratios must be three whole numbers, train >= 1, valid and test >= 0; given {ratios}")
