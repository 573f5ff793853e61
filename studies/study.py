"""What a study is: data sets, variants and seeds under common settings."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ttt4rec import TTT4RecConfig
from ttt4rec.recsys.training.train import TrainOptions

Settings = Mapping[str, Any]
"""Values of fields of ``TTT4RecConfig`` and ``TrainOptions``, by name; or a value for each data set, by its name."""
Published = Mapping[str, Mapping[str, tuple[float, float, float, float]]]
"""HR@10, HR@50, NDCG@10, NDCG@50 that somebody printed, by names of files and by variants."""

LEAVE_ONE_OUT, TEMPORAL = "leave-one-out", "temporal 8:1:1"
FEW_TRAIN = "leave-one-out, {} % of the users train"
"""All users' last items are tested, but only some users' others are learned from."""


@dataclass(frozen=True)
class Data:
    """A file of interactions, what is left out of it and how it is split.

    Attributes:
        name: of the file.
        split: ratios of training, validation and test, per user (``"3:2:5"``); ``LEAVE_ONE_OUT``; ``FEW_TRAIN`` with a
            percentage; or ``TEMPORAL``.
        min_user: users with fewer interactions are left out, and items with fewer than 5.
        settings: what the data add to a study's common settings.
    """

    name: str
    split: str = "3:2:5"
    min_user: int = 5
    settings: Settings = field(default_factory=dict, hash=False)

    @property
    def key(self) -> dict[str, Any]:
        """What tells data apart, as it is written into a result."""
        return {"dataset": self.name, "split": self.split, "min_user": self.min_user}

    @property
    def title(self) -> str:
        """Its heading in a report; the usual filter goes without saying, the usual split too."""
        split = "" if self.split == Data.split else f", {self.split}"
        return f"{self.name}{split}" + ("" if self.min_user == Data.min_user else f", users of {self.min_user} or more")


@dataclass(frozen=True)
class Run:
    """One training of a study; studies that have the same one share its result."""

    data: Data
    variant: str
    seed: int
    settings: Settings

    @property
    def key(self) -> dict[str, Any]:
        """What tells runs apart, as it is written into a result."""
        return self.data.key | {"seed": self.seed, "settings": dict(self.settings)}

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
        datasets: what to train on.
        variants: what each changes in the common settings, by its label in the table.
        seeds: of weights, shuffling and dropout.
        common: settings of all variants.
        published: values to set beside its own.
    """

    title: str
    datasets: tuple[Data, ...]
    variants: Mapping[str, Settings]
    seeds: tuple[int, ...] = (0, 1, 2)
    common: Settings = field(default_factory=dict)
    published: Published = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names of all settings, before hours have passed."""
        known = {f.name for kind in (TTT4RecConfig, TrainOptions) for f in dataclasses.fields(kind)}
        for run in self.runs():
            if unknown := set(run.settings) - known:
                raise ValueError(f"settings of {run.variant!r} must be known fields; given {sorted(unknown)}")

    def runs(self) -> Iterator[Run]:
        """All runs, in an order in which a part is of use: everything once before anything twice."""
        for seed in self.seeds:
            for data in self.datasets:
                for variant, changes in self.variants.items():
                    settings = {**self.common, **data.settings, **changes}
                    yield Run(data, variant, seed, {name: _for(data, value) for name, value in settings.items()})


def _for(data: Data, value: Any) -> Any:
    return value[data.name] if isinstance(value, Mapping) else value


def _of(kind: type, settings: Settings) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(kind)}
    return {name: value for name, value in settings.items() if name in names}
