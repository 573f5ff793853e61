"""Forward and backward of the whole layer: the paths for CPUs against the dual form under autograd.

``pytest benchmarks/test_layer.py -k "against or memory" -s`` prints the table of docs/backends.md. The sides take turns
in one process, and a ratio is the median of the rounds' ratios, so that what else runs on the machine slows both. Peak
memory is how far one forward and backward raises the resident set of a fresh process that a small one has warmed up.
"""

import statistics
import subprocess
import sys
import time

import pytest
import torch

from ttt4rec import TTTLayer

from .measure import resident

SHAPES = {
    "recommender": {"inner": "mlp", "batch": 256, "length": 50, "heads": 4, "head_dim": 16, "mini_batch_size": 8},
    "paper's batch": {"inner": "mlp", "batch": 2048, "length": 50, "heads": 4, "head_dim": 16, "mini_batch_size": 8},
    "linear": {"inner": "linear", "batch": 8, "length": 512, "heads": 4, "head_dim": 64, "mini_batch_size": 16},
}
BACKENDS = ("native", "eager", "reference")
ROUNDS = 7


def make(shape, backend, batch=None):
    """A layer, its input and the cotangent of its output."""
    case = SHAPES[shape]
    torch.manual_seed(0)
    width = case["heads"] * case["head_dim"]
    options = {name: case[name] for name in ("inner", "mini_batch_size")}
    layer = TTTLayer(width, case["heads"], backend=backend, **options)
    x = torch.randn(batch or case["batch"], case["length"], width, requires_grad=True)
    return layer, x, torch.randn_like(x)


def step(layer, x, grad):
    layer.zero_grad()
    x.grad = None
    layer(x).backward(grad)
    return x.grad


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_backward_against_the_reference(shape):
    sides = {backend: make(shape, backend) for backend in BACKENDS}
    seconds = {backend: [] for backend in BACKENDS}
    for _ in range(1 + ROUNDS):
        for backend, side in sides.items():
            start = time.perf_counter()
            result = step(*side)
            seconds[backend].append(time.perf_counter() - start)
            assert result.isfinite().all()
    times = {backend: values[1:] for backend, values in seconds.items()}
    for backend in BACKENDS[:-1]:
        ratio = statistics.median(r / t for r, t in zip(times["reference"], times[backend], strict=True))
        print(
            f"\n{shape}, {backend}: {statistics.median(times[backend]):.3f} s, the reference takes {ratio:.2f} of it",
            end="",
        )
    print(f" ({torch.get_num_threads()} threads, torch {torch.__version__})")


@pytest.mark.parametrize("shape", SHAPES)
def test_peak_memory_against_the_reference(shape):
    peaks = {}
    for backend in BACKENDS:
        command = [sys.executable, "-m", "benchmarks.test_layer", shape, backend]
        peaks[backend] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for backend in BACKENDS[:-1]:
        fraction = peaks[backend] / peaks["reference"]
        print(f"\n{shape}, {backend}: {peaks[backend] >> 20} MiB, {fraction:.2f} of {peaks['reference'] >> 20} MiB")
        assert fraction < 1 / 3


def test_one_event(benchmark):
    benchmark.group = "one event of one user"
    torch.manual_seed(0)
    layer = TTTLayer(64, 4, inner="mlp", mini_batch_size=8).eval()
    with torch.inference_mode():
        _, state = layer(torch.randn(1, 53, 64), return_state=True)
        event = torch.randn(1, 1, 64)
        y, _ = benchmark(lambda: layer(event, state=state, return_state=True))
    assert y.shape == (1, 1, 64)


def peak_bytes(shape, backend):
    """What a forward and backward adds to the resident set of this process, at its peak."""
    step(*make(shape, backend, batch=2))
    side = make(shape, backend)
    before = resident()
    step(*side)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(peak_bytes(*sys.argv[1:]))
