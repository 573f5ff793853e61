"""Pictures: a method has one colour, whatever a study or a contest calls it."""

from itertools import chain
from xml.etree import ElementTree

import pytest

from benchmarks import sides
from studies.grid import STUDIES
from tools import drawings
from tools.documents import ROOT
from ttt4rec import palette


@pytest.mark.parametrize(
    ("colour", "labels"),
    [
        (palette.LINEAR, ["TTT-Linear", "TTT-Linear (Mamba)", "TTT4Rec, TTT-Linear", "Mamba + Linear"]),
        (palette.MLP, ["TTT-MLP, Mamba backbone", "TTT4Rec, TTT-MLP", "Transformer + MLP", "TTT4Rec"]),
        (palette.ATTENTION, ["attention", "SASRec (attention), 0.001", "SASRec"]),
        (palette.GRU, ["GRU", "GRU4Rec (GRU), dropout 0.5"]),
        (palette.MAMBA, ["Mamba, plain PyTorch of transformers", "Mamba4Rec (Mamba)"]),
    ],
)
def test_names_of_a_method_have_its_colour(colour: str, labels: list[str]) -> None:
    assert {palette.colour(label) for label in labels} == {colour}


def test_everything_that_is_plotted_has_a_colour() -> None:
    labels = [*sides.side_makers(), *chain.from_iterable(study.variants for study in STUDIES.values())]
    assert not [label for label in labels if palette.colour(label) == "black"]
    assert palette.colour("NARM (GRU with attention)") not in (palette.GRU, palette.ATTENTION)
    assert palette.colour("Mamba-2, Triton kernels of mamba-ssm") != palette.MAMBA


def test_labels_of_one_colour_differ_in_their_markers() -> None:
    markers = palette.markers(["TTT-MLP, 0.001", "GRU, 0.001", "TTT-MLP, 0.003"])
    assert markers["TTT-MLP, 0.001"] == markers["GRU, 0.001"] != markers["TTT-MLP, 0.003"]
    assert palette.has_mamba_backbone("Mamba + MLP")
    assert not palette.has_mamba_backbone("Mamba4Rec (Mamba)")


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_drawings_are_what_the_documents_show(name: str) -> None:
    drawn = str(drawings.DRAWINGS[name]())
    ElementTree.fromstring(drawn)
    assert (ROOT / "docs" / f"{name}.svg").read_text() == drawn, "stale: run `python -m tools.drawings`"
    assert any(f"{name}.svg)" in path.read_text() for path in ROOT.glob("docs/*.md"))
