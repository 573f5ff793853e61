"""Sequences whose parts several processes read: outputs, states and gradients are those of one process."""

import pytest
import torch
import torch.distributed as dist

from tests.support.checks import assert_close, assert_states_close, make_layer
from tests.support.processes import together
from ttt4rec.layers.parallel import read_part
from ttt4rec.models.blocks import Block

LENGTHS = (7, 4, 1, 6)  # of the parts: inside of mini-batches of 4, and shorter


def results(module, x, read):
    """Outputs, the state behind them, and the gradients of x and of all parameters, zeros where there is none."""
    leaf = x.clone().requires_grad_()
    y, behind = read(leaf)
    module.zero_grad()
    y.square().sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
    return y.detach(), behind.detach(), leaf.grad, grads


def parts(module, x, size, state):
    """The same by several processes, as each of them has it, with gradients of parameters summed."""

    def run():
        rank = dist.get_rank()
        first = state if rank == 0 else None
        found = results(module, x.split(LENGTHS[:size], 1)[rank], lambda x: read_part(module, x, state=first))
        for g in found[-1]:
            dist.all_reduce(g)
        return found

    return together(size, run)


@pytest.mark.parametrize(
    ("inner", "backbone", "size"),
    [("mlp", "mamba", 2), pytest.param("linear", "transformer", 4, marks=pytest.mark.slow)],
)
def test_a_sequence_in_parts(inner, backbone, size):
    layer = make_layer(inner, backbone, backend="eager")
    x = torch.randn(2, sum(LENGTHS[:size]), 8, dtype=torch.float64)
    state = None  # begin with the initial weights, whose gradients come from all parts; or go on
    if size == 2:
        state = layer(torch.randn(2, 3, 8, dtype=torch.float64), return_state=True)[1].detach()
    y, behind, grad_x, grads = results(layer, x, lambda x: layer(x, state=state, return_state=True))
    found = parts(layer, x, size, state)
    assert_close(torch.cat([part[0] for part in found], 1), y, name="y")
    assert_states_close(found[-1][1], behind)
    assert_close(torch.cat([part[2] for part in found], 1), grad_x, name="gradient of x")
    for part in found:
        for g, expected in zip(part[3], grads, strict=True):
            assert_close(g, expected, name="gradient")


@pytest.mark.slow
def test_a_model_of_blocks_in_parts():
    """Two blocks with convolutions of their own, whose states are pytrees; without gradients too."""
    blocks = [
        Block(8, make_layer("linear", "mamba", backend="eager"), ffn_width=8, conv_kernel=4).double() for _ in "ab"
    ]
    x = torch.randn(2, 11, 8, dtype=torch.float64)

    def run():
        h = x.split(LENGTHS[:2], 1)[dist.get_rank()]
        with torch.no_grad():
            for block in blocks:
                h, _ = read_part(block, h)
        return h

    with torch.no_grad():
        expected = blocks[1](blocks[0](x))
    assert_close(torch.cat(together(2, run), 1), expected)


def test_only_the_first_process_goes_on_from_a_state():
    layer = make_layer("linear", "transformer", backend="eager")
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    _, state = layer(x, return_state=True)

    def run():
        try:
            if dist.get_rank():
                read_part(layer, x, state=state)
        except ValueError as error:
            return str(error)

    assert together(2, run)[1] == "state must be given to the first process of the group alone; given to number 1"


@pytest.mark.slow
def test_a_layer_whose_weights_are_split_by_fsdp():
    """``fully_shard``: masks, states, gradients, and pools while the weights are whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    layer, slots = make_layer("mlp", "mamba", backend="eager"), torch.tensor([2, 0])
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])

    def read(x):
        y, state = layer(x, mask=mask, return_state=True)
        more, behind = layer(x, state=state, return_state=True)
        return torch.cat((y, more), 1), behind

    def step():
        pool = layer.make_pool(3)
        return torch.stack([layer.step(x[:, t], pool, slots) for t in range(6)])

    def run():
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        y, behind, grad_x, grads = results(layer, x, read)
        with pytest.raises(ValueError, match=r"weights must be whole .* as after layer\.unshard"):
            layer.make_pool(3)
        layer.unshard()
        stepped = step()
        pool = layer.make_pool(3)
        layer.reshard()
        register_fsdp_forward_method(layer, "step")
        again = torch.stack([layer.step(x[:, t], pool, slots) for t in range(6)])
        return y, behind, grad_x, [g.full_tensor() for g in grads], stepped, again

    y, behind, grad_x, grads = results(layer, x, read)
    for found in together(2, run):
        assert_close(found[0], y)
        assert_states_close(found[1], behind)
        assert_close(found[2], grad_x)
        for g, expected in zip(found[3], grads, strict=True):
            assert_close(g, expected)
        for steps in found[4:]:
            assert_close(steps, step())
