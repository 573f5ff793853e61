"""One token at a time: streams in a pool against the whole forward, on the eager path and the kernels."""

import dataclasses

import pytest
import torch

from tests.support.checks import (
    BACKBONES,
    INNERS,
    assert_close,
    assert_states_close,
    assert_states_identical,
    make_layer,
)
from tests.support.steps import LENGTH, WIDTH, read_on, step_arguments, tokens
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer
from ttt4rec.arguments import TokenStep
from ttt4rec.eager import step
from ttt4rec.models.mixers import MIXERS

all_layers = pytest.mark.parametrize(
    ("inner", "backbone"), [(inner, backbone) for inner in INNERS for backbone in BACKBONES]
)


@all_layers
@pytest.mark.parametrize("mini_batch_size", [1, 2, 4])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_steps_are_the_forward(inner, backbone, mini_batch_size, backend):
    layer = make_layer(inner, backbone, mini_batch_size=mini_batch_size, backend=backend)
    x = tokens(3)
    whole, end = layer(x, return_state=True)
    pool, slots = layer.make_pool(5), torch.tensor([4, 0, 2])
    assert_close(read_on(layer, x, pool, slots), whole)
    assert_states_close(pool.read(slots), end.detach())


@all_layers
@pytest.mark.parametrize("split", range(LENGTH))
def test_a_stream_written_at_any_token_goes_on(inner, backbone, split):
    layer = make_layer(inner, backbone)
    x = tokens(2)
    whole, end = layer(x, return_state=True)
    pool, slots = layer.make_pool(3), torch.tensor([2, 0])
    if split:
        pool.write(slots, layer(x[:, :split], return_state=True)[1])
    assert_close(read_on(layer, x[:, split:], pool, slots), whole[:, split:])
    assert_states_close(pool.read(slots), end.detach())


@all_layers
def test_streams_at_different_positions_in_any_order(inner, backbone, monkeypatch):
    """Also where they need several chunks."""
    monkeypatch.setattr("ttt4rec.eager.step.CACHE_BYTES", 5000)
    layer = make_layer(inner, backbone)
    lengths = [5, 1, 11, 4, 8, 3, 7]
    histories = [tokens(1, length) for length in lengths]
    pool, read = layer.make_pool(9), [0] * len(lengths)
    outputs = [[] for _ in lengths]
    slot_of = torch.randperm(9)[: len(lengths)]
    while any(r < length for r, length in zip(read, lengths, strict=True)):
        unfinished = [n for n in range(len(lengths)) if read[n] < lengths[n]]
        chosen = [unfinished[i] for i in torch.randperm(len(unfinished))[:4]]
        y = layer.step(torch.cat([histories[n][:, read[n]] for n in chosen]), pool, slot_of[chosen])
        for n, row in zip(chosen, y, strict=True):
            outputs[n].append(row)
            read[n] += 1
    for n, history in enumerate(histories):
        assert_close(torch.stack(outputs[n])[None], layer(history))
    idle = torch.tensor([n for n in range(9) if n not in slot_of])
    assert_states_identical(pool.read(idle), layer.make_pool(2).read(torch.arange(2)))


@all_layers
def test_round_trip_is_exact(inner, backbone):
    layer = make_layer(inner, backbone)
    cu_seqlens = torch.tensor([0, 3, 4, 10, 14])
    _, state = layer(tokens(1, 14), cu_seqlens=cu_seqlens, return_state=True)
    pool, slots = layer.make_pool(6), torch.tensor([5, 1, 0, 3])
    pool.write(slots, state)
    assert_states_identical(pool.read(slots), state.detach())
    assert_states_identical(pool.read(slots.flip(0)), state.detach()[[3, 2, 1, 0]])
    layer.step(tokens(2, 1)[:, 0], pool, slots[:2])
    assert_states_identical(pool.read(slots[2:]), state.detach()[2:])


@all_layers
def test_reset_starts_anew(inner, backbone):
    """Whatever the slot held."""
    layer = make_layer(inner, backbone)
    pool, slots, x = layer.make_pool(3), torch.tensor([1, 2]), tokens(2)
    layer.step(torch.full((2, WIDTH), float("nan"), dtype=torch.float64), pool, slots)
    pool.reset(slots)
    assert_states_identical(pool.read(slots), layer.make_pool(2).read(torch.arange(2)))
    assert_close(read_on(layer, x, pool, slots), layer(x))


