"""What each training loss costs a step, from hidden states to the gradients of these and of all embeddings.

pytest benchmarks/test_losses.py --benchmark-columns=median,min,rounds
"""

import pytest
import torch

from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys.losses import LOSSES, Loss


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_items", [3_416, 30_000, 300_000])
def test_loss_of_2048_targets(benchmark, num_items, name):
    benchmark.group = f"2,048 targets, {num_items:,} items, width 64, 256 negatives"
    torch.manual_seed(0)
    model = TTT4Rec(TTT4RecConfig(num_items=num_items))
    loss = Loss.make(name, torch.ones(num_items), num_negatives=256, popularity=0.0, calibration=0.75)
    h, items = torch.randn(2048, 64, requires_grad=True), torch.randint(1, num_items + 1, (2048,))

    def step():
        model.zero_grad()
        loss(model, h, items).mean().backward()
        return model.embedding.weight.grad

    assert benchmark.pedantic(step, rounds=5, warmup_rounds=1).isfinite().all()
