"""Mini-batches of 64 to 2,048 tokens: timed on a CPU, counted for a GPU.

``python -m benchmarks.long_mini_batches`` times forward and backward of the inner loop in turn with the reference and
with causal attention over the same heads and tokens, on one thread, and prints how many times as long those take.
``--count`` prints what a GPU would do instead, of a scan without values: launches, bytes and FLOPs, and the time that
those take at least. Nothing of it is measured.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

SIZES, ROUNDS = (64, 256, 1024, 2048), 5
BANDWIDTH, PEAK = 4.8e12, 989e12
"""Of an H200, bytes and bfloat16 FLOPs a second, as its maker says."""
QUIET = ("empty", "view", "unsafe_view", "t", "transpose", "unsqueeze", "slice", "select", "expand", "as_strided",
         "split", "split_with_sizes", "alias", "detach", "unbind", "squeeze", "permute")  # fmt: skip
"""Operators that launch nothing."""


def inner_loop(inner: str, length: int, heads: int, head_dim: int, size: int, backend: str) -> Callable[[], None]:
    """Forward and backward of one sequence with initial weights of all ones' size."""
    from ttt4rec.inner_models import INNER_MODELS
    from ttt4rec.layers.functional import Rates, inner_loop

    torch.manual_seed(0)
    model = INNER_MODELS[inner]
    shapes = model.shapes(head_dim, model.expansion * head_dim).values()
    tokens = tuple(torch.randn(1, length, heads, head_dim, requires_grad=True) for _ in range(3))
    lr = torch.rand(1, length, heads) / head_dim
    weights = tuple((torch.randn(heads, *shape) * 0.02).requires_grad_() for shape in shapes)
    norm = torch.ones(heads, head_dim), torch.zeros(heads, head_dim)
    scale, grad = 1 / torch.arange(1.0, size + 1), torch.randn(1, length, heads, head_dim)

    def run() -> None:
        o, _ = inner_loop(model, tokens, Rates(lr, scale), weights, norm, size, None, None, None, 1e-6, backend)
        o.backward(grad)

    return run


def attention(length: int, heads: int, head_dim: int) -> Callable[[], None]:
    """The same of causal attention."""
    q, k, v, grad = (torch.randn(1, heads, length, head_dim) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)


def time_on_cpu(length: int, heads: int, head_dims: list[int]) -> None:
    """Print a table: microseconds a token and head, and how many times as long others take."""
    torch.set_num_threads(1)
    print(f"| inner model, D | K | native, µs a token and head | eager | reference | attention |\n{6 * '|---'}|")
    for inner in ("linear", "mlp"):
        for head_dim in head_dims:
            for size in SIZES:
                sides = {
                    name: inner_loop(inner, length, heads, head_dim, size, name)
                    for name in ("native", "eager", "reference")
                }
                sides["attention"] = attention(length, heads, head_dim)
                own, *others = in_turn(sides)
                row = " | ".join(f"{ratio:.1f}" for ratio in others)
                print(f"| {inner}, {head_dim} | {size:,} | {1e6 * own / (length * heads):.2f} | {row} |", flush=True)


def in_turn(sides: dict[str, Callable[[], None]]) -> list[float]:
    """Seconds of the first, and the median over rounds of the ratios of the others to it; by the process's own time."""
    rounds = []
    for _ in range(1 + ROUNDS):
        times = []
        for run in sides.values():
            begin = time.process_time()
            run()
            times.append(time.process_time() - begin)
        rounds.append(times)
    columns = list(zip(*rounds[1:], strict=True))
    ratios = [statistics.median(b / a for a, b in zip(columns[0], other, strict=True)) for other in columns[1:]]
    return [min(columns[0]), *ratios]


