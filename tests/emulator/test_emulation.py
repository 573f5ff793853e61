"""The compiled kernels, executed on this machine: those of the kernels' own tests that are marked so, all kernels.

Those take longer interpreted, and show less, or share their kernels with such. Every test here is a process of its own:
in this one Triton interprets. All tests of the kernels run by ``bash scripts/test.sh --emulate sm_90``.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.documents import ROOT

OWN = "tests/emulator/emulated.py"  # small kernels for the emulator itself
COMPILED = [  # the files with tests marked so
    "kernels/test_forgetting_kernels.py",
    "kernels/test_inner_loop_kernels.py",
    "kernels/test_long_mini_batches.py",
    "kernels/test_segments.py",
    "kernels/test_step_kernels.py",
    "kernels/test_triton_backend.py",
    "operators/test_projection.py",
    "operators/test_output.py",
]
SOURCES = (ROOT / "src" / "ttt4rec" / "kernels").glob("*.py")
KERNELS = {name for path in SOURCES for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
ON_SM_100 = (
    "operators/test_projection.py",
    "operators/test_output.py",
)  # with products in tensor memory
QUICK = "emulated or linear and not slow and (test_inner_loop_kernels or test_step_kernels)"
QUICK_KERNELS = {"linear_forward_kernel", "linear_backward_kernel", "linear_step_kernel"}


def emulate(architecture: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--emulate", architecture, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


@pytest.mark.parametrize(
    ("architecture", "chosen"),
    [
        pytest.param("sm_90", QUICK, id="sm_90-quick"),
        pytest.param("sm_90", f"not ({QUICK})", id="sm_90-rest", marks=pytest.mark.slow),
        pytest.param("sm_80", "", id="sm_80", marks=pytest.mark.slow),
        pytest.param("sm_100", "", id="sm_100", marks=pytest.mark.slow),
    ],
)
def test_every_kernel(architecture: str, chosen: str, tmp_path: Path) -> None:
    """Results are right, and nothing is found."""
    path = tmp_path / "report.json"
    files = ON_SM_100 if architecture == "sm_100" else COMPILED
    options = ["--emulate-report", str(path), "-m", "compiled", "-k", chosen]
    emulate(architecture, *options, OWN, *(f"tests/{name}" for name in files))
    kernels: dict[str, Any] = json.loads(path.read_text())["kernels"]
    if chosen == QUICK:
        assert set(kernels) == QUICK_KERNELS
    elif architecture != "sm_100":
        assert set(kernels) | (QUICK_KERNELS if chosen else set()) == KERNELS
