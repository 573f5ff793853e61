"""One token more of 1,024 streams in a pool, against reading their histories of 50 again."""

import statistics

import pytest
import torch

from ttt4rec import TTTLayer

from .measure import timed

STREAMS, HISTORY = 1024, 50


@pytest.mark.parametrize("inner", ["mlp", "linear"])
@torch.inference_mode()
def test_step_and_recomputing(benchmark, inner):
    """In turn, in one process: one reading again, and a step from each place of the mini-batch; per step."""
    benchmark.group = "eight tokens of 1,024 streams"
    torch.manual_seed(0)
    layer = TTTLayer(64, 4, inner=inner, mini_batch_size=8).eval()
    pool, slots = layer.make_pool(STREAMS), torch.randperm(STREAMS)
    for streams in range(STREAMS // 8, STREAMS, STREAMS // 8):  # an eighth of them at each place of a mini-batch
        layer.step(torch.randn(streams, 64), pool, slots[:streams])
    histories, event = torch.randn(STREAMS, HISTORY, 64), torch.randn(STREAMS, 64)
    recomputed, stepped = [], []

    def recompute():
        recomputed.append(timed(lambda: layer(histories), "cpu"))

    def steps():
        for _ in range(8):
            layer.step(event, pool, slots)

    def round_of_steps():
        stepped.append(timed(steps, "cpu") / 8)

    benchmark.pedantic(round_of_steps, setup=recompute, rounds=16, warmup_rounds=2)
    ratio = statistics.median(r / s for r, s in zip(recomputed[2:], stepped[2:], strict=True))
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.extra_info["recomputing / step"] = round(ratio, 1)
    print(f"\n{inner}: recomputing takes {ratio:.1f} times as long; a step {statistics.median(stepped) * 1e3:.1f} ms")
    assert layer.step(event, pool, slots).isfinite().all()
