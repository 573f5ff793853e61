"""Meta and fake tensors: forward, backward, states and steps have the shapes, dtypes and strides of real ones."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.checks import BACKBONES, INNERS, inner_inputs, run_inner
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer
from ttt4rec.models import full_softmax
from ttt4rec.models.mixers import MIXERS

MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
BOUNDS = torch.tensor([0, 5, 5, 14])


def kinds(result):
    """Shape, dtype and strides of all tensors of a result."""
    if hasattr(result, "tensors"):
        result = tuple(result.tensors().values())
    if isinstance(result, torch.Tensor):
        return [(tuple(result.shape), result.dtype, result.stride())]
    return [kind for part in result for kind in kinds(part)]


def on_meta(make, run, *inputs):
    return run(make().to("meta"), *(x.to("meta") for x in inputs))


def on_fakes(make, run, *inputs):
    module = make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return run(module, *(mode.from_tensor(x) for x in inputs))


def made_in_fake_mode(make, run, *inputs):
    with FakeTensorMode() as mode:
        return run(make(), *(mode.from_tensor(x) for x in inputs))


WAYS = pytest.mark.parametrize("way", [on_meta, on_fakes, made_in_fake_mode])


@WAYS
@pytest.mark.parametrize("backend", ["auto", "eager", "native", "reference"])
@pytest.mark.parametrize(("inner", "backbone"), [("linear", "mamba"), ("mlp", "transformer")])
def test_layer(inner, backbone, backend, way):
    def make():
        return TTTLayer(16, 2, inner=inner, backbone=backbone, mini_batch_size=4, backend=backend)

    def run(layer, x, mask, bounds):
        y, state = layer(x, return_state=True)
        padded, masked_state = layer(x, mask=mask, return_state=True)
        packed = layer(x.view(1, 14, 16), cu_seqlens=bounds)
        more, last = layer(x, state=masked_state, return_state=True)
        gradients = torch.autograd.grad((y + padded + more).sum() + packed.sum(), [x, *layer.parameters()])
        return [
            y,
            padded,
            packed,
            more,
            *(t for s in (state, masked_state, last) for t in s.tensors().values()),
            *gradients,
        ]

    inputs = torch.randn(2, 7, 16, requires_grad=True), MASK, BOUNDS
    assert kinds(way(make, run, *inputs)) == kinds(run(make(), *inputs))


@WAYS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inner", INNERS)
def test_inner_loops(inner, dtype, way):
    inputs = inner_inputs(inner, B=2, L=7, H=2, D=4, K=4, dtype=dtype)

    def run(_, *tensors):
        o, state = run_inner(inner, dict(zip(inputs, tensors, strict=True)))
        return [o, *state.tensors().values()]

    assert kinds(way(lambda: torch.nn.Identity(), run, *inputs.values())) == kinds(run(None, *inputs.values()))


@WAYS
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_steps(backbone, backend, way):
    def make():
        return TTTLayer(16, 2, backbone=backbone, mini_batch_size=4, backend=backend)

    def run(layer, x, slots):
        pool = layer.make_pool(3)
        y = layer.step(x, pool, slots)
        pool.write(slots, pool.read(slots))
        pool.reset(slots)
        return [y, pool.records, pool.position, *pool.read(slots).tensors().values()]

    inputs = torch.randn(2, 16), torch.tensor([2, 0])
    assert kinds(way(make, run, *inputs)) == kinds(run(make(), *inputs))


@WAYS
@pytest.mark.parametrize("backbone", BACKBONES)
def test_model(backbone, way):
    def make():
        return TTT4Rec(TTT4RecConfig(20, 16, 2, 2, backbone=backbone, block_conv=True)).eval()

    def run(model, ids, items, slots):
        h, states = model(ids, return_states=True)
        again = model(ids, states=states)
        loss = model.nll(h[:, -1], items, "mean")
        pools = model.make_pools(3)
        stepped = model.step(items, pools, slots)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        losses = model.nll(again[:, -1], items)
        return [h, again, loss, losses, stepped, model.scores(h), *gradients]

    inputs = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([6, 7]), torch.tensor([2, 0])
    assert kinds(way(make, run, *inputs)) == kinds(run(make(), *inputs))


@WAYS
@pytest.mark.parametrize("what", ["ranks", "top_k"])
def test_what_needs_values_says_so(what, way):
    h, table, items = torch.randn(2, 4), torch.randn(9, 4), torch.tensor([1, 2])
    call = {"ranks": full_softmax.ranks, "top_k": lambda h, t, _: full_softmax.top_k(h, t, 3)}[what]
    with pytest.raises(ValueError, match=f"{what} depends on values, which meta and fake tensors do not have"):
        way(lambda: torch.nn.Identity(), lambda _, *given: call(*given), h, table, items)


@WAYS
@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "ttt"])
def test_baselines(mixer, way):
    """Whole histories; where lengths decide what is computed, an error."""

    def make():
        return TTT4Rec(TTT4RecConfig(20, 16, 1, 2, mixer)).eval().blocks[0]

    def run(block, x):
        return [block(x)]

    x = torch.randn(2, 7, 16)
    assert kinds(way(make, run, x)) == kinds(run(make(), x))
    with pytest.raises(ValueError, match="depends on values, which meta and fake tensors do not have"):
        way(make, lambda block, x, bounds: block(x, cu_seqlens=bounds), x.view(1, 14, 16), BOUNDS)