@pytest.mark.parametrize("options", [{"adapt": False}, {"max_inner_step": 0.5}], ids=str)
def test_options_of_the_rates(options):
    layer = make_layer("mlp", "transformer", **options)
    layer.set_inner_lr_scale(0.7)
    x, slots = tokens(2), torch.arange(2)
    assert_close(read_on(layer, x, layer.make_pool(2), slots), layer(x))


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(inner, dtype):
    """Below float64 within twice what the forward loses in the same dtype, on average; the pool is float32."""
    ratios = []
    for _ in range(8):  # one draw of roundings may lose several times what another one does
        layer = make_layer(inner, "mamba")
        x, slots = tokens(2), torch.arange(2)
        exact = layer(x)
        layer.to(dtype)
        pool = layer.make_pool(2)
        y = read_on(layer, x.to(dtype), pool, slots)
        assert y.dtype == dtype
        assert pool.records.dtype == torch.float32
        lost = (layer(x.to(dtype)) - exact).abs().max()
        ratios.append((y - exact).abs().max() / lost)
    assert torch.stack(ratios).log().mean().exp() <= 2


def test_autocast_as_in_forward():
    layer = make_layer("linear", "transformer").float()
    x, slots = tokens(2).float(), torch.arange(2)
    pool = layer.make_pool(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pool.write(slots, layer(x[:, :3], return_state=True)[1])
        y, whole = read_on(layer, x[:, 3:], pool, slots), layer(x)[:, 3:]
    assert y.dtype == whole.dtype
    assert_close(y, whole, 2**-7)  # one rounding to bfloat16


def test_nothing_of_a_step_can_be_differentiated():
    layer = make_layer("mlp", "mamba")
    pool, slots = layer.make_pool(2), torch.arange(2)
    pool.write(slots, layer(tokens(2), return_state=True)[1])
    y = layer.step(tokens(2)[:, 0].requires_grad_(), pool, slots)
    assert not y.requires_grad
    assert not pool.records.requires_grad


@pytest.mark.parametrize("block_conv", [False, True])
@all_layers
def test_model_steps_are_its_forward(inner, backbone, block_conv):
    sizes = {"num_items": 30, "num_blocks": 2, "width": WIDTH, "num_heads": 2, "mini_batch_size": 4}
    config = TTT4RecConfig(**sizes, inner=inner, backbone=backbone, block_conv=block_conv)
    model = TTT4Rec(config).double().eval()
    ids = torch.randint(1, 31, (3, LENGTH))
    whole, states = model(ids, return_states=True)
    pools, slots = model.make_pools(5), torch.tensor([4, 0, 2])
    assert_close(torch.stack([model.step(ids[:, t], pools, slots) for t in range(LENGTH)], 1), whole)
    for pool, state in zip(pools, states, strict=True):
        assert_states_close(pool.read(slots).mixer, state.mixer.detach())
        pool.reset(slots)
        pool.write(slots, state)
    assert_close(model.step(ids[:, 0], pools, slots), model(ids[:, :1], states=states)[:, 0])
    pools[0].reset(slots)
    fresh = model.make_pools(3)[0]
    if block_conv:
        assert torch.equal(pools[0].read(slots).conv, fresh.read(torch.arange(3)).conv)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_have_pools_and_steps_if_they_say_so(mixer):
    model = TTT4Rec(TTT4RecConfig(num_items=5, mixer=mixer)).double().eval()
    if not MIXERS[mixer].steps:
        given = type(model.blocks[0].mixer).__name__
        with pytest.raises(ValueError, match=f"mixer must have steps and pools, as TTTLayer has; given {given}"):
            model.make_pools(2)
        return
    pools, slots, ids = model.make_pools(2), torch.tensor([1, 0]), torch.tensor([[1, 2, 3], [4, 5, 1]])
    steps = torch.stack([model.step(item, pools, slots) for item in ids.T], 1)
    assert_close(steps, model(ids))


def test_pool_size():
    """Weights and 8 rows of every stream and head, and a position; a row's 177 numbers in room for 184."""
    layer = TTTLayer(64, 4, inner="mlp", mini_batch_size=8)
    assert layer.make_pool(3).nbytes == 3 * (4 * 4 * (2 * 16 * 64 + 64 + 16 + 8 * 184) + 8)


def test_every_tensor_of_a_pool_counts():
    for pool in TTT4Rec(TTT4RecConfig(num_items=5, backbone="mamba", block_conv=True)).make_pools(3):
        inner = pool.mixer
        assert inner.nbytes == inner.records.nbytes + inner.position.nbytes + inner.conv.nbytes
        assert pool.nbytes == inner.nbytes + pool.conv.nbytes


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        ([0, 0], ValueError, "slots must differ, each stream reads one token; 0 is given twice"),
        ([0, 3], ValueError, "slots must be from 0 to 2; given 3"),
        ([-1, 2], ValueError, "slots must be from 0 to 2; given -1"),
        ([0], ValueError, r"slots must have shape \[B\] of x = \[2\]; given \[1\]"),
        ([[0, 1]], ValueError, r"slots must have shape \[B\] with B >= 1; given \[1, 2\]"),
        ([], TypeError, "slots must be int64; given torch.float32"),
    ],
)
def test_bad_slots(slots, error, message):
    layer = make_layer("linear", "transformer")
    pool = layer.make_pool(3)
    with pytest.raises(error, match=message):
        layer.step(tokens(2)[:, 0], pool, torch.tensor(slots))
    assert int(pool.position.sum()) == 0


