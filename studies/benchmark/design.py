"""What is compared, on which data, with what others have published."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ttt4rec.models.presets import PRESETS, rate_for

from ..models import baseline
from ..runner import Result, find
from ..study import LEAVE_ONE_OUT, TEMPORAL, Data, Run, Settings

_BEST: Settings = {**PRESETS["best"].model, **PRESETS["best"].training}
FRAME: Settings = {
    **_BEST, "width": 64, "num_heads": 4, "ffn_width": 256, "num_blocks": 1, "backbone": "transformer",
    "epochs": 100, "targets_per_batch": 2048,
}  # fmt: skip
"""Of every method, where it does not say otherwise; learning rates are tried."""
RATES = (1e-3, 3e-3, 1e-2)
_SHORTER = {"patience": 3}
_SMALLER = {"targets_per_batch": 1024}  # about a hundred steps in an epoch
_HSTU: Settings = {"mixer": "hstu", "num_blocks": 2, "ffn": "none"}

METHODS: dict[str, Settings] = {
    "TTT4Rec, the preset `best`": {name: value for name, value in _BEST.items() if name not in ("epochs", "patience")},
    "TTT4Rec (TTT-MLP)": {"inner": "mlp"},
    "TTT4Rec (TTT-MLP, with times)": {"inner": "mlp", "times": "query"},
    **baseline("attention"),
    "eSASRec (2 blocks with gates, 256 negatives)": {
        "mixer": "attention", "num_blocks": 2, "gates": True, "norm": "layer", "loss": "sampled", "num_negatives": 256
    },
    "HSTU (2 blocks, without times)": _HSTU,
    "HSTU (2 blocks, with times)": {**_HSTU, "times": "query"},
    **baseline("gru"),
    **baseline("mamba"),
    **baseline("bidirectional"),
    **baseline("narm"),
}  # fmt: skip

ML_1M = Data("ml-1m", LEAVE_ONE_OUT, settings=_SHORTER)
_GOWALLA = Data("gowalla-1k", LEAVE_ONE_OUT, settings=_SMALLER | _SHORTER)
_ML_100K = Data("ml-100k", LEAVE_ONE_OUT, settings=_SMALLER)
DATASETS = (
    ML_1M,
    Data("amazon-video-games", LEAVE_ONE_OUT, settings=_SMALLER | _SHORTER),
    _GOWALLA,
    replace(_GOWALLA, split=TEMPORAL),
    _ML_100K,
    replace(_ML_100K, split=TEMPORAL),
)
"""The files of ml-1m and amazon-video-games have the order of ratings alone, and cannot be cut in time."""
TIMED = ("gowalla-1k", "ml-100k")
"""Data whose times are real."""
LARGE = ("ml-1m", "amazon-video-games", "gowalla-1k")
"""Data on which learning rates are compared after TRIAL_EPOCHS epochs."""
TRIAL_EPOCHS = 5


class Published(NamedTuple):
    """What somebody printed of all items ranked."""

    hr: float  # HR@10
    ndcg: float  # NDCG@10
    seen: str  # whether items that a user had were ranked
    source: str


_HSTU_PAGE = "github.com/facebookresearch/generative-recommenders, README"
_ESASREC_PAGE = "github.com/blondered/transformer_benchmark, README"
_RECTOOLS_PAGE = "github.com/MTSWebServices/RecTools, tutorial of HSTU"
PUBLISHED: dict[Data, dict[str, Published]] = {
    ML_1M: {
        "SASRec (attention)": Published(0.2853, 0.1603, "out", _HSTU_PAGE),
        "eSASRec (2 blocks with gates, 256 negatives)": Published(0.3133, 0.1772, "not told", _ESASREC_PAGE),
        "HSTU, with times": Published(0.3097, 0.1720, "out", _HSTU_PAGE),
        "HSTU-large, with times": Published(0.3294, 0.1893, "out", _HSTU_PAGE),
        "FuXi-α, with times": Published(0.3164, 0.1813, "not told", _ESASREC_PAGE),
        "RecTools' HSTU, with times": Published(0.3226, 0.1880, "out", _RECTOOLS_PAGE),
        "RecTools' HSTU of 8 blocks, with times": Published(0.3642, 0.2164, "out", _RECTOOLS_PAGE),
    }
}
"""By data and method; methods that are not ours have rows of their own."""
ALL, NEW = "test", "test, new items"
"""Parts of a result: all items ranked, and those that the user has not had."""
AIM = {"HR@10": 0.335, "NDCG@10": 0.195}
"""Of the first method on ml-1m, seen items left out: above every published figure but that of 8 blocks with times."""


@dataclass(frozen=True)
class Plan:
    """Every method on all data with every seed; the learning rate is each method's best in validation with the first.

    A trial of a learning rate is a whole training, but a short one on large data.

    Attributes:
        datasets: what to train on.
        methods: what each changes in the frame, by its label.
        rates: learning rates, of which each method that has none of its own tries all on all data.
        seeds: of weights, shuffling and dropout.
        frame: settings of all methods.
    """

    datasets: Sequence[Data] = DATASETS
    methods: dict[str, Settings] = field(default_factory=lambda: METHODS)
    rates: Sequence[float] = RATES
    seeds: Sequence[int] = (0, 1, 2)
    frame: Settings = field(default_factory=lambda: FRAME)

    @property
    def total(self) -> int:
        """Number of trainings."""
        return sum(self.runs_of(data, method) for data in self.datasets for method in self.methods)

    def runs_of(self, data: Data, method: str) -> int:
        """Number of trainings of a method on a data set; none of one with times where there are no real ones."""
        if not self.runs_on(data, method):
            return 0
        return len(self.rates_of(data, method)) + len(self.seeds) - (0 if self.is_short(data, method) else 1)

    def is_short(self, data: Data, method: str) -> bool:
        """Whether trials have few epochs; a method with one rate has nothing to compare."""
        return data.name in LARGE and len(self.rates_of(data, method)) > 1

    def runs_on(self, data: Data, method: str) -> bool:
        """Whether the data have what the method reads."""
        return self.methods[method].get("times", "none") == "none" or data.name in TIMED

    def rates_of(self, data: Data, method: str) -> Sequence[float]:
        """What it tries; or its own rate, which goes with the root of the targets in a step as a preset's does."""
        own = self.methods[method].get("learning_rate")
        if own is None:
            return self.rates
        targets = {**self.frame, **data.settings}["targets_per_batch"]
        return (round(rate_for(targets, own), 5),)

    def trials(self, data: Data, method: str) -> list[Run]:
        """With each learning rate, the first seed; none on data that the method cannot read."""
        if not self.runs_on(data, method):
            return []
        runs = [self._run(data, method, rate, self.seeds[0]) for rate in self.rates_of(data, method)]
        if not self.is_short(data, method):
            return runs
        epochs = min(TRIAL_EPOCHS, self.frame["epochs"])
        return [replace(run, settings={**run.settings, "epochs": epochs}) for run in runs]

    def best_rate(self, data: Data, method: str, results: Iterable[Result]) -> float | None:
        """By the validation of the trials; None if some are to come, or there are none."""
        results = list(results)
        found = [find(results, run) for run in self.trials(data, method)]
        known = [result for result in found if result is not None]
        if not known or len(known) < len(found):
            return None
        best: dict[str, Any] = max(known, key=lambda result: max(result["validation"]))["settings"]
        return float(best["learning_rate"])

    def seeded(self, data: Data, method: str, results: Iterable[Result]) -> list[Run]:
        """With the best rate, every seed; none before that rate is known."""
        rate = self.best_rate(data, method, results)
        return [] if rate is None else [self._run(data, method, rate, seed) for seed in self.seeds]

    def finished(self, data: Data, method: str, results: Sequence[Result]) -> list[Result]:
        """Results of the seeds at the best rate; none before all rates are tried."""
        found = [find(results, run) for run in self.seeded(data, method, results)]
        return [result for result in found if result is not None]

    def done(self, data: Data, method: str, results: Sequence[Result]) -> list[Result]:
        """The results there are: of the trials, and of the seeds at the best rate that are no trials."""
        trials = self.trials(data, method)
        runs = [*trials, *(run for run in self.seeded(data, method, results) if run not in trials)]
        return [result for run in runs if (result := find(results, run)) is not None]

    def missing(self, results: Sequence[Result]) -> Iterator[Run]:
        """What can be run now and has no result, trials first."""
        cells = [(data, method) for data in self.datasets for method in self.methods]
        parts = ([self.trials(*cell) for cell in cells], [self.seeded(*cell, results) for cell in cells])
        for part in parts:
            for runs in part:
                yield from (run for run in runs if find(results, run) is None)

    def _run(self, data: Data, method: str, rate: float, seed: int) -> Run:
        settings = {**self.frame, **data.settings, **self.methods[method], "learning_rate": rate}
        return Run(data, method, seed, settings)
