"""Settings of model and training that go together, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..checks import check_choice

MOST, LEAST = 2048, 128
"""Targets in a step, of large and of the smallest data."""
STEPS = 100
"""Steps in an epoch that small data should have: with so few as 30, three epochs show next to nothing."""


def rate_for(targets: int, rate: float) -> float:
    """The learning rate for steps of a number of targets, given the one for ``MOST``; it goes with their root."""
    return rate * math.sqrt(min(1.0, targets / MOST))


class Preset(NamedTuple):
    """A row of the presets.

    Attributes:
        about: for the command line's help.
        model: fields of ``TTT4RecConfig``.
        training: fields of ``TrainOptions``; the learning rate belongs to steps of ``MOST`` targets.
        smaller_steps: whether small data get smaller steps, at rates that go with the root of their size.
        as_published: whether the paper's data sets get the paper's filter and length of history.
    """

    about: str
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    smaller_steps: bool = True
    as_published: bool = False

    def options(self, num_targets: int | None, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of ``TrainOptions`` for a number of training targets (None: many), given ones as they are."""
        chosen = {**self.training, **given}
        if self.smaller_steps:
            steps = MOST if num_targets is None else min(MOST, max(LEAST, num_targets // STEPS))
            size = chosen.setdefault("targets_per_batch", steps)
            if "learning_rate" not in given:
                chosen["learning_rate"] = rate_for(size, chosen["learning_rate"])
        return chosen


_PAPER_MODEL = {
    "width": 64, "num_blocks": 1, "num_heads": 4, "mixer": "ttt", "inner": "mlp", "backbone": "transformer",
    "mini_batch_size": 8, "forget": "none", "norm": "rms", "ffn": "swiglu", "ffn_width": 256, "gates": False,
    "dropout": 0.2, "max_len": 50,
}  # fmt: skip
_PAPER_TRAINING = {
    "epochs": 300, "patience": 5, "learning_rate": 1e-3, "learning_rate_warmup": 0, "inner_lr_warmup": 0,
    "weight_decay": 0.0, "average_over": 0.0, "loss": "softmax",
}  # fmt: skip
PRESETS = {
    "best": Preset(
        "three blocks of TTT-MLP, Mamba backbone, that read 200 items; averaged weights, steps by the size of the data",
        _PAPER_MODEL | {"max_len": 200, "num_blocks": 3, "backbone": "mamba"},
        _PAPER_TRAINING | {"learning_rate": 3e-3, "learning_rate_warmup": 50, "average_over": 0.1},
    ),
    "paper": Preset(
        "the TTT4Rec paper's; on its data sets also its filter and length of history",
        _PAPER_MODEL,
        _PAPER_TRAINING | {"targets_per_batch": 2048},
        smaller_steps=False,
        as_published=True,
    ),
    "fast": Preset(
        "TTT-Linear, 256 negatives in place of all items, at most 20 epochs",
        _PAPER_MODEL | {"inner": "linear"},
        _PAPER_TRAINING
        | {"epochs": 20, "patience": 2, "learning_rate": 3e-3, "learning_rate_warmup": 50, "average_over": 0.1}
        | {"loss": "sampled", "num_negatives": 256, "popularity": 0.0},
    ),
}
"""By the names that ``from_preset`` of ``TTT4RecConfig`` and ``TrainOptions``, and the command line, take."""


def preset(name: str) -> Preset:
    """One of ``PRESETS``; ValueError for another name."""
    check_choice("preset", name, PRESETS)
    return PRESETS[name]