def test_bad_arguments():
    layer = make_layer("linear", "transformer")
    pool, slots, x = layer.make_pool(3), torch.arange(2), tokens(2)[:, 0]
    with pytest.raises(ValueError, match=r"x must have shape \[B, width\] with width 8; given \[2, 7\]"):
        layer.step(x[:, 1:], pool, slots)
    with pytest.raises(TypeError, match=r"x must fit the pool's dtype torch.float64; given torch.float32"):
        layer.step(x.float(), pool, slots)
    with pytest.raises(ValueError, match="x must be on the pool's device cpu; given meta"):
        layer.step(x.to("meta"), pool, slots)
    with pytest.raises(ValueError, match="slots must be on the pool's device cpu; given meta"):
        layer.step(x, pool, slots.to("meta"))
    with pytest.raises(ValueError, match="the pool belongs to another layer"):
        layer.step(x, make_layer("linear", "transformer").make_pool(3), slots)
    for number in (0, 1.5):
        with pytest.raises(ValueError, match=f"num_slots must be an integer of at least 1; given {number}"):
            layer.make_pool(number)


class Halved(torch.nn.Module):
    """A parametrisation."""

    def forward(self, w):
        return w / 2


@all_layers
def test_a_parametrised_layer_steps_the_pool_it_made(inner, backbone):
    """Its parameters are other tensors whenever they are looked at; streams start with what they are now."""
    layer = make_layer(inner, backbone)
    for name in ("W1", "b1", "inner_norm_weight"):
        torch.nn.utils.parametrize.register_parametrization(layer, name, Halved())
    x, slots = tokens(2), torch.arange(2)
    pool = layer.make_pool(3)
    assert_close(read_on(layer, x, pool, slots), layer(x))
    with torch.no_grad():
        layer.parametrizations.W1.original.mul_(-1.5)
    pool.reset(slots)
    assert_close(read_on(layer, x, pool, slots), layer(x))
    pool.write(slots, layer(x[:, :6], return_state=True)[1])
    assert_close(read_on(layer, x[:, 6:], pool, slots), layer(x)[:, 6:])


@all_layers
def test_a_pool_is_its_layers_whatever_tensors_that_has(inner, backbone):
    """Weights that were assigned, and not another layer with the same tensors."""
    layer, other = make_layer(inner, backbone), make_layer(inner, backbone)
    x, slots, pool = tokens(2), torch.arange(2), layer.make_pool(3)
    layer.load_state_dict(other.state_dict(), assign=True)
    pool.reset(slots)
    assert_close(read_on(layer, x, pool, slots), other(x))
    other.W1 = layer.W1
    with pytest.raises(ValueError, match="the pool belongs to another layer"):
        other.step(x[:, 0], pool, slots)


def test_a_parametrised_model_steps_its_pools():
    model = TTT4Rec(TTT4RecConfig(num_items=5, num_blocks=2, dropout=0.0)).eval()
    for block in model.blocks:
        torch.nn.utils.parametrize.register_parametrization(block.mixer, "W1", Halved())
    pools, ids = model.make_pools(2), torch.tensor([[1, 2, 3]])
    stepped = torch.stack([model.step(item, pools, torch.tensor([1])) for item in ids.T], 1)
    assert_close(stepped, model(ids), 1e-5)


def test_states_of_other_layers_are_refused():
    layer = make_layer("linear", "transformer")
    pool, slots = layer.make_pool(3), torch.arange(2)
    for options, message in {
        ("mlp", "transformer"): "state must hold 2 weight tensors",
        ("linear", "mamba"): "another backbone than this layer's, transformer",
    }.items():
        with pytest.raises(ValueError, match=message):
            pool.write(slots, make_layer(*options)(tokens(2), return_state=True)[1])
    with pytest.raises(ValueError, match="state must hold one stream per sequence, 2; given 3"):
        pool.write(slots, layer(tokens(3), return_state=True)[1])


