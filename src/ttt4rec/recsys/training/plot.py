"""A picture of training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ttt4rec.extras import require


def plot_curves(runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw loss and validation NDCG@10 by epoch into a PNG file (needs the extra ``ttt4rec[plot]``).

    Args:
        runs: rows of ``metrics.csv`` by the name of the run.
        path: the file.
    """
    require("a picture of training runs", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, column, label in zip(
        figure.subplots(1, 2), ("loss", "valid_NDCG@10"), ("training loss", "validation NDCG@10"), strict=True
    ):
        for name, rows in runs.items():
            axes.plot([row["epoch"] for row in rows], [row[column] for row in rows], label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend()
    figure.savefig(path, dpi=120)
