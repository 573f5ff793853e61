"""The kernels of layers that forget, against the definition in float64; interpreted where there is no GPU."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.exactness import distances, excess, reference_errors
from tests.support.inner_loop_kernels import (
    DEVICE,
    FP32_TOLERANCE,
    WEIGHTS,
    Inputs,
    errors,
    make_gradients,
    make_inputs,
    make_scan,
    remember_states,
    run_definition,
    run_forward,
    run_kernels,
    with_decays,
)
from ttt4rec.kernels import launch

SLOW = pytest.mark.slow
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture(params=["linear", pytest.param("mlp", marks=SLOW)])
def inner(request: pytest.FixtureRequest) -> str:
    """The inner model."""
    return str(request.param)


def assert_matches(
    inner: str, inputs: Inputs, spans: tuple[Any, Any] = (None, None), segment: int = 2
) -> dict[str, Tensor]:
    """Outputs, states and all gradients, to float32's rounding, or twice what it costs the reference.

    The gradient of a gate is a sum over all weights, which may cancel.
    """
    gradients = make_gradients(inner, inputs)
    found, exact = (
        run_kernels(inner, inputs, gradients, spans, segment),
        run_definition(inner, inputs, gradients, spans),
    )
    usual = errors(run_definition(inner, inputs, gradients, spans, torch.float32), exact)
    own = errors(found, exact)
    wrong = {name: (own[name], usual[name]) for name in own if not own[name] <= max(FP32_TOLERANCE, 2 * usual[name])}
    assert not wrong, wrong
    return found


CASES = [  # B, L, H, D, K
    ("linear", 1, 19, 3, 16, 8),  # two heads a program, and an odd one
    ("linear", 2, 9, 2, 20, 4),
    ("linear", 1, 5, 2, 16, 1),
    ("linear", 1, 6, 1, 16, 16),  # less than one mini-batch
    ("mlp", 1, 10, 1, 16, 8),
    *(
        pytest.param(*case, marks=SLOW)
        for case in (
            ("linear", 2, 21, 4, 16, 8),
            ("linear", 1, 41, 1, 32, 20),
            ("linear", 1, 70, 1, 16, 64),
            ("linear", 1, 35, 1, 64, 16),
            ("linear", 1, 17, 1, 128, 16),
            ("mlp", 1, 19, 3, 16, 8),
            ("mlp", 1, 9, 2, 12, 4),
            ("mlp", 1, 6, 1, 16, 16),
        )
    ),
]


@pytest.mark.parametrize(("inner", "B", "L", "H", "D", "K"), CASES)
def test_matches_definition(inner: str, B: int, L: int, H: int, D: int, K: int) -> None:
    assert_matches(inner, with_decays(inner, make_inputs(inner, B, L, H, D, K)))


SHARES = [("linear", 3.0), *(pytest.param(*x, marks=SLOW) for x in (("linear", 1e-4), ("linear", 1e3), ("mlp", 3.0)))]


@pytest.mark.parametrize(("inner", "most"), SHARES)
def test_little_and_much_is_forgotten(inner: str, most: float) -> None:
    """Of sequences that begin with the initial weights."""
    inputs = with_decays(inner, make_inputs(inner, 2, 14, 3 if inner == "linear" else 1, 16, 4), most)
    inputs |= {name: inputs[f"{name}_initial"].expand_as(inputs[name]).contiguous() for name in WEIGHTS[inner]}
    assert_matches(inner, inputs)


@pytest.mark.slow
def test_any_number_of_heads_in_a_program(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(num_warps=1, num_stages=1, heads=4))
    assert_matches(inner, with_decays(inner, make_inputs(inner, 2, 10, 5, 16, 4)))


def test_unequal_lengths_and_tokens_outside_them(inner: str) -> None:
    inputs = with_decays(inner, make_inputs(inner, 3, 13, 3, 16, 8, N=4))
    lengths = torch.tensor([5, 0, 17, 9], device=DEVICE)
    found = assert_matches(inner, inputs, (torch.tensor([2, 7, 7, 30], device=DEVICE), lengths))
    flat = found["d_log_decay"].flatten(0, 1)
    assert (flat[:2] == 0).all()  # none's
    assert (flat[2:7] == 0).all()  # of a short mini-batch
    assert (flat[7:23] != 0).all()


def test_who_keeps_all_forgets_nothing_to_the_bit(inner: str) -> None:
    """Whatever the initial weights are."""
    inputs = make_inputs(inner, 1, 21, 3, 16, 8)
    gradients = make_gradients(inner, inputs)
    forgetful = run_kernels(inner, with_decays(inner, inputs, 0.0), gradients)
    for name, x in run_kernels(inner, inputs, gradients).items():
        assert torch.equal(forgetful[name], x), name


@pytest.mark.slow
def test_segments_change_no_bit(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many mini-batches are replayed; with one cut both ways."""
    monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(num_warps=4, num_stages=1))
    lengths = torch.tensor([21, 3, 13], device=DEVICE)
    inputs = with_decays(inner, make_inputs(inner, 1, 37, 1, 16, 4, N=3))
    gradients, spans = make_gradients(inner, inputs), (lengths.cumsum(0) - lengths, lengths)
    results = run_kernels(inner, inputs, gradients, spans, segment=1)
    for segment in (2, 16):
        others = run_kernels(inner, inputs, gradients, spans, segment)
        assert all(torch.equal(others[name], x) for name, x in results.items()), segment


