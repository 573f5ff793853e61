"""Curves beside the tables: little data, and long histories."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.documents import spread
from ttt4rec import palette

from ..report import row
from ..runner import Result
from ..study import FEW_TRAIN, LEAVE_ONE_OUT, Data
from .design import METHODS, ML_1M, NEW, Plan

FEWER = {100: 1024, 50: 512, 25: 256, 10: 128, 5: 128}
"""Percentages of the users who train, and targets in a step: a hundred steps in an epoch, but for the last."""
LENGTHS = (50, 200, 1000)
"""The most items that a model reads."""
FEWEST = 30
"""Targets of which a mean is shown."""
_SHOWN = ("TTT4Rec (", "SASRec", "HSTU", "GRU4Rec", "Mamba4Rec")
_METHODS = {
    label: settings
    for label, settings in METHODS.items()
    if label.startswith(_SHOWN) and settings.get("times", "none") == "none"
}
_FEWER_DATA = {
    percent: Data("ml-100k", FEW_TRAIN.format(percent) if percent < 100 else LEAVE_ONE_OUT,
                  settings={"targets_per_batch": targets})
    for percent, targets in FEWER.items()
}  # fmt: skip
_LONG_DATA = {
    length: Data(ML_1M.name, LEAVE_ONE_OUT, settings={**ML_1M.settings, "max_len": length}) for length in LENGTHS
}

LITTLE = Plan(tuple(_FEWER_DATA.values()), _METHODS | {"TTT-Linear": {"inner": "linear"}})
LONG = Plan(
    tuple(_LONG_DATA.values()),
    {label: settings for label, settings in _METHODS.items() if label.startswith(("TTT4Rec (", "SASRec", "GRU4Rec"))},
    rates=(3e-3,),
)

Curves = Mapping[str, Mapping[Any, list[float]]]
"""NDCG@10 of each method at each place, of every seed."""
Panel = tuple[str, str, Curves]
"""A title, what the places are, and the curves."""


def tables(plan: Plan, results: Sequence[Result]) -> dict[str, str]:
    """By the names of the page's parts: the picture, and a table for each panel."""
    texts = {}
    for name, panels in _panels(plan, results).items():
        parts = [f"{title}\n\n{table(curves, label)}" for title, label, curves in panels]
        drawn = [f"![NDCG@10, {panels[0][1]}]({picture(name)})\n"] if panels else []
        texts[name] = "\n".join([*drawn, *parts]) or "Not run yet.\n"
    return texts


def pictures(plan: Plan, results: Sequence[Result]) -> dict[str, list[Panel]]:
    """Panels by the names of the files; none for what has not been run.

    Of histories some methods are left to the table, as so many curves hide each other.
    """
    drawn = _panels(plan, results)
    hidden = METHODS.keys() - {*_METHODS, next(iter(METHODS))}
    drawn["histories"] = [
        (title, label, {method: curve for method, curve in curves.items() if method not in hidden})
        for title, label, curves in drawn["histories"]
    ]
    return {picture(name): panels for name, panels in drawn.items() if panels}


def picture(name: str) -> str:
    """The file of a part of the page."""
    return f"benchmarks-{name}.png"


def _panels(plan: Plan, results: Sequence[Result]) -> dict[str, list[Panel]]:
    found = {
        "little": [("ml-100k", "% of the users who train", _curves(LITTLE, _FEWER_DATA, results))],
        "lengths": [(ML_1M.name, "items read", _curves(LONG, _LONG_DATA, results))],
        "histories": [
            (data.title, "items of history, from", by_history(plan, data, results)) for data in plan.datasets
        ],
    }
    return {name: [panel for panel in panels if _any(panel[2])] for name, panels in found.items()}


def _any(curves: Curves) -> bool:
    return any(values for curve in curves.values() for values in curve.values())


def _curves(plan: Plan, places: Mapping[int, Data], results: Sequence[Result]) -> Curves:
    return {
        method: {
            place: [run[NEW]["NDCG@10"] for run in plan.finished(data, method, results)]
            for place, data in places.items()
        }
        for method in plan.methods
    }


def by_history(plan: Plan, data: Data, results: Sequence[Result]) -> Curves:
    """By how many items a user had before the target, of the runs of the page."""
    curves: dict[str, dict[Any, list[float]]] = {}
    for method in plan.methods:
        found: dict[Any, list[float]] = {}
        for run in plan.finished(data, method, results):
            for part in (part for part in run["by history"] if part["targets"] >= FEWEST):
                found.setdefault(part["from"], []).append(part["NDCG@10"])
        curves[method] = found
    return curves


def table(curves: Curves, heading: str) -> str:
    """NDCG@10, mean ± standard deviation over seeds; a line a method."""
    places = sorted({place for curve in curves.values() for place, values in curve.items() if values})
    text = row([heading, *map(str, places)]) + row(["---"] * (len(places) + 1))
    best = {place: max(statistics.fmean(x) for c in curves.values() if (x := c.get(place))) for place in places}
    for method, curve in curves.items():
        if not any(curve.values()):
            continue
        cells = []
        for place in places:
            values = curve.get(place)
            cells.append(spread(values, bold=statistics.fmean(values) == best[place]) if values else "")
        text += row([method, *cells])
    return text


def plot(panels: Sequence[Panel], path: Path) -> None:
    """A panel for each title, label of the axis and curves: means, with bars of a standard deviation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(panels), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, label, curves) in zip(all_axes, panels, strict=True):
        places = sorted({place for curve in curves.values() for place, values in curve.items() if values})
        for method, marker in palette.markers(curves).items():
            drawn = [(places.index(place), values) for place, values in curves[method].items() if values]
            x = [place for place, _ in drawn]
            means = [statistics.fmean(values) for _, values in drawn]
            bars = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in drawn]
            axes.errorbar(x, means, bars, marker=marker, color=palette.colour(method), label=method, capsize=2)
        axes.set_xticks(range(len(places)), map(str, places))
        axes.set(title=title, xlabel=label)
    all_axes[0].set_ylabel("NDCG@10, test, seen items out")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=palette.DPI)
