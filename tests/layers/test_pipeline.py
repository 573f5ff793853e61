"""Blocks in the stages of a pipeline, each in a process, with micro-batches: gradients are those of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.checks import assert_close, make_layer
from tests.support.processes import together
from ttt4rec.models.blocks import Block

KINDS = [("mlp", "mamba"), ("linear", "transformer"), ("linear", "mamba"), ("mlp", "transformer")]
MASK = torch.arange(9) < torch.tensor([[9], [5], [1], [7]])


class Masked(nn.Module):
    """Some of a model's blocks, all of which are given the mask."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, h, mask):
        for block in self.blocks:
            h = block(h, mask=mask)
        return h


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_stages_of_two_processes(schedule):
    from torch.distributed import pipelining

    layers = [make_layer(*kind, width=16) for kind in KINDS]
    blocks = [Block(16, layer, ffn_width=8, conv_kernel=4).double() for layer in layers]
    x, target = torch.randn(2, 4, 9, 16, dtype=torch.float64)

    def loss(y, target):
        return (y - target).square().mean()

    def run():
        rank = dist.get_rank()
        stage = pipelining.PipelineStage(Masked(blocks[2 * rank : 2 * rank + 2]), rank, 2, torch.device("cpu"))
        steps = getattr(pipelining, f"Schedule{schedule}")(stage, n_microbatches=2, loss_fn=loss)
        if rank == 0:
            steps.step(x, mask=MASK)
            return None, [p.grad for p in stage.submod.parameters()]
        return steps.step(target=target, mask=MASK), [p.grad for p in stage.submod.parameters()]

    (_, first), (y, second) = together(2, run)
    expected = Masked(blocks)(x, MASK)
    loss(expected, target).backward()
    assert_close(y, expected)
    for g, p in zip([*first, *second], nn.ModuleList(blocks).parameters(), strict=True):
        assert (g is None) == (p.grad is None)
        if g is not None:
            assert_close(g, p.grad)
