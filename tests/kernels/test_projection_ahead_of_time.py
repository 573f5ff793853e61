"""The kernels around the inner loop compiled for GPUs that need not be there: registers, spills, shared memory."""

import re

import pytest

from tests.support.compiled import cost_of

# Largest allowed: registers, spill instructions, of them in the loop, bytes of shared memory. About 15 % above the
# worst of Triton 3.6.0 and 3.9.0. Width is 4 head dimensions: 64 and 256 fused forward, 512 by the library's products.
# The backward of the output is fused up to 128, but on sm_80.
LIMITS = {
    "projection_forward:sm_80:16:8:bf16": (160, 0, 0, 12288),
    "projection_forward:sm_90:16:8:bf16": (128, 0, 0, 18432),
    "projection_forward:sm_100:16:8:bf16": (100, 0, 0, 18432),
    "projection_forward:gfx942:16:8:bf16": (116, 0, 0, 18432),
    "projection_forward:sm_90:32:8:bf16": (84, 0, 0, 81920),
    "projection_forward:sm_80:64:8:bf16": (255, 0, 0, 43008),
    "projection_forward:sm_90:64:8:bf16": (174, 0, 0, 57344),
    "projection_forward:sm_100:64:8:bf16": (148, 0, 0, 57344),
    "projection_forward:gfx942:64:8:bf16": (228, 0, 0, 48128),
    "projection_forward:sm_90:128:8:bf16": (76, 0, 0, 7168),
    "projection_forward:sm_90:16:8:fp32": (255, 0, 0, 9216),
    "projection_backward:sm_80:16:8:bf16": (255, 38, 2, 69632),
    "projection_backward:sm_90:16:8:bf16": (226, 0, 0, 69632),
    "projection_backward:sm_100:16:8:bf16": (168, 0, 0, 69632),
    "projection_backward:gfx942:16:8:bf16": (512, 0, 0, 18432),
    "projection_backward:sm_90:64:8:bf16": (64, 0, 0, 0),
    "projection_backward:sm_90:64:8:fp32": (64, 0, 0, 2560),
    "convolution_forward:sm_80:16:8:bf16": (84, 0, 0, 0),
    "convolution_forward:sm_90:16:8:bf16": (104, 0, 0, 0),
    "convolution_forward:sm_100:16:8:bf16": (84, 0, 0, 0),
    "convolution_forward:gfx942:16:8:bf16": (72, 0, 0, 0),
    "convolution_backward:sm_80:16:8:bf16": (148, 3, 0, 1024),
    "convolution_backward:sm_90:16:8:bf16": (148, 0, 0, 1024),
    "convolution_backward:sm_100:16:8:bf16": (148, 3, 0, 1024),
    "convolution_backward:gfx942:16:8:bf16": (184, 0, 0, 1024),
    "convolution_forward:sm_90:64:8:bf16": (104, 0, 0, 0),
    "convolution_forward:sm_90:16:8:fp32": (112, 0, 0, 5120),
    "convolution_backward:sm_90:64:8:bf16": (152, 0, 0, 1024),
    "convolution_backward:sm_90:16:8:fp32": (255, 0, 0, 5120),
    "output_forward:sm_80:16:8:bf16": (124, 0, 0, 10240),
    "output_forward:sm_90:16:8:bf16": (88, 0, 0, 19456),
    "output_forward:sm_100:16:8:bf16": (84, 0, 0, 12288),
    "output_forward:gfx942:16:8:bf16": (88, 0, 0, 10240),
    "output_forward:sm_90:32:8:bf16": (172, 0, 0, 65536),
    "output_forward:sm_80:64:8:bf16": (228, 0, 0, 60416),
    "output_forward:sm_90:64:8:bf16": (168, 0, 0, 78848),
    "output_forward:sm_100:64:8:bf16": (160, 0, 0, 28672),
    "output_forward:gfx942:64:8:bf16": (140, 0, 0, 37888),
    "output_forward:sm_90:128:8:bf16": (56, 0, 0, 3072),
    "output_forward:sm_90:16:8:fp32": (184, 0, 0, 19456),
    "output_backward:sm_80:16:8:bf16": (255, 99, 59, 23552),
    "output_backward:sm_90:16:8:bf16": (255, 0, 0, 28672),
    "output_backward:sm_100:16:8:bf16": (160, 0, 0, 28672),
    "output_backward:gfx942:16:8:bf16": (160, 0, 0, 10240),
    "output_backward:sm_80:32:8:bf16": (196, 0, 0, 3072),
    "output_backward:sm_90:32:8:bf16": (255, 3, 0, 74752),
    "output_backward:sm_100:32:8:bf16": (208, 0, 0, 56320),
    "output_backward:gfx942:32:8:bf16": (180, 0, 0, 37888),
    "output_backward:sm_90:128:8:bf16": (196, 0, 0, 5120),
    "output_backward:sm_90:16:8:fp32": (196, 3, 0, 2048),
}

FUSED = {  # kernels with products, and how many at least: three views and the rates; parameters' gradients too
    "projection_forward.*:(16|32|64):8:bf": 4,
    "projection_backward.*:16:8:bf": 8,
    "output_forward.*:(16|32|64):8:bf": 1,
    "output_backward.*:16:8:bf": 2,
}
PRODUCTS = {name: least for name in LIMITS for kind, least in FUSED.items() if re.match(kind, name)}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kernel", LIMITS)
def test_cost_stays_within_limits(kernel: str) -> None:
    cost = cost_of(kernel)
    names = ("registers", "spills", "loop_spills", "shared_memory")
    beyond = {name: cost[name] for name, limit in zip(names, LIMITS[kernel], strict=True) if cost[name] > limit}
    assert cost["registers"] > 20  # fewer, and it was not found
    assert not beyond


@pytest.mark.parametrize("kernel", LIMITS)
def test_lanes_sum_alike(kernel: str) -> None:
    assert cost_of(kernel)["unlike_sums"] == 0


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_fused_kernels_multiply_in_tensor_cores(kernel: str) -> None:
    ttgir = cost_of(kernel)["ttgir"]
    products = sum(ttgir.count(name) for name in ("= tt.dot ", "warp_group_dot ", "tc_gen5_mma "))
    assert products >= PRODUCTS[kernel]


@pytest.mark.parametrize("kernel", LIMITS)
def test_sums_are_taken_without_atomics(kernel: str) -> None:
    assert "store" in cost_of(kernel)["ttgir"]
    assert "atomic" not in cost_of(kernel)["ttgir"]
