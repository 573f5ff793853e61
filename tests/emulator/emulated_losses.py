"""Small launches in which every mask, barrier and wait should matter, for ``--emulate-mutations``.

    bash scripts/test.sh --emulate sm_90 --emulate-mutations tests/emulator/emulated_losses.py

Features are padded, the last head is alone, tokens end within a tile, sequences are packed with other ones behind them,
and the backward has several segments.
"""

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.support import inner_loop_kernels as inner_loop
from tests.support import output as after
from tests.support import projection as before
from tests.support.checks import INNERS
from tests.support.steps import step_arguments
from ttt4rec import kernels
from ttt4rec.arguments import TokenStep
from ttt4rec.operators import token_step

HALF = torch.bfloat16
FUSED = {"fused": 1 << 31, "not fused": 0}
SHAPES = [(3, 14, 7), (1, 30, 14), (1, 62, 14)]


def assert_numbers(results: Sequence[Tensor]) -> None:
    """What memory that nobody wrote would give is NaN."""
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize(("H", "D", "K"), SHAPES, ids=["H {} D {} K {}".format(*shape) for shape in SHAPES])
@pytest.mark.parametrize("inner", INNERS)
def test_inner_loop(inner, H, D, K):
    lengths = torch.tensor([K + 3, 3 * K + 2])
    inputs = inner_loop.make_inputs(inner, 1, int(lengths.sum()) + 5, H, D, K, N=2, dtype=HALF)
    spans = (torch.tensor([0, K + 3]), lengths)
    results = inner_loop.run_kernels(inner, inputs, inner_loop.make_gradients(inner, inputs), spans)
    assert_numbers(list(results.values()))


@pytest.mark.parametrize("inner", INNERS)
def test_step(inner):
    q, k, v, *rest = step_arguments(inner, torch.float32, D=14)
    assert_numbers(token_step(TokenStep(*(x.to(HALF) for x in (q, k, v)), *rest), "triton"))


def fuse(monkeypatch: pytest.MonkeyPatch, package: str, width: int) -> None:
    """Up to a width."""
    module = sys.modules[f"ttt4rec.kernels.{package}"]
    monkeypatch.setattr(module, "FUSED_WIDTH", {"forward": width, "backward": min(width, 64)})
    monkeypatch.setattr(module, "FUSED_WIDTH_BY_ARCHITECTURE", {}, raising=False)


@pytest.mark.parametrize("fused", FUSED, ids=lambda choice: f"projection {choice}")
def test_projection(fused, monkeypatch):
    fuse(monkeypatch, "projection", FUSED[fused])
    rope = before.make_rope(2, 19, 18, 8, "per row", torch.float32)
    assert_numbers(before.run_kernels(before.make_inputs(2, 19, 3, 18, HALF), rope, 2, HALF))


@pytest.mark.parametrize("fused", FUSED, ids=lambda choice: f"output {choice}")
def test_output(fused, monkeypatch):
    fuse(monkeypatch, "output", FUSED[fused])
    assert_numbers(after.run(kernels, after.make_inputs(2, 19, 3, 18, True, dtype=HALF)))


def test_convolution():
    assert_numbers(before.convolution_results(kernels, HALF, True, 2, 19, 78, 4, 2, 2)[0])
