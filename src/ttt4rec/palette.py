"""Colours of the pictures: a method has the same one in all of them."""

from collections import Counter
from collections.abc import Iterable

LINEAR, MLP, ATTENTION, GRU, MAMBA = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"
METHODS = {
    "NARM": "#882255",
    "HSTU": "#44aa99",
    "BERT4Rec": "#117733",
    "gated delta": "#661100",
    "Mamba-2": "#999933",
    "TTT-Linear of flash": "#88ccee",
    "TTT-Linear": LINEAR,
    "+ Linear": LINEAR,  # "Mamba + Linear", as the paper says
    "TTT-MLP": MLP,
    "+ MLP": MLP,
    "TTT4Rec": MLP,
    "Mamba": MAMBA,
    "attention": ATTENTION,
    "SASRec": ATTENTION,
    "GRU": GRU,
    "softmax over all": MLP,  # TTT-MLP's usual loss
    "sampled softmax": "#56b4e9",
    "gBCE": "#777777",
    "BPR": "#332288",
}
"""By a part of the label; the first that occurs counts. The eye tells them apart without red or green, too."""
MARKERS = "os^Dv"
DPI = 200
"""Dots an inch of a picture: twice what a page shows."""


def colour(label: str) -> str:
    """The colour of the method that a label names; black for none."""
    return next((value for name, value in METHODS.items() if name in label), "black")


def has_mamba_backbone(label: str) -> bool:
    """Whether a label names a TTT layer with the Mamba backbone, which has the colour of its inner model."""
    return "Mamba" in label and colour(label) in (LINEAR, MLP)


def markers(labels: Iterable[str]) -> dict[str, str]:
    """A marker a label: labels of one colour have different ones."""
    seen: Counter[str] = Counter()
    found = {}
    for label in labels:
        found[label] = MARKERS[seen[colour(label)] % len(MARKERS)]
        seen[colour(label)] += 1
    return found
