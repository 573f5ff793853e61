"""TTTLayer: however a stream is cut, packed or padded, each token gets the same numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support.checks import (
    BACKBONES,
    INNERS,
    assert_close,
    assert_states_close,
    assert_states_identical,
    gradients,
    inner_inputs,
    make_layer,
    relative_error,
    run_inner,
)
from ttt4rec import TTTLayer, TTTState
from ttt4rec.models.blocks import Block

WIDTH = 8
everywhere = [(inner, backbone) for inner in INNERS for backbone in BACKBONES]
all_layers = pytest.mark.parametrize(("inner", "backbone"), everywhere)


def sequence(length, batch=1):
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


def alone(layer, x, state=None):
    """One stream by itself: outputs and state."""
    return layer(x, state=state, return_state=True)


@all_layers
@given(pieces=st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_any_split_into_calls_equals_one_call(inner, backbone, pieces):
    torch.manual_seed(0)
    layer, x = make_layer(inner, backbone), sequence(sum(pieces), batch=2)
    whole, end = layer(x, return_state=True)
    state, outputs = None, []
    for piece in x.split(pieces, dim=1):
        y, state = layer(piece, state=state, return_state=True)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1), whole)
    assert_states_close(state, end)
    assert state.position.tolist() == [sum(pieces)] * 2


@all_layers
def test_gradients_flow_through_the_state_as_through_one_call(inner, backbone):
    layer, x = make_layer(inner, backbone), sequence(11, batch=2).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = gradients([layer(x)], leaves)
    first, state = layer(x[:, :6], return_state=True)
    y = torch.cat((first, layer(x[:, 6:], state=state)), 1)
    for name, actual, g in zip(["x", *dict(layer.named_parameters())], gradients([y], leaves), expected, strict=True):
        assert_close(actual, g, name=name)


@all_layers
@given(prefixes=st.lists(st.integers(1, 9), min_size=2, max_size=3), more=st.integers(1, 6))
def test_streams_at_different_positions_share_a_batch(inner, backbone, prefixes, more):
    torch.manual_seed(1)
    layer = make_layer(inner, backbone)
    streams = [sequence(length + more) for length in prefixes]
    starts = [alone(layer, x[:, :length])[1] for x, length in zip(streams, prefixes, strict=True)]
    batch = torch.cat([x[:, length:] for x, length in zip(streams, prefixes, strict=True)])
    y, state = layer(batch, state=TTTState.stack(starts), return_state=True)
    for n, x in enumerate(streams):
        expected, end = alone(layer, x)
        assert_close(y[n : n + 1], expected[:, -more:])
        assert_states_close(state[n], end)


@all_layers
@given(
    first=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    second=st.lists(st.integers(0, 6), min_size=3, max_size=3).filter(any),
)
def test_any_packing_continued_with_its_state(inner, backbone, first, second):
    torch.manual_seed(2)
    layer = make_layer(inner, backbone)
    streams = [sequence(a + b) for a, b in zip(first, second, strict=True)]
    heads = torch.cat([x[:, :a] for x, a in zip(streams, first, strict=True)], 1)
    tails = torch.cat([x[:, a:] for x, a in zip(streams, first, strict=True)], 1)
    y_heads, state = layer(heads, cu_seqlens=bounds(first), return_state=True)
    y_tails, state = layer(tails, cu_seqlens=bounds(second), state=state, return_state=True)
    pieces = zip(y_heads.split(first, 1), y_tails.split(second, 1), strict=True)
    for n, (x, y) in enumerate(zip(streams, pieces, strict=True)):
        if x.shape[1] == 0:
            assert_states_identical(state[n].to(), initial_state(layer))
            continue
        expected, end = alone(layer, x)
        assert_close(torch.cat(y, 1), expected)
        assert_states_close(state[n], end)


@st.composite
def masks(draw):
    rows = draw(st.integers(1, 3))
    lengths = [draw(st.integers(1, 9)) for _ in range(rows)]
    L = max(lengths) + draw(st.integers(0, 2))
    mask = torch.zeros(rows, L, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        start = draw(st.sampled_from([0, L - length, (L - length) // 2]))
        row[start : start + length] = True
    return mask


@all_layers
@given(mask=masks())
def test_any_padding_gives_each_token_what_it_gets_alone(inner, backbone, mask):
    torch.manual_seed(3)
    layer, x = make_layer(inner, backbone), sequence(mask.shape[1], batch=mask.shape[0]).requires_grad_()
    y, state = layer(x, mask=mask, return_state=True)
    rows = [alone(layer, x[n : n + 1, mask[n]]) for n in range(len(mask))]
    for n, (expected, end) in enumerate(rows):
        assert_close(y[n : n + 1, mask[n]], expected)
        assert_states_close(state[n], end)
    assert (y[~mask] == 0).all()
    leaves = [x, *layer.parameters()]
    together, apart = gradients([y[mask]], leaves), gradients([torch.cat([y for y, _ in rows], 1)[0]], leaves)
    assert (together[0][~mask] == 0).all()
    for actual, expected in zip(together, apart, strict=True):
        assert_close(actual, expected)


@all_layers
def test_padding_continues_a_stream(inner, backbone):
    layer, x = make_layer(inner, backbone), sequence(9, batch=2)
    whole, end = layer(x, return_state=True)
    state = layer(x[:, :3], return_state=True)[1]
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 2 + [True] * 4])
    middle = torch.zeros(2, 6, WIDTH, dtype=torch.float64)
    middle[mask] = x[:, 3:7].flatten(0, 1)
    y, state = layer(middle, mask=mask, state=state, return_state=True)
    last, state = layer(x[:, 7:], state=state, return_state=True)
    assert_close(y[mask].view(2, 4, WIDTH), whole[:, 3:7])
    assert_close(last, whole[:, 7:])
    assert_states_close(state, end)


@all_layers
def test_an_empty_row_leaves_its_stream_where_it_was(inner, backbone):
    layer = make_layer(inner, backbone)
    state = layer(sequence(6, batch=2), return_state=True)[1]
    mask = torch.tensor([[False] * 3, [True] * 3])
    y, after = layer(sequence(3, batch=2), mask=mask, state=state, return_state=True)
    assert_states_identical(after[0], state[0])
    assert (y[0] == 0).all()
    assert after.position.tolist() == [6, 9]


@all_layers
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_what_padding_rows_hold_reaches_neither_outputs_nor_gradients(inner, backbone, garbage):
    layer, x = make_layer(inner, backbone), sequence(7, batch=2)
    mask = torch.tensor([[True] * 5 + [False] * 2, [False] * 3 + [True] * 4])
    results = []
    for filling in (0.0, garbage):
        filled = x.masked_fill(~mask[..., None], filling).requires_grad_()
        y, state = layer(filled, mask=mask, return_state=True)
        results.append((y, state, gradients([y], [filled, *layer.parameters()])))
    (y, state, expected), (actual_y, actual_state, actual) = results
    assert torch.equal(actual_y, y)
    assert_states_identical(actual_state.detach(), state.detach())
    names = ["x", *dict(layer.named_parameters())]
    wrong = [n for n, a, e in zip(names, actual, expected, strict=True) if not torch.equal(a, e)]
    assert not wrong, f"gradients of {wrong} depend on padding"


@all_layers
@settings(max_examples=10)
@given(t=st.integers(1, 10))
def test_a_later_token_never_changes_an_earlier_output(inner, backbone, t):
    torch.manual_seed(4)
    layer, x = make_layer(inner, backbone), sequence(11, batch=2)
    changed = x.clone()
    changed[:, t:] = 3 * torch.randn_like(changed[:, t:])
    y, y_changed = layer(x), layer(changed)
    assert torch.equal(y[:, :t], y_changed[:, :t])
    assert not torch.equal(y[:, t:], y_changed[:, t:])


@all_layers
def test_backends_agree(inner, backbone):
    layer, x = make_layer(inner, backbone), sequence(11, batch=2)
    y = layer(x)
    layer.backend = "reference"
    assert_close(layer(x), y)


@all_layers
def test_without_adaptation_the_weights_stay_and_rates_are_zero(inner, backbone):
    layer, x = make_layer(inner, backbone), sequence(9, batch=2)
    adapted = layer(x)
    layer.adapt = False
    y, state = layer(x, return_state=True)
    for w, name in zip(state.weights, ("W1", "b1", "W2", "b2"), strict=False):
        assert torch.equal(w, getattr(layer, name).expand_as(w)), name
    assert (state.pending_lr == 0).all()
    assert relative_error(y, adapted) > 1e-3
    layer.adapt = True
    layer.set_inner_lr_scale(0.0)
    assert torch.equal(layer(x), y)
    layer.set_inner_lr_scale(1.0)
    assert torch.equal(layer(x), adapted)


@pytest.mark.parametrize("backend", ["auto", "reference", "eager"])
def test_a_state_does_not_follow_the_parameters(backend):
    layer = make_layer("linear", "transformer", backend=backend)
    _, state = layer(torch.randn(1, 2, 8).double(), return_state=True)  # shorter than a mini-batch: no weight changed
    before = state.weights[0].clone()
    with torch.no_grad():
        layer.W1 += 1
    assert torch.equal(state.weights[0], before)


@pytest.mark.parametrize("inner", INNERS)
def test_the_scale_multiplies_the_rates_and_is_not_saved(inner):
    layer, x = make_layer(inner, "transformer"), sequence(2)
    full = layer(x, return_state=True)[1].pending_lr
    layer.set_inner_lr_scale(0.25)
    assert_close(layer(x, return_state=True)[1].pending_lr, 0.25 * full)
    assert "inner_lr_scale" not in layer.state_dict()


@all_layers
def test_max_inner_step_bounds_the_step(inner, backbone):
    x = 30 * sequence(3)
    layer = make_layer(inner, backbone, max_inner_step=0.01)
    state = layer(x, return_state=True)[1]
    step = state.pending_lr * (1 + state.pending_k.square().sum(-1))
    assert step.max() <= 0.01 * (1 + 1e-12)
    assert step.max() > 0.0099  # the bound is met, not overdone
    layer.max_inner_step = None
    state = layer(x, return_state=True)[1]
    assert (state.pending_lr * (1 + state.pending_k.square().sum(-1))).max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@all_layers
def test_half_precision_layers_keep_a_float32_state(inner, backbone, dtype):
    layer, x = make_layer(inner, backbone).to(dtype), sequence(10, batch=2).to(dtype)
    first, state = layer(x[:, :6], return_state=True)
    second, state = layer(x[:, 6:], state=state, return_state=True)
    assert first.dtype == second.dtype == dtype
    assert float_dtypes(state) == {torch.float32}
    whole = layer.double()(x.double())
    assert_close(torch.cat((first, second), 1), whole, 30 * torch.finfo(dtype).eps)


@all_layers
def test_autocast_keeps_rates_and_state_in_float32(inner, backbone):
    layer, x = make_layer(inner, backbone).float(), sequence(10, batch=2).float()
    plain, plain_state = layer(x, return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, return_state=True)
        again = layer(x[:, :1], state=state)
    assert float_dtypes(state) == {torch.float32}
    assert torch.equal(state.pending_lr, plain_state.pending_lr)  # rates come from x and never see bfloat16
    assert_close(y, plain, 30 * torch.finfo(torch.bfloat16).eps)
    assert torch.isfinite(again).all()
    gradients([y], list(layer.parameters()))


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
@all_layers
def test_autocast_leaves_float64_alone(inner, backbone, backend):
    layer, x = make_layer(inner, backbone, width=16, backend=backend), torch.randn(2, 9, 16, dtype=torch.float64)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float64
    if backend != "reference":  # whose products are torch's, which autocast narrows
        assert_close(y, plain)  # a layer without autocast may go another way


@pytest.mark.parametrize("where", ["mask", "cu_seqlens"])
@pytest.mark.parametrize("inner", INNERS)
def test_a_narrow_layers_convolutions_keep_a_float32_state(inner, where):
    layer, x = make_layer(inner, "mamba").bfloat16(), sequence(10, batch=1).bfloat16()
    given = {"mask": torch.arange(10)[None] < 7, "cu_seqlens": torch.tensor([0, 4, 10])}[where]
    _, state = layer(x, **{where: given}, return_state=True)
    assert float_dtypes(state) == {torch.float32}
    layer(x, **{where: given}, state=state)


def test_bounds_of_packed_sequences_may_be_of_32_bits():
    layer, x = make_layer("linear", "mamba"), sequence(10, batch=1)
    wide = torch.tensor([0, 4, 10])
    y = layer(x, cu_seqlens=wide)
    own, own_state = layer(x, cu_seqlens=wide.int(), return_state=True)
    assert torch.equal(own, y)
    assert own_state.position.dtype == torch.int64
    layer(x, cu_seqlens=wide.int(), state=own_state)


def test_a_narrow_layers_bound_is_taken_in_float32():
    layer, x = make_layer("linear", "transformer", max_inner_step=0.01).bfloat16(), sequence(3, batch=2).bfloat16()
    _, state = layer(x, return_state=True)
    k = state.pending_k[:, -3:].float()
    rates = state.pending_lr[:, -3:]
    bound = 0.01 / (1 + k.square().sum(-1))
    torch.testing.assert_close(rates, bound, rtol=1e-6, atol=0)  # every rate is at its bound here


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
@pytest.mark.parametrize("backbone", ["transformer", "mamba"])
def test_what_is_no_number_stays_in_its_packed_sequence(backbone, backend):
    layer, x = make_layer("linear", backbone, width=16, backend=backend), torch.randn(1, 10, 16, dtype=torch.float64)
    bounds = torch.tensor([0, 4, 10])
    expected = layer(x, cu_seqlens=bounds)[:, 4:]
    x[0, 3] = torch.nan
    x.requires_grad_()
    y = layer(x, cu_seqlens=bounds)[:, 4:]
    assert torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad[:, 4:].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
def test_functional_call_with_weights_of_ones_own(backend):
    layer, x = make_layer("mlp", "mamba", width=16, backend=backend), torch.randn(2, 9, 16, dtype=torch.float64)
    weights = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, weights, (x,))
    assert torch.equal(y, layer(x))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), list(weights.values())))


@all_layers
def test_training_lowers_a_loss(inner, backbone):
    layer, x = make_layer(inner, backbone), sequence(12, batch=4)
    target = x.roll(1, dims=1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@all_layers
def test_a_fresh_layer_has_finite_outputs_and_a_gradient_for_every_parameter(inner, backbone):
    layer, x = TTTLayer(16, 2, inner=inner, backbone=backbone, mini_batch_size=4), torch.randn(2, 9, 16)
    y = layer(x)
    y.square().mean().backward()
    assert torch.isfinite(y).all()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@all_layers
def test_state_dict_round_trip(inner, backbone):
    layer, x = make_layer(inner, backbone), sequence(9)
    other = make_layer(inner, backbone)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_printing_shows_the_options():
    text = repr(TTTLayer(8, 2, inner="mlp", backbone="mamba", mini_batch_size=3))
    for part in ("width=8", "num_heads=2", "inner='mlp'", "backbone='mamba'", "mini_batch_size=3"):
        assert part in text


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def float_dtypes(state):
    tensors = (*state.weights, state.pending_k, state.pending_v, state.pending_lr, state.conv)
    return {x.dtype for x in tensors if x is not None}


def initial_state(layer):
    """The state of a stream of which nothing was read."""
    K, H, D = layer.mini_batch_size, layer.num_heads, layer.head_dim
    names = ("W1", "b1") if layer.inner == "linear" else ("W1", "b1", "W2", "b2")
    zeros = torch.zeros(1, K - 1, H, D, dtype=torch.float64)
    conv = torch.zeros(1, layer.conv_kernel - 1, layer.width, dtype=torch.float64)
    return TTTState(
        tuple(getattr(layer, name).detach()[None] for name in names),
        zeros,
        zeros,
        zeros[..., 0],
        torch.zeros(1, dtype=torch.int64),
        conv if layer.backbone == "mamba" else None,
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_masks_of_integers(dtype):
    """As tokenizers give them; also for the inner loop alone and for a block with a convolution of its own."""
    mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 2 + [True] * 4])
    layer, x = make_layer("linear", "mamba"), sequence(6, batch=2)
    assert torch.equal(layer(x, mask=mask.to(dtype)), layer(x, mask=mask))
    block = Block(WIDTH, layer, ffn_width=8, conv_kernel=4).double()
    assert torch.equal(block(x, mask=mask.to(dtype)), block(x, mask=mask))
    inputs = inner_inputs("linear", B=2, L=6, H=2, D=4, K=4)
    assert torch.equal(*(run_inner("linear", inputs, mask=given)[0] for given in (mask, mask.to(dtype))))
