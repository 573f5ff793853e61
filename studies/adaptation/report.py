"""Tables and plots of these studies, in ``docs/adaptation.md``."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from tools.documents import ROOT, section, spread
from ttt4rec import palette

from ..runner import Result, read_results
from .habits import PLACES, Habits

RUNS_FILE = ROOT / "studies" / "results" / "adaptation" / "runs.jsonl"
DOCUMENT = ROOT / "docs" / "adaptation.md"
METRICS = ("NDCG@10", "HR@10")
SWITCHES = ("made-up", "joined")
LINES = {"": "-", "decay constant": ":", "decay by token": "--"}
"""Of the kinds of models in the plots, how they are drawn; the tables have all."""
AFTER = ((1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, 29), (1, 29))
"""Columns: events known since the switch, first and last."""


def read() -> list[Result]:
    """All results so far."""
    return read_results(RUNS_FILE)


def ablation_table(results: Iterable[Result]) -> str:
    """Metrics by split, training and mode."""
    cells = defaultdict(list)
    for result in results:
        if result["study"] == "ablation":
            for mode, metrics in result["test"].items():
                cells[result["split"], result["adapting in training"], mode].append(metrics)
    lines = [f"| split | trained | tested | {' | '.join(METRICS)} |"]
    lines.append("|" + " --- |" * (3 + len(METRICS)))
    for (split, adapt, mode), runs in sorted(cells.items(), key=lambda cell: (cell[0][0], not cell[0][1])):
        values = [spread([run[name] for run in runs]) for name in METRICS]
        lines.append(f"| {split} | {'adapting' if adapt else 'without adapting'} | {mode} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def accuracy_table(results: Iterable[Result]) -> str:
    """Metrics by mixer."""
    cells = defaultdict(list)
    for result in results:
        if result["study"] == "accuracy":
            cells[result["mixer"]].append(result["test"])
    lines = [f"| | {' | '.join(METRICS)} |", "|" + " --- |" * (1 + len(METRICS))]
    for mixer, runs in cells.items():
        lines.append(f"| {mixer} | {' | '.join(spread([run[name] for run in runs]) for name in METRICS)} |")
    return "\n".join(lines) + "\n"


def curves(results: Iterable[Result], study: str, name: str = "curve") -> dict[str, list[list[float]]]:
    """By mixer, the curves of its seeds."""
    found = defaultdict(list)
    for result in results:
        if result["study"] == study:
            found[result["mixer"]].append(result[name])
    return dict(found)


def recovery_table(results: Sequence[Result], study: str) -> str:
    """NDCG@10 of the last five events before the switch, and means over those with so many events known since."""
    own = [result for result in results if result["study"] == study]
    if not own:
        return "Not run.\n"
    switch = own[0]["switch"]
    head = ["before", *(f"{n} known since" if n == last else f"{n} to {last}" for n, last in AFTER)]
    # A curve begins with event 1, so event ``switch + n``, before which n are known, stands at switch + n - 1.
    places = [range(switch - 6, switch - 1), *(range(switch + n - 1, switch + last) for n, last in AFTER)]
    lines = [f"| | {' | '.join(head)} |", "|" + " --- |" * (1 + len(head))]
    for name, label in (("curve", ""), ("alone", ", no switch")):
        for mixer, seeds in curves(own, study, name).items() if name in own[0] else ():
            cells = [spread([statistics.fmean(curve[i] for i in place) for curve in seeds]) for place in places]
            lines.append(f"| {mixer}{label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def drift_table(results: Iterable[Result]) -> str:
    """NDCG@10 by mixer and kind of target, a table for each way to tell targets apart."""
    cells = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for result in results:
        if result["study"] == "drift":
            for row in result["segments"]:
                part = f"{row['segment']}: {row['targets']:,}"
                cells[row["by"]][part][result["mixer"]].append(row["NDCG@10"])
    return "\n".join(_parts(by, parts) for by, parts in cells.items()) or "Not run.\n"


def _parts(by: str, parts: dict[str, dict[str, list[float]]]) -> str:
    mixers = list(dict.fromkeys(mixer for runs in parts.values() for mixer in runs))
    best = {part: max(map(_mean, runs.values())) for part, runs in parts.items()}
    lines = [f"| {by} | {' | '.join(parts)} |", "|" + " --- |" * (1 + len(parts))]
    for mixer in mixers:
        values = [spread(runs[mixer], bold=_mean(runs[mixer]) == best[part]) for part, runs in parts.items()]
        lines.append(f"| {mixer} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _mean(values: Iterable[float]) -> float:
    """As precise as it is printed."""
    return round(statistics.fmean(values), 4)


def habits_table(results: Iterable[Result]) -> str:
    """NDCG@10 by mixer and number of events known; the best possible last."""
    own = [result for result in results if result["study"] == "habits"]
    if not own:
        return "Not run.\n"
    kinds = itertools.pairwise(PLACES)
    head = [f"{first} to {end - 1}" for first, end in kinds]
    lines = [f"| events known | {' | '.join(head)} |", "|" + " --- |" * (1 + len(head))]
    for mixer, seeds in curves(own, "habits").items():
        lines.append(f"| {mixer} | {' | '.join(spread(values) for values in zip(*seeds, strict=True))} |")
    lines.append(f"| best possible | {' | '.join(f'{value:.4f}' for value in own[0]['best possible'])} |")
    return "\n".join(lines) + "\n"


def plot_habits(results: Sequence[Result]) -> None:
    """NDCG@10 against how many events are known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = [result for result in results if result["study"] == "habits"]
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    middles = [(first * end) ** 0.5 for first, end in itertools.pairwise(PLACES)]
    for (mixer, seeds), marker in zip(curves(own, "habits").items(), palette.MARKERS, strict=False):
        columns = list(zip(*seeds, strict=True))
        means = [statistics.fmean(values) for values in columns]
        bars = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in columns]
        axes.errorbar(middles, means, bars, marker=marker, color=palette.colour(mixer), label=mixer, capsize=2)
    axes.plot(middles, own[0]["best possible"], ":", color="gray", label="best possible")
    axes.axvline(Habits.length, color="gray", linewidth=0.8)
    axes.set(xlabel="events known (the line: length of training)", ylabel="NDCG@10", xscale="log", ylim=(0, 1))
    figure.legend(loc="outside right upper")
    figure.savefig(DOCUMENT.with_name("adaptation-habits.png"), dpi=palette.DPI)


