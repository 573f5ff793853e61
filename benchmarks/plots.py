"""Pictures of a result: time and memory against the length, and the roofline."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .contests import FORWARD, TRAINING
from .measurements import PLOTS, Result, Run


def plot(result: Result, folder: Path) -> None:
    """Write ``time.png``, ``memory.png`` and ``roofline.png`` into the folder."""
    time, memory, roofline = (folder / f"{name}.png" for name in PLOTS)
    _against_length(result, time, "µs per token", lambda run: run.seconds / run.info["tokens"] * 1e6)
    _against_length(result, memory, "peak bytes per token", lambda run: run.info["peak_bytes"] / run.info["tokens"])
    _roofline(result, roofline)


def passes(result: Result, operation: str) -> list[Run]:
    """Runs of an operation over whole sequences."""
    return [run for run in result.runs if run.info.get("operation") == operation and "width" in run.info]


def of_equal_tokens(runs: list[Run]) -> list[Run]:
    """Of one side's runs, one a length, in order: that with the number of tokens nearest to the longest's."""
    longest = max(runs, key=lambda run: run.info["length"])
    nearest: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: -abs(run.info["tokens"] - longest.info["tokens"])):
        nearest[run.info["length"]] = run
    return [nearest[length] for length in sorted(nearest)]


def _against_length(result: Result, path: Path, quantity: str, value: Callable[[Run], float]) -> None:
    panels = []
    for operation in (FORWARD, TRAINING):
        for width in sorted({run.info["width"] for run in passes(result, operation)}):
            runs = [run for run in passes(result, operation) if run.info["width"] == width]
            if len({run.info["length"] for run in runs}) > 1:
                panels.append((operation, width, runs))
    figure = Figure(figsize=(5.5 * max(1, len(panels)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (operation, width, runs) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for side, color in colors(result).items():
            if own := [run for run in runs if run.side == side]:
                line = of_equal_tokens(own)
                axes.plot([run.info["length"] for run in line], [value(run) for run in line], "o-", color=color)
        axes.set(title=f"{operation}, width {width}", xlabel="sequence length", xscale="log", yscale="log")
        axes.set_ylabel(quantity)
    _save(figure, result, path)


def _roofline(result: Result, path: Path) -> None:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for operation, marker in ((FORWARD, "o"), (TRAINING, "^")):
        for run in passes(result, operation):
            intensity, rate = run.info["flops"] / run.info["bytes"], run.info["flops"] / run.seconds
            axes.plot(intensity, rate, marker, color=colors(result)[run.side])
    for dtype, roofs in result.own["roofs"].items():
        if any(run.info["dtype"] == dtype for run in passes(result, FORWARD)):
            _roof(axes, roofs["copy"], roofs["matmul"])
    axes.set(title="forward (circles), forward and backward (triangles), under the measured roofs")
    axes.set(xlabel="FLOPs per byte moved at least", ylabel="FLOP/s", xscale="log", yscale="log")
    _save(figure, result, path)


def _roof(axes: Axes, copy: float, matmul: float) -> None:
    low, high = axes.get_xlim()
    ridge = matmul / copy
    right = max(high, 2 * ridge)
    axes.plot([max(low, 0.5), ridge, right], [copy * max(low, 0.5), matmul, matmul], color="black")


def colors(result: Result) -> dict[str, str]:
    """A colour for each mixer that was measured."""
    sides = dict.fromkeys(run.side for operation in (FORWARD, TRAINING) for run in passes(result, operation))
    return {side: f"C{i % 10}" for i, side in enumerate(sides)}


def _save(figure: Figure, result: Result, path: Path) -> None:
    for side, color in colors(result).items():
        figure.gca().plot([], [], "o-", color=color, label=side)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
