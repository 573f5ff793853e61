"""The job by several libraries: what is counted, kept and written of it."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers import page
from benchmarks.peers.sides import SIDES, lines_of_code
from tools.documents import ROOT

PROGRAM = '''"""A docstring
of two lines."""

# a comment
import os  # and another


def f(
    x,
):
    """Another docstring."""
    text = """two
lines"""
    return x, text, os
'''


def run(side: str, epochs: int, hr: float, **changes: object) -> dict:
    seconds = {"import": 1.0, "load": 0.25, "train": 30.0, "evaluate": 2.0, "recommend": 0.5}
    metrics, versions = {"HR@10": hr, "NDCG@10": 0.125}, {"torch": "2.13.0", "ttt4rec": "1.0"}
    return {
        "dataset": "toy", "side": side, "epochs": epochs, "cpu_seconds": seconds, "peak_mib": 1_234,
        "metrics": metrics, "versions": versions, "device": "a CPU", "commit": "abc", "date": "2030-01-01",
        "load_average": 1.26,
    } | changes  # fmt: skip


def test_lines_of_code_are_those_with_code() -> None:
    assert lines_of_code(PROGRAM) == 1 + 3 + 2 + 1
    assert all(side.path.exists() and side.lines < 60 for side in SIDES)


def test_a_run_takes_the_place_of_an_earlier_one_of_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for done in (run("RecTools, SASRec", 2, 0.1), run(SIDES[0].label, 2, 0.2), run(SIDES[0].label, 1, 0.3)):
        command.keep(path, done)
    command.keep(path, run(SIDES[0].label, 2, 0.4))
    found = [(one["side"], one["epochs"], one["metrics"]["HR@10"]) for one in page.read(path)["runs"]]
    assert found == [(SIDES[0].label, 1, 0.3), (SIDES[0].label, 2, 0.4), ("RecTools, SASRec", 2, 0.1)]


def test_tables_have_seconds_of_an_epoch_and_of_all() -> None:
    first, _, _, last = SIDES
    other = run(last.label, 1, 0.5, dataset="other", date="2030-01-02", load_average=None)
    runs = [run(first.label, 10, 0.25), other]
    text = page.tables({"runs": runs})
    assert text.count("### ") == 2
    assert (
        f"| {first.label} | {first.lines} | 10 | 1.0 | 0.25 | 30 | 2.0 | 0.50 | 3.0 | 34 | 1,234 | 0.2500 | 0.1250 |\n"
        in text
    )
    assert "a CPU; one thread; ttt4rec 1.0, torch 2.13.0; 2030-01-01 to 2030-01-02." in text
    assert text.endswith("Load average before a run: 1.3 to 1.3.\n")
    assert page.tables({"runs": []}) == "Not measured.\n"


def test_the_page_is_up_to_date() -> None:
    document = page.DOCUMENT.read_text()
    assert page.written(document, page.read(page.RESULTS_FILE)) == document, (
        "stale: run `python -m benchmarks.peers page`"
    )


@pytest.mark.slow
def test_our_program_does_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    results = tmp_path / "results.json"
    given = ["peers", "run", "--data", str(data), "--datasets", "toy", "--epochs", "1", "--sides", "ttt4rec, att"]
    monkeypatch.setattr(sys, "argv", [*given, "--results", str(results)])
    assert command.main() == 0
    (done,) = json.loads(results.read_text())["runs"]
    assert (done["dataset"], done["side"], done["epochs"]) == ("toy", "ttt4rec, attention", 1)
    assert done["recommended"]["users"] == 20
    assert 0 <= done["metrics"]["NDCG@10"] <= done["metrics"]["HR@10"] <= 1
    assert set(done["cpu_seconds"]) == set(page.PARTS)
    assert done["peak_mib"] > 50


def test_every_habit_has_a_test_that_is_there() -> None:
    _, _, habits = (ROOT / "docs" / "peers.md").read_text().partition("## The same habits")
    rows = [line.split("|")[1:-1] for line in habits.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 20
    for capability, *_, test in rows:
        assert (ROOT / test.strip(" `")).is_file(), capability