SCALES = [
    ("linear", 1e-6),
    *(pytest.param("linear", x, marks=SLOW) for x in (1e-3, 1.0, 1e2, 1e4)),
    *(pytest.param("mlp", x, marks=SLOW) for x in (1e-6, 1e4)),
]


@pytest.mark.parametrize(("inner", "scale"), SCALES)
def test_gradients_are_exact_at_every_scale(inner: str, scale: float) -> None:
    """By the rule of ``tests.support.exactness``; updates may be far larger than the weights, or far smaller."""
    inputs = with_decays(inner, make_inputs(inner, 1, 19, 1, 16, 4))
    inputs |= {name: 0.1 * scale * inputs[name] for name in "qkv"}
    gradients = make_gradients(inner, inputs)
    exact = run_definition(inner, inputs, gradients)
    evaluate = partial(moved_definition, inner, inputs, gradients)
    assert not excess(distances(run_kernels(inner, inputs, gradients), exact), reference_errors(evaluate, exact))


def moved_definition(inner: str, inputs: Inputs, gradients: list[Tensor], move: Any) -> dict[str, Tensor]:
    """PyTorch's results in float32, of inputs that ``move`` changes by their rounding."""
    return run_definition(inner, {name: move(x) for name, x in inputs.items()}, gradients, dtype=torch.float32)


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "B", "L", "H", "D", "K"),
    [("linear", 2, 36, 3, 16, 8), ("linear", 1, 51, 1, 32, 16), ("mlp", 1, 28, 3, 16, 8)],
)
def test_low_precision_is_no_worse_than_torch(inner: str, B: int, L: int, H: int, D: int, K: int) -> None:
    inputs = with_decays(inner, make_inputs(inner, B, L, H, D, K, dtype=torch.bfloat16))
    gradients = make_gradients(inner, inputs)
    exact = run_definition(inner, inputs, gradients)
    own = errors(run_kernels(inner, inputs, gradients), exact)
    plain = errors(run_definition(inner, inputs, gradients, dtype=torch.bfloat16), exact)
    assert not {name: (own[name], plain[name]) for name in own if not own[name] <= 2 * plain[name]}


@pytest.mark.compiled
@pytest.mark.slow
def test_the_replay_has_the_forwards_weights(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, before every mini-batch, where both kernels are cut differently."""
    H, D, K = 2, 32 if inner == "linear" else 16, 8
    inputs = with_decays(inner, make_inputs(inner, 1, 4 * K, H, D, K, dtype=torch.bfloat16))
    states = remember_states(monkeypatch, "new_linear_states" if inner == "linear" else "new_states")
    run_kernels(inner, inputs, make_gradients(inner, inputs), segment=4)
    *_, checkpoints = run_forward(inner, make_scan(inner, inputs, segment=1))
    found = states[0]
    if inner == "linear":
        W, b = found
        found = torch.cat((W.flatten(2), b), -1)
    assert torch.equal(found[1:], checkpoints[:3])


def test_no_sequences(inner: str) -> None:
    inputs = with_decays(inner, make_inputs(inner, 0, 5, 2, 16, 8))
    results = run_kernels(inner, inputs, make_gradients(inner, inputs))
    assert results["o"].shape == (0, 5, 2, 16)
    assert (results["d_W1_initial"] == 0).all()
