"""A picture of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ttt4rec.recsys.train import EpochReport


def plot_training(reports: Sequence[EpochReport], path: Path) -> None:
    """Draw loss and validation NDCG@10 by epoch into a PNG file (needs the package ``matplotlib``)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [report.epoch for report in reports]
    left = figure.add_subplot()
    right = left.twinx()
    left.plot(epochs, [report.loss for report in reports], color="tab:gray")
    right.plot(epochs, [report.metrics["NDCG@10"] for report in reports], color="tab:blue")
    left.set(xlabel="epoch", ylabel="training loss (grey)")
    right.set_ylabel("validation NDCG@10 (blue)")
    figure.savefig(path, dpi=120)
