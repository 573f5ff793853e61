"""Operands that a pipeline copies, to be run by ``pytest --emulate`` under a Triton that does not fence them."""

import pytest
import torch

from tests.support import output as after
from tests.support import projection as before
from tools.ptx_emulator.driver import EmulationError
from ttt4rec import kernels
from ttt4rec.kernels import launch

HALF = torch.bfloat16
pytestmark = pytest.mark.compiled


def project() -> None:
    rope = before.make_rope(2, 40, 16, 8, "shared", torch.float32)
    before.run_kernels(before.make_inputs(2, 40, 4, 16, HALF), rope, 2, HALF)


def finish() -> None:
    after.run(kernels, after.make_inputs(2, 40, 8, 16, True, dtype=HALF))


@pytest.mark.parametrize("surrounding", [project, finish])
def test_copies_of_operands_are_fenced_or_not_made(surrounding) -> None:
    surrounding()


@pytest.mark.parametrize("surrounding", [project, finish])
def test_a_pipeline_without_fences_is_found(surrounding, monkeypatch) -> None:
    if launch.triton_version() >= launch.FENCED_COPIES or launch.architecture() != "sm_90":
        pytest.skip("this compiler fences what it copies")
    monkeypatch.setattr(launch, "FENCED_COPIES", (0, 0))
    with pytest.raises(EmulationError, match=r"without a fence\.proxy\.async"):
        surrounding()
