"""The step kernels compiled for GPUs that need not be there: registers, spills, and what they do not do."""

import re

import pytest

from tests.support.compiled import cost_of

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


@pytest.mark.parametrize("kernel", LIMITS)
def test_cost_stays_within_limits(kernel: str) -> None:
    cost = cost_of(kernel)
    assert cost["registers"] > 20  # fewer, and it was not found
    assert cost["registers"] <= LIMITS[kernel][0]
    assert cost["spills"] <= LIMITS[kernel][1]


@pytest.mark.parametrize("kernel", LIMITS)
def test_lanes_sum_alike(kernel: str) -> None:
    assert cost_of(kernel)["unlike_sums"] == 0


@pytest.mark.parametrize("kernel", LIMITS)
def test_weights_stay_where_they_were_loaded(kernel: str) -> None:
    """No tile of weights goes through shared memory to change its layout, and none is loaded twice if it fits."""
    op, _, head_dim, *_ = kernel.split(":")
    D = int(head_dim)
    ttgir = cost_of(kernel)["ttgir"]
    chunk = {16: 64, 64: 256, 128: 64}[D]
    shapes = [f"{D}x{D}"] if op == "linear_step" else [f"{D}x{chunk}", f"{chunk}x{D}"]
    for shape in shapes:
        assert not re.search(rf"convert_layout .*tensor<{shape}xf32", ttgir)
        loads = len(re.findall(rf"(?:tt\.|buffer_)load .*tensor<{shape}x", ttgir))
        assert loads == (3 if D == 128 else 1)  # 128: the first chunk, the others, and all of them once more
