"""The tables of docs/emulation.md: what stands there reads back, and a run's figures take their places."""

from typing import Any

import pytest

from tools import emulation
from tools.documents import ROOT

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
    assert all(cell[:2] == "20" and ", Triton " in cell for *_, cell in known.values())


def test_figures_take_the_place_of_those_of_the_same_kernel() -> None:
    found = {"dtype": "bfloat16", "error": 0.00123, "usual": 0.5}
    own = report(
        properties=[["linear D 16 K 8", found], ["a new one", found]],
        mutations=[
            {
                "kernel": "a_kernel",
                "results": {
                    "barrier": {"found": 3, "harmless": 1},
                    "barrier of a warp": {"other results": 2, "not executed": 7},
                },
            }
        ],
        kernels={"a_kernel": {"launches": 2, "instructions": 3_000_000, "seconds": 1.5, "findings": ["one"]}},
    )
    text = emulation.updated(DOCUMENT, [own])
    of = "2030-01-02, Triton 4.0, torch 3.0"
    before, errors, lost, executed = (
        emulation.read(t, table) for t, table in zip((DOCUMENT, *[text] * 3), (TABLES[0], *TABLES), strict=True)
    )
    key = ("linear D 16 K 8", "bfloat16")
    assert errors[key] == (*key, before[key][2], "1.2e-3", before[key][4], "5.0e-1", of)
    assert errors["a new one", "bfloat16"] == ("a new one", "bfloat16", "", "1.2e-3", "", "5.0e-1", of)
    assert {k: row for k, row in errors.items() if k in before and k != key} == {
        k: r for k, r in before.items() if k != key
    }
    assert lost["a_kernel", "sm_90"] == ("a_kernel", "sm_90", "5 of 6", "", "", "", of)
    assert executed["a_kernel", "sm_90"] == ("a_kernel", "sm_90", "2", "3,000,000", "2.0", "1", of)
    assert list(emulation.read(emulation.updated(text, [own], anew=True), emulation.LOST)) == [("a_kernel", "sm_90")]


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no markers <!-- errors:begin -->"):
        emulation.updated("# Nothing", [])
