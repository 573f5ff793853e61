"""The step kernels compiled for GPUs that need not be there: registers, spills, and what they do not do."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tools.documents import ROOT

# Largest allowed: registers, spill instructions. About 15 % above the worst of Triton 3.6.0 and 3.9.0.
LIMITS = {
    "linear_step:sm_80:16:8:bf16": (76, 0),
    "linear_step:sm_90:16:8:bf16": (84, 0),
    "linear_step:sm_100:16:8:bf16": (76, 0),
    "linear_step:gfx942:16:8:bf16": (76, 0),
    "linear_step:sm_90:64:16:bf16": (148, 0),
    "mlp_step:sm_80:16:8:bf16": (196, 0),
    "mlp_step:sm_90:16:8:bf16": (164, 0),
    "mlp_step:sm_100:16:8:bf16": (164, 4),
    "mlp_step:gfx942:16:8:bf16": (212, 0),
    "mlp_step:sm_90:64:16:bf16": (255, 0),
    "mlp_step:sm_90:128:16:bf16": (255, 9),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def costs() -> dict[str, dict[str, Any]]:
    """What every kernel costs. In a process of its own: under the interpreter nothing is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.aot", "--json", *LIMITS]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return {cost["kernel"]: cost for cost in map(json.loads, run.stdout.splitlines())}


@pytest.mark.parametrize("kernel", LIMITS)
def test_cost_stays_within_limits(kernel: str, costs: dict[str, dict[str, Any]]) -> None:
    cost = costs[kernel]
    assert cost["registers"] > 20  # fewer, and it was not found
    assert cost["registers"] <= LIMITS[kernel][0]
    assert cost["spills"] <= LIMITS[kernel][1]


@pytest.mark.parametrize("kernel", LIMITS)
def test_weights_stay_where_they_were_loaded(kernel: str, costs: dict[str, dict[str, Any]]) -> None:
    """No tile of weights goes through shared memory to change its layout, and none is loaded twice if it fits."""
    op, _, head_dim, *_ = kernel.split(":")
    D = int(head_dim)
    ttgir = costs[kernel]["ttgir"]
    chunk = {16: 64, 64: 256, 128: 64}[D]
    shapes = [f"{D}x{D}"] if op == "linear_step" else [f"{D}x{chunk}", f"{chunk}x{D}"]
    for shape in shapes:
        assert not re.search(rf"convert_layout .*tensor<{shape}xf32", ttgir)
        loads = len(re.findall(rf"(?:tt\.|buffer_)load .*tensor<{shape}x", ttgir))
        assert loads == (3 if D == 128 else 1)  # 128: the first chunk, the others, and all of them once more
