"""A layer's forward and backward as one node of autograd: the numbers of its parts, taken where nobody could tell."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import peak_memory
from tests.support.at_once import WIDTH, make_layer, note
from tests.support.checks import BACKBONES, INNERS, assert_close
from tests.support.exactness import SCALES, distances, excess, layer_results, reference_errors, token_sizes
from ttt4rec import TTTLayer
from ttt4rec.layers import layer_at_once, ttt
from ttt4rec.layers.forgetting import GATES
from ttt4rec.layers.standing import prepared
from ttt4rec.native import threads

PACKED = torch.tensor([0, 5, 5, 26, 41])


@pytest.fixture
def taken(monkeypatch):
    """What came out at once."""
    return note(monkeypatch, "layer_at_once")


def results(layer, x, **options):
    """Output, and gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    y = layer(x, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def by_parts(layer, x, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(ttt, "layer_at_once", lambda *_: None)
        return results(layer, x, **options)


@pytest.mark.parametrize("forget", GATES)
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_the_numbers_are_those_of_the_parts(inner, backbone, cu_seqlens, forget, taken, monkeypatch):
    """And the same whether or not a graph is recorded."""
    layer = make_layer(inner, backbone, forget=forget)
    layer.set_inner_lr_scale(0.7)
    x = torch.randn(3 if cu_seqlens is None else 1, 41, WIDTH, dtype=torch.float64)
    own = results(layer, x, cu_seqlens=cu_seqlens)
    assert len(taken) == 1
    for a, b in zip(own, by_parts(layer, x, monkeypatch, cu_seqlens=cu_seqlens), strict=True):
        assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(layer(x, cu_seqlens=cu_seqlens), own[0])


def test_bounds_in_other_memory_are_read_as_they_are(taken):
    """As those of a view; and the way back, which writes where they point, takes them as they were."""
    layer, x = make_layer(), torch.randn(1, 41, WIDTH, dtype=torch.float64, requires_grad=True)
    apart = torch.zeros(2 * len(PACKED), dtype=torch.int64)[::2].copy_(PACKED)
    y = layer(x, cu_seqlens=apart)
    apart.zero_()
    own, expected = y.detach(), results(layer, x.detach(), cu_seqlens=PACKED)
    assert torch.equal(own, expected[0])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert all(map(torch.equal, torch.autograd.grad(y, [x, *layer.parameters()], dy), expected[1:]))
    assert len(taken) == 2


@pytest.mark.parametrize("value", [-1.0, -3.0, float("nan")], ids=["zero", "negative", "nan"])
def test_scales_at_their_bound_have_the_gradients_of_the_parts(value, taken, monkeypatch):
    layer, x = make_layer(), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        layer.token_offset[0] = value
    for a, b in zip(results(layer, x), by_parts(layer, x, monkeypatch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13, equal_nan=True)
    assert taken


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 4), (1, 5), (2, 130)])
@pytest.mark.parametrize(("backbone", "forget"), [("transformer", "none"), ("mamba", "token")])
def test_lengths(backbone, forget, shape, taken, monkeypatch):
    layer, x = make_layer(backbone=backbone, forget=forget), torch.randn(*shape, WIDTH, dtype=torch.float64)
    for a, b in zip(results(layer, x), by_parts(layer, x, monkeypatch), strict=True):
        assert_close(a, b)
    assert len(taken) == 1


