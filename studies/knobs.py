"""TTT4Rec's own settings, one turned at a time."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt4rec import TTT4RecConfig, palette

from .models import PROTOCOL, TUNED
from .study import Data, Settings, Study

KNOBS: Mapping[str, Sequence[Any]] = {
    "mini_batch_size": (1, 2, 4, 8, 16, 32),
    "num_heads": (1, 2, 4, 8),
    "num_blocks": (1, 2, 3),
    "base_lr": (0.1, 0.3, 1.0, 3.0),
}
LABELS = {
    "mini_batch_size": "K, tokens of a mini-batch",
    "num_heads": "heads of D = 64 / heads",
    "num_blocks": "blocks",
    "base_lr": "base_lr",
}
INNERS = ("TTT-Linear", "TTT-MLP")
USUAL = {name: getattr(TTT4RecConfig, name) for name in KNOBS}


def _label(inner: str, name: str, value: Any) -> str:
    return inner if value == USUAL[name] else f"{inner}, {name} = {value:g}"


def _variants() -> dict[str, Settings]:
    variants = {label: TUNED[label] for label in INNERS}
    for label in INNERS:
        for name, values in KNOBS.items():
            for value in values:
                if value != USUAL[name]:
                    variants[_label(label, name, value)] = {**TUNED[label], name: value}
    return variants


STUDY = Study("Knobs", datasets=(Data("ml-100k"),), variants=_variants(), common=PROTOCOL)


def plot(cells: Mapping[tuple[Data, str], Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Accuracy and time of an epoch over each knob: the mean of the seeds, and the runs as dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(KNOBS), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, len(KNOBS), sharex="col", sharey="row")
    for column, (name, values) in zip(panels.T, KNOBS.items(), strict=True):
        for label in INNERS:
            known = _of_equal_seeds({value: cells[STUDY.datasets[0], _label(label, name, value)] for value in values})
            for axes, of in zip(column, (_accuracy, _seconds), strict=True):
                means = [statistics.fmean(map(of, runs)) for runs in known.values()]
                axes.plot(list(known), means, color=palette.colour(label), label=label)
                dots = [(value, of(run)) for value, runs in known.items() for run in runs]
                axes.plot(*zip(*dots, strict=True) if dots else ([], []), ".", color=palette.colour(label), alpha=0.5)
                axes.set_xscale("log", base=2 if isinstance(values[0], int) else 10)
                axes.set_xticks(values, [f"{value:g}" for value in values])
                axes.minorticks_off()
        column[1].set_xlabel(LABELS[name])
    panels[0, 0].set_ylabel("NDCG@10, test")
    panels[1, 0].set_ylabel("CPU s an epoch")
    panels[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=palette.DPI)


def _of_equal_seeds(runs: Mapping[Any, Sequence[Mapping[str, Any]]]) -> dict[Any, list[Mapping[str, Any]]]:
    """The runs of those seeds that all values have which have any: a mean of other seeds would be another point."""
    seeds = [{run["seed"] for run in of_value} for of_value in runs.values() if of_value]
    common = set.intersection(*seeds) if seeds else set()
    kept = {value: [run for run in of_value if run["seed"] in common] for value, of_value in runs.items()}
    return {value: of_value for value, of_value in kept.items() if of_value}


def _accuracy(run: Mapping[str, Any]) -> float:
    return run["test"]["NDCG@10"]


def _seconds(run: Mapping[str, Any]) -> float:
    return run["cpu_seconds"] / len(run["validation"])
