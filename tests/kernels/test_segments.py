"""TTT-MLP's backward by segments against the definition in float64; interpreted where there is no GPU."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.kernels.test_inner_loop_kernels import as_initialised, moved_definition
from tests.support.exactness import distances, excess, reference_errors
from tests.support.inner_loop_kernels import (
    DEVICE,
    FP32_TOLERANCE,
    Inputs,
    errors,
    make_gradients,
    make_inputs,
    make_scan,
    run_definition,
    run_kernels,
)
from ttt4rec.kernels import launch, segments

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
Spans = tuple[Tensor | None, Tensor | None]
NONE: Spans = (None, None)
SUMS = {"d_token_scale", "d_ln_weight", "d_ln_bias"}
"""What is added up segment by segment."""


def cut(monkeypatch: pytest.MonkeyPatch, D: int, *chunks: int) -> None:
    """Narrow heads go by segments too, each kernel in so many chunks."""
    for op, n in zip(segments.OPS, chunks, strict=True):
        for table in (launch.HALF, launch.SINGLE):
            monkeypatch.setitem(table, (op, launch.padded(D)), {64: launch.Blocks(4, 1, chunks=n)})


def run(inputs: Inputs, spans: Spans = NONE, segment: int = 2) -> dict[str, Tensor]:
    assert segments.takes(make_scan("mlp", inputs, spans))
    return run_kernels("mlp", inputs, make_gradients("mlp", inputs), spans, segment)


def assert_exact(inputs: Inputs) -> None:
    expected = run_definition("mlp", inputs, make_gradients("mlp", inputs))
    found = errors(run(inputs), expected)
    wrong = {name: error for name, error in found.items() if not error <= FP32_TOLERANCE}
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("chunks", "L", "H", "K"),
    [
        pytest.param((1, 1, 1), 21, 1, 4, marks=pytest.mark.slow),  # three segments, a short mini-batch in the last
        ((2, 4, 2), 11, 2, 4),
        pytest.param((4, 1, 4), 16, 1, 4, marks=pytest.mark.slow),  # no rest
        pytest.param((1, 2, 1), 3, 1, 4, marks=pytest.mark.slow),  # less than one mini-batch
        pytest.param((2, 2, 2), 70, 1, 32, marks=pytest.mark.slow),
    ],
)
def test_matches_definition(chunks: tuple[int, ...], L: int, H: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 16, *chunks)
    assert_exact(make_inputs("mlp", 1, L, H, 16, K))


def test_rows_with_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of other numbers of segments, one of them empty; zeros where there is no token."""
    cut(monkeypatch, 16, 2, 1, 2)
    inputs = make_inputs("mlp", 3, 9, 1, 16, 4)
    spans = torch.tensor([0, 13, 18], device=DEVICE), torch.tensor([9, 3, 0], device=DEVICE)
    results, gradients = run(inputs, spans), make_gradients("mlp", inputs)
    found = errors(results, run_definition("mlp", inputs, gradients, spans))
    assert all(error <= FP32_TOLERANCE for error in found.values()), found
    outside = torch.cat([torch.arange(9, 13), torch.arange(16, 27)])
    for name in ("d_q", "d_k", "d_v", "d_inner_lr"):
        assert (results[name].flatten(0, 1)[outside] == 0).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [10, 100])
def test_any_number_of_hidden_features(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 20, 2, 1, 2)
    assert_exact(make_inputs("mlp", 1, 9, 2, 20, 4, hidden=hidden))


@pytest.mark.slow
def test_segments_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """But of the sums over all tokens, and two runs give the same bits of these too."""
    cut(monkeypatch, 16, 1, 1, 2)
    inputs = make_inputs("mlp", 1, 26, 1, 16, 4)
    results, again = run(inputs, segment=2), run(inputs, segment=2)
    assert all(torch.equal(again[name], x) for name, x in results.items())
    others = run(inputs, segment=5)
    for name in results.keys() - SUMS:
        assert torch.equal(others[name], results[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("D", "K", "dtype"),
    [
        pytest.param(16, 16, torch.bfloat16, marks=pytest.mark.compiled),
        (64, 16, torch.bfloat16),
        (128, 4, torch.bfloat16),
        (16, 8, torch.float16),
    ],
)
def test_low_precision_is_no_worse_than_torch(
    D: int, K: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice the error of the reference run in the same dtype."""
    cut(monkeypatch, D, 2, 2, 2)
    inputs = make_inputs("mlp", 1, 2 * K + 3, 1, D, K, dtype=dtype)
    gradients = make_gradients("mlp", inputs)
    results, exact = run(inputs), run_definition("mlp", inputs, gradients)
    torch_errors = errors(run_definition("mlp", inputs, gradients, dtype=dtype), exact)
    wrong = {
        name: (error, torch_errors[name])
        for name, error in errors(results, exact).items()
        if not error <= 2 * torch_errors[name]
    }
    assert not wrong, wrong


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_gradients_are_exact_at_every_scale(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rule of ``tests.support.exactness``, with weights as a layer initialises them."""
    cut(monkeypatch, 16, 2, 1, 2)
    inputs = as_initialised("mlp", make_inputs("mlp", 1, 19, 1, 16, 4))
    inputs |= {name: 0.1 * scale * inputs[name] for name in "qkv"}
    gradients = make_gradients("mlp", inputs)
    exact = run_definition("mlp", inputs, gradients)
    evaluate = partial(moved_definition, "mlp", inputs, gradients)
    over = excess(distances(run(inputs), exact), reference_errors(evaluate, exact))
    assert not over, over


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "sm_86", "sm_100", "gfx942"])
def test_where_a_backward_goes_by_segments(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "target", lambda: target)
    wide = make_inputs("mlp", 2, 3, 1, 64, 16, dtype=torch.bfloat16)
    scan = make_scan("mlp", wide)
    assert segments.takes(scan)
    padded = scan._replace(starts=torch.tensor([0, 3]), lengths=torch.tensor([3, 1]))
    assert segments.takes(padded)
    assert not segments.takes(padded._replace(q=scan.q[:1]))  # packed
    assert not segments.takes(scan._replace(log_decay=scan.inner_lr))
    assert not segments.takes(scan._replace(q=scan.q.float()))
    assert not segments.takes(scan._replace(q=scan.q[..., :32]))
    assert not segments.takes(scan._replace(token_scale=torch.ones(32)))
