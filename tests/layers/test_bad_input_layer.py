"""Wrong arguments: one sentence that names what was wrong and what was given, before anything is computed."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch

from tests.support.checks import (
    assert_states_identical,
    inner_inputs,
    make_layer,
    run_inner,
    state_tensors,
)
from ttt4rec import TTTLayer, ttt_linear, ttt_mlp
from ttt4rec.layers.original_weights import _LAYER_NAMES
from ttt4rec.layers.validation import check_cu_seqlens, check_mask

ERRORS = (ValueError, TypeError, RuntimeError)


@contextmanager
def raises(kind, *parts):
    """Expect an error of this very kind whose message is one line and contains every part."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"width": 0}, "0"),
        ({"width": 8.0}, "8.0"),
        ({"num_heads": 0}, "0"),
        ({"num_heads": True}, "True"),
        ({"num_heads": 3}, "width 8 and 3 heads"),
        ({"num_heads": 8}, "width 8 and 8 heads"),  # head dimension 1 is odd
        ({"inner": "conv"}, "'conv'"),
        ({"backbone": "gru"}, "'gru'"),
        ({"mini_batch_size": 0}, "0"),
        ({"mini_batch_size": 2.5}, "2.5"),
        ({"rope_theta": 0.0}, "0.0"),
        ({"rope_theta": float("inf")}, "inf"),
        ({"base_lr": -1.0}, "-1.0"),
        ({"base_lr": float("nan")}, "nan"),
        ({"conv_kernel": 0}, "0"),
        ({"max_inner_step": 0.0}, "0.0"),
        ({"backend": "cuda"}, "'cuda'"),
    ],
    ids=str,
)
def test_constructor_options(options, given):
    (name,) = options
    with raises(ValueError, name if " and " not in given else "width", given):
        TTTLayer(**({"width": 8, "num_heads": 2} | options))


@pytest.mark.parametrize("scale", [-0.5, float("nan"), float("inf")])
def test_scale_of_the_rates(scale):
    layer = make_layer("linear", "transformer")
    with raises(ValueError, str(scale)):
        layer.set_inner_lr_scale(scale)
    assert layer.inner_lr_scale == 1


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(*shape, dtype=dtype)


LAYER_CALLS = {
    "x without batch": (ValueError, {"x": zeros(6, 8)}, ["x must", "[6, 8]"]),
    "x of another width": (ValueError, {"x": zeros(2, 6, 9)}, ["width 8", "[2, 6, 9]"]),
    "no token": (ValueError, {"x": zeros(2, 0, 8)}, ["token", "[2, 0, 8]"]),
    "no sequence": (ValueError, {"x": zeros(0, 6, 8)}, ["sequence", "[0, 6, 8]"]),
    "integer x": (TypeError, {"x": zeros(2, 6, 8, dtype=torch.int64)}, ["x must", "torch.int64"]),
    "mask of floats": (TypeError, {"mask": torch.ones(2, 6)}, ["mask must be bool", "torch.float32"]),
    "mask of other integers": (ValueError, {"mask": torch.full((2, 6), 2)}, ["mask must be of 0 and 1", "2 to 2"]),
    "mask of another length": (ValueError, {"mask": torch.ones(2, 5).bool()}, ["mask", "[2, 6]", "[2, 5]"]),
    "mask of one row": (ValueError, {"mask": torch.ones(6).bool()}, ["mask", "[6]"]),
    "mask with a gap": (
        ValueError,
        {"mask": torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()},
        ["mask", "row 1 has a gap"],
    ),
    "mask and cu_seqlens": (
        ValueError,
        {"x": zeros(1, 6, 8), "mask": torch.ones(1, 6).bool(), "cu_seqlens": torch.tensor([0, 6])},
        ["mask or cu_seqlens"],
    ),
    "packed batch of two": (ValueError, {"cu_seqlens": torch.tensor([0, 6])}, ["batch size 2"]),
    "descending bounds": (
        ValueError,
        {"x": zeros(1, 6, 8), "cu_seqlens": torch.tensor([0, 4, 3, 6])},
        ["cu_seqlens", "[0, 4, 3, 6]"],
    ),
    "bounds that end early": (
        ValueError,
        {"x": zeros(1, 6, 8), "cu_seqlens": torch.tensor([0, 5])},
        ["tokens, 6", "[0, 5]"],
    ),
    "bounds that start late": (
        ValueError,
        {"x": zeros(1, 6, 8), "cu_seqlens": torch.tensor([1, 6])},
        ["cu_seqlens", "[1, 6]"],
    ),
    "bounds of floats": (
        TypeError,
        {"x": zeros(1, 6, 8), "cu_seqlens": torch.tensor([0.0, 6.0])},
        ["cu_seqlens", "torch.float32"],
    ),
    "one bound": (ValueError, {"x": zeros(1, 6, 8), "cu_seqlens": torch.tensor([0])}, ["cu_seqlens", "[1]"]),
    "two-dimensional bounds": (
        ValueError,
        {"x": zeros(1, 6, 8), "cu_seqlens": torch.tensor([[0, 6]])},
        ["cu_seqlens", "[1, 2]"],
    ),
}


