"""What a study is: data sets, variants and seeds under common settings; and the studies there are."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ttt4rec import TTT4RecConfig
from ttt4rec.recsys.train import TrainOptions

Settings = Mapping[str, Any]
"""Values of fields of ``TTT4RecConfig`` and ``TrainOptions``, by name."""


@dataclass(frozen=True)
class Run:
    """One training of a study; studies that have the same one share its result."""

    dataset: str
    variant: str
    seed: int
    settings: Settings

    @property
    def key(self) -> dict[str, Any]:
        """What tells runs apart, as it is written into a result."""
        return {"dataset": self.dataset, "seed": self.seed, "settings": dict(self.settings)}

    def config(self, num_items: int) -> TTT4RecConfig:
        """The model's shape."""
        return TTT4RecConfig(num_items=num_items, **_of(TTT4RecConfig, self.settings))

    def options(self) -> TrainOptions:
        """How to train."""
        return TrainOptions(seed=self.seed, **_of(TrainOptions, self.settings))


@dataclass(frozen=True)
class Study:
    """Every variant on every data set with every seed.

    Attributes:
        title: heading of its part of the report.
        datasets: by the names of their files.
        variants: what each changes in the common settings, by its label in the table.
        seeds: of weights, shuffling and dropout.
        common: settings of all variants.
    """

    title: str
    datasets: tuple[str, ...]
    variants: Mapping[str, Settings]
    seeds: tuple[int, ...] = (0, 1, 2)
    common: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names of all settings, before hours have passed."""
        known = {f.name for kind in (TTT4RecConfig, TrainOptions) for f in dataclasses.fields(kind)}
        for run in self.runs():
            if unknown := set(run.settings) - known:
                raise ValueError(f"settings of {run.variant!r} must be known fields; given {sorted(unknown)}")

    def runs(self) -> Iterator[Run]:
        """All runs, in an order in which a part is of use: everything once before anything twice."""
        for seed in self.seeds:
            for dataset in self.datasets:
                for variant, changes in self.variants.items():
                    yield Run(dataset, variant, seed, {**self.common, **changes})


def _of(kind: type, settings: Settings) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)}
    return {name: value for name, value in settings.items() if name in names}


MIXERS: dict[str, Settings] = {
    "attention (SASRec)": {"mixer": "attention"},
    "GRU (GRU4Rec)": {"mixer": "gru"},
    "TTT-Linear": {"inner": "linear"},
    "TTT-MLP": {"inner": "mlp"},
}
PROTOCOL: Settings = {"dropout": 0.5, "patience": 5, "epochs": 100, "targets_per_batch": 512}
RATES = (1e-3, 3e-3)
TUNED = {label: {**mixer, "learning_rate": 1e-3} for label, mixer in MIXERS.items()}
TUNED["attention (SASRec)"]["learning_rate"] = 3e-3

STUDIES = {
    "mixers": Study(
        "Mixers",
        datasets=("ml-100k", "gowalla-1k", "amazon-video-games", "ml-1m"),
        variants=TUNED,
        common=PROTOCOL,
    ),
    "losses": Study(
        "Losses",
        datasets=("ml-100k", "ml-1m", "gowalla-1k"),
        variants={
            "softmax over all items": {},
            "sampled softmax, 256 negatives": {"loss": "sampled"},
            "gBCE, 256 negatives, t = 0.75": {"loss": "gbce"},
            "BPR, 256 negatives": {"loss": "bpr"},
        },
        common={**PROTOCOL, **TUNED["TTT-MLP"]},
    ),
    "tuning": Study(
        "Tuning",
        datasets=("ml-100k",),
        variants={
            f"{label}, {rate:g}": {**mixer, "learning_rate": rate} for label, mixer in MIXERS.items() for rate in RATES
        },
        seeds=(0,),
        common=PROTOCOL,
    ),
}
