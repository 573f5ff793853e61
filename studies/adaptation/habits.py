"""Users with habits of their own, made up: what comes after an item is learned from the user's history alone."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys.data.split import Split
from ttt4rec.recsys.training.train import TrainOptions, fit

from .switches import discounted, made_up_split

MIXERS: Mapping[str, Mapping[str, Any]] = {
    "TTT-Linear": {"inner": "linear"},
    "TTT-MLP": {"inner": "mlp"},
    "attention": {"mixer": "attention"},
    "GRU": {"mixer": "gru"},
    "Mamba": {"mixer": "mamba"},
}
SHAPE: Mapping[str, Any] = {"num_blocks": 2, "block_conv": True, "dropout": 0.1}
"""Two blocks with a convolution before each: what came after an item can be seen only by who sees two at once."""
OPTIONS: Mapping[str, Any] = {
    "epochs": 40, "patience": 5, "learning_rate": 3e-3, "learning_rate_warmup": 50, "average_over": 0.1
}  # fmt: skip
PLACES = (1, 20, 50, 100, 200, 500, 1000, 2000)
"""Bounds of the kinds of events: so many are known before the first of a kind."""


@dataclass(frozen=True)
class Habits:
    """How users are made up.

    Each user has a successor for each item, drawn uniformly and independently. An event is the successor of the one
    before it with probability ``share``, else any item. Nothing is common to two users, so a model must remember the
    history: which of the items came after the last one before. Ranking by how often each did is the best there is.
    """

    items: int = 128
    share: float = 0.85
    length: int = 500

    def streams(self, count: int, length: int, seed: int) -> np.ndarray:
        """Item codes, int64 [count, length] from 1 on."""
        rng = np.random.default_rng([self.items, seed])
        successors = rng.integers(1, self.items + 1, (count, self.items + 1))
        follows = rng.random((count, length)) < self.share
        taken = rng.integers(1, self.items + 1, (count, length))
        users = np.arange(count)
        for place in range(1, length):
            habit = successors[users, taken[:, place - 1]]
            taken[:, place] = np.where(follows[:, place], habit, taken[:, place])
        return taken

    def split(self, count: int, seed: int) -> Split:
        """Users to train on: a tenth of their events for validation."""
        return made_up_split(self.streams(count, self.length, seed), self.items, (9, 1, 0))

    def best(self, taken: np.ndarray) -> Tensor:
        """NDCG@10 of every item but the first of streams ``[N, L]``, [L - 1], of who counts successors; ties half."""
        users = np.arange(len(taken))
        counts = np.zeros((len(taken), self.items + 1, self.items + 1), dtype=np.int32)
        ranks = np.empty((len(taken), taken.shape[1] - 1))
        for place in range(1, taken.shape[1]):
            before, now = taken[:, place - 1], taken[:, place]
            known = counts[users, before][:, 1:]
            own = counts[users, before, now][:, None]
            ranks[:, place - 1] = 1 + (known > own).sum(1) + ((known == own).sum(1) - 1) / 2
            counts[users, before, now] += 1
        return discounted(torch.from_numpy(ranks)).mean(0)


def trained(mixer: str, split: Split, folder: Path, seed: int, length: int) -> TTT4Rec:
    """A model trained on a split, the same way for every mixer; one that lies in the folder is not trained again."""
    torch.manual_seed(seed)
    model = TTT4Rec(TTT4RecConfig(num_items=split.histories.num_items, max_len=length, **SHAPE, **MIXERS[mixer]))
    fit(model, split, folder, TrainOptions(seed=seed, **OPTIONS))
    return model.eval()


def by_place(gained: Tensor) -> list[float]:
    """Means of the gains ``[L - 1]`` of every event but the first, for each kind of events."""
    return [float(gained[first - 1 : end - 1].mean()) for first, end in itertools.pairwise(PLACES)]
