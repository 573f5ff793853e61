"""Gradients are as exact as the reference's, whatever the size of the inputs, weights and updates."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checks import BACKBONES, INNERS, inner_inputs, run_inner
from tests.support.exactness import (
    FLOOR,
    SCALES,
    distances,
    excess,
    layer_results,
    operator_inputs,
    operator_results,
    reference_errors,
    token_sizes,
)
from ttt4rec import TTTLayer
from ttt4rec.eager import checkpoints
from ttt4rec.inner_models import INNER_MODELS
from ttt4rec.layers import functional

BACKENDS = ("native", "eager")
TOKENS = ("q", "k", "v", "inner_lr")
CASES = {
    "inner": st.sampled_from(INNERS),
    "scale": st.sampled_from(SCALES) | st.floats(-6, 4).map(lambda e: 10**e),
    "K": st.sampled_from((1, 2, 4, 8, 16, 64)),
    "L": st.sampled_from((1, 7, 16, 33, 64, 150)),
    "weight_scale": st.sampled_from((0.02, 0.02, 0.3, 3.0)),
    "constant": st.booleans(),
    "dtype": st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
    "segment": st.sampled_from((None, 1, 2, 5)),
    "seed": st.integers(0, 999),
}


def operator_references(inner, inputs, exact):
    return reference_errors(
        lambda move: operator_results(inner, {n: move(x) for n, x in inputs.items()}, backend="reference"), exact
    )


@given(case=st.fixed_dictionaries(CASES))
@settings(max_examples=40)
def test_of_the_inner_loop(case):
    inner, segment, seed = (case.pop(name) for name in ("inner", "segment", "seed"))
    if case["dtype"] == torch.float16 and case["scale"] not in (1e-3, 1.0, 10.0):
        case["scale"] = 1.0  # its range ends at 65,504
    torch.manual_seed(seed)
    inputs = operator_inputs(inner, **case)
    exact = operator_results(inner, inputs, torch.float64, backend="reference")
    references = operator_references(inner, inputs, exact)
    with pytest.MonkeyPatch.context() as patch:
        if segment is not None:
            patch.setattr(functional, "segment_length", lambda *_: segment)
        for backend in BACKENDS:
            errors = distances(operator_results(inner, inputs, backend=backend), exact)
            assert not excess(errors, references), backend


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("inner", INNERS)
def test_on_average_of_many_draws(inner, scale):
    check_on_average(inner, scale, 12)


def check_on_average(inner, scale, draws, change=lambda inputs: None, **sizes):
    """One draw scatters; the mean of the ratios does not."""
    logs = {backend: {} for backend in BACKENDS}
    for _ in range(draws):
        inputs = operator_inputs(inner, scale, **sizes)
        change(inputs)
        exact = operator_results(inner, inputs, torch.float64, backend="reference")
        plain = distances(operator_results(inner, inputs, backend="reference"), exact)
        for backend in BACKENDS:
            for name, error in distances(operator_results(inner, inputs, backend=backend), exact).items():
                logs[backend].setdefault(name, []).append(math.log(max(error, FLOOR) / max(plain[name], FLOOR)))
    for backend in BACKENDS:
        ratios = {name: math.exp(sum(values) / len(values)) for name, values in logs[backend].items()}
        assert max(ratios.values()) <= 2, (backend, ratios)


def near_values(inputs):
    inputs["v"] = inputs["k"] + 0.01 * torch.randn_like(inputs["k"])


def far_mean(inputs):
    inputs["b2" if "b2" in inputs else "b1"] += 100


@pytest.mark.parametrize(("change", "scale"), [(near_values, 1e4), (far_mean, 1.0)])
@pytest.mark.parametrize("inner", INNERS)
def test_of_small_differences_of_large_numbers(inner, change, scale):
    """What the inner loss and the layer norm subtract first is small beside its terms."""
    check_on_average(inner, scale, 12, change)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e4, "mixed"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_of_a_layer_as_initialised(inner, backbone, scale):
    layer = TTTLayer(32, 4, inner=inner, backbone=backbone, mini_batch_size=8)
    x = (token_sizes(scale, 2, 64) * torch.randn(2, 64, 32)).float()
    exact = layer_results(layer, x, torch.float64, "reference")
    references = reference_errors(lambda move: layer_results(layer, x, torch.float32, "reference", move), exact)
    for backend in BACKENDS:
        assert not excess(distances(layer_results(layer, x, torch.float32, backend), exact), references), backend


@pytest.mark.parametrize("scale", [1.0, "mixed"])
@pytest.mark.parametrize("inner", INNERS)
def test_of_a_stream_that_begins_from_a_state(inner, scale):
    inputs = operator_inputs(inner, scale, B=2, L=80)
    before = {n: x[:, :51] if n in TOKENS else x for n, x in inputs.items()}
    after = {n: x[:, 51:] if n in TOKENS else x for n, x in inputs.items()}
    state = run_inner(inner, before, backend="reference")[1].detach()
    of_state = {f"state {i}": w for i, w in enumerate(state.weights)}

    def results(dtype, backend, move=lambda x: x):
        named = {name: move(x) for name, x in (after | of_state).items()}
        return operator_results(inner, named, dtype, backend=backend, state=state)

    exact = results(torch.float64, "reference")
    references = reference_errors(lambda move: results(torch.float32, "reference", move), exact)
    for backend in BACKENDS:
        assert not excess(distances(results(torch.float32, backend), exact), references), backend


@pytest.mark.parametrize("inner", INNERS)
def test_of_a_long_sequence(inner):
    inputs = operator_inputs(inner, 1.0, L=4096, H=1, K=16)
    exact = operator_results(inner, inputs, torch.float64, backend="reference")
    references = operator_references(inner, inputs, exact)
    for backend in BACKENDS:
        assert not excess(distances(operator_results(inner, inputs, backend=backend), exact), references), backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner", INNERS)
def test_the_segments_change_no_bit(inner, backend, monkeypatch):
    """With one mini-batch a segment nothing is replayed: all weights are the forward's."""
    inputs = {n: x.float() for n, x in inner_inputs(inner, B=2, L=45, H=2, D=8, K=4).items()}
    cu_seqlens = torch.tensor([0, 3, 3, 44, 70, 90])
    packed = {n: x.flatten(0, 1).unsqueeze(0) if n in TOKENS else x for n, x in inputs.items()}
    results = {}
    for segment in (1, 2, 3, 7, 50):
        monkeypatch.setattr(functional, "segment_length", lambda *_, length=segment: length)
        results[segment] = [
            operator_results(inner, inputs, backend=backend),
            operator_results(inner, packed, backend=backend, cu_seqlens=cu_seqlens),
        ]
    for segment, found in results.items():
        for ours, expected in zip(found, results[1], strict=True):
            for name, x in ours.items():
                assert torch.equal(x, expected[name]), (segment, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner", INNERS)
def test_a_segment_replayed_in_parts_changes_no_bit(inner, backend, monkeypatch):
    """More mini-batches than states are held: 8 by the eager path here, by the compiled one as many as fill a MiB."""
    monkeypatch.setattr(checkpoints, "HELD_BYTES", 1)
    L = 1300 if (inner, backend) == ("linear", "native") else 200
    inputs = {n: x.float() for n, x in inner_inputs(inner, B=1, L=L, H=1, D=16, K=1).items()}
    cu_seqlens = torch.tensor([0, 9, L - 4, L])
    results = []
    for segment in (1, L - 13):
        monkeypatch.setattr(functional, "segment_length", lambda *_, length=segment: length)
        results.append(operator_results(inner, inputs, backend=backend, cu_seqlens=cu_seqlens))
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


def test_states_held_and_mini_batches_served():
    """As many as binomials say, with none replayed more often than need be."""

    def times(mini_batches, room):
        if mini_batches <= room:
            return 1
        ahead = checkpoints.steps_ahead(mini_batches, room)
        assert 0 < ahead < mini_batches
        return max(1 + times(ahead, room), times(mini_batches - ahead, room - 1))

    for room in (2, 3, 8):
        for mini_batches in range(1, 60):
            least = next(t for t in itertools.count(1) if math.comb(room + t - 1, t) >= mini_batches)
            assert times(mini_batches, room) == least


@pytest.mark.slow
def test_the_walk_back_holds_little():
    """Small mini-batches of large heads have segments of hundreds, each with weights of 132 kB."""
    code = """
import resource, sys, torch
from ttt4rec import TTTLayer
torch.set_num_threads(1)
for backend in ("native", "eager"):
    layer = TTTLayer(64, 1, inner="mlp", mini_batch_size=1, backend=backend)
    for length in (3, 520):
        layer(torch.randn(1, length, 64)).sum().backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    native_small, native, eager_small, eager = (int(line) / 1024 for line in found.split())
    assert native - native_small < 16  # MiB; all states are 70
    assert eager - eager_small < 32


@pytest.mark.parametrize("D", [8, 64])
@pytest.mark.parametrize("K", [1, 8, 64])
@pytest.mark.parametrize("inner", INNERS)
def test_checkpoints_are_small_beside_what_is_kept_of_the_tokens(inner, D, K):
    inputs = operator_inputs(inner, 1.0, L=1, H=1, D=D, K=K)
    weights = [x.unsqueeze(0) for n, x in inputs.items() if n[0] in "Wb"]
    numbers = sum(w.numel() for w in weights)
    tokens = K * functional.segment_length(INNER_MODELS[inner], tuple(weights), K)
    assert 8 * numbers <= tokens * (8 * D if inner == "mlp" else 4 * D)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [-1e8, 1e8])
def test_derivatives_of_gelu_saturate(bias, backend):
    """Far from zero gelu is linear or zero; what a sigmoid leaves there must not meet the cubes of a large argument."""
    inputs = operator_inputs("mlp", 1.0, L=8, K=8, weight_scale=1.0)
    inputs["b1"][:, ::2] = bias
    exact = operator_results("mlp", inputs, torch.float64, backend="reference")
    for name, error in distances(operator_results("mlp", inputs, backend=backend), exact).items():
        assert error < 1e-3, name