def plot(results: Sequence[Result], study: str) -> None:
    """NDCG@10 against events since the switch: mean of the seeds, and their range as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own = [result for result in results if result["study"] == study]
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    switch = own[0]["switch"]
    for mixer, seeds in curves(own, study).items():
        kind = mixer.partition(", ")[2]
        if kind not in LINES:
            continue
        colour = palette.colour(mixer)
        x = [n + 1 - switch for n in range(len(seeds[0]))]
        means = [statistics.fmean(values) for values in zip(*seeds, strict=True)]
        axes.plot(x, means, linestyle=LINES[kind], color=colour, label=mixer)
        low, high = zip(*((min(values), max(values)) for values in zip(*seeds, strict=True)), strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    if "best possible" in own[0]:
        axes.axhline(own[0]["best possible"], color="gray", linestyle=":", label="best possible")
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set(xlabel="events since the switch", ylabel="NDCG@10", ylim=(0, None))
    figure.legend(loc="outside right upper")
    figure.savefig(DOCUMENT.with_name(f"adaptation-{study}.png"), dpi=palette.DPI)


def write() -> None:
    """Bring tables and plots up to date."""
    results, document = read(), DOCUMENT.read_text()
    texts = {"ablation": ablation_table(results), "accuracy": accuracy_table(results), "drift": drift_table(results)}
    texts["habits"] = habits_table(results)
    if any(result["study"] == "habits" for result in results):
        plot_habits(results)
    for study in SWITCHES:
        texts[study] = recovery_table(results, study)
        if any(result["study"] == study for result in results):
            plot(results, study)
    for name, text in texts.items():
        document = section(name).sub(lambda _, text=text: text, document)
    DOCUMENT.write_text(document)