def test_bad_arguments_of_the_model():
    model = TTT4Rec(TTT4RecConfig(num_items=5, num_blocks=2, block_conv=True))
    pools, slots = model.make_pools(2), torch.arange(2)
    with pytest.raises(TypeError, match=r"ids must be int64 \[B\]; given torch.int64 \[2, 1\]"):
        model.step(torch.ones(2, 1, dtype=torch.int64), pools, slots)
    with pytest.raises(ValueError, match="pools must hold one entry per block, 2; given 1"):
        model.step(torch.ones(2, dtype=torch.int64), pools[:1], slots)
    with pytest.raises(ValueError, match="0 is given twice"):
        model.step(torch.ones(2, dtype=torch.int64), pools, torch.zeros_like(slots))
    others, longer = TTT4Rec(model.config).make_pools(2), model.make_pools(3)
    for foreign in ([pools[0], others[1]], [others[0], pools[1]], [pools[0], longer[1]], pools[::-1]):
        with pytest.raises(ValueError, match="pools must come from one make_pools"):
            model.step(torch.ones(2, dtype=torch.int64), foreign, slots)
    with pytest.raises(ValueError, match="ids must be of items, from 1; given a 0"):
        model.step(torch.tensor([3, 0]), pools, slots)
    with pytest.raises(ValueError, match="the pool belongs to another layer"):
        model.blocks[0].step(torch.ones(2, 64), others[0], slots)
    for pool in (*pools, *others, *longer):  # nothing has changed
        assert not pool.conv.any()
        assert not pool.mixer.position.any()


def test_a_convolutions_state_belongs_to_a_block_with_one():
    config = TTT4RecConfig(num_items=5, block_conv=True)
    with_conv, without = TTT4Rec(config), TTT4Rec(dataclasses.replace(config, block_conv=False))
    ids, slots = torch.tensor([[1, 2], [3, 4]]), torch.arange(2)
    states = {model: model(ids, return_states=True)[1] for model in (with_conv, without)}
    for model, other in ((with_conv, without), (without, with_conv)):
        (pool,) = model.make_pools(2)
        with pytest.raises(ValueError, match=r"state must be of a block with(out)? a convolution; given one with"):
            pool.write(slots, states[other][0])
        assert not pool.mixer.position.any()
        with pytest.raises(ValueError, match=r"state must be of a block with(out)? a convolution; given one with"):
            model(ids, states=states[other])
    (state,) = states[with_conv]
    with pytest.raises(ValueError, match=r"state's conv must have shape .*\[2, 3, 64\]; given \[1, 3, 64\]"):
        with_conv(ids, states=[state._replace(conv=state.conv[:1])])


@all_layers
def test_compile_has_no_graph_break(inner, backbone):
    torch._dynamo.reset()
    layer = make_layer(inner, backbone)
    x, slots = tokens(2), torch.tensor([2, 0])
    pool = layer.make_pool(3)
    compiled = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    y = torch.stack([compiled(x[:, t], pool, slots) for t in range(LENGTH)], 1)
    whole, end = layer(x, return_state=True)
    assert_close(y, whole)
    assert_states_close(pool.read(slots), end.detach())


@all_layers
def test_without_looking_at_the_positions(inner, backbone, monkeypatch):
    """What runs on a GPU where no kernel does: the host knows nothing of the positions."""
    monkeypatch.setattr(step, "_chunks", lambda offset, *_: step._everything(offset))
    layer = make_layer(inner, backbone)
    x, slots = tokens(3), torch.tensor([4, 0, 2])
    pool = layer.make_pool(5)
    pool.write(slots[:1], layer(x[:1, :2], return_state=True)[1])
    pool.write(slots[1:2], layer(x[1:2, :3], return_state=True)[1])
    y = read_on(layer, torch.stack([x[0, 2:10], x[1, 3:11], x[2, :8]]), pool, slots)
    whole = layer(x)
    assert_close(y, torch.stack([whole[0, 2:10], whole[1, 3:11], whole[2, :8]]))


@pytest.mark.parametrize("inner", INNERS)
def test_the_host_need_not_know_a_value(inner):
    """Meta tensors have none; so the eager path too can be captured in a CUDA graph."""
    given = step_arguments(inner, torch.float64)
    (o,) = step.token_step(TokenStep(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in given)))
    assert o.shape == given.q.shape
