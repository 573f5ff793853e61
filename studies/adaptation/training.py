"""Models trained for these studies, kept in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer
from ttt4rec.models import mixers
from ttt4rec.recsys.data.split import Split
from ttt4rec.recsys.training.train import TrainOptions, fit

KINDS: dict[str, dict[str, Any]] = {
    "": {},
    "decay constant": {"forget": "constant"},
    "decay by token": {"forget": "token"},
    "Mamba backbone": {"backbone": "mamba"},
    "Mamba backbone, decay by token": {"backbone": "mamba", "forget": "token"},
    "K = 1": {"mini_batch_size": 1},
    "K = 2": {"mini_batch_size": 2},
    "K = 2, decay by token": {"mini_batch_size": 2, "forget": "token"},
}
"""Of a TTT model, what tells it from the usual one: how it forgets, what surrounds it, or how often it learns."""
MIXERS: dict[str, dict[str, Any]] = {
    ", ".join(filter(None, (name, kind))): {"mixer": "ttt", "inner": inner} | options
    for kind, options in KINDS.items()
    for inner, name in (("linear", "TTT-Linear"), ("mlp", "TTT-MLP"))
} | {mixers.MIXERS[name].kind: {"mixer": name} for name in ("attention", "gru")}

DRIFTING = ("TTT-Linear", "TTT-MLP", "TTT-Linear, decay by token", "TTT-MLP, decay by token", "attention", "GRU")
TIMED = {f"{name}, with times": MIXERS[name] | {"times": "query"} for name in DRIFTING}
"""On data with real times: inner rates and gates know the time since the last event, scores that of the request."""


def trained(mixer: str, split: Split, folder: Path, seed: int, *, max_len: int, adapt: bool = True) -> TTT4Rec:
    """A model trained on a split, the same way for every mixer; one that lies in the folder is not trained again."""
    torch.manual_seed(seed)
    model = TTT4Rec(
        TTT4RecConfig(num_items=split.histories.num_items, max_len=max_len, dropout=0.5, **(MIXERS | TIMED)[mixer])
    )
    options = TrainOptions(epochs=100, patience=5, targets_per_batch=512, seed=seed)
    with adapting(model, adapt):
        fit(model, split, folder, options)
    return model.eval()


@contextmanager
def adapting(model: TTT4Rec, adapt: bool) -> Iterator[None]:
    """The inner loops live, or at rest."""
    layers = [layer for layer in model.modules() if isinstance(layer, TTTLayer)]
    before = [layer.adapt for layer in layers]
    for layer in layers:
        layer.adapt = adapt
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.adapt = old