@pytest.mark.parametrize("case", LAYER_CALLS)
def test_layer_call(case):
    kind, call, parts = LAYER_CALLS[case]
    layer = make_layer("linear", "mamba")
    with raises(kind, *parts):
        layer(**({"x": zeros(2, 6, 8)} | call))


STATES = {
    "other batch size": (ValueError, {}, {"batch": 3}, ["2", "given 3"]),
    "other inner model": (ValueError, {"inner": "linear"}, {}, ["4 weight tensors", "given 2"]),
    "other backbone": (ValueError, {"backbone": "transformer"}, {}, ["backbone", "mamba"]),
    "other mini-batch size": (ValueError, {"mini_batch_size": 5}, {}, ["pending_k", "[2, 3, 2, 4]", "[2, 4, 2, 4]"]),
    "other number of heads": (ValueError, {"num_heads": 1}, {}, ["W1", "[2, 1, 8, 32]"]),
    "other kernel of the convolutions": (ValueError, {"conv_kernel": 3}, {}, ["conv", "[2, 3, 8]", "[2, 2, 8]"]),
    "other dtype": (TypeError, {}, {"dtype": torch.float32}, ["torch.float64", "given torch.float32"]),
}


@pytest.mark.parametrize("case", STATES)
def test_state_of_another_layer_or_batch(case):
    kind, options, differing, parts = STATES[case]
    other = make_layer(**({"inner": "mlp", "backbone": "mamba"} | options))
    state = other(torch.randn(differing.get("batch", 2), 6, 8).double(), return_state=True)[1].detach()
    state = state.to(dtype=differing.get("dtype"))
    before = state.clone()
    with raises(kind, "state", *parts):
        make_layer("mlp", "mamba")(torch.randn(2, 6, 8).double(), state=state)
    assert_states_identical(state, before)


@pytest.mark.parametrize("given", [(torch.zeros(2),), {"weights": 1}, torch.zeros(2)], ids=["tuple", "dict", "tensor"])
def test_something_else_than_a_state(given):
    with raises(TypeError, "state must be a TTTState", type(given).__name__):
        make_layer("linear", "mamba")(zeros(2, 6, 8), state=given)
    with raises(TypeError, "state must be a TTTState", type(given).__name__):
        run_inner("linear", inner_inputs("linear", 2, 6, 2, 4, 3), state=given)


def test_packed_sequences_need_one_stream_each():
    layer = make_layer("linear", "mamba")
    state = layer(zeros(1, 6, 8), return_state=True)[1]
    with raises(ValueError, "one stream per sequence, 2", "given 1"):
        layer(zeros(1, 6, 8), cu_seqlens=torch.tensor([0, 2, 6]), state=state)


@pytest.mark.parametrize("name", ["pending_v", "pending_lr", "position"])
def test_a_state_whose_parts_do_not_fit_together(name):
    layer = make_layer("linear", "transformer")
    state = layer(torch.randn(2, 6, 8).double(), return_state=True)[1].detach()
    broken = dataclasses.replace(state, **{name: getattr(state, name)[:1]})
    before = {key: x.clone() for key, x in state_tensors(broken).items()}
    with raises(ValueError, "state"):
        layer(torch.randn(2, 6, 8).double(), state=broken)
    assert all(torch.equal(x, before[key]) for key, x in state_tensors(broken).items())


