"""Studies written up: tables of means and spreads into ``docs/studies.md``, and a plot of every study beside it."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import RESULTS, ROOT, number, section, spread
from . import costs
from .grid import STUDIES, Study
from .runner import Result, find, read_results

DOCUMENT = ROOT / "docs" / "studies.md"
RUNS_FILE, COSTS_FILE = RESULTS / "studies" / "runs.jsonl", RESULTS / "studies" / "costs.json"
PICTURE = "studies-{}.png"
METRICS = ("NDCG@10", "HR@10", "NDCG@50", "HR@50")
HEAD = ("validation NDCG@10", *METRICS, "epochs", "CPU s an epoch", "CPU min a training")

Cells = dict[tuple[str, str], list[Result]]
"""Finished runs by data set and variant."""


def finished(study: Study, results: Sequence[Result]) -> Cells:
    """The results of a study's seeds; an empty list where there are none."""
    cells: Cells = {}
    for run in study.runs():
        own = cells.setdefault((run.dataset, run.variant), [])
        if (result := find(results, run)) is not None:
            own.append(result)
    return cells


def tables(study: Study, cells: Cells) -> str:
    """A Markdown table for each data set, best mean of each metric in bold."""
    parts = []
    for dataset in study.datasets:
        known = {variant: cells[dataset, variant] for variant in study.variants}
        first = next((runs[0] for runs in known.values() if runs), None)
        if first is None:
            parts.append(f"**{dataset}**: not run yet.\n\n")
            continue
        data = first["data"]
        about = f"{data['users']:,} users, {data['items']:,} items, {data['train targets']:,} training targets"
        parts.append(f"**{dataset}**, {about}:\n\n| | {' | '.join(HEAD)} |\n|{' --- |' * (len(HEAD) + 1)}\n")
        best = {
            name: max(statistics.fmean(_values(name, runs)) for runs in known.values() if runs) for name in HEAD[:5]
        }
        for variant, runs in known.items():
            cell = [_metric(name, runs, best[name]) for name in best] + _costs(runs) if runs else ["not run yet"]
            missing = f" ({len(runs)} of {len(study.seeds)} seeds)" if 0 < len(runs) < len(study.seeds) else ""
            parts.append(f"| {variant}{missing} | {' | '.join(cell)} |\n")
        parts.append("\n")
    return "".join(parts)


def _values(metric: str, runs: list[Result]) -> list[float]:
    return [run["test"][metric] if metric in run["test"] else max(run["validation"]) for run in runs]


def _metric(metric: str, runs: list[Result], best: float) -> str:
    values = _values(metric, runs)
    return spread(values, bold=statistics.fmean(values) == best)


def _costs(runs: list[Result]) -> list[str]:
    epochs = [len(run["validation"]) for run in runs]
    seconds = [run["cpu_seconds"] for run in runs]
    number_of = f"{min(epochs)}" if min(epochs) == max(epochs) else f"{min(epochs)} to {max(epochs)}"
    return [number_of, number(sum(seconds) / sum(epochs), 2), number(statistics.fmean(seconds) / 60, 2)]


def plot(study: Study, cells: Cells, path: Path) -> None:
    """A panel for each data set: NDCG@10 of each run over the CPU time of its training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    datasets = [name for name in study.datasets if any(cells[name, variant] for variant in study.variants)]
    figure = Figure(figsize=(3.2 * len(datasets) + 1.5, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(datasets), squeeze=False)[0]
    for axes, dataset in zip(panels, datasets, strict=True):
        for i, variant in enumerate(study.variants):
            runs = cells[dataset, variant]
            x = [run["cpu_seconds"] / 60 for run in runs]
            axes.plot(x, [run["test"]["NDCG@10"] for run in runs], "o", color=f"C{i}", label=variant)
        axes.set(title=dataset, xlabel="CPU minutes of a training", xlim=(0, None))
    panels[0].set_ylabel("NDCG@10, test")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(datasets) + 1, fontsize="small"
    )
    figure.savefig(path, dpi=110)


def written(document: str) -> str:
    """The document with every part between markers brought up to date with the results."""
    results = read_results(RUNS_FILE)
    parts = {name: _part(name, finished(study, results)) for name, study in STUDIES.items()}
    parts["costs"] = costs.table(json.loads(COSTS_FILE.read_text()))
    for name, text in parts.items():
        document = section(name).sub(lambda _, text=text: text, document)
    return document


def _part(name: str, cells: Cells) -> str:
    picture = f"![{STUDIES[name].title}]({PICTURE.format(name)})\n" if any(cells.values()) else ""
    return tables(STUDIES[name], cells) + picture


def write() -> None:
    """Bring ``docs/studies.md`` and its plots up to date with the results."""
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
    results = read_results(RUNS_FILE)
    for name, study in STUDIES.items():
        if any((cells := finished(study, results)).values()):
            plot(study, cells, DOCUMENT.with_name(PICTURE.format(name)))
