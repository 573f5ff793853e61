"""What the search may choose, and where it begins."""

from typing import Any

from optuna import Trial

from ttt4rec.models.presets import PRESETS

from ..benchmark.design import ML_1M
from ..study import Data, Run, Settings

DATA: Data = ML_1M
FRAME: Settings = {
    **PRESETS["best"].model, **PRESETS["best"].training, "targets_per_batch": 2048, "exclude_seen": True, "epochs": 12,
    "patience": 3,
}  # fmt: skip
"""What all trials have; a trial's epochs are fewer than a training's. Nobody has an item of ml-1m twice."""
FIRST: dict[str, Any] = {
    "inner": "mlp", "backbone": "transformer", "width": 64, "num_blocks": 1, "mini_batch_size": 8, "forget": "none",
    "norm": "rms", "gates": False, "dropout": 0.2, "learning_rate": 3e-3, "weight_decay": 1e-6,
}  # fmt: skip
"""The first trial: the preset that stood before the search; its weight decay was none."""


def suggested(trial: Trial) -> Settings:
    """The settings that a trial is given."""
    width = trial.suggest_categorical("width", [64, 128])
    return {
        "inner": trial.suggest_categorical("inner", ["mlp", "linear"]),
        "backbone": trial.suggest_categorical("backbone", ["transformer", "mamba"]),
        "width": width,
        "ffn_width": 4 * width,
        "num_heads": width // 16,
        "num_blocks": trial.suggest_int("num_blocks", 1, 3),
        "mini_batch_size": trial.suggest_categorical("mini_batch_size", [4, 8, 16]),
        "forget": trial.suggest_categorical("forget", ["none", "token"]),
        "norm": trial.suggest_categorical("norm", ["rms", "layer"]),
        "gates": trial.suggest_categorical("gates", [False, True]),
        "dropout": trial.suggest_float("dropout", 0.1, 0.6, step=0.1),
        "learning_rate": trial.suggest_float("learning_rate", 5e-4, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True),
    }


def run_of(trial: Trial, seed: int = 0) -> Run:
    """The training that a trial stands for."""
    return Run(DATA, "search", seed, {**FRAME, **suggested(trial)})
