"""The registered operators keep their contract, and layers compile without a graph break."""

import pytest
import torch

from checks import BACKBONES, INNERS, assert_close, assert_states_close, gradients, inner_inputs, make_layer
from ttt4rec import ops
from ttt4rec.eager import walk

EPS = 1e-6
SPANS = {
    "dense": (None, None),
    "spans": (torch.tensor([6, 0, 3]), torch.tensor([4, 3, 0])),  # one empty, slots 3 to 5 unused
}


def test_fresh_memory_in_the_eager_path_is_poisoned():
    assert walk.torch.empty(3).isnan().all()
    assert walk.torch.empty_like(torch.ones(3)).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("inner", INNERS)
def test_opcheck_forward(inner, spans):
    operator = ops.linear_scan if inner == "linear" else ops.mlp_scan
    torch.library.opcheck(operator, forward_arguments(inner, spans, requires_grad=True))


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("inner", INNERS)
def test_opcheck_backward(inner, spans):
    forward, backward = OPERATORS[inner]
    arguments = forward_arguments(inner, spans, requires_grad=False)
    tokens, weights, rest = arguments[:5], arguments[5:-7], arguments[-7:]
    results = forward(*arguments)
    o, kept = results[0], results[1 + len(weights) :]
    cotangents = [torch.randn_like(x) for x in (o, *weights)]
    torch.library.opcheck(backward, (*cotangents, *tokens, *weights, *kept, *rest))


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("inner", INNERS)
def test_fake_tensors_predict_shapes_dtypes_and_strides(inner, spans):
    forward, _ = OPERATORS[inner]
    arguments = forward_arguments(inner, spans, requires_grad=False, dtype=torch.bfloat16)
    real = forward(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = forward(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_compile_gives_the_same_numbers_without_a_graph_break(inner, backbone):
    torch._dynamo.reset()
    layer = make_layer(inner, backbone)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    parameters = list(layer.parameters())
    for where in ({}, {"mask": mask}):
        y, y_compiled = layer(x, **where), compiled(x, **where)
        assert_close(y_compiled, y)
        for actual, expected in zip(gradients([y_compiled], parameters), gradients([y], parameters), strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_compile_of_a_stream(inner, backbone):
    torch._dynamo.reset()
    layer = make_layer(inner, backbone)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        y, end = layer(x, return_state=True)
        state, outputs = None, []
        for piece in x.split(6, dim=1):
            out, state = compiled(piece, state=state, return_state=True)
            outputs.append(out)
    assert_close(torch.cat(outputs, 1), y)
    assert_states_close(state, end)


@pytest.mark.parametrize("inner", INNERS)
def test_compile_of_packed_sequences(inner):
    torch._dynamo.reset()
    layer = make_layer(inner, "mamba")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, cu_seqlens = torch.randn(1, 9, 8, dtype=torch.float64), torch.tensor([0, 5, 5, 9])
    assert_close(compiled(x, cu_seqlens=cu_seqlens), layer(x, cu_seqlens=cu_seqlens))


OPERATORS = {
    "linear": (ops.linear_scan, ops.linear_scan_backward),
    "mlp": (ops.mlp_scan, ops.mlp_scan_backward),
}


def forward_arguments(inner, spans, *, requires_grad, dtype=torch.float64):
    """Arguments of the forward operators: weights per sequence, then the spans, eps and the eager path."""
    B, L, N = (2, 5, 2) if spans == "dense" else (1, 10, 3)
    named = inner_inputs(inner, B=B, L=L, H=2, D=4, K=3, hidden=6, dtype=dtype)
    for name in ("W1", "b1", "W2", "b2"):
        if name in named:
            named[name] = named[name].expand(N, *named[name].shape).contiguous()
    tensors = [x.requires_grad_(requires_grad) for x in named.values()]
    return (*tensors, *SPANS[spans], EPS, 1, "eager")
