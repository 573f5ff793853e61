"""The kernels of layers that forget, compiled for GPUs that need not be there."""

import re

import pytest

from tests.kernels.test_ahead_of_time import TABLE, VERSIONS
from tests.support.compiled import cost_of
from tools.resources import MACHINES

SAMPLE = [f"linear_{way}:{arch}:16:8:bf16" for way in ("forward", "backward") for arch in ("sm_90", "gfx942")]
WIDE = [f"linear_{way}:sm_90:64:16:bf16" for way in ("forward", "backward")]
MLP = {  # spills of a warp in a mini-batch, of which the oldest Triton leaves most
    "mlp_forward:sm_90:16:8:bf16": 230,
    "mlp_backward:sm_90:16:8:bf16": 770,
}
STEPS = {  # registers as those of the other layers' steps may have, and spills where a mini-batch is complete
    "linear_step:sm_90:16:8:bf16": (84, 0),
    "mlp_step:sm_90:64:16:bf16": (255, 77),
}

pytestmark = pytest.mark.slow


def forgetting(kernel: str) -> str:
    """The same of a layer that forgets."""
    return kernel.replace("_", "_forgetting_", 1)


@pytest.mark.parametrize("kernel", [*SAMPLE, *WIDE])
def test_scans_take_little_more_than_those_that_do_not_forget(kernel: str) -> None:
    """A half more instructions at most, and forwards no spill and no more shared memory.

    Backwards the states are float32 where the others' are operands: two bytes more a number, in three buffers at most.
    """
    cost = cost_of(forgetting(kernel))
    op, architecture, head_dim, mini_batch_size, _ = kernel.split(":")
    shape = op, int(head_dim), int(mini_batch_size), "bf16"
    rows = [r for version in VERSIONS for r in TABLE[version, architecture] if r[:4] == shape]
    assert len(rows) == 2
    assert cost["loop_instructions"] <= 1.5 * max(r.loop_instructions for r in rows)
    wider = 3 * 2 * max(r.heads for r in rows) * int(head_dim) ** 2 if op.endswith("backward") else 0
    assert cost["shared_memory"] <= max(r.shared_memory for r in rows) + wider
    assert cost["loop_spills"] <= (470 if op.endswith("backward") else 0)


@pytest.mark.parametrize("kernel", MLP)
def test_mlp_stays_within_limits(kernel: str) -> None:
    """With all registers: where the assembler gives up it leaves 32 of them."""
    cost = cost_of(forgetting(kernel))
    architecture = kernel.split(":")[1]
    assert cost["registers"] > 64
    assert cost["loop_spills"] <= MLP[kernel]
    assert cost["shared_memory"] <= MACHINES[architecture].shared_memory
    assert cost["loop_instructions"] > 1000
    assert cost["tensor_core"] > 0


@pytest.mark.parametrize("kernel", STEPS)
def test_steps_stay_within_limits(kernel: str) -> None:
    cost = cost_of(forgetting(kernel))
    assert 20 < cost["registers"] <= STEPS[kernel][0]
    assert cost["spills"] <= STEPS[kernel][1]


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_the_kernel_before_is_small(architecture: str) -> None:
    cost = cost_of(f"linear_decays:{architecture}:16:8:bf16")
    assert 20 < cost["registers"] <= 72
    assert cost["spills"] == 0


@pytest.mark.parametrize("kernel", [*SAMPLE, *WIDE, *MLP, *STEPS])
def test_lanes_sum_alike(kernel: str) -> None:
    assert cost_of(forgetting(kernel))["unlike_sums"] == 0


@pytest.mark.parametrize("kernel", ["linear_forward:sm_90:16:8:bf16", "linear_forward:sm_90:64:16:bf16"])
def test_initial_weights_are_not_loaded_in_the_loop(kernel: str) -> None:
    """Once before it, like the weights themselves, and twice behind it, with their means."""
    ttgir = cost_of(forgetting(kernel))["ttgir"]
    shape = {"16": "32x16", "64": "64x64"}[kernel.split(":")[2]]
    loads = [line for line in ttgir.splitlines() if re.search(rf"tt\.load .*tensor<{shape}x", line)]
    assert len(loads) == 4
    depth = {len(line) - len(line.lstrip()) for line in loads}
    assert len(depth) == 1
