"""Studies written up in ``docs/``: tables of means and spreads, and a plot of every study."""

import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tools.documents import ROOT, number, section, spread
from ttt4rec import palette

from . import costs, knobs
from .grid import STUDIES
from .runner import Result, find, read_results
from .study import Data, Study

DOCUMENTS = [ROOT / "docs" / "studies.md", ROOT / "docs" / "paper.md"]
RESULTS = ROOT / "studies" / "results"
RUNS_FILE, COSTS_FILE = RESULTS / "runs.jsonl", RESULTS / "costs.json"
PICTURE = "studies-{}.png"
METRICS = ("HR@10", "HR@50", "NDCG@10", "NDCG@50")
VALIDATION = "validation NDCG@10"  # of the best epoch
COSTS = ("epochs", "CPU s an epoch", "CPU min a training")

Cells = dict[tuple[Data, str], list[Result]]
"""Finished runs by data set and variant."""


def finished(study: Study, results: Sequence[Result]) -> Cells:
    """The results of a study's seeds; an empty list where there are none."""
    cells: Cells = {}
    for run in study.runs():
        own = cells.setdefault((run.data, run.variant), [])
        if (result := find(results, run)) is not None:
            own.append(result)
    return cells


def tables(study: Study, cells: Cells) -> str:
    """A Markdown table for each data set, best mean of each metric in bold; published values beside them."""
    parts = []
    for data in study.datasets:
        known = {variant: cells[data, variant] for variant in study.variants}
        first = next((runs[0] for runs in known.values() if runs), None)
        if first is None:
            parts.append(f"**{data.title}**: not run yet.\n\n")
            continue
        published = study.published.get(data.name, {})
        head = ["", VALIDATION]
        for metric in METRICS:
            head += [metric, "published"] if published else [metric]
        head += COSTS
        parts.append(f"**{data.title}**, {_about(first['data'])}:\n\n{row(head)}{row(['---'] * len(head))}")
        best = {
            name: max(statistics.fmean(_values(name, runs)) for runs in known.values() if runs)
            for name in (VALIDATION, *METRICS)
        }
        for variant, runs in known.items():
            missing = f" ({len(runs)} of {len(study.seeds)} seeds)" if 0 < len(runs) < len(study.seeds) else ""
            beside = _named(published.get(variant)) if published else {}
            parts.append(row([f"{variant}{missing}", *(_cells(runs, best, beside) if runs else ["not run yet"])]))
        parts.append("\n")
    return "".join(parts)


def _about(data: dict[str, Any]) -> str:
    counts = [f"{data[name]:,} {name}" for name in ("users", "items")]
    counts += [f"{data['train targets']:,} training targets", f"{data['test targets']:,} test targets"]
    new = data.get("test targets of new users", 0)
    return ", ".join(counts) + (f" ({new:,} of users who are not in training)" if new else "")


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |\n"


def _named(published: Sequence[float] | None) -> dict[str, float | None]:
    return dict(zip(METRICS, published or [None] * len(METRICS), strict=True))


def _cells(runs: list[Result], best: dict[str, float], published: dict[str, float | None]) -> list[str]:
    cells = []
    for metric in best:
        values = _values(metric, runs)
        mean = statistics.fmean(values)
        cells.append(spread(values, bold=round(mean, 4) == round(best[metric], 4)))
        if metric in published:
            other = published[metric]
            cells.append(f"{other:.4f} ({mean / other - 1:+.0%})" if other else "-")
    return cells + _costs(runs)


def _values(metric: str, runs: list[Result]) -> list[float]:
    return [max(run["validation"]) if metric == VALIDATION else run["test"][metric] for run in runs]


def _costs(runs: list[Result]) -> list[str]:
    epochs = [len(run["validation"]) for run in runs]
    seconds = [run["cpu_seconds"] for run in runs]
    number_of = f"{min(epochs)}" if min(epochs) == max(epochs) else f"{min(epochs)} to {max(epochs)}"
    return [number_of, number(sum(seconds) / sum(epochs), 2), number(statistics.fmean(seconds) / 60, 2)]


def plot(study: Study, cells: Cells, path: Path) -> None:
    """A panel for each data set: NDCG@10 of each run over the CPU time of its training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    datasets = [data for data in study.datasets if any(cells[data, variant] for variant in study.variants)]
    figure = Figure(figsize=(3.2 * len(datasets) + 1.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(datasets), squeeze=False)[0]
    for axes, data in zip(panels, datasets, strict=True):
        for variant, marker in palette.markers(study.variants).items():
            runs = cells[data, variant]
            x, y = ([of(run) for run in runs] for of in (_cpu_minutes, _ndcg))
            hollow = {"markerfacecolor": "white"} if palette.has_mamba_backbone(variant) else {}
            axes.plot(x, y, marker, color=palette.colour(variant), label=variant, **hollow)
        axes.set(xlabel="CPU minutes of a training", xlim=(0, None))
        axes.set_title(data.title.replace(", ", "\n", 1), fontsize="medium")
    panels[0].set_ylabel("NDCG@10, test")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(datasets) + 1, fontsize="small"
    )
    figure.savefig(path, dpi=palette.DPI)


def _cpu_minutes(run: Result) -> float:
    return run["cpu_seconds"] / 60


def _ndcg(run: Result) -> float:
    return run["test"]["NDCG@10"]


def written(document: str) -> str:
    """The document with every part between markers brought up to date with the results."""
    results = read_results(RUNS_FILE)
    parts = {name: tables(study, finished(study, results)) for name, study in STUDIES.items()}
    parts["costs"] = costs.table(json.loads(COSTS_FILE.read_text()))
    for name, text in parts.items():
        document = section(name).sub(lambda _, text=text: text, document)
    return document


def write() -> None:
    """Bring the documents and the plots that they show up to date with the results."""
    results = read_results(RUNS_FILE)
    for path in DOCUMENTS:
        document = path.read_text()
        path.write_text(written(document))
        for name, study in STUDIES.items():
            picture = PICTURE.format(name)
            if picture in document and any((cells := finished(study, results)).values()):
                draw = knobs.plot if study is knobs.STUDY else partial(plot, study)
                draw(cells, path.with_name(picture))
