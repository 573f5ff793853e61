"""The kernels between the products of long mini-batches, compiled for GPUs that need not be there."""

import pytest

from tests.support.compiled import cost_of
from tools.aot import BLOCK_KERNELS, TARGETS

# Largest allowed number of registers on sm_80, sm_90, sm_100 and gfx942: about 15 % above the worst of Triton 3.6.0 and
# 3.9.0. What moves so much memory wants many programs on a multiprocessor: 128 leave four of 128 threads.
REGISTERS = {
    "inner_gradient": (76, 76, 84, 60),
    "inner_gradient_backward": (148, 112, 144, 92),
    "output": (48, 48, 52, 56),
    "output_backward": (76, 80, 76, 54),
    "gelu": (48, 48, 48, 36),
    "slope": (52, 40, 40, 60),
    "hidden_backward": (64, 54, 66, 68),
    "scaled": (40, 40, 40, 24),
    "causal": (36, 36, 38, 36),
    "running": (38, 32, 38, 16),
}
SAMPLE = [f"blocks/{name}:{architecture}:64:128:bf16" for name in REGISTERS for architecture in TARGETS]
WIDE = [f"blocks/{name}:sm_90:{shape}" for name in REGISTERS for shape in ("128:128:bf16", "16:128:fp32")]

pytestmark = pytest.mark.slow


def test_all_kernels_are_looked_at() -> None:
    assert set(REGISTERS) == set(BLOCK_KERNELS)


@pytest.mark.parametrize("kernel", SAMPLE)
def test_registers_stay_within_limits(kernel: str) -> None:
    op, architecture, *_ = kernel.removeprefix("blocks/").split(":")
    cost = cost_of(kernel)
    assert 8 < cost["registers"] <= REGISTERS[op][list(TARGETS).index(architecture)]


@pytest.mark.parametrize("kernel", [*SAMPLE, *WIDE])
def test_nothing_is_spilled_and_lanes_sum_alike(kernel: str) -> None:
    cost = cost_of(kernel)
    assert cost["spills"] == 0
    assert cost["unlike_sums"] == 0
    assert cost["shared_memory"] <= 8192
