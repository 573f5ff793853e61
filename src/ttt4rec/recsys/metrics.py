"""Ranks over the whole catalogue and the averages made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt4rec.recsys import parallel


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Rank of every row's target among all columns, 1 being the best.

    rank = 1 + #(columns scored higher) + #(other columns scored the same) / 2, so that a scorer which gives
    every item the same score ranks each target in the middle instead of first.

    Args:
        scores: [N, I], any real dtype, larger is better.
        targets: int64 [N], column of the target in each row.

    Returns:
        float64 [N].

    Raises:
        ValueError: the shapes do not fit, a target is no column, or a score is NaN.
    """
    if scores.dim() != 2 or targets.shape != scores.shape[:1]:
        shapes = f"{list(scores.shape)} and {list(targets.shape)}"
        raise ValueError(f"expected scores [N, I] and targets [N], got {shapes}")
    if targets.numel() == 0:
        return torch.zeros(0, dtype=torch.float64, device=scores.device)
    lowest, highest = int(targets.min()), int(targets.max())
    if lowest < 0 or highest >= scores.shape[1]:
        raise ValueError(f"expected targets from 0 to {scores.shape[1] - 1}, got {lowest} to {highest}")
    if scores.amax().isnan():  # a maximum over any NaN is NaN
        raise ValueError("expected scores that are numbers, got NaN among them")
    target_scores = scores.gather(1, targets.unsqueeze(1))
    higher = (scores > target_scores).sum(dim=1)
    equal_others = (scores == target_scores).sum(dim=1) - 1
    return 1 + higher.double() + equal_others.double() / 2


class RankingMetrics:
    """Averages over all targets of hits, discounted gains and reciprocal ranks.

    For a target of rank r and a cutoff k: HR@k counts 1, NDCG@k counts 1 / log2(1 + r), MRR@k counts 1 / r,
    and all of them 0 when r > k. MRR has no cutoff. Every target weighs the same; sums are float64.
    """

    def __init__(self, cutoffs: Sequence[int] = (10, 50)) -> None:
        if not cutoffs or any(cutoff < 1 for cutoff in cutoffs):
            raise ValueError(f"expected one or more cutoffs of at least 1, got {tuple(cutoffs)}")
        self._names = [f"{name}@{k}" for k in cutoffs for name in ("HR", "NDCG", "MRR")] + ["MRR"]
        self._cutoffs = tuple(cutoffs)
        self._sums = torch.zeros(len(self._names), dtype=torch.float64)
        self._count = 0

    def update(self, ranks: Tensor) -> None:
        """Add the targets with these ranks, [N] real numbers >= 1; ValueError when one is below 1 or NaN."""
        ranks = ranks.detach().double()
        if not bool((ranks >= 1).all()):
            raise ValueError("expected ranks of at least 1, got smaller ones or NaN")
        gains = torch.stack([torch.ones_like(ranks), 1 / torch.log2(1 + ranks), 1 / ranks])
        cut = [(gains * (ranks <= k)).sum(dim=1) for k in self._cutoffs]
        self._sums += torch.cat([*cut, gains[2].sum().unsqueeze(0)]).cpu()
        self._count += ranks.numel()

    def add_up(self) -> None:
        """Add the targets that other processes have ranked; all of them call it."""
        totals = parallel.add_up(torch.cat((self._sums, torch.tensor([self._count], dtype=torch.float64))))
        self._sums, self._count = totals[:-1], int(totals[-1])

    def compute(self) -> dict[str, float]:
        """HR@k, NDCG@k and MRR@k for every cutoff, then MRR, by name; ValueError without targets."""
        if not self._count:
            raise ValueError("expected at least one target before compute(), got none")
        return dict(zip(self._names, (self._sums / self._count).tolist(), strict=True))
