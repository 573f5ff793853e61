"""Mini-batches in blocks: the equations, and the paths on a CPU, beside the dual form of whole mini-batches."""

import pytest
import torch

from tests.backends.test_exact_gradients import check_on_average
from tests.support.checks import (
    INNERS,
    assert_close,
    check_gradients,
    gradients,
    inner_inputs,
    make_layer,
    run_inner,
)
from tests.support.exactness import distances, excess, operator_inputs, operator_results, reference_errors
from ttt4rec.inner_models import INNER_MODELS
from ttt4rec.layers import functional
from ttt4rec.operators import SCANS

BACKENDS = ("native", "eager")
both = pytest.mark.parametrize("inner", INNERS)
everywhere = pytest.mark.parametrize("backend", BACKENDS)


def dual_layer(X, X_bar, U, s, W, b):
    """(8) and (9) of one layer, whole."""
    C = torch.tril(X_bar @ X.T + 1)
    P = X_bar @ W + b - s[:, None] * (C @ U)
    return P, W - s[-1] * X.T @ U, b - s[-1] * U.sum(0)


def blocked_layer(X, X_bar, U, s, W, b, n):
    """(36) and (37), block by block; R beside."""
    S, t, P, R = torch.zeros_like(W), torch.zeros_like(b), [], []
    for c in torch.arange(X.shape[0]).split(n):
        R.append(X_bar[c] @ S + t + torch.tril(X_bar[c] @ X[c].T + 1) @ U[c])
        P.append(X_bar[c] @ W + b - s[c, None] * R[-1])
        S, t = S + X[c].T @ U[c], t + U[c].sum(0)
    return torch.cat(P), W - s[-1] * S, b - s[-1] * t, torch.cat(R), S, t


def blocked_gradients(X, X_bar, U, s, W, b, dP, dW, db, n):
    """(38) and (39): of X, X̄, U, s, W and b."""
    *_, R, S_all, t_all = blocked_layer(X, X_bar, U, s, W, b, n)
    dR = -s[:, None] * dP
    dX, dX_bar, dU = torch.empty_like(X), torch.empty_like(X_bar), torch.empty_like(U)
    blocks = torch.arange(X.shape[0]).split(n)
    for i, c in enumerate(blocks):
        before, after = torch.cat([*blocks[:i], c[:0]]), torch.cat([*blocks[i + 1 :], c[:0]])
        S = X[before].T @ U[before]
        dS, dt = X_bar[after].T @ dR[after] - s[-1] * dW, dR[after].sum(0) - s[-1] * db
        C, dC = torch.tril(X_bar[c] @ X[c].T + 1), torch.tril(dR[c] @ U[c].T)
        dX_bar[c] = dP[c] @ W.T + dR[c] @ S.T + dC @ X[c]
        dX[c] = dC.T @ X_bar[c] + U[c] @ dS.T
        dU[c] = C.T @ dR[c] + X[c] @ dS + dt
    ds = -(dP * R).sum(1)
    ds[-1] -= (S_all * dW).sum() + (t_all * db).sum()
    return dX, dX_bar, dU, ds, dW + X_bar.T @ dP, db + dP.sum(0)


@pytest.mark.parametrize("n", [1, 4, 5, 16, 64])
def test_the_equations_are_those_of_the_dual_form(n):
    shapes = (16, 6), (16, 6), (16, 3), (16,), (6, 3), (3,)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    whole, (P, W, b, *_) = dual_layer(*given), blocked_layer(*given, n)
    for actual, expected in zip((P, W, b), whole, strict=True):
        assert_close(actual, expected)
    outer = [torch.randn_like(x) for x in whole]
    expected = torch.autograd.grad(whole, given, outer)
    for actual, wanted in zip(blocked_gradients(*(x.detach() for x in given), *outer, n), expected, strict=True):
        assert_close(actual, wanted)


def both_ways(inner, inputs, backend, **options):
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o, state = run_inner(inner, leaves, backend=backend, **options)
    return [o, *state.weights, *gradients([o, *state.weights], list(leaves.values()))]


SHAPES = [(2, 300, 2, 8, 65), (1, 256, 2, 8, 128), (1, 150, 1, 16, 300), (1, 1100, 1, 16, 512), (1, 2048, 1, 8, 2048)]


@both
@everywhere
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_the_references(inner, backend, shape):
    inputs = inner_inputs(inner, *shape)
    for actual, expected in zip(both_ways(inner, inputs, backend), both_ways(inner, inputs, "reference"), strict=True):
        assert_close(actual, expected)


