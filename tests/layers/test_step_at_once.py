"""A layer's step in one compiled call: the numbers of its parts, and taken only where nobody could tell."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from tests.support.at_once import WIDTH, make_layer, note
from tests.support.checks import BACKBONES, INNERS, assert_close
from ttt4rec import TTTLayer
from ttt4rec.layers import rotary, step_at_once
from ttt4rec.native import whole_step
from ttt4rec.operators import backends

SLOTS = 40


def steps(count=13, dtype=torch.float64):
    """Tokens of one, few and many streams, out of order."""
    for t in range(count):
        B = (1, 3, 37)[t % 3]
        yield torch.randn(B, WIDTH, dtype=torch.float64).to(dtype), torch.randperm(SLOTS)[:B]


@pytest.fixture
def taken(monkeypatch):
    """How many steps were taken at once."""
    return note(monkeypatch, "step_at_once")


OPTIONS = {"plain": {}, "bounded": {"max_inner_step": 0.3}, "still": {"adapt": False}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_the_numbers_are_those_of_the_parts(inner, backbone, options, taken):
    layer = make_layer(inner, backbone, **options)
    layer.set_inner_lr_scale(0.7)
    own, parts = layer.make_pool(SLOTS), layer.make_pool(SLOTS)
    for x, slots in steps():
        assert_close(layer.step(x, own, slots), layer._step_by_parts(x, parts, slots))
    assert len(taken) == 13
    assert torch.equal(own.position, parts.position)
    everything = torch.arange(SLOTS)
    for name, x in own.read(everything).tensors().items():
        assert_close(x, parts.read(everything).tensors()[name], name=name)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_errors_in_float32_are_those_of_the_parts(inner, backbone):
    layer = make_layer(inner, backbone, torch.float32)
    exact = make_layer(inner, backbone)
    exact.load_state_dict({name: x.double() for name, x in layer.state_dict().items()})
    own, parts, true = layer.make_pool(SLOTS), layer.make_pool(SLOTS), exact.make_pool(SLOTS)
    ours = theirs = size = 0.0
    for x, slots in steps(30, torch.float32):
        expected = exact._step_by_parts(x.double(), true, slots)
        ours += (layer.step(x, own, slots) - expected).square().sum()
        theirs += (layer._step_by_parts(x, parts, slots) - expected).square().sum()
        size += expected.square().sum()
    assert (ours / size) ** 0.5 <= 2 * (theirs / size) ** 0.5


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_number(threads, monkeypatch):
    monkeypatch.setattr(whole_step, "ALONE", 0)
    layer, before = make_layer(), torch.get_num_threads()
    pool, x = layer.make_pool(SLOTS), torch.randn(SLOTS, WIDTH, dtype=torch.float64)
    alone = torch.cat([layer.step(row[None], pool, torch.tensor([i])) for i, row in enumerate(x)])
    torch.set_num_threads(threads)
    try:
        together = layer.step(x, layer.make_pool(SLOTS), torch.arange(SLOTS))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, alone)


def test_few_streams_are_one_threads(monkeypatch):
    parts = []
    monkeypatch.setattr(whole_step, "share", lambda work, rows: parts.append(rows) or work(0, rows))
    layer = make_layer()
    pool = layer.make_pool(1000)
    for B in (1, 32, 1000):
        layer.step(torch.randn(B, WIDTH, dtype=torch.float64), pool, torch.arange(B))
    assert parts == [1000]


def test_streams_in_two_threads_of_one_pool():
    layer = make_layer()
    pool, x = layer.make_pool(2), torch.randn(60, 2, WIDTH, dtype=torch.float64)
    expected = layer.make_pool(2)
    for row in x:
        layer.step(row, expected, torch.arange(2))
    both = [
        threading.Thread(target=lambda n=n: [layer.step(row[n : n + 1], pool, torch.tensor([n])) for row in x])
        for n in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert torch.equal(pool.records, expected.records)


def test_parameters_are_read_at_every_call(taken):
    layer, other = make_layer(), make_layer()
    pool, x, slots = layer.make_pool(2), torch.randn(1, WIDTH, dtype=torch.float64), torch.tensor([0])
    layer.step(x, pool, slots)
    layer.load_state_dict({name: p.clone() for name, p in other.state_dict().items()}, assign=True)
    pool.reset(slots)
    assert_close(layer.step(x, pool, slots), other.step(x, other.make_pool(2), slots))
    assert len(taken) == 3


WRONG = {
    "twice": (torch.randn(2, WIDTH), torch.tensor([1, 1]), "1 is given twice"),
    "beyond": (torch.randn(2, WIDTH), torch.tensor([1, SLOTS]), f"from 0 to {SLOTS - 1}; given {SLOTS}"),
    "negative": (torch.randn(1, WIDTH), torch.tensor([-1]), "given -1"),
    "narrow": (torch.randn(1, WIDTH - 1), torch.tensor([1]), "x must have shape"),
    "none": (torch.randn(0, WIDTH), torch.tensor([], dtype=torch.int64), "B >= 1"),
    "more": (torch.randn(3, WIDTH), torch.tensor([1, 2]), "slots"),
    "another dtype": (torch.randn(1, WIDTH), torch.tensor([1.0]), "slots must be int64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_changes_nothing(case):
    layer = make_layer(dtype=torch.float32)
    pool = layer.make_pool(SLOTS)
    layer.step(torch.randn(SLOTS, WIDTH), pool, torch.arange(SLOTS))
    before = [x.clone() for x in (pool.records, pool.position, pool.conv)]
    x, slots, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        layer.step(x, pool, slots)
    assert all(map(torch.equal, before, (pool.records, pool.position, pool.conv)))


def test_another_layers_pool_is_refused():
    with pytest.raises(ValueError, match="another layer"):
        make_layer().step(torch.randn(1, WIDTH, dtype=torch.float64), make_layer().make_pool(1), torch.tensor([0]))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Adapter(nn.Linear):
    """In the place of a linear map."""


class Own(TTTLayer):
    def _inner_lr(self, lr, k):
        return 0.5 * super()._inner_lr(lr, k)


def adapted(layer):
    layer.value = Adapter(WIDTH, WIDTH, bias=False, dtype=torch.float64)


def reshaped(layer):
    layer.norm.weight = nn.Parameter(layer.norm.weight.detach().repeat(2)[::2])


CHANGES = {
    "hook": lambda layer: layer.query.register_forward_hook(lambda *_: None),
    "parametrised map": lambda layer: parametrize.register_parametrization(layer.output, "weight", Doubled()),
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "token_offset", Doubled()),
    "adapter": adapted,
    "not contiguous": reshaped,
    "eager": lambda layer: setattr(layer, "backend", "eager"),
    "reference": lambda layer: setattr(layer, "backend", "reference"),
    "class": lambda layer: setattr(layer, "__class__", Own),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_to_which_something_was_done_goes_by_its_parts(change, taken):
    layer = make_layer()
    CHANGES[change](layer)
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    pool = layer.make_pool(2)
    y = torch.stack([layer.step(x[:, t], pool, torch.tensor([1])) for t in range(6)], 1)
    assert_close(y, layer(x))
    assert not taken


def drawn(layer):
    return torch.randn_like(layer.query.weight)


def replaced(layer):
    layer.value = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)


def turned(layer):
    """The same memory, in another order."""
    layer.query.weight.data = layer.query.weight.data.t()


class Tagged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * y if function is nn.functional.linear else y


def swapped(layer):
    """The same memory, by a tensor of another kind."""
    weight = layer.query.weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().as_subclass(Tagged)))


def reread(layer):
    """The same memory, as numbers of another kind."""
    layer.token_offset.requires_grad_(False)
    layer.token_offset.data = layer.token_offset.data.view(torch.int64)


LATER = CHANGES | {
    "swapped": swapped,
    "reread": reread,
    "patched": lambda layer: setattr(layer, "_inner_lr", lambda lr, k: 0.5 * lr),
    "in place": lambda layer: layer.query.weight.data.copy_(drawn(layer)),
    "data": lambda layer: setattr(layer.query.weight, "data", drawn(layer)),
    "parameter": lambda layer: setattr(layer.output, "weight", nn.Parameter(drawn(layer))),
    "turned": turned,
    "module": replaced,
    "still": lambda layer: setattr(layer, "adapt", False),
    "bounded": lambda layer: setattr(layer, "max_inner_step", 0.1),
    "scaled": lambda layer: layer.set_inner_lr_scale(0.3),
    "rate": lambda layer: setattr(layer, "base_lr", 0.2),
    "theta": lambda layer: setattr(layer, "rope_theta", 10.0),
    "eps": lambda layer: setattr(layer.norm, "eps", 1.0),
    "own forward": lambda layer: setattr(layer.value, "forward", lambda x: 3 * x),
}


@pytest.mark.parametrize("change", LATER)
def test_what_is_done_between_two_steps_counts(change):
    """A call that was prepared before it serves no longer."""
    layer, x, slots = make_layer(backbone="transformer"), torch.randn(9, 1, WIDTH).double(), torch.tensor([1])
    own, parts = layer.make_pool(2), layer.make_pool(2)
    for pool in (own, parts):
        for t in range(4):
            layer.step(x[t], pool, slots)
    LATER[change](layer)
    for t in range(4, 9):
        assert_close(layer.step(x[t], own, slots), layer._step_by_parts(x[t], parts, slots))


def test_a_call_is_prepared_once(monkeypatch):
    layer, other, calls = make_layer(), make_layer(), []
    found = step_at_once.layer_parts
    monkeypatch.setattr(step_at_once, "layer_parts", lambda *args: calls.append(args) or found(*args))
    pools = [layer.make_pool(2), layer.make_pool(2), other.make_pool(2)]
    for x, _ in steps(6):
        for pool in pools:
            pool.layer.step(x[:1], pool, torch.tensor([1]))
            pool.layer.requires_grad_(False)  # changes nothing that counts
    assert len(calls) == len(pools)
    gone = weakref.ref(pools[0].records)
    del pools[0], pool, calls[:]
    gc.collect()
    assert gone() is None


def test_tables_of_rotation_live_as_long_as_the_call(monkeypatch):
    """Elsewhere only the latest 32 are kept."""
    tables, made = [], rotary._made

    def noted(*sizes):
        table = made(*sizes)
        tables.extend(map(weakref.ref, table))
        return table

    rotary._kept.cache_clear()
    monkeypatch.setattr(rotary, "_made", noted)
    layer = make_layer()
    pool = layer.make_pool(1)
    layer.step(torch.randn(1, WIDTH, dtype=torch.float64), pool, torch.tensor([0]))
    rotary._kept.cache_clear()
    gc.collect()
    assert len(tables) == 2
    assert all(table() is not None for table in tables)
    del pool
    gc.collect()
    assert all(table() is None for table in tables)


def test_what_was_replaced_is_not_kept():
    layer = make_layer()
    pool, x, slots = layer.make_pool(1), torch.randn(1, WIDTH, dtype=torch.float64), torch.tensor([0])
    layer.step(x, pool, slots)
    gone = weakref.ref(layer.query.weight)
    layer.load_state_dict({name: p.clone() for name, p in layer.state_dict().items()}, assign=True)
    gc.collect()
    assert gone() is None


def test_a_layer_that_has_its_pool_goes_with_it():
    layer = make_layer()
    layer.pool = layer.make_pool(1)
    layer.step(torch.randn(1, WIDTH, dtype=torch.float64), layer.pool, torch.tensor([0]))
    gone = weakref.ref(layer.pool.records)
    del layer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda pool: pickle.loads(pickle.dumps(pool))])
def test_a_copied_pool_prepares_its_own_calls(copied):
    layer = make_layer()
    pool, x, slots = layer.make_pool(1), torch.randn(1, WIDTH, dtype=torch.float64), torch.tensor([0])
    layer.step(x, pool, slots)
    other = copied(pool)
    assert other.prepared is None
    y = other.layer.step(x, other, slots)
    if other.records is not pool.records:
        assert torch.equal(y, layer.step(x, pool, slots))


def test_a_parameter_without_memory_beside_the_layers_own(taken):
    layer = make_layer()
    layer.head = nn.LazyLinear(3)
    pool = layer.make_pool(1)
    for x, _ in steps(3):
        layer.step(x[:1], pool, torch.tensor([0]))
    assert len(taken) == 3


def test_who_looks_on_sees_the_parts(taken):
    layer = make_layer(dtype=torch.float32)
    pool, x, slots = layer.make_pool(2), torch.randn(1, WIDTH), torch.tensor([0])
    with FlopCounterMode(display=False) as counter:
        layer.step(x, pool, slots)
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.step(x, pool, slots).dtype == torch.bfloat16
    seen = []
    handle = modules.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer.step(x, pool, slots)
    finally:
        handle.remove()
    assert layer.query in seen
    layer.requires_grad_(False)
    traced = torch.jit.trace(lambda x: layer.step(x, pool, slots), x, check_trace=False)
    assert "ttt4rec::" in str(traced.graph)
    half = make_layer(dtype=torch.bfloat16)
    half.step(x.bfloat16(), half.make_pool(1), slots)
    narrow = TTTLayer(12, 2)  # heads of six features are no whole vectors
    narrow.step(torch.randn(1, 12), narrow.make_pool(1), slots)
    assert not taken
    layer.step(x, pool, slots)
    assert len(taken) == 1


def test_a_backend_without_a_shortcut_goes_by_parts(taken, monkeypatch):
    monkeypatch.setattr(backends, "shortcut", lambda *_: None)
    monkeypatch.setattr("ttt4rec.layers.step_at_once.shortcut", lambda *_: None)
    layer = make_layer()
    layer.step(torch.randn(1, WIDTH, dtype=torch.float64), layer.make_pool(1), torch.tensor([0]))
    assert not taken
