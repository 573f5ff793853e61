"""TTTState: selecting, joining, moving and saving streams."""

import numpy as np
import pytest
import torch
from torch.utils._pytree import (
    tree_flatten,
    tree_flatten_with_path,
    tree_map,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from tests.support.checks import (
    BACKBONES,
    INNERS,
    assert_states_close,
    assert_states_identical,
    make_layer,
    state_tensors,
)
from ttt4rec import TTTLayer, TTTState
from ttt4rec.models.blocks import BlockState

WIDTH = 8
all_layers = pytest.mark.parametrize(
    ("inner", "backbone"), [(inner, backbone) for inner in INNERS for backbone in BACKBONES]
)


def four_streams(inner="mlp", backbone="mamba", **options):
    """A layer, and the state of four streams at different positions."""
    layer = make_layer(inner, backbone, **options)
    cu_seqlens = torch.tensor([0, 3, 4, 10, 14])
    x = torch.randn(1, 14, WIDTH, dtype=torch.float64)
    return layer, layer(x, cu_seqlens=cu_seqlens, return_state=True)[1]


@all_layers
def test_shapes_and_positions(inner, backbone):
    layer, state = four_streams(inner, backbone)
    H, D, K = layer.num_heads, layer.head_dim, layer.mini_batch_size
    hidden = D if inner == "linear" else 4 * D
    shapes = [(4, H, D, hidden), (4, H, hidden), (4, H, hidden, D), (4, H, D)]
    assert [tuple(w.shape) for w in state.weights] == shapes[: 2 if inner == "linear" else 4]
    assert state.pending_k.shape == state.pending_v.shape == (4, K - 1, H, D)
    assert state.pending_lr.shape == (4, K - 1, H)
    assert state.position.tolist() == [3, 1, 6, 4]
    assert state.position.dtype == torch.int64
    assert (state.batch_size, state.mini_batch_size) == (4, K)
    assert (state.conv is None) == (backbone == "transformer")
    pending = (state.pending_lr[..., 0] != 0).tolist()  # right-aligned
    assert pending == [[True] * 3, [False, False, True], [False, True, True], [False] * 3]


def test_a_mini_batch_of_one_has_nothing_pending():
    layer, state = four_streams(mini_batch_size=1)
    assert state.pending_k.shape[1] == 0
    layer(torch.randn(4, 2, WIDTH, dtype=torch.float64), state=state)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (0, [3]),
        (-1, [4]),
        (np.int64(1), [1]),
        (torch.tensor(2), [6]),
        (slice(1, 3), [1, 6]),
        (slice(None, None, 2), [3, 6]),
        ([2, 0, 2], [6, 3, 6]),
        (torch.tensor([3, 1]), [4, 1]),
        (torch.tensor([True, False, False, True]), [3, 4]),
        ([True, False, False, True], [3, 4]),
    ],
    ids=repr,
)
def test_indexing_selects_streams(index, expected):
    layer, state = four_streams()
    chosen = state[index]
    assert chosen.position.tolist() == expected
    assert chosen.batch_size == len(expected)
    x = torch.randn(len(expected), 3, WIDTH, dtype=torch.float64)
    rows = [layer(x[i : i + 1], state=state[state.position.tolist().index(p)]) for i, p in enumerate(expected)]
    torch.testing.assert_close(layer(x, state=chosen), torch.cat(rows))


@pytest.mark.parametrize("index", [[], (), slice(0), torch.zeros(0, dtype=torch.int64)])
def test_no_streams_are_a_state_of_none(index):
    _, state = four_streams()
    chosen = state[index]
    assert chosen.batch_size == 0
    assert [x.shape[1:] for x in chosen.tensors().values()] == [x.shape[1:] for x in state.tensors().values()]


@pytest.mark.parametrize("index", [4, -5])
def test_an_integer_out_of_range(index):
    _, state = four_streams()
    with pytest.raises(IndexError, match=rf"stream {index} is out of range for a state of 4 streams"):
        state[index]


@all_layers
def test_stack_undoes_indexing(inner, backbone):
    _, state = four_streams(inner, backbone)
    assert_states_identical(TTTState.stack([state[:1], state[1], state[2:]]), state)
    assert_states_identical(TTTState.stack([state]), state)


def test_stack_needs_states_of_one_layer():
    _, state = four_streams()
    with pytest.raises(ValueError, match="states must be at least one; given none"):
        TTTState.stack([])
    for options in ({"inner": "linear"}, {"backbone": "transformer"}, {"mini_batch_size": 3}):
        with pytest.raises(ValueError, match="states must all be of one layer; given shapes"):
            TTTState.stack([state, four_streams(**options)[1]])


