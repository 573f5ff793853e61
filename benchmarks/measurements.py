"""What pytest-benchmark wrote, by tables and columns."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JSON_FILE, REPORT_FILE, NOTES_FILE = "benchmark.json", "report.md", "notes.md"
PLOTS = ("time", "memory", "roofline")
"""Names of the pictures of a result."""


@dataclass(frozen=True)
class Run:
    """One side of one contest: what was known and what was measured."""

    info: dict[str, Any]
    stats: dict[str, Any]

    @property
    def side(self) -> str:
        """Its label."""
        return self.info["side"]

    @property
    def seconds(self) -> float:
        """Median of a call."""
        return self.stats["median"]

    def ratio(self, other: "Run") -> float:
        """How many times as long as another side of the contest: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.stats["data"], other.stats["data"], strict=True))


Column = dict[str, Run | str]
"""A contest's sides by label: measured, or why not."""


class Result:
    """A file that pytest-benchmark wrote, by tables and columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.json = json.loads(path.read_text())
        self.own = self.json["ttt4rec"]
        self.runs = [Run(b["extra_info"], b["stats"]) for b in self.json["benchmarks"] if "table" in b["extra_info"]]
        found: dict[tuple[str, str, str], Run | str] = {
            (run.info["table"], run.info["column"], run.side): run for run in self.runs
        }
        found |= {(row["table"], row["column"], row["side"]): row["why"] for row in self.own["not_measured"]}
        self.tables: dict[str, dict[str, Column]] = {}
        for title, column in self.own["contests"]:
            sides = {side: found[title, column, side] for side in self.own["sides"] if (title, column, side) in found}
            self.tables.setdefault(title, {})[column] = sides

    def environment(self) -> list[str]:
        """Sentences on what was measured on, and when."""
        machine, commit = self.json["machine_info"], self.json["commit_info"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        driver = f", driver {machine['driver']}" if machine["driver"] else ""
        begin, end = self.own["load_average"]
        changed = ", with changes" if commit.get("dirty") else ""
        lines = [
            f"{machine['device']}, {machine['memory_gib']} GiB{driver}; {machine['threads']} threads, "
            f"load average {begin} before and {end} after; Python {machine['python']}, {versions}; "
            f"commit {commit['id'][:10]}{changed}, {self.json['datetime'][:10]}."
        ]
        for dtype, roofs in self.own["roofs"].items():
            lines.append(
                f"Reached in {dtype}: {roofs['copy'] / 1e9:.0f} GB/s when copying, "
                f"{roofs['matmul'] / 1e12:.2f} TFLOP/s in a matrix product."
            )
        return lines + ([self.own["note"]] if self.own["note"] else [])

    def notes(self) -> list[str]:
        """What a person wrote about this result."""
        file = self.path.parent / NOTES_FILE
        return [file.read_text().strip()] if file.exists() else []


def fastest(column: Column) -> Run | None:
    """The side with the smallest median, if any was measured."""
    return min((run for run in column.values() if isinstance(run, Run)), key=lambda run: run.seconds, default=None)
