"""Pictures of a result: time and memory against the length, the roofline, and the README's plot."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ttt4rec import palette

from .contests import FORWARD, TRAINING
from .measurements import PLOTS, Result, Run


def plot(result: Result, folder: Path) -> None:
    """Write ``time.png``, ``memory.png`` and ``roofline.png`` into the folder."""
    time, memory, roofline = (folder / f"{name}.png" for name in PLOTS)
    _against_length(result, time, "µs per token", lambda run: run.seconds / run.info["tokens"] * 1e6)
    _against_length(result, memory, "peak bytes per token", lambda run: run.info["peak_bytes"] / run.info["tokens"])
    _roofline(result, roofline)


README_SIDES = {
    "Mamba, plain PyTorch of transformers": "Mamba (plain PyTorch;\nits kernels need a GPU)",
    "GRU": "GRU",
    "attention": "attention",
    "TTT-MLP (Transformer)": "TTT-MLP",
    "TTT-Linear (Transformer)": "TTT-Linear",
}
"""What the README's plot shows, and how it names them."""


def plot_for_readme(result: Result, path: Path) -> None:
    """Write the plot of training time a token against the length, at the smallest width; absent sides have no line."""
    runs = passes(result, TRAINING)
    width = min(run.info["width"] for run in runs)
    lines = {side: [run for run in runs if run.side == side and run.info["width"] == width] for side in README_SIDES}
    lines = {side: own for side, own in lines.items() if own}
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side, own in lines.items():
        line = of_equal_tokens(own)
        x = [run.info["length"] for run in line]
        y, low, high = ([run.stats[name] / run.info["tokens"] * 1e6 for run in line] for name in ("median", "q1", "q3"))
        axes.plot(x, y, "o-", color=palette.colour(side), linewidth=2)
        axes.fill_between(x, low, high, color=palette.colour(side), alpha=0.25, linewidth=0)
        axes.annotate(
            README_SIDES[side], (x[-1], y[-1]), xytext=(8, 0), textcoords="offset points", va="center",
            color=palette.colour(side), fontsize="small", fontweight="bold",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tokens in a sequence", ylabel="µs a token, forward and backward")
    axes.set_xticks(x, [f"{length:,}" for length in x])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(right=x[-1] * 3.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    threads = result.json["machine_info"]["threads"]
    axes.set_title(
        f"One layer of width {width}, about {line[-1].info['tokens']:,} tokens a call, {threads} CPU threads"
    )
    figure.savefig(path, dpi=palette.DPI)


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
        for side in sides(result):
            if own := [run for run in runs if run.side == side]:
                line = of_equal_tokens(own)
                axes.plot([run.info["length"] for run in line], [value(run) for run in line], **_style(side))
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
            axes.plot(intensity, rate, **_style(run.side, marker, line=""))
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


def sides(result: Result) -> list[str]:
    """Mixers that were measured."""
    return list(dict.fromkeys(run.side for operation in (FORWARD, TRAINING) for run in passes(result, operation)))


def _style(side: str, marker: str = "o", line: str = "-") -> dict[str, str]:
    color = palette.colour(side)
    if palette.has_mamba_backbone(side):
        return {"color": color, "marker": marker, "markerfacecolor": "white", "linestyle": line and "--"}
    return {"color": color, "marker": marker, "linestyle": line}


def _save(figure: Figure, result: Result, path: Path) -> None:
    for side in sides(result):
        figure.gca().plot([], [], label=side, **_style(side))
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=palette.DPI)
