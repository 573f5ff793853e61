"""Metrics of lists: one list a user, made from what was before a part, against all that the part holds of the user.

The paper's protocol, ``evaluate``, ranks every single target. Here users weigh the same, however much the part has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ttt4rec.checks import check_integer
from ttt4rec.recsys.data import IntArray
from ttt4rec.recsys.data.split import Part, Split
from ttt4rec.recsys.recommend import Recommender
from ttt4rec.recsys.recommend.candidates import Wanted
from ttt4rec.recsys.recommend.histories import History
from ttt4rec.recsys.training.intervals import Estimate, estimates
from ttt4rec.recsys.training.progress import progress_bar

_USERS_AT_ONCE = 512


def evaluate_lists(
    recommender: Recommender,
    split: Split,
    part: Part = "test",
    *,
    cutoffs: Sequence[int] = (10,),
    exclude_seen: bool = True,
    samples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Estimate]:
    """Metrics of the k best items for every user who has items in a part.

    A user's list is made from the history before the part; relevant are the part's different items, without the
    history's if seen items are left out. A user without a relevant item is passed over. For each cutoff k:

    - ``precision@k``: the share of k that is relevant; ``recall@k``: the share of the relevant that is in the list;
      ``HR@k``: whether any is; ``MAP@k``: the precisions at the places of relevant items, summed, by the number of
      relevant items; ``NDCG@k``: gains of 1 / log2(1 + rank), by the gains of the best list there could be;
    - ``novelty@k``: mean of -log2 of the share of users who have an item in training (a single one, where nobody has);
      ``popularity@k``: mean of the interactions that an item has in training;
    - ``diversity@k``: mean of 1 - cosine of the embeddings of two items of a list, by this model's own table;
    - ``coverage@k``: the share of the catalogue that is in any list; no interval, as a resample has fewer users.

    Args:
        recommender: the model, with the split's histories.
        split: which of them is the part.
        part: whose items to find.
        cutoffs: the k.
        exclude_seen: leave out the items of the history.
        samples: resamples of the bootstrap; 0: no intervals.
        seed: of the bootstrap.
        progress: show a progress bar.

    Raises:
        ValueError: no user has a relevant item, a cutoff or samples is out of range, or a score is NaN.
    """
    if not cutoffs or min(cutoffs) < 1:
        raise ValueError(f"cutoffs must be one or more of at least 1; given {tuple(cutoffs)}")
    check_integer("samples", samples, least=0)
    of_user = _Measures(recommender, split, cutoffs)
    wanted = Wanted(k=max(cutoffs), exclude_seen=exclude_seen)
    users = np.flatnonzero(np.subtract(*split.bounds(part)[::-1]) > 0)
    with progress_bar(total=len(users), unit="user", desc="lists", enabled=progress) as bar:
        for start in range(0, len(users), _USERS_AT_ONCE):
            asked = list(_asked(split, part, users[start : start + _USERS_AT_ONCE], exclude_seen))
            lists = recommender.best_codes([history for history, _ in asked], wanted)
            for (items, _), (_, relevant) in zip(lists, asked, strict=True):
                of_user.add(items, relevant)
            bar.update(min(_USERS_AT_ONCE, len(users) - start))
    return of_user.compute(samples, seed)


def _asked(split: Split, part: Part, users: IntArray, exclude_seen: bool) -> Iterator[tuple[History, IntArray]]:
    """The history before a part, asked for when that begins, and the relevant items, of users who have some."""
    first, end = split.bounds(part)
    begins, times = split.histories.offsets, split.histories.times
    for user in users.tolist():
        history = split.histories.history(user)
        before, relevant = history[: first[user]], np.unique(history[first[user] : end[user]])
        if exclude_seen:
            relevant = np.setdiff1d(relevant, before)
        if len(relevant):
            begin, cut = begins[user], begins[user] + first[user]
            yield History(before, times[begin:cut], times[cut].item()), relevant


class _Measures:
    """What is measured of each list, and the averages."""

    def __init__(self, recommender: Recommender, split: Split, cutoffs: Sequence[int]) -> None:
        self._cutoffs = tuple(cutoffs)
        self._counts = np.concatenate([[0], split.train_counts()])
        users, everyone = _users_in_training(split)
        self._novelty = -np.log2(np.maximum(users, 1) / max(1, everyone))
        table = recommender.model.served_items().detach().float()
        self._directions = torch.nn.functional.normalize(table, dim=1).cpu().numpy()
        self._rows: list[list[float]] = []
        self._covered = np.zeros((len(self._cutoffs), split.histories.num_items + 1), dtype=bool)

    def add(self, items: IntArray, relevant: IntArray) -> None:
        """Measure a list."""
        hit = np.isin(items, relevant)
        row: list[float] = []
        for covered, k in zip(self._covered, self._cutoffs, strict=True):
            row += _accuracy(hit[:k], k, len(relevant))
            row += self._others(items[:k])
            covered[items[:k]] = True
        self._rows.append(row)

    def _others(self, items: IntArray) -> list[float]:
        if not len(items):
            return [np.nan] * 3
        likeness = self._directions[items] @ self._directions[items].T
        pairs = len(items) * (len(items) - 1)
        diversity = 1 - (likeness.sum() - np.trace(likeness)) / pairs if pairs else np.nan
        return [float(self._novelty[items].mean()), float(self._counts[items].mean()), float(diversity)]

    def compute(self, samples: int, seed: int) -> dict[str, Estimate]:
        """All metrics by name; ValueError if there was no list."""
        if not self._rows:
            raise ValueError("users must be at least one with a relevant item; given none")
        names = [
            f"{name}@{k}"
            for k in self._cutoffs
            for name in ("precision", "recall", "HR", "MAP", "NDCG", "novelty", "popularity", "diversity")
        ]
        rows = np.array(self._rows)
        there = ~np.isnan(rows)
        values, weights = np.where(there, rows, 0.0), there.astype(np.float64)
        found = estimates(names, values, weights, samples, seed)
        for covered, k in zip(self._covered, self._cutoffs, strict=True):
            found[f"coverage@{k}"] = Estimate(float(covered[1:].mean()), None, None)
        return found


def _accuracy(hit: NDArray[np.bool_], k: int, relevant: int) -> list[float]:
    """Precision, recall, hit rate, average precision and discounted gain of a list."""
    places = np.flatnonzero(hit) + 1
    gains = 1 / np.log2(1 + np.arange(1, k + 1))
    precisions = np.arange(1, len(places) + 1) / places
    return [
        len(places) / k,
        len(places) / relevant,
        float(len(places) > 0),
        float(precisions.sum()) / relevant,
        float(gains[places - 1].sum() / gains[:relevant].sum()),
    ]


def _users_in_training(split: Split) -> tuple[IntArray, int]:
    """How many users have each item in training, int64 [num_items + 1], and how many have any."""
    histories, lengths = split.histories, np.diff(split.histories.offsets)
    users = np.repeat(np.arange(histories.num_users), lengths)
    position = np.arange(len(users)) - histories.offsets[users]
    inside = (position >= split.train_begin[users]) & (position < split.train_end[users])
    pairs = np.unique(users[inside] * (histories.num_items + 1) + histories.items[inside])
    counts = np.bincount(pairs % (histories.num_items + 1), minlength=histories.num_items + 1)
    return counts, len(np.unique(users[inside]))
