"""Write the tables of docs/emulation.md from reports of emulated runs; ``scripts/emulation.sh`` makes all of these.

    bash scripts/test.sh --emulate sm_90 --emulate-report report.json tests/emulator/emulated_errors.py
    python -m tools.emulation docs/emulation.md report.json

A run's figures take the place of those of the same kernels; all others stay, unless ``--anew`` is given. Launches of a
kernel add up over the reports that are given. Each row has the date and torch's version that its last figure is of.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .documents import section

RUNS = ("sm_80", "sm_90", "sm_100", "interpreter")
LOSSES = {"barriers": ("barrier", "barrier of a warp"), "waits": ("wait",), "fences": ("fence",), "masks": ("mask",)}
Row = tuple[str, ...]


class Table(NamedTuple):
    """What stands between two markers."""

    name: str
    head: Row
    keys: int  # how many columns, from the first, tell rows apart


ERRORS = Table("errors", ("kernels, forward and backward", "dtype", "Triton", *RUNS, "PyTorch", "of"), 3)
LOST = Table("losses", ("kernel", "architecture", "Triton", *LOSSES, "of"), 3)
EXECUTED = Table(
    "executed",
    (
        "kernel",
        "architecture",
        "Triton",
        "types",
        "launches",
        "warp instructions",
        "million a second",
        "findings",
        "of",
    ),
    3,
)


def rows(report: dict[str, Any]) -> Iterator[tuple[Table, Row]]:
    """What a report of ``--emulate-report`` says, row by row; cells that it says nothing of are empty."""
    architecture, version, of = report["architecture"], report["triton"], stamp(report)
    for kernels, found in report["properties"]:
        errors = (error(found["error"]) if each == architecture else "" for each in RUNS)
        yield ERRORS, (kernels, found["dtype"], version, *errors, error(found["usual"]), of)
    for lost in report["mutations"]:
        counts = [[lost["results"].get(kind, {}) for kind in kinds] for kinds in LOSSES.values()]
        yield LOST, (lost["kernel"], architecture, version, *map(caught, counts), of)


def launches(reports: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """What was launched of every kernel, all reports together."""
    kernels: dict[Row, list[dict[str, Any]]] = {}
    stamps: dict[Row, str] = {}
    for report in reports:
        for name, kernel in report["kernels"].items():
            key: Row = (name, report["architecture"], report["triton"])
            kernels.setdefault(key, []).append(kernel)
            stamps[key] = stamp(report)
    for key, parts in kernels.items():
        launched, instructions, seconds = (
            sum(p[what] for p in parts) for what in ("launches", "instructions", "seconds")
        )
        speed = instructions / max(seconds, 1e-9) / 1e6
        types, findings = (sorted({each for p in parts for each in p[what]}) for what in ("types", "findings"))
        figures = f"{launched:,}", f"{instructions:,}", f"{speed:.1f}", str(len(findings))
        yield (*key, ", ".join(types), *figures, stamps[key])


def stamp(report: dict[str, Any]) -> str:
    """What figures are of, beside a Triton."""
    return f"{report['date']}, torch {report['torch']}"


def error(x: float) -> str:
    """``2.3e-4``."""
    return f"{x:.1e}".replace("e-0", "e-")


def caught(kinds: list[dict[str, int]]) -> str:
    """How many losses were seen, of those that were executed."""
    executed = sum(number for results in kinds for result, number in results.items() if result != "not executed")
    seen = sum(results.get("found", 0) + results.get("other results", 0) for results in kinds)
    return f"{seen} of {executed}" if executed else ""


def read(text: str, table: Table) -> dict[Row, Row]:
    """The rows of a document's table by their keys."""
    found = re.search(section(table.name), text)
    if found is None:
        raise ValueError(f"no markers <!-- {table.name}:begin --> and <!-- {table.name}:end --> in the document")
    lines = [tuple(cell.strip() for cell in line.strip("|\n").split("|")) for line in found[0].splitlines()[2:]]
    wrong = [line for line in lines if len(line) != len(table.head)]
    if wrong:
        raise ValueError(f"table {table.name} must have {len(table.head)} columns; given {wrong[0]}")
    return {line[: table.keys]: line for line in lines}


def written(text: str, table: Table, known: dict[Row, Row]) -> str:
    """The document with these rows in its table."""
    lines = [table.head, ("---",) * len(table.head), *known.values()]
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return re.sub(section(table.name), lambda _: body, text)


def updated(text: str, reports: list[dict[str, Any]], *, anew: bool = False) -> str:
    """The document with the figures of some reports in place of its own, or, anew, of all its own."""
    tables = {table: {} if anew else read(text, table) for table in (ERRORS, LOST, EXECUTED)}
    found = [(table, row) for report in reports for table, row in rows(report)]
    for table, row in [*found, *((EXECUTED, row) for row in launches(reports))]:
        before = tables[table].get(row[: table.keys], row)
        tables[table][row[: table.keys]] = tuple(new or old for new, old in zip(row, before, strict=True))
    for table, known in tables.items():
        text = written(text, table, known)
    return text


def main() -> None:
    """Rewrite a document's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path)
    parser.add_argument("reports", type=Path, nargs="+", help="files that --emulate-report wrote")
    parser.add_argument("--anew", action="store_true", help="drop all rows that no report has")
    given = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in given.reports]
    given.document.write_text(updated(given.document.read_text(), reports, anew=given.anew))


if __name__ == "__main__":
    main()
