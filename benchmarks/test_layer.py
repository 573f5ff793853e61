"""Forward and backward of the whole layer: the path taken without a GPU against the dual form under autograd."""

import pytest
import torch

from ttt4rec import TTTLayer

SHAPES = {
    "recommender": {"inner": "mlp", "batch": 256, "length": 50, "heads": 4, "head_dim": 16, "mini_batch_size": 8},
    "linear": {"inner": "linear", "batch": 8, "length": 512, "heads": 4, "head_dim": 64, "mini_batch_size": 16},
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_backward(benchmark, shape, backend):
    case = SHAPES[shape]
    benchmark.group = f"forward and backward, {shape}"
    torch.manual_seed(0)
    width = case["heads"] * case["head_dim"]
    layer = TTTLayer(
        width, case["heads"], inner=case["inner"], mini_batch_size=case["mini_batch_size"], backend=backend
    )
    x = torch.randn(case["batch"], case["length"], width, requires_grad=True)
    grad = torch.randn_like(x)
    benchmark.extra_info |= case | {"threads": torch.get_num_threads(), "torch": torch.__version__}

    def step():
        layer.zero_grad()
        x.grad = None
        layer(x).backward(grad)
        return x.grad

    result = benchmark.pedantic(step, rounds=7, warmup_rounds=2)
    assert result.isfinite().all()


def test_one_event(benchmark):
    benchmark.group = "one event of one user"
    torch.manual_seed(0)
    layer = TTTLayer(64, 4, inner="mlp", mini_batch_size=8).eval()
    with torch.inference_mode():
        _, state = layer(torch.randn(1, 53, 64), return_state=True)
        event = torch.randn(1, 1, 64)
        y, _ = benchmark(lambda: layer(event, state=state, return_state=True))
    assert y.shape == (1, 1, 64)
