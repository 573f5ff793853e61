"""The compiled kernels, executed on this machine: some of the kernels' own tests, chosen so that each kernel runs.

Every test is a process of its own: in this one Triton interprets. All tests of the kernels run by
``bash scripts/test.sh --emulate sm_90``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.documents import ROOT

OWN = "tests/emulator/emulated.py"  # small kernels for the emulator itself
SAMPLE = [  # of the kernels' tests
    "kernels/test_inner_loop_kernels.py::test_low_precision_is_no_worse_than_torch[2-36-2-16-8-dtype0-linear]",
    "kernels/test_inner_loop_kernels.py::test_low_precision_is_no_worse_than_torch[2-36-2-16-8-dtype0-mlp]",
    "kernels/test_inner_loop_kernels.py::test_the_replay_has_the_forwards_weights[linear-1-16-32]",
    "kernels/test_inner_loop_kernels.py::test_the_replay_has_the_forwards_weights[mlp-1-16-16]",
    "kernels/test_step_kernels.py::test_half_precision_is_rounded_once[dtype0]",
    "operators/test_operators.py::test_opcheck_forward[token_step-triton-0]",
    "operators/test_projection.py::test_kernels_in_low_precision_are_no_worse_than_torch[dtype0-same-everything]",
    "operators/test_projection.py::test_kernels_in_low_precision_are_no_worse_than_torch[dtype0-same-nothing]",
    "operators/test_projection.py::test_convolution_kernels_in_low_precision_are_no_worse_than_torch[dtype0]",
    "operators/test_output.py::test_kernels_in_low_precision_are_no_worse_than_torch[dtype0-everything]",
    "operators/test_output.py::test_kernels_match_definition[shape0-True-nothing]",
    "operators/test_output.py::test_kernels_give_the_same_bits_twice_whatever_the_strides[everything]",
]
KERNELS = {
    "linear_forward_kernel", "linear_backward_kernel", "mlp_forward_kernel", "mlp_backward_kernel",
    "linear_step_kernel", "mlp_step_kernel", "fused_forward_kernel", "fused_backward_kernel", "rotation_kernel",
    "packing_kernel", "convolution_forward_kernel", "convolution_backward_kernel", "norm_forward_kernel",
    "norm_backward_kernel",
}  # fmt: skip
ON_SM_100 = (
    "operators/test_projection.py",
    "operators/test_output.py",
)  # with products in tensor memory


def emulate(architecture: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--emulate", architecture, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


others = [pytest.param(architecture, marks=pytest.mark.slow) for architecture in ("sm_80", "sm_100")]


@pytest.mark.parametrize("architecture", ["sm_90", *others])
def test_every_kernel(architecture: str, tmp_path: Path) -> None:
    """Results are right, and nothing is found."""
    path = tmp_path / "report.json"
    sample = [name for name in SAMPLE if architecture != "sm_100" or name.startswith(ON_SM_100)]
    nodes = [OWN, *(f"tests/{name}" for name in sample)]
    emulate(architecture, "--emulate-report", str(path), *nodes)
    kernels: dict[str, Any] = json.loads(path.read_text())["kernels"]
    if architecture != "sm_100":
        assert set(kernels) == KERNELS
