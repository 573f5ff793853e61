"""The tables of docs/emulation.md: what stands there reads back, and a run's figures take their places."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools import emulation
from tools.documents import ROOT
from tools.ptx_emulator import plugin

DOCUMENT = (ROOT / "docs" / "emulation.md").read_text()
TABLES = (emulation.ERRORS, emulation.LOST, emulation.EXECUTED)


def report(**parts: Any) -> dict[str, Any]:
    versions = {"architecture": "sm_90", "date": "2030-01-02", "triton": "4.0", "torch": "3.0"}
    return versions | {"properties": [], "mutations": [], "kernels": {}} | parts


@pytest.mark.parametrize("table", TABLES)
def test_the_document_reads_back(table: emulation.Table) -> None:
    known = emulation.read(DOCUMENT, table)
    assert known
    assert emulation.written(DOCUMENT, table, known) == DOCUMENT
    assert all(cell[:2] == "20" and ", torch " in cell for *_, cell in known.values())


def test_figures_take_the_place_of_those_of_the_same_kernel() -> None:
    found = {"dtype": "bfloat16", "error": 0.00123, "usual": 0.5}
    kernel = {"launches": 2, "instructions": 3_000_000, "seconds": 1.5, "types": ["bf16"], "findings": ["one"]}
    results = {
        "barrier": {"found": 3, "harmless": 1},
        "barrier of a warp": {"other results": 2, "not executed": 7},
    }
    first = report(
        properties=[["linear D 16 K 8", found]],
        mutations=[{"kernel": "a_kernel", "results": results}],
        kernels={"a_kernel": kernel},
    )
    second = report(
        properties=[["linear D 16 K 8", found | {"error": 0.00456}]],
        kernels={"a_kernel": kernel | {"types": ["bf16", "fp32"], "findings": ["one", "another"]}},
    )
    interpreted = report(properties=[["linear D 16 K 8", found]], architecture="interpreter")
    text = emulation.updated(DOCUMENT, [first, second, interpreted])
    of = "2030-01-02, torch 3.0"
    before, errors, lost, executed = (
        emulation.read(t, table) for t, table in zip((DOCUMENT, *[text] * 3), (TABLES[0], *TABLES), strict=True)
    )
    key = ("linear D 16 K 8", "bfloat16", "4.0")
    assert errors == before | {key: (*key, "", "4.6e-3", "", "1.2e-3", "5.0e-1", of)}
    assert lost["a_kernel", "sm_90", "4.0"][3:] == ("5 of 6", "", "", "", of)
    assert executed["a_kernel", "sm_90", "4.0"][3:] == ("bf16, fp32", "4", "6,000,000", "2.0", "2", of)
    known = next(iter(before))
    other = report(properties=[[known[0], found | {"dtype": known[1]}]], triton=known[2])
    changed = emulation.read(emulation.updated(DOCUMENT, [other]), TABLES[0])
    assert {k: row for k, row in changed.items() if row != before[k]} == {known: changed[known]}
    assert changed[known][4] == "1.2e-3"
    assert list(emulation.read(emulation.updated(text, [first], anew=True), emulation.LOST)) == [
        ("a_kernel", "sm_90", "4.0")
    ]


def test_a_run_of_the_interpreter_reports_too(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    config = SimpleNamespace(stash={}, getoption={"--emulate-report": str(path)}.get)
    call = SimpleNamespace(
        when="call", user_properties=[("a kernel", {"dtype": "float32", "error": 1e-7, "usual": 2e-7})]
    )
    plugin.pytest_terminal_summary(SimpleNamespace(stats={"passed": [call]}), config)
    own = json.loads(path.read_text())
    table = emulation.read(emulation.updated(DOCUMENT, [own], anew=True), emulation.ERRORS)
    assert table["a kernel", "float32", own["triton"]][3:8] == ("", "", "", "1.0e-7", "2.0e-7")


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no markers <!-- errors:begin -->"):
        emulation.updated("# Nothing", [])


def test_the_core_is_as_small_as_the_document_says() -> None:
    emulator = ROOT / "tools" / "ptx_emulator"
    files = [emulator / "decoder.py", *(emulator / "core").iterdir()]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert lines <= 1500
    assert f"these are {lines:,} lines" in DOCUMENT


STOPPED = """
import os, signal, time

def test_first(record_property):
    record_property("first", 1)

def test_second():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

def test_third(record_property):
    record_property("third", 3)
"""


@pytest.mark.slow
def test_a_run_that_is_told_to_end_reports_what_there_was(tmp_path: Path) -> None:
    (tmp_path / "test_stopped.py").write_text(STOPPED)
    options = ["-q", "-p", "no:cacheprovider", "-p", "tools.ptx_emulator.plugin", "--emulate-report", "report.json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=tmp_path, env=environment, check=False)
    assert run.returncode == pytest.ExitCode.INTERRUPTED
    assert json.loads((tmp_path / "report.json").read_text())["properties"] == [["first", 1]]