@all_layers
def test_save_and_load_bit_by_bit(inner, backbone, tmp_path):
    _, state = four_streams(inner, backbone)
    state.save(tmp_path / "state.safetensors")
    assert_states_identical(TTTState.load(tmp_path / "state.safetensors"), state)


def test_a_selected_state_can_be_saved(tmp_path):
    _, state = four_streams()
    state[::2].save(tmp_path / "state.safetensors")
    assert_states_identical(TTTState.load(tmp_path / "state.safetensors"), state[::2])


def test_a_file_without_a_state_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"position": torch.zeros(1, dtype=torch.int64)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a saved TTTState: it lacks pending_k"):
        TTTState.load(tmp_path / "other.safetensors")


def test_detach_cuts_the_graph():
    layer, state = four_streams()
    assert all(w.requires_grad for w in state.weights)
    cut = state.detach()
    assert not any(x.requires_grad for x in state_tensors(cut).values())
    assert_states_identical(cut, state)
    y = layer(torch.randn(4, 6, WIDTH, dtype=torch.float64), state=cut)
    (gradient,) = torch.autograd.grad(y.sum(), layer.W1, allow_unused=True)
    assert gradient is None  # the initial weights matter only through the earlier call


def test_clone_copies_and_detach_does_not():
    _, state = four_streams()
    copy, view = state.detach().clone(), state.detach()
    copy.weights[0].zero_()
    assert state.weights[0].abs().max() > 0
    assert view.weights[0].data_ptr() == state.weights[0].data_ptr()


def test_to_converts_all_but_the_positions():
    layer, state = four_streams()
    single = state.to("cpu", torch.float32)
    for name, x in state_tensors(single).items():
        assert x.dtype == (torch.int64 if name == "position" else torch.float32), name
    assert_states_close(single, state, 1e-6)
    assert_states_identical(state.to("cpu"), state)
    assert_states_identical(state.to(dtype=torch.float64), state)
    layer.float()(torch.randn(4, 2, WIDTH), state=single)


@all_layers
def test_nbytes_counts_every_tensor(inner, backbone):
    _, state = four_streams(inner, backbone)
    numbers = sum(x.numel() for x in state_tensors(state).values())
    assert state.nbytes == 8 * numbers
    assert state[:2].nbytes == state.nbytes // 2


@all_layers
def test_weight_norm_is_that_of_all_weights_of_a_head(inner, backbone):
    layer, state = four_streams(inner, backbone)
    norm = state.weight_norm()
    assert norm.shape == (4, layer.num_heads)
    together = torch.cat([w[2, 1].flatten() for w in state.weights])
    torch.testing.assert_close(norm[2, 1], together.norm())


def test_a_call_leaves_the_given_state_unchanged():
    layer, state = four_streams()
    before = state.detach().clone()
    y, after = layer(torch.randn(4, 5, WIDTH, dtype=torch.float64), state=state, return_state=True)
    (y.sum() + sum(w.sum() for w in after.weights)).backward()
    assert_states_identical(state.detach(), before)


def test_the_state_has_the_same_size_however_long_the_stream():
    layer = TTTLayer(WIDTH, 2, mini_batch_size=4)
    sizes = {layer(torch.randn(1, L, WIDTH), return_state=True)[1].nbytes for L in (1, 4, 30)}
    assert len(sizes) == 1


def test_a_state_is_immutable():
    _, state = four_streams()
    with pytest.raises(AttributeError):
        state.position = torch.zeros(4, dtype=torch.int64)


@all_layers
def test_a_state_is_a_pytree(inner, backbone):
    _, state = four_streams(inner, backbone)
    leaves, spec = tree_flatten(state)
    assert [id(x) for x in leaves] == [id(x) for x in state.tensors().values()]
    assert_states_identical(tree_unflatten(leaves, spec), state)
    assert_states_identical(tree_map(lambda x: x[1:3], state), state[1:3])
    assert treespec_loads(treespec_dumps(spec)) == spec
    named, _ = tree_flatten_with_path(state)
    assert {path[0].key: id(x) for path, x in named} == {name: id(x) for name, x in state.tensors().items()}


@all_layers
def test_torch_load_trusts_a_state(inner, backbone, tmp_path):
    layer, state = four_streams(inner, backbone)
    together = {"layer": layer.state_dict(), "states": [BlockState(state.detach(), torch.ones(2))]}
    torch.save(together, tmp_path / "all.pt")
    (loaded,) = torch.load(tmp_path / "all.pt", weights_only=True)["states"]
    assert_states_identical(loaded.mixer, state)
    assert torch.equal(loaded.conv, torch.ones(2))
