"""Metrics apart for kinds of targets: by the length of the history, the popularity of the item, and new users."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.recsys.data.interactions import IntArray
from ttt4rec.recsys.data.split import Part, Split
from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.training.evaluate import ranked_targets
from ttt4rec.recsys.training.intervals import Estimate, estimates
from ttt4rec.recsys.training.metrics import RankingMetrics

_LENGTHS = (5, 10, 20, 50, 100)
"""The longest histories of the segments, except the last one, which has no bound."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What is ranked: N targets of a part.

    Attributes:
        users: int64 [N], codes of users.
        positions: int64 [N], how many items the user had before.
        items: int64 [N], item codes.
    """

    users: IntArray
    positions: IntArray
    items: IntArray


Segmentation: TypeAlias = Callable[[Split, Targets], tuple[Sequence[str], IntArray]]
"""Names of segments, in the order of a table, and int64 [N], the number of each target's segment."""


@dataclass(frozen=True)
class Segment:
    """A row of the table.

    Attributes:
        by: name of the segmentation.
        name: of the segment.
        targets: how many it has.
        users: how many they are of.
        metrics: HR, NDCG and MRR by name, as of ``evaluate``.
    """

    by: str
    name: str
    targets: int
    users: int
    metrics: dict[str, Estimate]


def by_history(split: Split, targets: Targets) -> tuple[Sequence[str], IntArray]:
    """How many items the user had before the target."""
    firsts = [1, *(bound + 1 for bound in _LENGTHS)]
    names = [f"{first} to {last}" for first, last in zip(firsts, _LENGTHS, strict=False)] + [f"above {_LENGTHS[-1]}"]
    return names, np.searchsorted(_LENGTHS, targets.positions)


def by_popularity(split: Split, targets: Targets) -> tuple[Sequence[str], IntArray]:
    """Head, middle and tail: items with most interactions in training, a third of all of these in each.

    Items with equally many are in one segment. Those that training does not have are apart.
    """
    counts = split.train_counts()
    descending = np.sort(counts)[::-1]
    before = np.concatenate([[0], np.cumsum(descending)])  # interactions with more popular items, by their number
    more_popular = np.searchsorted(-descending, -counts, side="left")
    thirds = np.minimum(2, 3 * before[more_popular] // max(1, before[-1]))
    segment = np.where(counts > 0, thirds, 3)
    return ("head", "middle", "tail", "not in training"), segment[targets.items - 1]


def by_users(split: Split, targets: Targets) -> tuple[Sequence[str], IntArray]:
    """Users of training, and those who have nothing in it."""
    return ("known", "new"), (split.train_begin == split.train_end).astype(np.int64)[targets.users]


SEGMENTATIONS: dict[str, Segmentation] = {"history": by_history, "popularity": by_popularity, "users": by_users}
"""By the names that the command line takes."""


def evaluate_segments(
    model: TTT4Rec,
    split: Split,
    part: Part = "test",
    *,
    by: Mapping[str, Segmentation] = SEGMENTATIONS,
    cutoffs: Sequence[int] = (10, 50),
    exclude_seen: bool = False,
    samples: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> list[Segment]:
    """The metrics of ``evaluate``, apart for each segment that has targets.

    Args:
        model: put into evaluation mode, and back if it was training.
        split: histories and their parts.
        part: whose targets to rank, each from the at most ``max_len`` items before it.
        by: how targets are told apart, by name.
        cutoffs: the k.
        exclude_seen: rank only targets new to the user, among items new to the user.
        samples: resamples of users for intervals; 0: none.
        seed: of the resamples.
        progress: show a progress bar.

    Raises:
        ValueError: there is no target, a score is NaN, or a segmentation does not give each target one of its segments.
    """
    windows = evaluation_prefixes(split, part, max_len=model.config.max_len)
    found = list(ranked_targets(model, windows, exclude_seen, progress))
    if not sum(len(ranks) for ranks, _ in found):
        raise ValueError("targets must be at least one; given none")
    metrics = RankingMetrics(cutoffs)
    gains = torch.cat([metrics.gains(ranks) for ranks, _ in found]).numpy()
    places = torch.cat([places for _, places in found]).numpy()
    histories = split.histories
    users = np.searchsorted(histories.offsets, places, side="right") - 1
    targets = Targets(users, places - histories.offsets[users], histories.items[places])
    rows = []
    for name, segmentation in by.items():
        segments, number = segmentation(split, targets)
        number = np.asarray(number)
        if number.shape != users.shape or number.min() < 0 or number.max() >= len(segments):
            raise ValueError(f"{name} must give each of {len(users)} targets a number below {len(segments)}")
        for place, segment in enumerate(segments):
            own = np.flatnonzero(number == place)
            if not len(own):
                continue
            different, of_user = np.unique(users[own], return_inverse=True)
            sums = np.zeros((len(different), gains.shape[1]))
            np.add.at(sums, of_user, gains[own])
            weights = np.broadcast_to(np.bincount(of_user).astype(np.float64)[:, None], sums.shape)
            values = estimates(metrics.names, sums, weights, samples, seed)
            rows.append(Segment(name, segment, len(own), len(different), values))
    return rows
