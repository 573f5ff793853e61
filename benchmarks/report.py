"""From pytest-benchmark's JSON to a report with plots, docs/performance.md and the README's plot.

``python -m benchmarks.report FOLDER`` writes ``report.md`` and plots beside ``benchmark.json``;
``python -m benchmarks.report --documents`` brings both up to date with all folders in ``benchmarks/results``.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from tools.documents import ROOT, number, section

from .measurements import JSON_FILE, PLOTS, REPORT_FILE, Column, Result, Run, fastest

RESULTS = ROOT / "benchmarks" / "results"
LOGS = {"parity.log": "The kernels against the reference, `pytest -m gpu`"}


DOCUMENT, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "time-per-token.png"
SECTION = section("performance")
SHOWN = ("forward and backward, width 64", "one-token step, width 64", "training step", "full-catalogue evaluation")
READING = (
    "Milliseconds a call: the median over rounds in which all sides took turns, ± half the distance between the "
    "quartiles; the fastest in bold. A column is sequences × tokens."
)


def table(columns: dict[str, Column]) -> list[str]:
    """A Markdown table: a row a side, in the order of the first mention, and one that names the winners."""
    sides = dict.fromkeys(side for column in columns.values() for side in column)
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for side in sides:
        cells = [_cell(column, side) for column in columns.values()]
        if len(set(cells)) == 1 and isinstance(next(iter(columns.values())).get(side), str):
            cells[1:] = [""] * (len(cells) - 1)  # a reason need not be repeated
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return [*lines, "| *fastest* | " + " | ".join(map(_verdict, columns.values())) + " |"]


def _cell(column: Column, side: str) -> str:
    run = column.get(side, "not measured")
    if isinstance(run, str):
        return run if run.startswith(("absent", "not measured")) else f"not measured: {run}"
    text = f"{number(run.seconds * 1e3)} ± {number(run.stats['iqr'] / 2 * 1e3, 2)}"
    return f"**{text}**" if run is fastest(column) else text


def _verdict(column: Column) -> str:
    """Who won, and by how much the best TTT lost, or the best of the others."""
    best = fastest(column)
    if best is None:
        return "not measured"
    known = "" if all(isinstance(x, Run) or x.startswith("absent") for x in column.values()) else " of those measured"
    rivals = {side: run for side, run in column.items() if _is_ttt(side) != _is_ttt(best.side)}
    rival = fastest(rivals)
    behind = "" if rival is None else f"; {rival.side} takes {number(rival.ratio(best))} ×"
    return best.side + known + behind


def _is_ttt(side: str) -> bool:
    return side.startswith(("TTT-Linear (", "TTT-MLP (", "TTT4Rec"))


def details(result: Result) -> list[str]:
    """Everything known of every run."""
    head = ("side", "ms", "quartiles", "rounds", "to the fastest", "tokens/s", "peak MiB", "of copy", "of matmul")
    lines = []
    for title, columns in result.tables.items():
        for name, column in columns.items():
            rows = [_detail(run, column, result) for run in column.values() if isinstance(run, Run)]
            if rows:
                lines += [f"### {title}, {name}", "", *_markdown([*head, "parameters"], rows), ""]
    return lines


def _detail(run: Run, column: Column, result: Result) -> list[str]:
    stats, info = run.stats, run.info
    roofs, peak = result.own["roofs"][info["dtype"]], info["peak_bytes"]
    return [
        run.side,
        number(run.seconds * 1e3),
        f"{number(stats['q1'] * 1e3)} to {number(stats['q3'] * 1e3)}",
        str(stats["rounds"]),
        f"{run.ratio(fastest(column) or run):.2f} ×",
        f"{info['tokens'] / run.seconds:,.0f}",
        "unknown" if peak is None else f"{peak / 2**20:,.1f}",
        f"{info['bytes'] / run.seconds / roofs['copy']:.1%}" if "bytes" in info else "not counted",
        f"{info['flops'] / run.seconds / roofs['matmul']:.1%}" if "flops" in info else "not counted",
        f"{info['parameters']:,}" if "parameters" in info else "none",
    ]


def _markdown(head: Iterable[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [list(head), *rows]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return [text[0], "|" + " --- |" * len(lines[0]), *text[1:]]


def report(result: Result) -> str:
    """The whole of a result in Markdown."""
    lines = ["# Benchmarks", "", *_paragraphs(result.environment()), READING, ""]
    lines += _paragraphs(result.notes())
    for log, title in LOGS.items():
        if (path := result.path.parent / log).exists():
            lines += [f"{title}:", "", "```", *path.read_text().strip().splitlines()[-8:], "```", ""]
    lines += [f"![{name} of the mixers]({name}.png)" for name in PLOTS if result.runs] + [""]
    for title, columns in result.tables.items():
        lines += [f"## {title}", "", *table(columns), ""]
    lines += [
        "## Details", "",
        "FLOPs are those of the projections and of the recurrence written token by token, three times as many with "
        "the backward; bytes are inputs, outputs, weights, states and gradients, each moved once. Peak memory is what "
        "a call holds at once beyond its inputs and weights.", "",
        *details(result),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def performance_section(results: list[Result]) -> str:
    """What stands between the markers of docs/performance.md."""
    lines = []
    for kind, title in (("cuda", "On a GPU"), ("cpu", "On a CPU")):
        own = [result for result in results if result.own["device_type"] == kind]
        lines += [f"### {title}", ""] + ([] if own else ["Not measured.", ""])
        for result in own:
            lines += [*_paragraphs(result.environment()), READING, ""]
            for name in SHOWN:
                shown = table(result.tables[name]) if name in result.tables else ["Not measured."]
                lines += [f"{name[0].upper()}{name[1:]}:", "", *shown, ""]
            lines += _paragraphs(result.notes())
            where = result.path.parent.relative_to(ROOT)
            lines += [f"All of it, with memory, throughput and plots: [{where}](../{where}/{REPORT_FILE}).", ""]
    return "\n".join(lines)


def _paragraphs(texts: list[str]) -> list[str]:
    return [line for text in texts for line in (text, "")]


def committed() -> list[Result]:
    """The results in the repository, by folder."""
    return [Result(path) for path in sorted(RESULTS.glob(f"*/{JSON_FILE}"))]


def main() -> None:
    """Write a folder's report, or what the documents show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where benchmark.json is")
    parser.add_argument("--documents", action="store_true", help="rewrite docs/performance.md and the README's plot")
    given = parser.parse_args()
    if given.folder is not None:
        from .plots import plot

        result = Result(given.folder / JSON_FILE)
        (given.folder / REPORT_FILE).write_text(report(result))
        plot(result, given.folder)
    if given.documents:
        from .plots import plot_for_readme

        text = performance_section(committed())
        DOCUMENT.write_text(SECTION.sub(lambda _: text, DOCUMENT.read_text()))
        plot_for_readme(next(r for r in committed() if r.own["device_type"] == "cpu"), PICTURE)


if __name__ == "__main__":
    main()
