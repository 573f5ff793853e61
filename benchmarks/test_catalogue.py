"""Loss and ranks over a catalogue in blocks, against the matrix of all scores and PyTorch's own chunked loss.

    pytest benchmarks/test_catalogue.py -s

The contests of smaller catalogues take turns. With a million items every case runs in a process of its own, which
reports its peak memory; the matrix of all scores with 4,096 targets needs 3 × 15.3 GiB, so the dense side runs where it
fits, with 256 targets.
"""

import json
import subprocess
import sys

import pytest
import torch

from .catalogue import LOSSES, RANKS, loss_contests
from .measure import REPLAY

contests = loss_contests
WAYS = {"loss": LOSSES, "ranks": RANKS}
CASES = [
    (what, way, targets)
    for what, ways in WAYS.items()
    for way in ways
    for targets in (256, 4096)
    if (way, targets) != ("all scores", 4096)
]


@pytest.mark.benchmark(timer=REPLAY)
def test_loss(record, contest, side):
    outcome = record(contest, side)
    assert outcome.seconds or outcome.why_not


def run(what, way, targets, items=1_000_000, width=64):
    command = [sys.executable, "-m", "benchmarks.catalogue", what, way, *map(str, (targets, items, width))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(("what", "way", "targets"), CASES)
def test_a_million_items(benchmark, what, way, targets):
    benchmark.group = f"{what}, {targets} targets, 1,000,000 items, width 64"
    results = []
    benchmark.pedantic(lambda: results.append(run(what, way, targets)), rounds=1)
    seconds, extra = results[0]["seconds"], results[0]["extra"] / 2**20
    benchmark.extra_info |= {"seconds": seconds, "extra MiB": extra, "torch": torch.__version__}
    print(f"\n{what}, {way}, {targets}: {seconds:.1f} s, {extra:.0f} MiB beyond the inputs")
    if way == "blocks":
        assert extra < 1024


def test_ranks_are_the_same():
    dense, blocks = (run("ranks", way, 64)["check"] for way in RANKS)
    assert blocks == dense


def test_losses_are_as_exact_as_that_of_all_scores():
    exact, *checks = (run("loss", way, 64)["check"] for way in ("exact", *LOSSES))
    dense, *others = (max(abs(a / b - 1) for a, b in zip(check, exact, strict=True)) for check in checks)
    assert max(others) <= 2 * dense
