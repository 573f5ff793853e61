"""Weights that decay towards the initial ones: the definition, all backends, and layers of every gate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

from tests.support.batches import batches
from tests.support.checks import (
    BACKBONES,
    INNERS,
    SIMPLE_FIRST,
    assert_close,
    assert_states_close,
    check_gradients,
    gradients,
    inner_inputs,
    inner_results,
    make_layer,
    relative_error,
    run_inner,
    state_tensors,
)
from tests.support.exactness import SCALES, distances, excess, operator_inputs, operator_results, reference_errors
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer
from ttt4rec.layers.forgetting import GATES
from ttt4rec.layers.step_at_once import step_at_once
from ttt4rec.reference import MODELS, dual_form, inner_loss, primal_form

FORGETFUL = [gate for gate in GATES if gate != "none"]
BACKENDS = ("eager", "native")


def decays(inputs, most=0.3):
    """``ln a`` of tokens that keep all, some or next to nothing."""
    return -most * torch.rand(inputs["inner_lr"].shape, dtype=torch.float64).square() * 10 ** torch.randint(0, 3, (1,))


@pytest.mark.parametrize("inner", INNERS)
def test_the_dual_form_is_the_primal_form(inner):
    inputs = inner_inputs(inner, 2, 11, 2, 6, 4)
    *tokens, ln_weight, ln_bias = inputs.values()
    tokens, initial = tokens[:5], tuple(tokens[5:])
    weights = tuple(w + 0.1 * torch.randn(2, *w.shape, dtype=w.dtype) for w in initial)
    given = *tokens, weights, ln_weight, ln_bias
    decay = {"log_decay": decays(inputs), "initial": initial}
    o, after = dual_form(*given, inner=inner, **decay)
    expected, expected_after = primal_form(*given, model=MODELS[inner], **decay)
    assert_close(o, expected)
    for w, e in zip(after, expected_after, strict=True):
        assert_close(w, e)


@pytest.mark.parametrize("inner", INNERS)
@given(batch=batches(head_dims=(8,)), seed=st.integers(0, 99))
def test_backends_equal_the_reference(inner, batch, seed):
    shape, where = batch
    torch.manual_seed(seed)
    inputs = inner_inputs(inner, **shape | {"hidden": 4 * shape["D"]})
    inputs["log_decay"] = decays(inputs)
    o, state, grads = inner_results(inner, inputs, backend="reference", **where)
    for backend in BACKENDS:
        own_o, own_state, own_grads = inner_results(inner, inputs, backend=backend, **where)
        assert_close(own_o, o, name="o")
        assert_states_close(own_state, state)
        for name, expected in grads.items():
            assert_close(own_grads[name], expected, name=f"grad {name}")


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("length", [21, pytest.param(150, marks=pytest.mark.slow)])
def test_the_kernels_equal_the_reference(inner, length):
    inputs = {name: x.float() for name, x in inner_inputs(inner, 2, length, 1, 16, length // 2).items()}
    inputs["log_decay"] = decays(inputs).float()
    exact = operator_results(inner, inputs, torch.float64, backend="reference")
    references = reference_errors(
        lambda move: operator_results(inner, {n: move(x) for n, x in inputs.items()}, backend="reference"), exact
    )
    assert not excess(distances(operator_results(inner, inputs, backend="triton"), exact), references)


@pytest.mark.parametrize("scale", SCALES[::2])
@pytest.mark.parametrize("inner", INNERS)
def test_gradients_are_as_exact_as_the_references(inner, scale):
    inputs = operator_inputs(inner, scale, L=160)
    inputs["log_decay"] = decays(inputs, 0.03).float()
    exact = operator_results(inner, inputs, torch.float64, backend="reference")
    references = reference_errors(
        lambda move: operator_results(inner, {n: move(x) for n, x in inputs.items()}, backend="reference"), exact
    )
    for backend in BACKENDS:
        assert not excess(distances(operator_results(inner, inputs, backend=backend), exact), references), backend


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), *BACKENDS])
@pytest.mark.parametrize("inner", SIMPLE_FIRST)
def test_gradcheck_from_state_to_state(inner, backend):
    inputs = inner_inputs(inner, B=1, L=5, H=1, D=8, K=3, hidden=8)
    inputs["log_decay"] = decays(inputs)
    _, start = run_inner(inner, {n: x[:, :2] if x.dim() > 2 and x.shape[1] == 5 else x for n, x in inputs.items()})
    names, named = list(inputs), state_tensors(start)
    changing = {name: x for name, x in named.items() if name != "position"}

    def function(*arguments):
        own = dict(zip((*names, *changing), arguments, strict=True))
        state = type(start).from_tensors(named | {name: own.pop(name) for name in changing})
        o, state = run_inner(inner, own, state=state, backend=backend)
        return o, *state.weights, state.pending_log_decay

    check_gradients(function, [*inputs.values(), *changing.values()])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("inner", INNERS)
def test_who_keeps_all_forgets_nothing_to_the_bit(inner, backend):
    inputs = inner_inputs(inner, 2, 19, 2, 8, 4, dtype=torch.float32)
    o, state = run_inner(inner, inputs, backend=backend)
    kept, same = run_inner(inner, inputs | {"log_decay": torch.zeros(2, 19, 2)}, backend=backend)
    assert torch.equal(kept, o)
    assert all(torch.equal(a, b) for a, b in zip(same.weights, state.weights, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("inner", INNERS)
def test_who_keeps_nothing_begins_anew_but_for_the_last_steps(inner, backend):
    inputs = inner_inputs(inner, 1, 8, 2, 8, 4)
    first, second = ({n: x[:, at : at + 4] if n in TOKENS else x for n, x in inputs.items()} for at in (0, 4))
    _, one = run_inner(inner, first, backend=backend)
    _, both = run_inner(inner, inputs | {"log_decay": torch.full((1, 8, 2), -1e3).double()}, backend=backend)
    _, other = run_inner(inner, second, state=one, backend=backend)
    for i, name in enumerate(n for n in inputs if n[0] in "Wb"):
        assert_close(both.weights[i], inputs[name] + other.weights[i] - one.weights[i], 1e-9, name)


TOKENS = ("q", "k", "v", "inner_lr")


@pytest.mark.parametrize("forget", FORGETFUL)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_however_a_layer_is_called(inner, backbone, forget):
    layer = make_layer(inner, backbone, width=16, forget=forget)
    x = torch.randn(3, 13, 16, dtype=torch.float64)
    layer.backend = "reference"
    y, end = layer(x, return_state=True)
    results = gradients([y], list(layer.parameters()))
    assert all(g.abs().max() > 0 for g in results)
    layer.backend = "auto"
    y_auto = layer(x)
    assert_close(y_auto, y)
    for (name, _), a, e in zip(
        layer.named_parameters(), gradients([y_auto], list(layer.parameters())), results, strict=True
    ):
        assert_close(a, e, name=name)

    packed = layer(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 13, 26, 39]))
    assert_close(packed[0], y.flatten(0, 1))
    padded = layer(pad(x, (0, 0, 2, 1)), mask=pad(torch.ones(3, 13).bool(), (2, 1)))
    assert_close(padded[:, 2:-1], y)
    head, state = layer(x[:, :6], return_state=True)
    tail, state = layer(x[:, 6:], state=state, return_state=True)
    assert_close(torch.cat((head, tail), 1), y)
    assert_states_close(state, end)


@pytest.mark.parametrize("forget", FORGETFUL)
@pytest.mark.parametrize("inner", INNERS)
def test_steps_in_a_pool(inner, forget):
    """Streams at different tokens, which leave the pool in the middle and come back elsewhere."""
    layer = make_layer(inner, "mamba", width=16, forget=forget)
    x = torch.randn(3, 13, 16, dtype=torch.float64)
    pool, slots = layer.make_pool(6), torch.tensor([4, 0, 2])
    layer.step(x[:1, 0], pool, slots[:1])
    steps = [layer.step(x[:, 0], pool, torch.tensor([5, 0, 2]))]
    pool.write(slots[:1], pool.read(torch.tensor([5])))
    steps += [layer.step(x[:, t], pool, slots) for t in range(1, 6)]
    other = layer.make_pool(3)
    other.write(torch.tensor([2, 1, 0]), pool.read(slots))
    steps += [layer.step(x[:, t], other, torch.tensor([2, 1, 0])) for t in range(6, 13)]
    y, end = layer(x, return_state=True)
    assert_close(torch.stack(steps, 1), y)
    state = other.read(torch.tensor([2, 1, 0]))
    assert_states_close(state, end)


@pytest.mark.parametrize("forget", FORGETFUL)
@pytest.mark.parametrize("inner", INNERS)
def test_a_step_at_once_is_that_of_the_parts(inner, forget):
    layer = make_layer(inner, "transformer", width=16, forget=forget)
    x, slots = torch.randn(3, 9, 16, dtype=torch.float64), torch.tensor([1, 4, 2])
    pools = [layer.make_pool(5) for _ in range(2)]
    for t in range(9):
        y = step_at_once(layer, x[:, t], pools[0], slots)
        assert y is not None
        assert_close(y, layer._step_by_parts(x[:, t], pools[1], slots))
    assert_close(pools[0].records, pools[1].records)
    with torch.no_grad():
        layer.forget_bias = torch.nn.Parameter(layer.forget_bias.float())
    assert step_at_once(layer, x[:, 0], pools[0], slots) is None


@pytest.mark.parametrize("forget", FORGETFUL)
def test_who_does_not_learn_does_not_forget(forget):
    layer = make_layer("linear", "transformer", width=16, forget=forget)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    _, state = layer(x[:, :4], return_state=True)
    layer.adapt = False
    _, after = layer(x[:, 4:], state=state, return_state=True)
    assert all(torch.equal(a, b) for a, b in zip(after.weights, state.weights, strict=True))


def test_states_of_other_layers_are_refused():
    forgets, keeps = (make_layer("linear", "transformer", forget=f) for f in ("constant", "none"))
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    (_, one), (_, other) = (layer(x, return_state=True) for layer in (forgets, keeps))
    for layer, state, said in ((forgets, other, "that forgets; given"), (keeps, one, "that does not forget; given")):
        with pytest.raises(ValueError, match=f"state must come from a layer {said}"):
            layer(x, state=state)
        with pytest.raises(ValueError, match=f"state must come from a layer {said}"):
            layer.make_pool(1).write(torch.tensor([0]), state)


def test_wrong_options_and_shapes_are_refused():
    with pytest.raises(ValueError, match="forget must be one of none, constant, token; given 'often'"):
        TTTLayer(8, 2, forget="often")
    inputs = inner_inputs("linear", 2, 5, 2, 4, 3)
    with pytest.raises(ValueError, match="log_decay must have shape"):
        run_inner("linear", inputs | {"log_decay": torch.zeros(2, 5)})


def test_a_new_layer_keeps_most():
    layer = TTTLayer(16, 2, forget="token")
    assert torch.sigmoid(-layer.forget_bias).tolist() == pytest.approx([0.9526, 0.9526], abs=1e-4)
    assert not layer.forget_weight.any()
    assert "forget='token'" in repr(layer)
    with torch.no_grad():
        layer.forget_bias += 1
    layer.reset_parameters()
    assert layer.forget_bias.tolist() == [-3.0, -3.0]


@pytest.mark.parametrize("forget", ["token", pytest.param("constant", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same_numbers(forget):
    torch._dynamo.reset()
    layer = make_layer("linear", "transformer", forget=forget)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, parameters = torch.randn(2, 7, 8, dtype=torch.float64), list(layer.parameters())
    y, y_compiled = layer(x), compiled(x)
    assert_close(y_compiled, y)
    for actual, expected in zip(gradients([y_compiled], parameters), gradients([y], parameters), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("forget", FORGETFUL)
def test_a_model_is_saved_and_goes_on(tmp_path, forget):
    config = TTT4RecConfig(20, width=16, num_heads=2, inner="linear", mini_batch_size=4, forget=forget)
    model = TTT4Rec(config, dtype=torch.float64).eval()
    ids = torch.randint(1, 21, (2, 9))
    model.save(tmp_path)
    again = TTT4Rec.load(tmp_path).eval()
    assert again.config.forget == forget
    assert_close(again(ids), model(ids), 1e-6)
    pools = model.make_pools(2)
    steps = [model.step(ids[:, t], pools, torch.arange(2)) for t in range(9)]
    assert_close(torch.stack(steps, 1), model(ids))


def test_half_precision_is_close():
    layer = make_layer("mlp", "transformer", width=16, forget="token")
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    y = layer(x)
    assert relative_error(layer.bfloat16()(x.bfloat16()), y) < 0.1


@pytest.mark.parametrize("forget", list(GATES))
@pytest.mark.parametrize("inner", INNERS)
def test_surprise_is_the_inner_loss_over_that_of_the_initial_weights(inner, forget):
    layer = make_layer(inner, "mamba", width=16, forget=forget)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    found = layer.surprise(x)
    assert found.shape == (2, 11)
    assert_close(found[:, :4], torch.ones(2, 4, dtype=torch.float64))  # nothing was learned yet
    _, state = layer(x[:, :8], return_state=True)
    _, k, v, *_ = layer._views(x, None, None, None, "eager")
    losses = {}
    for name, weights in (("own", state.weights), ("initial", layer.initial_state()[0])):
        each = [
            inner_loss(
                tuple(w if name == "initial" else w[n] for w in weights),
                *(y[n, t, :, None] for y in (k, v)),
                *layer.initial_state()[1],
                MODELS[inner],
                1e-6,
            )
            for n in range(2)
            for t in range(8, 11)
        ]
        losses[name] = torch.stack(each).view(2, 3)
    assert_close(found[:, 8:], losses["own"] / losses["initial"])


def test_how_far_weights_have_moved():
    layer = make_layer("mlp", "transformer", width=16, num_heads=2)
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    _, state = layer(x, return_state=True)
    moved = layer.moved(state)
    assert moved.shape == (3, 2)
    assert (moved > 0).all()
    _, early = layer(x[:, :3], return_state=True)
    assert not layer.moved(early).any()
    doubled = type(state)(
        tuple(2 * w.expand(3, *w.shape) for w in layer.initial_state()[0]), *list(vars(state).values())[1:]
    )
    assert_close(layer.moved(doubled), torch.ones(3, 2, dtype=torch.float64))


def test_a_models_surprise_is_the_mean_over_its_blocks():
    config = TTT4RecConfig(20, 16, 2, num_heads=2, mini_batch_size=4, backbone="mamba", block_conv=True)
    model, ids = TTT4Rec(config, dtype=torch.float64).eval(), torch.randint(1, 21, (2, 9))
    inputs = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda layer, given: inputs.append((layer, given[0])))
    model(ids)
    assert_close(model.surprise(ids), torch.stack([layer.surprise(x) for layer, x in inputs]).mean(0))
    with pytest.raises(TypeError, match="mixer must be ttt"):
        TTT4Rec(TTT4RecConfig(20, 16, num_heads=2, mixer="gru")).surprise(ids)
