"""Predicted against published speeds."""

import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tests.cycles.published import POINTS, Published
from tests.support.compiled import environment
from tools.documents import ROOT

KEPT_BY = "3.9.0"
BOUNDS = {  # predicted cycles over published ones
    "attention_a100": (0.8, 1.0),
    "product_a100": (0.9, 1.1),
    "sum_half_a100": (0.65, 1.0),
    "sum_a100": (0.65, 1.0),
    "attention_h100": (0.8, 1.0),
}
BY_NAME = [pytest.param(point, id=point.name) for point in POINTS]


@pytest.mark.parametrize("point", BY_NAME)
def test_predictions_are_near_published_speeds(point: Published):
    """Mostly below: nothing is simulated of how a kernel begins and ends."""
    least, most = BOUNDS[point.name]
    assert least <= point.predicted(point.trip()) / point.cycles <= most


@pytest.mark.slow
def test_the_kept_loops_are_what_is_compiled(tmp_path: Path):
    """Under another Triton, only nearly as fast."""
    command = [sys.executable, "-m", "tests.cycles.published", str(tmp_path)]
    run = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    for point in POINTS:
        if triton.__version__ == KEPT_BY:
            assert point.trip(tmp_path) == point.trip(), point.name
        else:
            assert point.predicted(point.trip(tmp_path)) == pytest.approx(point.predicted(point.trip()), rel=0.25)


def test_the_documented_ratios_are_these():
    text = (ROOT / "docs" / "predicted.md").read_text()
    for point in POINTS:
        predicted = point.predicted(point.trip())
        row = f"| {predicted:,.0f} | {point.cycles:,.0f} | {predicted / point.cycles:.2f} |"
        assert row in text, (point.name, row)
