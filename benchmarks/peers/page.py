"""``docs/peers.md``: what the job took each library."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.documents import ROOT, number, section

from .sides import SIDES

DOCUMENT = ROOT / "docs" / "peers.md"
RESULTS_FILE = ROOT / "benchmarks" / "results" / "peers-cpu-epyc-2-cores.json"
PARTS = ("import", "load", "train", "evaluate", "recommend")
HEAD = (
    "", "lines of code", "epochs", *(f"{part}, s" for part in PARTS), "a training epoch, s", "all, s", "MiB",
    "HR@10", "NDCG@10",
)  # fmt: skip
_SHOWN = ("ttt4rec", "rectools", "recbole", "torch")


def read(path: Path) -> dict[str, Any]:
    """Results so far, none if there is no file."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    return results


def tables(results: dict[str, Any]) -> str:
    """A table for each data set."""
    runs = results["runs"]
    if not runs:
        return "Not measured.\n"
    datasets = dict.fromkeys(run["dataset"] for run in runs)
    return "\n".join(_table(name, [run for run in runs if run["dataset"] == name]) for name in datasets) + _about(runs)


def _table(name: str, runs: Sequence[dict[str, Any]]) -> str:
    rows = [HEAD, ["---"] * len(HEAD), *map(_row, runs)]
    return f"### {name}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _row(run: dict[str, Any]) -> list[str]:
    seconds, epochs = run["cpu_seconds"], run["epochs"]
    parts = [number(seconds[part], 2) for part in PARTS]
    together = [number(seconds["train"] / epochs, 2), number(sum(seconds.values()), 2)]
    metrics = [f"{run['metrics'][metric]:.4f}" for metric in ("HR@10", "NDCG@10")]
    lines = next(side.lines for side in SIDES if side.label == run["side"])
    return [run["side"], str(lines), str(epochs), *parts, *together, f"{run['peak_mib']:,}", *metrics]


def _about(runs: Sequence[dict[str, Any]]) -> str:
    """Machine, versions and days of all runs."""
    devices = ", ".join(dict.fromkeys(run["device"] for run in runs))
    found = {name: sorted({v for run in runs if (v := run["versions"].get(name))}) for name in _SHOWN}
    versions = ", ".join(f"{name} {' and '.join(known)}" for name, known in found.items() if known)
    days = sorted({run["date"] for run in runs})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    loads = [run["load_average"] for run in runs if run["load_average"] is not None]
    load = f" Load average before a run: {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    return f"\n{devices}; one thread; {versions}; {when}.{load}\n"


def written(document: str, results: dict[str, Any]) -> str:
    """The document with its part between markers brought up to date."""
    return section("peers").sub(lambda _: tables(results), document)


def write() -> None:
    """Bring the page up to date."""
    DOCUMENT.write_text(written(DOCUMENT.read_text(), read(RESULTS_FILE)))
