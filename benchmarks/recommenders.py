"""Contests of whole recommenders: a training step and the ranking of the whole catalogue."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.models.mixers import MIXERS
from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.data.split import split_by_ratio
from ttt4rec.recsys.data.windows import batches, evaluation_prefixes, training_windows
from ttt4rec.recsys.training.evaluate import evaluate
from ttt4rec.recsys.training.train import TrainOptions

from .measure import Call

MODELS: dict[str, dict[str, Any]] = {
    "TTT4Rec, TTT-MLP": {"inner": "mlp"},
    "TTT4Rec, TTT-Linear": {"inner": "linear"},
    **{f"{MIXERS[name].kind} ({MIXERS[name].published})": {"mixer": name} for name in ("attention", "gru")},
}
TRAINING_STEP, EVALUATION = "training step", "full-catalogue evaluation"
HISTORY = 101
"""Items in everyone's history; targets are split 3:2:5, so thirty train and fifty test."""


@dataclass(frozen=True)
class RecommenderContest:
    """One operation of TTT4Rec and its baselines at the paper's sizes, with a made-up catalogue of ``items``."""

    operation: str
    items: int
    users: int

    @property
    def name(self) -> str:
        return f"{self.operation.replace(' ', '_')}-n{self.items}"

    @property
    def size(self) -> dict[str, Any]:
        return {"table": self.operation, "column": f"{self.items:,} items"} | vars(self)

    @property
    def weight(self) -> int:
        return 4 if self.operation == TRAINING_STEP else 2

    def sides(self, device: str) -> list[str]:
        return list(MODELS)

    def absent(self, device: str) -> dict[str, str]:
        return {}

    def prepare(self, side: str, device: str, info: dict[str, Any]) -> Call:
        torch.manual_seed(0)
        split = split_by_ratio(made_up_histories(self.users, self.items))
        model = TTT4Rec(TTT4RecConfig(num_items=self.items, **MODELS[side])).to(device)
        info |= {"dtype": "float32", "parameters": sum(p.numel() for p in model.parameters())}
        max_len = model.config.max_len
        if self.operation == EVALUATION:
            prefixes = evaluation_prefixes(split, "test", max_len=max_len)
            info["tokens"] = prefixes.num_targets
            return partial(evaluate, model, prefixes)
        options = TrainOptions()
        windows = training_windows(split, max_len=max_len)
        plan = batches(windows, targets_per_batch=options.targets_per_batch, generator=torch.Generator().manual_seed(0))
        ids, targets, cu_seqlens = (x.to(device) for x in windows.packed_batch(next(plan)))
        info["tokens"] = int((targets != 0).sum())
        optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, fused=True)
        return partial(_training_step, model, optimizer, options.clip_norm, ids, targets, cu_seqlens)


def _training_step(
    model: TTT4Rec,
    optimizer: torch.optim.Optimizer,
    clip_norm: float,
    ids: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """One step as ``ttt4rec.recsys.fit`` takes it."""
    scored = targets != 0
    hidden = model(ids, cu_seqlens=cu_seqlens)[0, scored]
    loss = model.nll(hidden, targets[scored], "mean")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss


def made_up_histories(users: int, items: int) -> Histories:
    """Every user with ``HISTORY`` random items."""
    offsets = np.arange(users + 1, dtype=np.int64) * HISTORY
    drawn = np.random.default_rng(0).integers(1, items + 1, users * HISTORY)
    names = tuple(map(str, range(max(users, items))))
    return Histories(drawn, offsets, np.arange(users * HISTORY, dtype=np.int64), names[:users], names[:items])


def recommender_contests(size: str) -> list[RecommenderContest]:
    """The contests of ``"small"``, for a CPU, or ``"full"``, for a GPU."""
    catalogues, evaluated = ((1_000, 10_000, 30_000), 4) if size == "small" else ((10_000, 100_000, 1_000_000), 200)
    return [RecommenderContest(TRAINING_STEP, items, 80) for items in catalogues] + [
        RecommenderContest(EVALUATION, items, evaluated) for items in catalogues
    ]