@pytest.mark.parametrize(
    ("kind", "change", "parts"),
    [
        (TypeError, {"weights": lambda w: (w[0], w[1].float())}, ["weights.1", "torch.float64", "torch.float32"]),
        (TypeError, {"pending_k": torch.Tensor.float}, ["pending_k", "torch.float32"]),
        (TypeError, {"position": torch.Tensor.double}, ["position", "torch.int64", "torch.float64"]),
        (ValueError, {"position": torch.neg}, ["position", "from 0", "[-6, -6]"]),
        (ValueError, {"pending_v": lambda x: x.to("meta")}, ["pending_v", "cpu", "meta"]),
    ],
    ids=["dtype of a weight", "dtype of keys", "dtype of a position", "negative position", "device"],
)
def test_a_state_whose_parts_are_of_another_kind(kind, change, parts):
    layer = make_layer("linear", "transformer")
    state = layer(torch.randn(2, 6, 8).double(), return_state=True)[1].detach()
    broken = dataclasses.replace(state, **{name: do(getattr(state, name)) for name, do in change.items()})
    with raises(kind, "state", *parts):
        layer(torch.randn(2, 6, 8).double(), state=broken)


def test_compiled_layers_do_not_read_beyond_their_tokens():
    """Values are not looked at while tracing; the compiled inner loop does."""
    layer = TTTLayer(16, 2, mini_batch_size=4, backend="native")
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for bounds in ([0, 100_000_000], [0, 8, 2, 9], [-4, 2, 9]):
        with torch.no_grad(), pytest.raises(ValueError, match="among the 9 tokens"):
            compiled(torch.randn(1, 9, 16), cu_seqlens=torch.tensor(bounds))


FUNCTIONAL = {
    "q of three dimensions": (ValueError, "q", zeros(2, 6, 8), ["q must", "[2, 6, 8]"]),
    "integer q": (TypeError, "q", zeros(2, 6, 2, 4, dtype=torch.int32), ["q must", "torch.int32"]),
    "no token": (ValueError, "qkv", zeros(2, 0, 2, 4), ["token", "[2, 0, 2, 4]"]),
    "k of another length": (ValueError, "k", zeros(2, 5, 2, 4), ["k must", "[2, 6, 2, 4]", "[2, 5, 2, 4]"]),
    "v of another head dimension": (ValueError, "v", zeros(2, 6, 2, 6), ["v must", "[2, 6, 2, 6]"]),
    "k of another dtype": (TypeError, "k", zeros(2, 6, 2, 4).float(), ["k must", "torch.float64", "torch.float32"]),
    "rates without heads": (ValueError, "inner_lr", zeros(2, 6), ["inner_lr", "[2, 6, 2]", "given [2, 6]"]),
    "too few token scales": (ValueError, "token_scale", zeros(2), ["token_scale", "[3]", "given [2]"]),
    "W1 of another head dimension": (ValueError, "W1", zeros(2, 6, 16), ["W1", "[2, 4, 16]", "[2, 6, 16]"]),
    "W1 without heads": (ValueError, "W1", zeros(4, 16), ["W1", "[4, 16]"]),
    "b1 of another size": (ValueError, "b1", zeros(2, 15), ["b1", "[2, 16]", "[2, 15]"]),
    "W2 transposed": (ValueError, "W2", zeros(2, 4, 16), ["W2", "[2, 16, 4]", "[2, 4, 16]"]),
    "b2 of another size": (ValueError, "b2", zeros(2, 16), ["b2", "[2, 4]", "[2, 16]"]),
    "ln_weight without heads": (ValueError, "ln_weight", zeros(4), ["ln_weight", "[2, 4]", "given [4]"]),
    "ln_bias without heads": (ValueError, "ln_bias", zeros(4), ["ln_bias", "[2, 4]", "given [4]"]),
    "rates on another device": (
        ValueError,
        "inner_lr",
        torch.zeros(2, 6, 2, device="meta"),
        ["inner_lr", "device cpu", "meta"],
    ),
}


