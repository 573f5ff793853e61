"""``torch.compile(fullgraph=True)`` of layers on every backend and of models: no graph break, and the same numbers.

The backend "auto" alone is in ``test_operators``.
"""

import pytest
import torch

from tests.support.checks import BACKBONES, INNERS, assert_close, assert_states_close, gradients
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer

CALLS = [(inner, backbone, where) for inner in INNERS for backbone in BACKBONES for where in ("packed", "state")]
# Each takes seconds: the default run meets every option on the kernels.
QUICK = [("triton", *CALLS[i]) for i in (0, 7)]
PATHS = [
    pytest.param(*path, marks=() if path in QUICK else pytest.mark.slow)
    for path in ((backend, *call) for backend in ("reference", "triton") for call in CALLS)
]
SINGLE = 1e-5  # the same operators on the same numbers; only what is around them may be reordered
MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])


@pytest.mark.parametrize(("backend", "inner", "backbone", "where"), PATHS)
def test_layer(backend, inner, backbone, where):
    torch._dynamo.reset()
    layer = TTTLayer(8, 2, inner=inner, backbone=backbone, mini_batch_size=4, backend=backend)
    x = torch.randn(2, 7, 8, requires_grad=True)
    if where == "packed":
        tokens, options = x.view(1, 14, 8), {"cu_seqlens": torch.tensor([0, 5, 5, 14])}
    else:
        _, state = layer(x.detach(), return_state=True)
        tokens, options = x, {"state": state.detach(), "mask": MASK}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [f(tokens, return_state=True, **options) for f in (layer, compiled)]
    leaves = [x, *layer.parameters()]
    (y, *grads), (y_compiled, *grads_compiled) = ([o, *gradients([o, *s.weights], leaves)] for o, s in results)
    assert_close(y_compiled, y, SINGLE, "y")
    for i, (actual, expected) in enumerate(zip(grads_compiled, grads, strict=True)):
        assert_close(actual, expected, SINGLE, f"gradient {i}")


@pytest.mark.parametrize(
    ("inner", "backbone"), [("linear", "transformer"), pytest.param("mlp", "mamba", marks=pytest.mark.slow)]
)
def test_model(inner, backbone):
    torch._dynamo.reset()
    options = {"inner": inner, "backbone": backbone, "block_conv": backbone == "mamba", "mini_batch_size": 4}
    model = TTT4Rec(TTT4RecConfig(num_items=20, width=8, num_heads=2, ffn_width=8, **options)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _, states = model(torch.tensor([[1, 2, 3]]), return_states=True)
    for ids, where in (
        (torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]), {}),
        (torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), {"cu_seqlens": torch.tensor([0, 3, 7])}),
        (torch.tensor([[4, 5, 6]]), {"states": states}),
    ):
        h, h_compiled = (f(ids, return_states=True, **where)[0] for f in (model, compiled))
        assert_close(h_compiled, h, SINGLE)
        parameters = list(model.parameters())
        for actual, expected in zip(gradients([h_compiled], parameters), gradients([h], parameters), strict=True):
            assert_close(actual, expected, SINGLE)


def padded(B, L):
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, L // 2 :] = False
    mask[-1, : L // 3] = False
    return torch.randn(B, L, 8), mask


def packed(*bounds):
    return torch.randn(1, bounds[-1], 8), torch.tensor(bounds)


def streams(layer, B, L, seen):
    return torch.randn(B, L, 8), layer(torch.randn(B, seen, 8), return_state=True)[1].detach()


def counted(function):
    """The function compiled for all sizes, and the programs that were made."""
    programs = []

    def keep(graph, inputs):
        programs.append(graph)
        return graph.forward

    return torch.compile(function, fullgraph=True, dynamic=True, backend=keep), programs


CALLS_OF_ANY_SIZE = {  # PyTorch takes sizes that are equal at first for one size: none here is K - 1 or a width
    "mask": (lambda layer, x, mask: layer(x, mask=mask, return_state=True), [(5, 7), (2, 13), (9, 4), (4, 2)]),
    "packed": (lambda layer, x, bounds: layer(x, cu_seqlens=bounds, return_state=True),
               [(0, 5, 5, 9), (0, 2, 3, 7), (0, 1, 2, 3, 12, 20), (0, 3, 10)]),
    "state": (lambda layer, x, state: layer(x, state=state, return_state=True), [(5, 7, 6), (2, 13, 1), (9, 4, 11)]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "backbone", "where"),
    [("mlp", "mamba", "mask"), ("linear", "transformer", "packed"), ("mlp", "mamba", "state")],
)
def test_one_program_serves_all_sizes(inner, backbone, where):
    torch._dynamo.reset()
    layer = TTTLayer(8, 2, inner=inner, backbone=backbone, mini_batch_size=4)
    call, sizes = CALLS_OF_ANY_SIZE[where]
    make = {"mask": padded, "packed": packed, "state": lambda *size: streams(layer, *size)}[where]
    compiled, programs = counted(call)
    for size in sizes:
        given = make(*size)
        (y, state), (expected, expected_state) = compiled(layer, *given), call(layer, *given)
        assert_close(y, expected, SINGLE, str(size))
        assert_states_close(state, expected_state, SINGLE)
    assert len(programs) == 1


@pytest.mark.slow
def test_one_program_steps_any_number_of_streams():
    torch._dynamo.reset()
    layer = TTTLayer(8, 2, inner="mlp", backbone="mamba", mini_batch_size=4)
    pool, other = layer.make_pool(12), layer.make_pool(12)
    step, programs = counted(lambda x, pool, slots: layer.step(x, pool, slots))
    for B in (5, 2, 11, 5, 7, 9):
        x, slots = torch.randn(B, 8), torch.randperm(12)[:B]
        assert_close(step(x, pool, slots), layer.step(x, other, slots), SINGLE)
    assert_states_close(pool.read(torch.arange(12)), other.read(torch.arange(12)), SINGLE)
    assert len(programs) == 1
