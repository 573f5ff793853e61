"""ttt_linear and ttt_mlp: their gradients, and the fast path held against the reference."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.batches import batches
from tests.support.checks import (
    INNERS,
    assert_close,
    assert_states_close,
    check_gradients,
    flat,
    inner_inputs,
    inner_results,
    relative_error,
    run_inner,
)
from ttt4rec import TTTState
from ttt4rec.eager import layout
from ttt4rec.eager.gelu import Gelu

BACKENDS = ("eager", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner", INNERS)
def test_gradcheck(inner, backend):
    inputs = inner_inputs(inner, B=2, L=5, H=1, D=2, K=3)
    names = list(inputs)

    def function(*arguments):
        o, state = run_inner(inner, dict(zip(names, arguments, strict=True)), backend=backend)
        return o, *state.weights, state.pending_k, state.pending_v, state.pending_lr

    check_gradients(function, list(inputs.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner", INNERS)
def test_gradcheck_from_state_to_state(inner, backend):
    inputs = inner_inputs(inner, B=1, L=5, H=2, D=4, K=3, hidden=6)
    earlier = inner_inputs(inner, B=1, L=2, H=2, D=4, K=3, hidden=6)
    shared = {name: x for name, x in inputs.items() if name not in ("q", "k", "v", "inner_lr")}
    _, start = run_inner(inner, earlier | shared)
    names = list(inputs)
    tensors = [*inputs.values(), start.pending_k, start.pending_v, start.pending_lr, *start.weights]

    def function(*arguments):
        own, (k, v, lr, *weights) = arguments[: len(names)], arguments[len(names) :]
        state = TTTState(tuple(weights), k, v, lr, start.position)
        o, end = run_inner(inner, dict(zip(names, own, strict=True)), state=state, backend=backend)
        return o, *end.weights, end.pending_k, end.pending_v, end.pending_lr

    check_gradients(function, tensors)


@pytest.mark.parametrize("inner", INNERS)
def test_gradcheck_of_packed_and_padded_sequences(inner):
    inputs = inner_inputs(inner, B=1, L=6, H=1, D=2, K=2, hidden=3)
    names = list(inputs)
    for where in (
        {"cu_seqlens": torch.tensor([0, 1, 1, 6])},
        {"mask": torch.tensor([[False, True, True, True, True, False]])},
    ):

        def function(*arguments, where=where):
            o, state = run_inner(inner, dict(zip(names, arguments, strict=True)), **where)
            return o, *state.weights

        check_gradients(function, list(inputs.values()))


@pytest.mark.parametrize("inner", INNERS)
@given(batch=batches(), cache_bytes=st.sampled_from([1, 1000, layout.CACHE_BYTES]), seed=st.integers(0, 99))
def test_eager_equals_reference(inner, batch, cache_bytes, seed):
    shape, where = batch
    torch.manual_seed(seed)
    inputs = inner_inputs(inner, **shape)
    o, state, grads = inner_results(inner, inputs, backend="reference", **where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CACHE_BYTES", cache_bytes)  # small: one sequence at a time
        fast_o, fast_state, fast_grads = inner_results(inner, inputs, backend="eager", **where)
    tolerance = 1e-8  # D = 2 normalises two numbers to almost +-1, which magnifies rounding
    assert_close(fast_o, o, tolerance, "o")
    assert_states_close(fast_state, state, tolerance)
    for name, expected in grads.items():
        assert_close(fast_grads[name], expected, tolerance, f"grad {name}")


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("where", ["dense", "packed"])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_float32_is_as_accurate_as_the_reference_in_float32(inner, where, backend):
    options = {"cu_seqlens": torch.tensor([0, 40, 41, 96])} if where == "packed" else {}
    errors = {"reference": defaultdict(float), backend: defaultdict(float)}  # summed, since a single sum may cancel
    draws = 4
    for _ in range(draws):
        exact = inner_inputs(inner, B=1, L=96, H=2, D=16, K=8)
        single = {name: x.float() for name, x in exact.items()}
        exact = {name: x.double() for name, x in single.items()}  # the same numbers
        truth = flat(inner_results(inner, exact, backend="reference", **options))
        for side, sums in errors.items():
            for name, actual in flat(inner_results(inner, single, backend=side, **options)).items():
                assert actual.dtype == torch.float32, name
                sums[name] += relative_error(actual, truth[name])
    for name, error in errors[backend].items():
        allowed = 2 * errors["reference"][name] + draws * 8 * torch.finfo(torch.float32).eps
        assert error <= allowed, f"{name}: mean error {error / draws:.2e} above {allowed / draws:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_half_precision_inputs_are_computed_in_float32(inner, dtype, backend):
    inputs = inner_inputs(inner, B=2, L=21, H=2, D=8, K=4, dtype=dtype)
    o, state, grads = inner_results(inner, inputs, backend=backend)
    assert o.dtype == grads["q"].dtype == dtype
    assert {x.dtype for x in (*state.weights, state.pending_k, state.pending_v, state.pending_lr)} == {torch.float32}
    exact = {name: x.double() for name, x in inputs.items()}
    exact_o, exact_state, exact_grads = inner_results(inner, exact, backend="reference")
    ulp = torch.finfo(dtype).eps
    assert_close(o, exact_o, ulp, "o")
    assert_states_close(state, exact_state, 1e-4)  # no half-precision rounding inside
    for name in ("q", "k", "v", "inner_lr", "W1", "ln_weight"):
        # outputs arrive rounded, so gradients carry the rounding of the cotangent alone
        assert_close(grads[name], exact_grads[name], 4 * ulp, f"grad {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inner", INNERS)
def test_split_calls_equal_one_call(inner, backend):
    inputs = inner_inputs(inner, B=2, L=13, H=2, D=4, K=4)
    whole, end = run_inner(inner, inputs, backend=backend)
    state, outputs = None, []
    for piece in (slice(0, 1), slice(1, 6), slice(6, 7), slice(7, 13)):
        own = {name: inputs[name][:, piece] for name in ("q", "k", "v", "inner_lr")}
        o, state = run_inner(inner, inputs | own, state=state, backend=backend)
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), whole)
    assert_states_close(state, end)


@pytest.mark.parametrize("inner", INNERS)
def test_inputs_are_left_unchanged(inner):
    inputs = inner_inputs(inner, B=2, L=9, H=2, D=4, K=4)
    before = {name: x.clone() for name, x in inputs.items()}
    _, state = run_inner(inner, inputs)
    kept = state.clone()
    run_inner(inner, inputs, state=state)
    for name, x in inputs.items():
        assert torch.equal(x, before[name]), name
    assert_states_close(state, kept, 0.0)


@pytest.mark.parametrize("inner", INNERS)
def test_gradients_are_freed_and_deterministic(inner):
    inputs = inner_inputs(inner, B=3, L=17, H=2, D=4, K=4)
    first, second = (flat(inner_results(inner, inputs)) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("inner", INNERS)
def test_non_contiguous_inputs(inner):
    inputs = inner_inputs(inner, B=2, L=9, H=2, D=4, K=4)
    strided = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in inputs.items()}
    assert not strided["q"].is_contiguous()
    expected, actual = flat(inner_results(inner, inputs)), flat(inner_results(inner, strided))
    for name, x in expected.items():
        assert_close(actual[name], x, name=name)


def test_the_second_derivative_of_gelu_does_not_cancel():
    """4 (q - c s (1 - s)) + ...: in float32, 1 - s has lost its digits where s is nearly one."""
    z = torch.linspace(-8, 8, 1001)
    exact = z.double().requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.gelu(exact, approximate="tanh").sum(), exact, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), exact)
    gelu = Gelu(z)
    for own, expected in ((gelu.slope(), slope), (gelu.curvature(), curvature)):
        assert ((own - expected).abs() <= 1e-6 * (1 + expected.abs())).all()