@pytest.mark.parametrize("forget", ["none", "token"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("inner", INNERS)
def test_gradients_are_exact_at_every_scale(inner, scale, forget, taken):
    """By the rule of ``tests.support.exactness``, of a layer as initialised."""
    backbone = "mamba" if inner == "mlp" else "transformer"
    layer = TTTLayer(WIDTH, 4, inner=inner, backbone=backbone, mini_batch_size=8, forget=forget)
    x = (token_sizes(scale, 1, 64) * torch.randn(1, 64, WIDTH)).float()
    exact = layer_results(layer, x, torch.float64, "reference")
    references = reference_errors(lambda move: layer_results(layer, x, torch.float32, "reference", move), exact)
    errors = distances(layer_results(layer, x, torch.float32, "native"), exact)
    assert len(taken) == 1
    assert not excess(errors, references)


def test_threads_change_no_number(monkeypatch):
    monkeypatch.setattr(threads, "ALONE", 0)
    layer, x = make_layer(), torch.randn(7, 23, WIDTH, dtype=torch.float64)
    alone = results(layer, x)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 3)
    assert all(map(torch.equal, results(layer, x), alone))


@pytest.fixture
def two_nodes(monkeypatch):
    """As of large calls, the part behind the inner loop is a node of its own."""
    monkeypatch.setattr(layer_at_once, "LARGEST", 0)


@pytest.mark.parametrize("forget", ["none", "token"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_two_nodes_have_the_bits_of_one(inner, backbone, forget, taken, request):
    layer, x = make_layer(inner, backbone, dtype=torch.float32, forget=forget), torch.randn(3, 41, WIDTH)
    one = results(layer, x)
    request.getfixturevalue("two_nodes")
    assert all(map(torch.equal, results(layer, x), one))
    assert layer(x).grad_fn.name() == layer(x[:1]).grad_fn.name() == "_NodeBackward"
    assert len(taken) == 4


@pytest.mark.parametrize("forget", ["none", "token"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_large_calls_take_no_more_memory_than_the_parts(inner, backbone, forget, monkeypatch):
    """But for four in a hundred, which are copies of weights and sums of parameters."""
    layer = TTTLayer(64, 4, inner=inner, backbone=backbone, mini_batch_size=8, forget=forget)
    x = torch.randn(32, 50, 64)
    dy = torch.randn_like(x)

    def call():
        torch.autograd.grad(layer(x.requires_grad_()), [x, *layer.parameters()], dy)

    def peak():
        call()
        return peak_memory(call, "cpu")

    own = peak()
    monkeypatch.setattr(ttt, "layer_at_once", lambda *_: None)
    assert own <= 1.04 * peak()


@pytest.mark.usefixtures("two_nodes")
def test_gradcheck_of_two_nodes(taken):
    layer = make_layer("mlp", "mamba", conv_kernel=2)
    x = torch.randn(1, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x), x, nondet_tol=0)
    assert taken


@pytest.mark.usefixtures("two_nodes")
def test_a_graph_of_two_nodes_may_be_walked_twice_and_not_differentiated_twice():
    layer, x = make_layer("mlp", "mamba"), torch.randn(2, 19, WIDTH, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    first, second = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_anomaly_detection_finds_none(backbone, monkeypatch):
    """In memory that nobody wrote to."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    with torch.autograd.detect_anomaly():
        found = results(make_layer("linear", backbone), torch.randn(2, 9, WIDTH, dtype=torch.float64))
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("forget", GATES)
def test_gradcheck(forget, taken):
    layer = make_layer("linear", conv_kernel=2, forget=forget)
    x = torch.randn(1, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x), x, nondet_tol=0)
    assert taken


class Subclass(TTTLayer):
    pass


def hooked(layer):
    layer.query.register_forward_hook(lambda *_: None)


def adapted(layer):
    layer.value = nn.Sequential(layer.value)


def parametrised(layer):
    parametrize.register_parametrization(layer.output, "weight", nn.Identity())


CHANGES = {
    "hook": hooked,
    "adapter": adapted,
    "parametrisation": parametrised,
    "subclass": lambda layer: setattr(layer, "__class__", Subclass),
    "no inner rates": lambda layer: setattr(layer, "adapt", False),
    "bounded steps": lambda layer: setattr(layer, "max_inner_step", 0.3),
    "another backend": lambda layer: setattr(layer, "backend", "eager"),
    "another dtype": lambda layer: layer.norm.float(),
    "a gate of another dtype": lambda layer: setattr(layer, "forget_bias", nn.Parameter(layer.forget_bias.float())),
    "a patched method": lambda layer: setattr(layer, "initial_state", lambda: TTTLayer.initial_state(layer)),
    "strides": lambda layer: setattr(layer.query, "weight", nn.Parameter(layer.query.weight.t().contiguous().t())),
}


@pytest.mark.parametrize("before", [False, True], ids=["at first", "later"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_done_to_a_layer_goes_by_the_parts(change, before, taken, monkeypatch):
    """Also after passes were prepared."""
    layer = make_layer(forget="constant" if "gate" in change else "none")
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    if before:
        layer(x)
        taken.clear()
    CHANGES[change](layer)
    for a, b in zip(results(layer, x), by_parts(layer, x, monkeypatch), strict=True):
        assert torch.equal(a, b)
    assert not taken


def test_an_input_of_another_dtype_is_refused_as_by_the_parts():
    layer = make_layer(backbone="transformer", dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="dtype"):
        layer(torch.randn(1, 9, WIDTH))


def replaced(layer):
    layer.query.weight = nn.Parameter(2 * layer.query.weight.detach())


def loaded(layer):
    layer.load_state_dict({name: 2 * w for name, w in layer.state_dict().items()}, assign=True)


def moved(layer):
    layer.W1.data = 2 * layer.W1.data


SETTINGS = {
    "scale": lambda layer: layer.set_inner_lr_scale(0.3),
    "rate": lambda layer: setattr(layer, "base_lr", 0.3),
    "rotation": lambda layer: setattr(layer, "rope_theta", 3.0),
    "norm": lambda layer: setattr(layer.norm, "eps", 0.1),
    "mini-batches": lambda layer: (
        setattr(layer, "mini_batch_size", 4),
        setattr(layer, "token_offset", nn.Parameter(layer.token_offset[:4].detach())),
    ),
    "a replaced weight": replaced,
    "loaded weights": loaded,
    "a moved weight": moved,
    "a frozen weight": lambda layer: layer.value.weight.requires_grad_(False),
}


@pytest.mark.parametrize("change", SETTINGS)
def test_what_was_set_since_the_last_call_is_seen(change, taken, monkeypatch):
    layer, x = make_layer(), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    before = layer(x)
    SETTINGS[change](layer)

    def call():
        y = layer(x)
        trained = [p for p in layer.parameters() if p.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), trained)]

    own = call()
    assert len(taken) == 2
    monkeypatch.setattr(ttt, "layer_at_once", lambda *_: None)
    for a, b in zip(own, call(), strict=True):
        assert_close(a, b)
    assert torch.equal(before, own[0]) == (change == "a frozen weight")


def test_tied_weights_that_come_apart_have_their_own_gradients(taken, monkeypatch):
    """Though they share their memory still."""
    layer, x = make_layer(), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    layer.query.weight = layer.value.weight
    layer(x)
    layer.load_state_dict(layer.state_dict(), assign=True)
    assert layer.query.weight is not layer.value.weight
    for a, b in zip(results(layer, x), by_parts(layer, x, monkeypatch), strict=True):
        assert_close(a, b)
    assert len(taken) == 2


def test_a_patched_method_that_comes_for_another_attribute_is_seen(taken):
    layer, x = make_layer(backbone="transformer"), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    layer.norm.note = "own"
    layer(x)
    del layer.norm.note
    layer.norm.forward = torch.zeros_like
    assert not layer(x).any()
    assert len(taken) == 1


def test_another_thread_may_prepare_anew_meanwhile():
    class Keeper:
        kept = None
        looks = 0

        @property
        def prepared(self):
            found, self.kept, self.looks = self.kept, None, self.looks + 1
            return found

        @prepared.setter
        def prepared(self, kept):
            self.kept = kept

    keeper, root = Keeper(), nn.Linear(1, 1)
    for _ in range(2):
        assert prepared(keeper, root, (), lambda _: "call")[0] == "call"
    assert keeper.looks == 2


COPIES = {"copy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_prepare_their_own_passes(copied, taken):
    layer, x = make_layer(), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    y = layer(x)
    other = copied(layer)
    assert layer.prepared is not None
    assert other.prepared is None
    with torch.no_grad():
        layer.query.weight.zero_()
    assert torch.equal(other(x), y)
    other(x).sum().backward()
    assert layer.query.weight.grad is None
    assert len(taken) == 3


def test_who_looks_on_sees_the_parts(taken):
    layer, x = make_layer(dtype=torch.float32), torch.randn(1, 9, WIDTH)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    with torch.no_grad():
        torch.func.jvp(layer, (x,), (x,))
    handle = modules.register_module_forward_hook(lambda *_: None)
    layer(x)
    handle.remove()
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    mask = torch.ones(1, 9, dtype=torch.bool)
    layer(x, mask=mask)
    _, state = layer(x, return_state=True)
    layer(x, state=state)
    assert not taken
    layer(x)
    assert len(taken) == 1


def test_second_derivatives_are_refused():
    layer = make_layer()
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


def test_a_changed_weight_is_noticed():
    """Autograd's own watch over what a backward needs."""
    layer = make_layer()
    y = layer(torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True))
    with torch.no_grad():
        layer.query.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def emptied(layer):
    layer.W2.data = torch.empty(0, dtype=torch.float64)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("change", [TTTLayer.float, emptied])
def test_memory_that_is_another_by_the_way_back_is_refused(change, nodes, monkeypatch):
    """Autograd counts no changes by ``.data``, which is how modules move."""
    monkeypatch.setattr(layer_at_once, "LARGEST", (1 << 16) * (nodes == 1))
    layer = make_layer()
    y = layer(torch.randn(1, 9, WIDTH, dtype=torch.float64))
    change(layer)
    with pytest.raises(RuntimeError, match="must have one dtype"):
        y.sum().backward()


def turned(x):
    return x.mT.contiguous().mT if x.dim() > 1 else x


@pytest.mark.usefixtures("two_nodes")
@pytest.mark.parametrize("by", ["data", "hook", "gradient"])
def test_strides_may_be_others_by_the_way_back(by):
    """Of what autograd kept, or gives to a node."""
    layer, x = make_layer(), torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, turned if by == "hook" else lambda x: x):
        y = layer(x)
    for p in layer.parameters() if by == "data" else ():
        p.data = turned(p.data)
    for node, _ in y.grad_fn.next_functions if by == "gradient" else ():
        node.register_prehook(lambda grads: tuple(map(turned, grads)))
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), [x, *layer.parameters()]), expected))


def test_parameters_of_a_functional_call(taken):
    layer = make_layer()
    given = {name: p.detach().clone().requires_grad_() for name, p in copy.deepcopy(layer).named_parameters()}
    y = torch.func.functional_call(layer, given, (torch.randn(1, 9, WIDTH, dtype=torch.float64),))
    y.sum().backward()
    assert len(taken) == 1
    assert all(p.grad is not None for p in given.values())
    assert all(p.grad is None for p in layer.parameters())
