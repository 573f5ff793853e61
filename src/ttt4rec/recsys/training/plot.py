"""A picture of training runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt4rec.extras import require
from ttt4rec.palette import MARKERS, colour

_COLUMNS = {"loss": "training loss", "valid_NDCG@10": "validation NDCG@10"}
_MARKED = 15
"""Epochs of a run that have a marker, at most about that many."""


def plot_curves(
    runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path, methods: Mapping[str, str] | None = None
) -> None:
    """Draw loss and validation NDCG@10 by epoch into a PNG file (needs the extra ``ttt4rec[plot]``).

    A star marks the epoch whose weights are kept. Runs of one method have its colour and differ in their markers.

    Args:
        runs: rows of ``metrics.csv`` by the name of the run.
        path: the file.
        methods: by the name of the run, what ``palette.METHODS`` may have a colour for; without it, black.
    """
    require("a picture of training runs", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4 + 0.25 * (len(runs) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, column in zip((left, right), _COLUMNS, strict=True):
        _draw(axes, column, runs, methods or {})
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(runs)), frameon=False)
    figure.savefig(path, dpi=120)


def _draw(
    axes: Any, column: str, runs: Mapping[str, Sequence[Mapping[str, float]]], methods: Mapping[str, str]
) -> None:
    from matplotlib.ticker import MaxNLocator

    seen = Counter[str]()
    for name, rows in runs.items():
        of_method = colour(methods.get(name, ""))
        marker = MARKERS[seen[of_method] % len(MARKERS)]
        seen[of_method] += 1
        style = {"color": of_method, "marker": marker, "markersize": 4, "markevery": -(-len(rows) // _MARKED)}
        axes.plot([row["epoch"] for row in rows], [row[column] for row in rows], label=name, **style)
        best = max(rows, key=lambda row: row["valid_NDCG@10"])
        axes.plot(best["epoch"], best[column], marker="*", markersize=12, color=of_method)
    axes.set(xlabel="epoch", ylabel=_COLUMNS[column])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