@pytest.mark.parametrize("name", ["k", "token_scale", "b1", "W2", "b2", "ln_bias"])
def test_arguments_on_another_device(name):
    inputs = inner_inputs("mlp", 2, 6, 2, 4, 3)
    inputs[name] = inputs[name].to("meta")
    with raises(ValueError, f"{name} must be on q's device cpu", "meta"):
        ttt_mlp(**inputs, mini_batch_size=3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", FUNCTIONAL)
def test_functional_arguments(case, backend):
    kind, names, value, parts = FUNCTIONAL[case]
    inputs = inner_inputs("mlp", 2, 6, 2, 4, 3)
    inputs |= dict.fromkeys(names if names == "qkv" else [names], value)
    with raises(kind, *parts):
        ttt_mlp(**inputs, mini_batch_size=3, backend=backend)


def test_ttt_linear_needs_square_weights():
    inputs = inner_inputs("linear", 2, 6, 2, 4, 3) | {"W1": zeros(2, 4, 5)}
    with raises(ValueError, "W1", "[2, 4, 4]", "[2, 4, 5]"):
        run_inner("linear", inputs)


@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_mini_batch_size(size):
    with raises(ValueError, "mini_batch_size", repr(size)):
        ttt_linear(**inner_inputs("linear", 2, 6, 2, 4, 3), mini_batch_size=size)


def test_unknown_backend():
    with raises(ValueError, "backend", "auto, reference, eager, native, triton", "'cuda'"):
        run_inner("linear", inner_inputs("linear", 2, 6, 2, 4, 3), backend="cuda")


def test_triton_backend_where_it_cannot_run():
    with raises(RuntimeError, "triton"):
        run_inner("linear", inner_inputs("linear", 2, 6, 2, 4, 3), backend="triton")


def release_weights(layer):
    """The layer's weights under the release's names."""
    own = layer.state_dict()
    return {theirs: own[ours].clone() for theirs, ours in _LAYER_NAMES.items() if ours in own}


def without(weights, name):
    return {key: x for key, x in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda w: without(w, "q_proj.weight"), ["missing ['q_proj.weight']"]),
        (lambda w: w | {"bias": zeros(8)}, ["unknown ['bias']"]),
        (lambda w: w | {"W2": zeros(2, 16, 4)}, ["W2"]),
        (lambda w: w | {"W1": zeros(2, 4, 5)}, ["W1", "[2, 4, 4]", "[2, 4, 5]"]),
        (lambda w: w | {"q_proj.weight": zeros(64)}, ["q_proj.weight", "[8, 8]", "[64]"]),
        (lambda w: {}, ["missing"]),
    ],
    ids=["missing", "unknown", "of another inner model", "wrong shape", "flat", "empty"],
)
def test_release_weights(change, parts):
    layer = make_layer("linear", "transformer")
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    weights = {name: x + 1 for name, x in release_weights(layer).items()}
    with raises(ValueError, *parts):
        layer.load_release_state_dict(change(weights))
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())


def test_release_constants_are_ignored():
    layer, other = make_layer("mlp", "mamba"), make_layer("mlp", "mamba")
    constants = {"token_idx": zeros(4), "rotary_emb.inv_freq": zeros(2)}
    other.load_release_state_dict(release_weights(layer) | constants)
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in layer.state_dict().items())


@pytest.mark.parametrize("backbone", ["transformer", "mamba"])
def test_input_of_another_dtype_than_the_parameters(backbone):
    with pytest.raises(ERRORS) as caught:
        make_layer("linear", backbone)(zeros(2, 6, 8, dtype=torch.float32))
    assert "\n" not in str(caught.value)


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it is on another device, and counts how often its values are looked at."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cpu = False
    looks = 0

    def tolist(self):
        self.looks += 1
        return super().tolist()


def test_a_gpu_is_asked_once_for_the_bounds_of_all_layers_and_again_after_a_change():
    cu_seqlens = torch.tensor([0, 2, 6]).as_subclass(Elsewhere)
    for _ in range(3):
        check_cu_seqlens(cu_seqlens, 1, 6)
    assert cu_seqlens.looks == 1
    with pytest.raises(ValueError, match="number of tokens, 7"):
        check_cu_seqlens(cu_seqlens, 1, 7)
    cu_seqlens[1] = 9
    for _ in range(2):  # what was found wrong is found wrong again
        with pytest.raises(ValueError, match="ascend"):
            check_cu_seqlens(cu_seqlens, 1, 6)
    mask = torch.tensor([[True, True, False]]).as_subclass(Elsewhere)
    check_mask(mask, 1, 3)
    mask[0, 0] = mask[0, 2] = True
    mask[0, 1] = False
    with pytest.raises(ValueError, match="gap"):
        check_mask(mask, 1, 3)


def test_no_change_goes_unseen_on_a_cpu_nor_in_inference_mode():
    """Neither is counted in a tensor's version: what NumPy writes, and what happens to tensors of inference mode."""
    with torch.inference_mode():
        inference = torch.tensor([0, 2, 6])
    shared = torch.tensor([0, 2, 6])
    for cu_seqlens, write in ((shared, shared.numpy()), (inference.as_subclass(Elsewhere), inference.numpy())):
        check_cu_seqlens(cu_seqlens, 1, 6)
        write[1] = 9
        with pytest.raises(ValueError, match="ascend"):
            check_cu_seqlens(cu_seqlens, 1, 6)
