"""Operands that a pipeline copies, to be run by ``pytest --emulate`` under a Triton that does not fence them."""

from collections.abc import Callable

import pytest
import torch

from tests.support import inner_loop_kernels as inner_loop
from tests.support import output as after
from tests.support import projection as before
from tools.ptx_emulator.driver import EmulationError
from ttt4rec import kernels
from ttt4rec.kernels import launch

HALF = torch.bfloat16
pytestmark = pytest.mark.compiled
Run = Callable[[], object]


def project() -> None:
    rope = before.make_rope(2, 40, 16, 8, "shared", torch.float32)
    before.run_kernels(before.make_inputs(2, 40, 4, 16, HALF), rope, 2, HALF)


def finish() -> None:
    after.run(kernels, after.make_inputs(2, 40, 8, 16, True, dtype=HALF))


def scan() -> None:
    inputs = inner_loop.make_inputs("linear", 1, 150, 1, 32, 64, dtype=HALF)
    inner_loop.run_kernels("linear", inputs, inner_loop.make_gradients("linear", inputs))


@pytest.mark.parametrize("run", [project, finish, scan])
def test_copies_of_operands_are_fenced_or_not_made(run: Run) -> None:
    run()


@pytest.mark.parametrize(("run", "architecture"), [(project, "sm_90"), (finish, "sm_90"), (scan, "sm_100")])
def test_a_pipeline_without_fences_is_found(run: Run, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if launch.triton_version() >= launch.FENCED_COPIES or launch.architecture() != architecture:
        pytest.skip("this compiler fences what it copies, or another architecture has such a pipeline")
    monkeypatch.setattr(launch, "FENCED_COPIES", (0, 0))
    monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(num_warps=8, num_stages=2))
    with pytest.raises(EmulationError, match=r"without a fence\.proxy\.async"):
        run()