class Count(TorchDispatchMode):
    """Launches, bytes and FLOPs of what runs inside: of products, of PyTorch's other operators, and of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = {"products": 0, "kernels": 0, "other operators": 0}
        self.bytes, self.flops, self.seconds = 0.0, 0.0, 0.0

    def add(self, kind: str, tensors: list[Tensor], flops: float = 0.0) -> None:
        """A launch that reads or writes each tensor once."""
        moved = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        self.launches[kind] += 1
        self.bytes, self.flops = self.bytes + moved, self.flops + flops
        self.seconds += max(moved / BANDWIDTH, flops / PEAK)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        if name not in QUIET and not name.startswith(("empty", "new_empty")):
            results = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
            overwrites = name in ("copy", "fill", "zero")
            given = [x for x in args[overwrites:] if isinstance(x, Tensor)]
            flops = 2.0 * args[0].numel() * args[1].shape[-1] if name == "bmm" else 0.0
            self.add("products" if name in ("bmm", "baddbmm") else "other operators", [*given, *results], flops)
        return out


def counted(inner: str, batch: int, length: int, heads: int, head_dim: int, size: int) -> list[Count]:
    """Of a scan on a GPU in bfloat16, and of its backward."""
    from ttt4rec import kernels
    from ttt4rec.eager import layout
    from ttt4rec.inner_models import INNER_MODELS
    from ttt4rec.kernels import launch
    from ttt4rec.layers.functional import segment_length
    from ttt4rec.operators import SCANS
    from ttt4rec.operators.samples import Sizes

    operator, counts, run = SCANS[inner], [Count(), Count()], launch.Launch.run
    given = operator.sample(Sizes(batch, length, heads, head_dim, size), torch.bfloat16, "meta")
    given = given._replace(segment=segment_length(INNER_MODELS[inner], given.weights, size))
    kept, grads = operator.backward_sample(operator(given, "triton"))
    cpu_bytes = layout.CACHE_BYTES
    layout.CACHE_BYTES = layout.CHUNK_BYTES  # what is on no device counts as on a CPU
    try:
        for count, function, rest in zip(counts, ("scan", "scan_backward"), ((), (kept, grads)), strict=True):
            launch.Launch.run = lambda prepared, count=count: count.add(  # type: ignore[method-assign]
                "kernels", [x for x in prepared.arguments if isinstance(x, Tensor)]
            )
            with count:
                getattr(kernels, f"{inner}_{function}")(given, *rest)
    finally:
        launch.Launch.run, layout.CACHE_BYTES = run, cpu_bytes  # type: ignore[method-assign]
    return counts


def count_for_gpu(batch: int, length: int, heads: int, head_dims: list[int]) -> None:
    """Print a table: launches of a mini-batch, and what a token and head takes by arithmetic."""
    print(
        f"Predicted by arithmetic, not measured: {batch} × {length:,} tokens, {heads} heads, bfloat16, an H200 of"
        f" {BANDWIDTH / 1e12} TB/s and {PEAK / 1e12:.0f} TFLOP/s. A launch takes the longer of its bytes and FLOPs.\n"
    )
    print(
        "| inner model, D | K | | launches a mini-batch: products, kernels, other | bytes a token and head | FLOPs | "
        f"ps |\n{7 * '|---'}|"
    )
    for inner, head_dim, size in itertools.product(("linear", "mlp"), head_dims, SIZES[1:]):
        ways = zip(("forward", "backward"), counted(inner, batch, length, heads, head_dim, size), strict=True)
        for way, count in ways:
            tokens = batch * length * heads
            launches = ", ".join(f"{n / (length // size):.0f}" for n in count.launches.values())
            per_token = [count.bytes / tokens, count.flops / tokens, 1e12 * count.seconds / tokens]
            row = " | ".join(f"{n:,.0f}" for n in per_token)
            print(f"| {inner}, {head_dim} | {size:,} | {way} | {launches} | {row} |")


def main() -> None:
    """Time or count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="what a GPU would do, by arithmetic")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32, help="of what is counted")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[16, 32, 64])
    given = parser.parse_args()
    if given.count:
        count_for_gpu(given.batch, given.length, given.heads, given.head_dim)
    else:
        time_on_cpu(given.length, given.heads, given.head_dim)


if __name__ == "__main__":
    main()
