"""Heads that processes share out: outputs, states and gradients are those of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from tests.support.checks import assert_close, assert_states_close, make_layer
from tests.support.processes import together
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.layers.head_parallel import HeadParallel

MASK = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
SLOTS = torch.tensor([2, 0])
ONE_OF_FOUR = {"width": 32, "num_heads": 4}


def split(layer, size):
    return parallelize_module(layer, init_device_mesh("cpu", (size,)), HeadParallel())


def own_heads(state, rank, size):
    """Of a state, what a process has."""

    def part(x, dim):
        return None if x is None else x.chunk(size, dim)[rank].contiguous()

    return type(state)(
        tuple(part(W, 1) for W in state.weights),
        part(state.pending_k, 2),
        part(state.pending_v, 2),
        part(state.pending_lr, 2),
        state.position,
        part(state.conv, 2),
        part(state.pending_log_decay, 2),
    )


def results(layer, x, state):
    """Outputs, new and twice on from a state, the state then, and gradients of x, the first state and parameters."""
    layer.zero_grad()
    leaf, start = x.clone().requires_grad_(), state.detach().clone()
    start.weights[0].requires_grad_()
    new = layer(leaf)
    y, between = layer(leaf, mask=MASK, state=start, return_state=True)
    more, behind = layer(leaf, state=between, return_state=True)
    outputs = torch.cat((new, y, more.square()), 1)
    outputs.sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return outputs.detach(), behind.detach(), leaf.grad, start.weights[0].grad, grads


def stepped(layer, x, state):
    """Outputs of steps of two streams in a pool, one of which goes on from a state, and the states behind them."""
    pool = layer.make_pool(3)
    pool.write(SLOTS[:1], state[0])
    y = torch.stack([layer.step(x[:, t], pool, SLOTS) for t in range(6)])
    return y, pool.read(SLOTS)


def check(layer, size, backend="eager"):
    layer.backend = backend
    x = torch.randn(2, 9, layer.width, dtype=torch.float64)
    state = layer(torch.randn(2, 3, layer.width, dtype=torch.float64), return_state=True)[1].detach()
    expected, steps, losses = results(layer, x, state), stepped(layer, x, state), layer.surprise(x)
    moved, doubled = layer.moved(expected[1]), layer(2 * x).detach()

    def run():
        own = split(layer, size)
        mine = own_heads(state, dist.get_rank(), size)
        found = results(own, x, mine)
        found[-1].update((name, g.full_tensor()) for name, g in found[-1].items())
        found = *found, stepped(own, x, mine), own.surprise(x), own.moved(found[1])
        own.register_forward_pre_hook(lambda _, given: (2 * given[0],))
        return *found, own(x).detach()

    for rank, found in enumerate(together(size, run)):
        assert_close(found[0], expected[0], name="y")
        assert_states_close(found[1], own_heads(expected[1], rank, size))
        assert_close(found[2], expected[2], name="gradient of x")
        assert_close(found[3], expected[3].chunk(size, 1)[rank], name="gradient of the state")
        assert found[4].keys() == expected[4].keys()
        for name, g in found[4].items():
            assert_close(g, expected[4][name], name=f"gradient of {name}")
        assert_close(found[5][0], steps[0], name="steps")
        assert_states_close(found[5][1], own_heads(steps[1], rank, size))
        assert_close(found[6], losses, name="surprise")
        assert_close(found[7], moved.chunk(size, 1)[rank], name="moved")
        assert_close(found[8], doubled, name="y behind a hook, which is called once")


def test_heads_of_two_processes():
    check(make_layer("mlp", "mamba", forget="token"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_heads_of_four_processes(backend):
    check(make_layer("linear", "transformer", max_inner_step=1.0, **ONE_OF_FOUR), 4, backend)


@pytest.mark.slow
def test_what_cannot_be_split_says_so():
    adapted, hooked = make_layer("linear", "mamba"), make_layer("linear", "transformer")
    adapted.value = nn.Sequential(adapted.value)

    def refusal(module, plan=None):
        plan = HeadParallel() if plan is None else plan
        try:
            parallelize_module(module, init_device_mesh("cpu", (2,)), plan)
        except (TypeError, ValueError) as error:
            return str(error)

    def run():
        x, whole = torch.randn(2, 3, 8, dtype=torch.float64), hooked(torch.ones(2, 3, 8).double(), return_state=True)[1]
        found = [refusal(nn.Linear(8, 8)), refusal(make_layer("linear", "transformer", width=6, num_heads=3))]
        found += [refusal(adapted), refusal(hooked), refusal(hooked)]
        with pytest.raises(ValueError, match=r"state"):
            hooked(x, state=whole)
        with pytest.raises(ValueError, match=r"another layer"):
            hooked.step(x[:, 0], adapted.make_pool(3), SLOTS)
        with pytest.raises(ValueError, match=r"x must have shape"):
            hooked(x[..., :4])
        with pytest.raises(TypeError, match=r"x must be float32"):
            hooked(x.long())
        with pytest.raises(TypeError, match=r"x must be whole in every process"):
            hooked(next(hooked.parameters()))
        return found

    for found in together(2, run):
        assert found == [
            "module must be a TTTLayer for its heads to be split; given a Linear",
            "num_heads must be a multiple of the number of processes in the mesh; given 3 and 2",
            "layer must be as TTTLayer makes it for its heads to be split; changed in it: value",
            None,
            "weights must be whole before heads are split, as before fully_shard; given DTensors",
        ]


@pytest.mark.slow
def test_a_model_with_heads_split_in_pairs_of_processes_and_the_rest_by_fsdp():
    """A mesh of two dimensions; after a step of an optimizer the weights are those of one process."""
    from torch.distributed.fsdp import fully_shard

    config = TTT4RecConfig(30, width=16, num_blocks=2, num_heads=4, backbone="mamba", dropout=0.0)
    model, ids = TTT4Rec(config).double(), torch.randint(1, 31, (4, 9))
    started = copy.deepcopy(model.state_dict())

    def trained(model, ids):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(ids).square().mean().backward()
        optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    def run():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
        parallelize_module(model, mesh["heads"], {"blocks.*.mixer": HeadParallel()})
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh["data"])
        found = trained(model, ids.chunk(2)[mesh.get_local_rank("data")])
        with pytest.raises(ValueError, match=r"must be a DTensor where fully_shard .*set_model_state_dict with"):
            model.load_state_dict(started)
        found = {name: p.full_tensor() for name, p in found.items()}
        set_model_state_dict(model, dict(started), options=StateDictOptions(full_state_dict=True))
        assert all(torch.equal(p.full_tensor(), started[name]) for name, p in model.named_parameters())
        return found

    split_weights = together(4, run)
    expected = trained(model, ids)
    for found in split_weights:
        for name, p in found.items():
            assert_close(p, expected[name], name=name)
            assert not torch.equal(p, started[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("assign", [False, True])
def test_whole_weights_are_loaded_into_split_ones(assign):
    """By each process its part; and what the split layer saves is loaded again, whole or split."""
    model, x = nn.Sequential(make_layer("mlp", "mamba", forget="token")), torch.randn(2, 9, 8).double()
    other = nn.Sequential(make_layer("mlp", "mamba", forget="token"))
    expected, first = other(x).detach(), model(x).detach()

    def run():
        whole = copy.deepcopy(other.state_dict())
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": HeadParallel()})
        split = copy.deepcopy(model.state_dict())
        model.load_state_dict(whole, assign=assign)
        found = [model(x).detach()]
        assert all(isinstance(p, DTensor) for p in model.parameters())
        saved = {name: p.full_tensor() for name, p in model.state_dict().items()}
        assert all(torch.equal(p, saved[name]) for name, p in whole.items())
        options = StateDictOptions(full_state_dict=True)
        assert all(torch.equal(p, whole[name]) for name, p in get_model_state_dict(model, options=options).items())
        model.load_state_dict(split, assign=assign)
        found += [model(x).detach()]
        set_model_state_dict(model, dict(whole), options=options)
        found += [model(x).detach()]
        with pytest.raises(RuntimeError, match=r"size mismatch for 0\.query\.weight"):
            model.load_state_dict(whole | {"0.query.weight": torch.zeros(3, 8)})
        return found

    for found in together(2, run):
        for y, wanted in zip(found, (expected, first, expected), strict=True):
            assert_close(y, wanted)
