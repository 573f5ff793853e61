"""A model's step in one compiled call: the numbers of its parts, and taken only where nobody could tell."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.support.checks import BACKBONES, INNERS, assert_close
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer
from ttt4rec.models import ttt4rec

ITEMS, SLOTS = 50, 40
SHAPES = {
    "rms-swiglu": {"norm": "rms", "ffn": "swiglu"},
    "layer-gelu-conv": {"norm": "layer", "ffn": "gelu", "block_conv": True},
    "three-blocks": {"num_blocks": 3, "block_conv": True, "conv_kernel": 2},
}


def make_model(inner="mlp", backbone="transformer", dtype=torch.float64, **options):
    config = TTT4RecConfig(
        ITEMS, 32, num_heads=2, inner=inner, backbone=backbone, ffn_width=64, mini_batch_size=3, **options
    )
    model = TTT4Rec(config, dtype=dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


at_once = ttt4rec.step_at_once


@pytest.fixture
def taken(monkeypatch):
    """The results of steps that were taken at once; of the others None."""
    results = []

    def noted(*given):
        results.append(at_once(*given))
        return results[-1]

    monkeypatch.setattr(ttt4rec, "step_at_once", noted)
    return results


def states_of(pools):
    return [
        x
        for pool in pools
        for x in (pool.mixer.records, pool.mixer.position, pool.mixer.conv, pool.conv)
        if x is not None
    ]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("inner", "backbone"), list(itertools.product(INNERS, BACKBONES)))
def test_the_numbers_are_those_of_the_parts(inner, backbone, shape, taken):
    model = make_model(inner, backbone, **shape)
    own, parts = model.make_pools(SLOTS), model.make_pools(SLOTS)
    for t in range(9):
        B = (1, 3, 37)[t % 3]
        ids, slots = torch.randint(1, ITEMS + 1, (B,)), torch.randperm(SLOTS)[:B]
        assert_close(model.step(ids, own, slots), model._step_by_parts(ids, parts, slots))
    assert all(y is not None for y in taken)
    for a, b in zip(states_of(own), states_of(parts), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("inner", INNERS)
def test_models_with_times_step_at_once_too(inner, taken):
    model = make_model(inner, times="query", num_blocks=2)
    own, parts = model.make_pools(SLOTS), model.make_pools(SLOTS)
    for t in range(7):
        B = (1, 3, 37)[t % 3]
        ids, slots = torch.randint(1, ITEMS + 1, (B,)), torch.randperm(SLOTS)[:B]
        gaps = 10 ** (8 * torch.rand(B)) if t else torch.full((B,), torch.inf)
        assert_close(model.step(ids, own, slots, gaps), model._step_by_parts(ids, parts, slots, gaps))
    assert all(y is not None for y in taken)
    for a, b in zip(states_of(own), states_of(parts), strict=True):
        assert_close(a, b)
    before = [x.clone() for x in states_of(own)]
    for wrong in (torch.tensor([torch.nan, 0]), torch.zeros(1), None):
        with pytest.raises(ValueError, match="gaps must"):
            model.step(torch.tensor([1, 2]), own, torch.tensor([0, 1]), wrong)
    with pytest.raises(ValueError, match="given a 0, which pads"):
        model.step(torch.tensor([1, 0]), own, torch.tensor([0, 1]), torch.ones(2))
    assert all(map(torch.equal, before, states_of(own)))
    with torch.no_grad():
        model.event_times.gap.mul_(2)  # nothing is kept of what it was
    ids, slots, gaps = torch.tensor([3]), torch.tensor([1]), torch.tensor([5.0])
    assert_close(model.step(ids, own, slots, gaps), model._step_by_parts(ids, parts, slots, gaps))


def test_errors_in_float32_are_those_of_the_parts():
    model, exact = make_model(dtype=torch.float32), make_model()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    own, parts, true = (m.make_pools(SLOTS) for m in (model, model, exact))
    ours = theirs = 0.0
    for _ in range(20):
        ids, slots = torch.randint(1, ITEMS + 1, (SLOTS,)), torch.randperm(SLOTS)
        expected = exact._step_by_parts(ids, true, slots)
        ours += (model.step(ids, own, slots) - expected).square().sum()
        theirs += (model._step_by_parts(ids, parts, slots) - expected).square().sum()
    assert ours**0.5 <= 2 * theirs**0.5


WRONG = {
    "padding": ([0, 3], [0, 1], "given a 0, which pads"),
    "no item": ([3, ITEMS + 1], [0, 1], "index out of range"),
    "negative": ([-1], [0], "index out of range"),
    "twice": ([3, 4], [1, 1], "1 is given twice"),
    "beyond": ([3], [SLOTS], f"given {SLOTS}"),
    "more": ([3, 4], [1], "slots must have a place for each of 2 ids"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_changes_nothing(case):
    model = make_model(num_blocks=2, block_conv=True)
    pools = model.make_pools(SLOTS)
    model.step(torch.randint(1, ITEMS + 1, (SLOTS,)), pools, torch.arange(SLOTS))
    before = [x.clone() for x in states_of(pools)]
    ids, slots, message = WRONG[case]
    with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
        model.step(torch.tensor(ids), pools, torch.tensor(slots))
    assert all(map(torch.equal, before, states_of(pools)))


def test_pools_of_another_model_are_refused():
    with pytest.raises(ValueError, match="pools must come from one make_pools"):
        make_model().step(torch.tensor([1]), make_model().make_pools(1), torch.tensor([0]))


class Half(nn.Module):
    def forward(self, x):
        return 0.5 * x


class Adapter(nn.Linear):
    """In the place of a linear map."""


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def replaced(model):
    model.blocks[0].ffn.down = Adapter(64, 32, bias=False, dtype=torch.float64)


CHANGES = {
    "hook on a network": lambda model: model.blocks[0].ffn.register_forward_hook(lambda m, x, y: 2 * y),
    "hook on a norm": lambda model: model.norm.register_forward_hook(lambda m, x, y: 2 * y),
    "hook on the table": lambda model: model.embedding.register_forward_hook(lambda m, x, y: 2 * y),
    "hook on a layer's map": lambda model: model.blocks[0].mixer.value.register_forward_hook(lambda m, x, y: 2 * y),
    "parametrised": lambda model: parametrize.register_parametrization(model.embedding, "weight", Half()),
    "parametrised norm": lambda model: parametrize.register_parametrization(model.blocks[0].ffn_norm, "weight", Half()),
    "adapter": replaced,
    "largest norm": lambda model: setattr(model.embedding, "max_norm", 0.5),
    "eager": lambda model: setattr(model.blocks[0].mixer, "backend", "eager"),
    "own forward": lambda model: setattr(model.blocks[0].ffn, "forward", lambda x: 3 * x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_to_which_something_was_done_goes_by_its_parts(change, taken):
    model = make_model()
    CHANGES[change](model)
    pools, ids = model.make_pools(2), torch.randint(1, ITEMS + 1, (1, 7))
    y = torch.stack([model.step(ids[:, t], pools, torch.tensor([1])) for t in range(7)], 1)
    assert_close(y, model(ids))
    assert taken == [None] * 7


LATER = CHANGES | {
    "fewer items": lambda model: setattr(model.embedding.weight, "data", model.embedding.weight.data[:5]),
    "dropout alone in training": lambda model: setattr(model.dropout.train(), "p", 0.9),
    "a layer's step": lambda model: setattr(model.blocks[0].mixer, "step", lambda x, *_: 3 * x),
    "a block's step": lambda model: setattr(model.blocks[0], "step", lambda h, *_: 3 * h),
    "no norm before the network": lambda model: setattr(model.blocks[0], "ffn_norm", None),
    "gate of the network": lambda model: setattr(model.blocks[0], "ffn_gate", nn.Linear(32, 32).double()),
    "class": lambda model: setattr(model.blocks[0].ffn.down, "__class__", Tripled),
}


@pytest.mark.parametrize("change", LATER)
def test_what_is_done_between_two_steps_counts(change):
    """A call that was prepared before it serves no longer."""
    model = make_model()
    own, parts, ids, slots = model.make_pools(2), model.make_pools(2), torch.randint(1, 5, (5, 1)), torch.tensor([1])
    for pools in (own, parts):
        model.step(ids[0], pools, slots)
    LATER[change](model)
    for t, x in enumerate(ids[1:]):
        both = []
        for step, pools in ((model.step, own), (model._step_by_parts, parts)):
            torch.manual_seed(t)
            both.append(step(x, pools, slots))
        assert_close(*both)


def test_items_that_were_taken_away_are_unknown():
    model = make_model()
    pools, slots = model.make_pools(2), torch.tensor([1])
    model.step(torch.tensor([7]), pools, slots)
    model.embedding.weight.data = model.embedding.weight.data[:5]
    with pytest.raises(IndexError):
        model.step(torch.tensor([7]), pools, slots)


@pytest.mark.parametrize("other", [{"inner": "linear"}, pytest.param({"num_heads": 4}, marks=pytest.mark.slow)])
def test_blocks_of_different_heads_go_by_parts(other, taken):
    """Compiled code is made for one head dimension and one inner model."""
    layers = iter([{"inner": "mlp", "num_heads": 2}, {"inner": "mlp", "num_heads": 2} | other])
    config = TTT4RecConfig(ITEMS, 32, 2, 2, ffn_width=64)
    model = TTT4Rec(config, lambda c: TTTLayer(c.width, mini_batch_size=3, **next(layers)), dtype=torch.float64).eval()
    pools, ids = model.make_pools(2), torch.randint(1, ITEMS + 1, (1, 7))
    y = torch.stack([model.step(ids[:, t], pools, torch.tensor([1])) for t in range(7)], 1)
    assert_close(y, model(ids))
    assert taken == [None] * 7


class Sums(nn.Module):
    """A mixer of somebody else's, with pools of his own."""

    def make_pool(self, num_slots):
        return SimpleNamespace(num_slots=num_slots, sums=torch.zeros(num_slots, 32, dtype=torch.float64))

    def step(self, x, pool, slots):
        pool.sums[slots] += x
        return pool.sums[slots]


def test_pools_of_another_kind_go_by_parts(taken):
    config = TTT4RecConfig(ITEMS, 32, 2, 2, ffn_width=64)
    mixers = iter([TTTLayer(32, 2), Sums()])
    model = TTT4Rec(config, lambda _: next(mixers), dtype=torch.float64).eval()
    pools = model.make_pools(2)
    for _ in range(2):
        assert model.step(torch.tensor([1]), pools, torch.tensor([0])).shape == (1, 32)
    assert taken == [None] * 2


def test_dropout_in_training_goes_by_parts(taken):
    model = make_model(dropout=0.5)
    pools = model.make_pools(1)
    for training in (True, False, True):
        model.train(training).step(torch.tensor([1]), pools, torch.tensor([0]))
    assert [y is None for y in taken] == [True, False, True]