@both
@everywhere
@pytest.mark.parametrize("packed", [True, False])
def test_of_unequal_sequences(inner, backend, packed):
    mask = torch.arange(180) < torch.tensor([180, 64, 65, 0, 100])[:, None]
    where = {"cu_seqlens": torch.tensor([0, 70, 70, 76, 300])} if packed else {"mask": mask}
    inputs = inner_inputs(inner, *((1, 300) if packed else mask.shape), 1, 8, 72)
    for actual, expected in zip(
        both_ways(inner, inputs, backend, **where), both_ways(inner, inputs, "reference", **where), strict=True
    ):
        assert_close(actual, expected)


@both
@everywhere
def test_of_streams(inner, backend):
    inputs = inner_inputs(inner, 2, 200, 1, 8, 80)
    whole, end = run_inner(inner, inputs, backend="reference")
    state, outputs = None, []
    for first, last in ((0, 30), (30, 31), (31, 200)):
        piece = inputs | {name: inputs[name][:, first:last] for name in ("q", "k", "v", "inner_lr")}
        o, state = run_inner(inner, piece, state=state, backend=backend)
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), whole)
    for actual, expected in zip(state.weights, end.weights, strict=True):
        assert_close(actual, expected)


@everywhere
@both
@pytest.mark.slow
def test_gradcheck(inner, backend):
    inputs = inner_inputs(inner, 1, 69, 1, 8, 66, hidden=8)

    def function(*arguments):
        o, state = run_inner(inner, dict(zip(inputs, arguments, strict=True)), backend=backend)
        return o, *state.weights

    check_gradients(function, list(inputs.values()))


@both
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, "mixed"])
def test_gradients_are_as_exact_as_the_references(inner, scale):
    inputs = operator_inputs(inner, scale, L=300, K=128, H=1)
    exact = operator_results(inner, inputs, torch.float64, backend="reference")
    references = reference_errors(
        lambda move: operator_results(inner, {n: move(x) for n, x in inputs.items()}, backend="reference"), exact
    )
    for backend in BACKENDS:
        assert not excess(distances(operator_results(inner, inputs, backend=backend), exact), references), backend


@both
@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, "mixed"])
def test_gradients_are_as_exact_on_average_of_many_draws(inner, scale):
    """The gradient of the last token scale is one number, a small difference: its mean wants many draws."""
    check_on_average(inner, scale, 40, L=1100, K=512, H=1)


@both
@everywhere
def test_replay_gives_the_forwards_weights_to_the_last_bit(inner, backend, monkeypatch):
    found = []
    for segment in (1, 4):
        monkeypatch.setattr(functional, "segment_length", lambda *_, segment=segment: segment)
        torch.manual_seed(3)
        found.append(
            both_ways(inner, {n: x.float() for n, x in inner_inputs(inner, 1, 700, 2, 8, 100).items()}, backend)
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@both
def test_a_copy_of_the_weights_is_small_beside_what_is_kept(inner):
    weights = [w.unsqueeze(0) for name, w in inner_inputs(inner, 1, 1, 1, 64, 1).items() if name[0] in "Wb"]
    lengths = {K: functional.segment_length(INNER_MODELS[inner], tuple(weights), K) for K in (16, 64, 512, 2048)}
    assert lengths[16] >= lengths[64] >= 16
    assert lengths[2048] == 1 <= lengths[512] <= 2


@both
@everywhere
@pytest.mark.parametrize("backward", [False, True])
def test_opcheck(inner, backend, backward):
    operator = SCANS[inner]
    inputs = inner_inputs(inner, 1, 140, 1, 8, 70)
    *tokens, scale = (inputs.pop(n) for n in ("q", "k", "v", "inner_lr", "token_scale"))
    norm = inputs.pop("ln_weight"), inputs.pop("ln_bias")
    weights = tuple(w.unsqueeze(0) for w in inputs.values())
    scan = operator.pack((*tokens, scale, *weights, *norm, None, None, 1e-6, 1))
    if backward:
        kept, grads = operator.backward_sample(operator(scan, backend))
        torch.library.opcheck(operator.backward_op, (*operator.flatten(scan), *kept, *grads, backend))
    else:
        torch.library.opcheck(operator.op, (*operator.flatten(scan), backend))


@both
def test_a_layer_compiles_without_a_graph_break(inner):
    torch._dynamo.reset()
    layer = make_layer(inner, "transformer", mini_batch_size=128)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 200, 8, dtype=torch.float64)
    parameters = list(layer.parameters())
    y, own = layer(x), compiled(x)
    assert_close(own, y)
    for actual, expected in zip(gradients([own], parameters), gradients([y], parameters), strict=True):
        assert_close(actual, expected)


@both
def test_a_layer_exports(inner):
    layer, x = make_layer(inner, "transformer", mini_batch_size=128), torch.randn(1, 200, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
