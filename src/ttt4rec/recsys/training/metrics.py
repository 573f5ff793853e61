"""Averages made of ranks over the whole catalogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt4rec.recsys.training import parallel


class RankingMetrics:
    """Averages over all targets of hits, discounted gains and reciprocal ranks.

    For a target of rank r and a cutoff k: HR@k counts 1, NDCG@k counts 1 / log2(1 + r), MRR@k counts 1 / r,
    and all of them 0 when r > k. MRR has no cutoff. Every target weighs the same; sums are float64.

    Attributes:
        names: of the M metrics.
    """

    def __init__(self, cutoffs: Sequence[int] = (10, 50)) -> None:
        if not cutoffs or any(cutoff < 1 for cutoff in cutoffs):
            raise ValueError(f"cutoffs must be one or more of at least 1; given {tuple(cutoffs)}")
        self.names = [f"{name}@{k}" for k in cutoffs for name in ("HR", "NDCG", "MRR")] + ["MRR"]
        self._cutoffs = tuple(cutoffs)
        self._sums = torch.zeros(len(self.names), dtype=torch.float64)
        self._count = 0

    def update(self, ranks: Tensor) -> None:
        """Add the targets with these ranks, [N] real numbers >= 1; ValueError when one is below 1 or NaN."""
        self._sums += self.gains(ranks).sum(dim=0)
        self._count += ranks.numel()

    def gains(self, ranks: Tensor) -> Tensor:
        """What each of the targets with these ranks counts, by metric, float64 [N, M]; ValueError as for ``update``."""
        ranks = ranks.detach().double()
        if not bool((ranks >= 1).all()):
            raise ValueError("ranks must be at least 1; given smaller ones or NaN")
        gains = torch.stack([torch.ones_like(ranks), 1 / torch.log2(1 + ranks), 1 / ranks], dim=1)
        return torch.cat([*(gains * (ranks <= k)[:, None] for k in self._cutoffs), gains[:, 2:]], dim=1).cpu()

    def add_up(self) -> None:
        """Add the targets that other processes have ranked; all of them call it."""
        totals = parallel.add_up(torch.cat((self._sums, torch.tensor([self._count], dtype=torch.float64))))
        self._sums, self._count = totals[:-1], int(totals[-1])

    def compute(self) -> dict[str, float]:
        """HR@k, NDCG@k and MRR@k for every cutoff, then MRR, by name; ValueError without targets."""
        if not self._count:
            raise ValueError("targets must be at least one before compute(); given none")
        return dict(zip(self.names, (self._sums / self._count).tolist(), strict=True))
