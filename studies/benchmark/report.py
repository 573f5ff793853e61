"""``docs/benchmarks.md``: a table for each data set, with what others have published in a column of its own."""

import statistics
from collections.abc import Iterable, Sequence

from tools.documents import ROOT, number, section, spread

from ..report import row
from ..runner import Result, read_results
from ..study import Data
from . import checks, curves
from .design import AIM, ALL, ML_1M, NEW, PUBLISHED, Plan, Published

DOCUMENT = ROOT / "docs" / "benchmarks.md"
RUNS_FILE = ROOT / "studies" / "results" / "benchmark" / "runs.jsonl"
METRICS = ((ALL, "HR@10"), (ALL, "NDCG@10"), (NEW, "HR@10"), (NEW, "NDCG@10"))
HEAD = (
    "", "validation NDCG@10", "HR@10, all items", "NDCG@10, all items", "HR@10, seen out", "NDCG@10, seen out",
    "published HR@10, NDCG@10", "learning rate", "epochs", "CPU min a training", "MiB",
)  # fmt: skip


def tables(plan: Plan, results: Sequence[Result], checked: Sequence[Result] = ()) -> str:
    """Of all data sets, each under its heading; with what others' programs reached."""
    return "\n".join(_table(plan, data, results, checked) for data in plan.datasets)


def _table(plan: Plan, data: Data, results: Sequence[Result], checked: Sequence[Result]) -> str:
    published, others = PUBLISHED.get(data, {}), checks.rows(data, checked)
    rows = {method: plan.finished(data, method, results) for method in plan.methods if plan.runs_on(data, method)}
    best = [_best((*rows.values(), *others.values()), metric) for metric in METRICS]
    known = next((runs[0]["data"] for runs in rows.values() if runs), None)
    about = "" if known is None else f", {known['users']:,} users, {known['items']:,} items"
    text = f"### {data.title}{about}\n\n{row(HEAD)}{row(['---'] * len(HEAD))}"
    for method, runs in rows.items():
        text += row(_row(method, runs, best, _published(published.get(method)), len(plan.seeds)))
    for label, runs in others.items():
        text += row(_row(label, runs, best, "", len(plan.seeds)))
    for method in published:
        if method not in plan.methods:
            text += row([method, *[""] * 5, _published(published[method]), *[""] * 4])
    return text


def _row(method: str, runs: Sequence[Result], best: Sequence[float], published: str, seeds: int) -> list[str]:
    if not runs:
        return [method, "not run yet", *[""] * len(METRICS), published, *[""] * 4]
    missing = f" ({len(runs)} of {seeds} seeds)" if len(runs) < seeds else ""
    cells = [_cell(_values(runs, metric), most) for metric, most in zip(METRICS, best, strict=True)]
    validation = spread([max(run["validation"]) for run in runs])
    return [f"{method}{missing}", validation, *cells, published, *_costs(runs)]


def _best(rows: Iterable[Sequence[Result]], metric: tuple[str, str]) -> float:
    """The best mean of all methods."""
    return max((statistics.fmean(values) for runs in rows if (values := _values(runs, metric))), default=0.0)


def _values(runs: Sequence[Result], metric: tuple[str, str]) -> list[float]:
    part, name = metric
    return [run[part][name] for run in runs if run[part] is not None]


def _cell(values: Sequence[float], best: float) -> str:
    """Mean and spread; bold if it is the best mean."""
    if not values:
        return "-"
    return spread(values, bold=round(statistics.fmean(values), 4) == round(best, 4))


def _published(value: Published | None) -> str:
    if value is None:
        return ""
    seen = "" if value.seen == "out" else f"; seen items: {value.seen}"
    return f"{value.hr:.4f}, {value.ndcg:.4f} ({value.source}{seen})"


def _costs(runs: Sequence[Result]) -> list[str]:
    epochs = sorted({len(run["validation"]) for run in runs})
    minutes = statistics.fmean(run["cpu_seconds"] for run in runs) / 60
    rate = f"{runs[0]['settings']['learning_rate']:g}"
    counts = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
    return [rate, counts, number(minutes, 2), f"{max(run['peak_mib'] for run in runs):,}"]


def state(plan: Plan, results: Sequence[Result]) -> str:
    """How much of the page has been run, and how far the first method is from its aim."""
    done = [result for data in plan.datasets for method in plan.methods for result in plan.done(data, method, results)]
    hours = sum(result["wall_seconds"] for result in done) / 3600
    text = f"{len(done)} of {plan.total} trainings have been run, in {hours:.1f} hours of one thread each."
    return f"{text}\n\n{_aim(plan, results)}\n"


def _aim(plan: Plan, results: Sequence[Result]) -> str:
    method = next(iter(plan.methods))
    aimed = " and ".join(f"{name} {value:.3f}" for name, value in AIM.items())
    above = "above every published figure but that of 8 blocks with times"
    text = f"The aim on ml-1m, leave-one-out, seen items out: {aimed}, {above}. {method}:"
    runs = plan.finished(ML_1M, method, results) if ML_1M in plan.datasets else []
    if not runs:
        return f"{text} not run yet."
    means = {name: statistics.fmean(_values(runs, (NEW, name))) for name in AIM}
    reached = [f"{name} {mean:.4f} ({mean / AIM[name] - 1:+.0%})" for name, mean in means.items()]
    return f"{text} {', '.join(reached)}; {len(runs)} of {len(plan.seeds)} seeds."


def written(document: str, plan: Plan, results: Sequence[Result], checked: Sequence[Result] = ()) -> str:
    """The document with its parts between markers brought up to date."""
    parts = {"state": state(plan, results), "tables": tables(plan, results, checked)} | curves.tables(plan, results)
    for name, text in parts.items():
        document = section(name).sub(lambda _, text=text: text, document)
    return document


def write() -> None:
    """Bring the page and its pictures up to date with the results."""
    results, checked = read_results(RUNS_FILE), read_results(checks.CHECKS_FILE)
    DOCUMENT.write_text(written(DOCUMENT.read_text(), Plan(), results, checked))
    for name, panels in curves.pictures(Plan(), results).items():
        curves.plot(panels, DOCUMENT.with_name(name))
