"""How kernels are launched: block sizes from a table, types of the matrix products, memory for results.

The table was filled from machine code, not from timings, by ``python -m tools.tune``. Two kinds of entries have the
least predicted time: sm_90's own for mini-batches of up to 16, and sm_80's for a backward by segments. Others have no
spill in their loop, if any choice has none, and then the fewest instructions per head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import MAX_HEAD_DIM, MAX_MINI_BATCH_SIZE, Scan
from .primitives import Tile

TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Blocks(NamedTuple):
    """How one kernel is cut into programs and threads."""

    num_warps: int
    num_stages: int
    heads: int = 1  # heads of one sequence in a program
    chunks: int = 1  # into which an inner MLP's 4D hidden features are cut; one: the state stays in registers


Table = dict[tuple[str, int], dict[int, Blocks]]
HALF: Table = {  # (op, padded head dimension): {largest mini-batch size: blocks}, for bfloat16 and float16
    ("linear_forward", 16): {8: Blocks(1, 2, heads=2), 16: Blocks(1, 2), 32: Blocks(1, 2), 64: Blocks(2, 2)},
    ("linear_forward", 32): {8: Blocks(2, 2, heads=2), 16: Blocks(1, 2), 32: Blocks(2, 2), 64: Blocks(4, 2)},
    ("linear_forward", 64): {16: Blocks(4, 2), 32: Blocks(4, 2), 64: Blocks(8, 1)},
    ("linear_forward", 128): {16: Blocks(8, 2), 64: Blocks(8, 2)},
    ("linear_backward", 16): {8: Blocks(1, 1, heads=2), 16: Blocks(1, 1), 32: Blocks(2, 1), 64: Blocks(4, 1)},
    ("linear_backward", 32): {8: Blocks(4, 1, heads=2), 16: Blocks(4, 1), 32: Blocks(2, 1), 64: Blocks(4, 1)},
    ("linear_backward", 64): {16: Blocks(8, 1), 32: Blocks(8, 1), 64: Blocks(8, 1)},
    ("linear_backward", 128): {16: Blocks(8, 1), 64: Blocks(8, 1)},
    ("mlp_forward", 16): {8: Blocks(4, 2, heads=2), 16: Blocks(2, 2), 64: Blocks(4, 2)},
    ("mlp_forward", 32): {16: Blocks(8, 2), 64: Blocks(4, 2)},
    ("mlp_forward", 64): {16: Blocks(8, 2), 64: Blocks(4, 2, chunks=8)},
    ("mlp_forward", 128): {16: Blocks(8, 2, chunks=8), 64: Blocks(8, 2, chunks=16)},
    ("mlp_backward", 16): {8: Blocks(4, 1, heads=2), 16: Blocks(4, 1), 32: Blocks(4, 1), 64: Blocks(4, 1)},
    ("mlp_backward", 32): {16: Blocks(8, 1), 32: Blocks(8, 1, chunks=2), 64: Blocks(4, 1)},  # in one chunk 32 registers
    ("mlp_backward", 64): {16: Blocks(4, 1, chunks=8), 32: Blocks(8, 1, chunks=8), 64: Blocks(8, 1, chunks=8)},
    ("mlp_backward", 128): {16: Blocks(8, 1, chunks=8), 32: Blocks(8, 1, chunks=16), 64: Blocks(8, 1, chunks=16)},
}
SINGLE: Table = {  # the same for float32, whose products are three tensor-core products, or none
    ("linear_forward", 16): {8: Blocks(1, 1, heads=2), 16: Blocks(1, 1), 64: Blocks(4, 1)},
    ("linear_forward", 32): {16: Blocks(2, 1), 64: Blocks(4, 1)},
    ("linear_forward", 64): {64: Blocks(8, 1)},
    ("linear_forward", 128): {64: Blocks(8, 1)},
    ("linear_backward", 16): {8: Blocks(1, 1), 16: Blocks(1, 1), 64: Blocks(4, 1)},
    ("linear_backward", 32): {16: Blocks(4, 1), 64: Blocks(4, 1)},
    ("linear_backward", 64): {64: Blocks(8, 1)},
    ("linear_backward", 128): {64: Blocks(8, 1)},
    ("mlp_forward", 16): {8: Blocks(4, 1, heads=2), 16: Blocks(8, 1), 64: Blocks(4, 1)},
    ("mlp_forward", 32): {64: Blocks(8, 1)},
    ("mlp_forward", 64): {64: Blocks(8, 1, chunks=8)},
    ("mlp_forward", 128): {64: Blocks(8, 1, chunks=16)},
    ("mlp_backward", 16): {16: Blocks(4, 1, chunks=2), 64: Blocks(4, 1)},  # in one chunk ptxas leaves 32 registers
    ("mlp_backward", 32): {64: Blocks(8, 1, chunks=2)},
    ("mlp_backward", 64): {64: Blocks(8, 1, chunks=8)},
    ("mlp_backward", 128): {64: Blocks(8, 1, chunks=16)},
}
HALF_BY_ARCHITECTURE: dict[str, Table] = {  # where an architecture wants another choice
    "sm_90": {  # by predicted time, and within three hundredths of it by spills
        ("linear_forward", 16): {8: Blocks(1, 3, heads=2), 16: Blocks(1, 3), 32: Blocks(1, 2), 64: Blocks(2, 2)},
        ("linear_forward", 32): {8: Blocks(1, 3, heads=2), 16: Blocks(1, 3), 32: Blocks(2, 2), 64: Blocks(4, 2)},
        ("linear_forward", 64): {16: Blocks(4, 3), 32: Blocks(4, 2), 64: Blocks(8, 1)},
        ("linear_backward", 16): {8: Blocks(1, 3, heads=2), 16: Blocks(1, 3), 32: Blocks(2, 1), 64: Blocks(4, 1)},
        ("linear_backward", 32): {8: Blocks(2, 3, heads=2), 16: Blocks(2, 3), 32: Blocks(2, 1), 64: Blocks(4, 1)},
        ("linear_backward", 64): {16: Blocks(4, 3), 32: Blocks(8, 1), 64: Blocks(8, 1)},
        ("mlp_forward", 16): {8: Blocks(2, 3, heads=2), 16: Blocks(2, 3), 64: Blocks(4, 2)},
        ("mlp_forward", 32): {16: Blocks(4, 2), 64: Blocks(4, 2)},
        ("mlp_backward", 16): {8: Blocks(2, 2, heads=2), 16: Blocks(2, 2), 32: Blocks(4, 1), 64: Blocks(4, 1)},
        ("mlp_backward", 32): {16: Blocks(4, 2), 32: Blocks(8, 1, chunks=2), 64: Blocks(4, 1)},
        ("mlp_backward", 64): {16: Blocks(4, 2, chunks=4), 32: Blocks(8, 1, chunks=8), 64: Blocks(8, 1, chunks=8)},
        ("mlp_forgetting_backward", 16): {8: Blocks(4, 3, heads=2), 16: Blocks(4, 3)},
        ("mlp_forgetting_backward", 32): {16: Blocks(8, 2)},
        ("segment_replay", 64): {16: Blocks(4, 3, chunks=4)},
        ("segment_outputs", 64): {16: Blocks(4, 2, chunks=4)},
        ("segment_walk", 64): {16: Blocks(4, 2, chunks=4)},
        ("segment_replay", 128): {16: Blocks(4, 3, chunks=8)},
        ("segment_outputs", 128): {16: Blocks(4, 2, chunks=8)},
        ("segment_walk", 128): {16: Blocks(8, 2, chunks=8)},
    },
    "sm_80": {
        ("linear_backward", 32): {8: Blocks(4, 1, heads=2), 16: Blocks(2, 1), 32: Blocks(2, 1), 64: Blocks(4, 1)},
        ("mlp_backward", 32): {16: Blocks(8, 1, chunks=2), 64: Blocks(8, 1, chunks=2)},
        ("mlp_forward", 128): {16: Blocks(8, 2, chunks=16), 64: Blocks(8, 2, chunks=16)},
        ("mlp_backward", 64): {16: Blocks(8, 1, chunks=2), 64: Blocks(8, 1, chunks=4)},
        ("mlp_backward", 128): {16: Blocks(8, 1, chunks=16), 64: Blocks(8, 1, chunks=16)},
        ("segment_replay", 64): {16: Blocks(4, 3, chunks=2)},
        ("segment_outputs", 64): {16: Blocks(4, 2, chunks=4)},
        ("segment_walk", 64): {16: Blocks(8, 1, chunks=2)},  # in more chunks 32 registers
    },
    "sm_100": {
        ("linear_forward", 128): {16: Blocks(8, 2), 64: Blocks(8, 1)},
        ("linear_backward", 16): {8: Blocks(1, 1, heads=2), 16: Blocks(1, 1), 32: Blocks(2, 1), 64: Blocks(8, 1)},
        ("linear_backward", 32): {8: Blocks(2, 1), 16: Blocks(4, 1), 32: Blocks(2, 2), 64: Blocks(8, 1)},
        ("mlp_forward", 64): {16: Blocks(8, 2, chunks=4), 64: Blocks(4, 2, chunks=8)},  # in one chunk: only a trap
        ("mlp_backward", 64): {16: Blocks(4, 1, chunks=8), 32: Blocks(8, 1, chunks=16)},
        ("segment_replay", 64): {16: Blocks(4, 3, chunks=4)},
        ("segment_outputs", 64): {16: Blocks(4, 2, chunks=4)},
        ("segment_walk", 64): {16: Blocks(4, 1, chunks=8)},
    },
    "gfx942": {  # twice the registers
        ("linear_forward", 32): {8: Blocks(1, 2, heads=2), 16: Blocks(1, 2), 32: Blocks(1, 2), 64: Blocks(2, 2)},
        ("linear_forward", 64): {16: Blocks(2, 2), 64: Blocks(4, 2)},
        ("linear_backward", 16): {8: Blocks(1, 1, heads=2), 16: Blocks(1, 1), 32: Blocks(1, 1), 64: Blocks(2, 1)},
        ("linear_backward", 32): {8: Blocks(1, 1, heads=2), 16: Blocks(1, 1), 32: Blocks(2, 1), 64: Blocks(2, 1)},
        ("linear_backward", 64): {16: Blocks(4, 1), 32: Blocks(4, 1), 64: Blocks(8, 1)},
        ("linear_backward", 128): {16: Blocks(4, 1), 64: Blocks(8, 1)},
        ("mlp_forward", 16): {8: Blocks(2, 1, heads=2), 16: Blocks(2, 1), 64: Blocks(4, 1)},  # in two stages and one
        ("mlp_forward", 32): {16: Blocks(2, 1), 64: Blocks(4, 1)},  # chunk Triton 3.6 leaves a conversion without code
        ("mlp_forward", 64): {16: Blocks(4, 2, chunks=4), 64: Blocks(4, 2, chunks=8)},
        ("mlp_forward", 128): {16: Blocks(4, 2, chunks=8), 64: Blocks(8, 2, chunks=16)},
        ("mlp_backward", 16): {8: Blocks(2, 1, heads=2), 16: Blocks(2, 1), 64: Blocks(4, 1)},
        ("mlp_backward", 32): {16: Blocks(4, 1, chunks=2), 64: Blocks(4, 1, chunks=2)},
        ("segment_replay", 64): {16: Blocks(4, 1, chunks=2)},
        ("segment_outputs", 64): {16: Blocks(2, 1, chunks=4)},
        ("segment_walk", 64): {16: Blocks(2, 1, chunks=8)},
    },
}

SINGLE_BY_ARCHITECTURE: dict[str, Table] = {
    "sm_80": {("mlp_backward", 32): {32: Blocks(8, 1, chunks=2), 64: Blocks(8, 1, chunks=4)}},  # by shared memory
    "gfx942": {
        ("linear_forward", 64): {64: Blocks(4, 1)},
        ("mlp_forward", 16): {8: Blocks(4, 1, heads=2), 64: Blocks(4, 1)},
    },
}


NEAREST = {"sm_8": "sm_80", "sm_10": "sm_100", "sm_12": "sm_80", "gfx9": "gfx942"}
"""By the beginnings of names; what is not here takes the cuts that are no architecture's own."""

FENCED_COPIES = (3, 8)
"""The first Triton with fences between a pipeline's copies and the products that read them."""


P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Make the GPU of the first tensor the current one for a call, as Triton launches there and tables are for it."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        first: Any = arguments[0]
        x: Tensor = first if isinstance(first, Tensor) else first[0]
        if not x.is_cuda:
            return function(*arguments, **options)
        with torch.cuda.device(x.device):
            return function(*arguments, **options)

    return run


class Launch(NamedTuple):
    """A kernel with everything it needs to run, or to be compiled only."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    blocks: Blocks
    first: Any = None  # another launch, that has to come before it

    def run(self) -> None:
        """Run the kernel, unless there is no program to run."""
        if self.grid[0] > 0:
            if self.first is not None:
                self.first.run()
            self.kernel[self.grid](*self.arguments, **self.options())

    def options(self) -> dict[str, Any]:
        """Triton's compile options."""
        return {"num_warps": self.blocks.num_warps, "num_stages": self.blocks.num_stages, "enable_fp_fusion": True}


def blocks(
    op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype, architecture: str, num_heads: int
) -> Blocks:
    """Look up how a kernel is cut.

    Args:
        op: ``"linear_forward"``, ``"mlp_forgetting_backward"``, ...
        head_dim: D.
        mini_batch_size: K.
        dtype: of q, k and v.
        architecture: ``"sm_90"``, ``"gfx942"``, ...
        num_heads: H; a single head is not paired with another.
    """
    needed = mini_batch_size if num_heads > 1 else max(16, mini_batch_size)
    sizes = choices(op, padded(head_dim), dtype, architecture)
    return next(choice for largest, choice in sizes.items() if needed <= largest)


def has_cut(op: str, q: Tensor, mini_batch_size: int) -> bool:
    """Whether the table has a cut of a kernel here for tokens ``[B, L, H, D]`` and that mini-batch size."""
    sizes = _table(q.dtype, architecture()).get((op, padded(q.shape[3])), {})
    return any(mini_batch_size <= largest for largest in sizes)


def choices(op: str, padded_head_dim: int, dtype: torch.dtype, architecture: str) -> dict[int, Blocks]:
    """The cuts of a kernel by the largest mini-batch size each is for.

    A kernel that forgets takes cuts of its own where there are any, else the cuts of the one that does not.
    """
    table = _table(dtype, architecture)
    return table[without_decay(op), padded_head_dim] | table.get((op, padded_head_dim), {})


def kernel_of(scan: Scan, way: str) -> str:
    """The table's name of a scan's kernel, forward or backward."""
    return f"{scan.inner}_{way}" if scan.log_decay is None else f"{scan.inner}_forgetting_{way}"


def without_decay(op: str) -> str:
    """The name of the same kernel for layers that forget nothing."""
    return op.replace("_forgetting", "")


def _table(dtype: torch.dtype, architecture: str) -> Table:
    single = dtype == torch.float32
    table, own = (SINGLE, SINGLE_BY_ARCHITECTURE) if single else (HALF, HALF_BY_ARCHITECTURE)
    return table | own.get(architecture, {})


def padded(size: int) -> int:
    """The power of two, at least 16, that holds size."""
    return max(16, int(triton.next_power_of_2(size)))


def triton_version() -> tuple[int, int]:
    """``(3, 6)``, for example."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def fenced(choice: Blocks) -> Blocks:
    """Blocks without a pipeline where the compiler leaves its copies without a fence.

    What ``cp.async`` writes to shared memory the products of sm_90 and sm_100 read by another proxy. Tritons before 3.8
    order the two for what is stored only. One stage stores.
    """
    unfenced = triton_version() < FENCED_COPIES and architecture() in ("sm_90", "sm_100")
    return choice._replace(num_stages=1) if unfenced else choice


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def target() -> str:
    """What kernels are compiled for now: ``sm_86``, for example; ``interpreter`` under the interpreter."""
    if interpreted():
        return "interpreter"
    current = triton.runtime.driver.active.get_current_target()
    return f"sm_{current.arch}" if current.backend == "cuda" else str(current.arch)


def architecture() -> str:
    """The name that tables have for it, of the nearest architecture that was looked at."""
    return nearest(target())


def nearest(name: str) -> str:
    """``sm_100`` for ``sm_103``; ``sm_80`` for ``sm_120`` too, whose matrix products are of the same kind."""
    found = (known for prefix, known in NEAREST.items() if name.startswith(prefix))
    return next(found, name)


def plan(op: str, q: Tensor, mini_batch_size: int, hidden: int = 0) -> tuple[Blocks, Tile]:
    """Choose the blocks and the compile-time sizes of a launch.

    Args:
        op: key of the table.
        q: ``[B, L, H, D]``.
        mini_batch_size: K.
        hidden: features of an inner MLP's hidden layer.

    Raises:
        ValueError: if the kernels do not run that dtype, head dimension or mini-batch size.
    """
    check_tokens(q)
    D = q.shape[3]
    if not 1 <= mini_batch_size <= MAX_MINI_BATCH_SIZE:
        raise ValueError(f"kernels' mini_batch_size must be from 1 to {MAX_MINI_BATCH_SIZE}; given {mini_batch_size}")
    here = architecture()
    choice = blocks(op, D, mini_batch_size, q.dtype, here, q.shape[2])
    operand = TRITON_DTYPE[q.dtype]
    chunk = min(padded(hidden), 4 * padded(D) // choice.chunks)  # the table is for hidden layers of 4D
    tile = Tile(
        mini_batch=mini_batch_size,
        heads=choice.heads,
        rows=max(16, choice.heads * triton.next_power_of_2(mini_batch_size)),
        head_dim=D,
        features=padded(D),
        operand=operand,
        dot=tl.float32 if interpreted() else operand,
        precision="tf32x3" if here.startswith("sm_") else "ieee",  # plain tf32 has 11 bits
        hidden=hidden,
        chunk=chunk,
        chunks=padded(hidden) // chunk,
    )
    return choice, tile


def check_tokens(q: Tensor) -> None:
    """Raise ValueError unless kernels run tokens ``[B, L, H, D]`` of that dtype and head dimension."""
    if q.dtype not in TRITON_DTYPE:
        raise ValueError(f"kernels' tokens must be float32, bfloat16 or float16; given {q.dtype}")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"kernels' head dimension must be from 1 to {MAX_HEAD_DIM}; given {q.shape[3]}")


def compiler_refusal(op: str, head_dim: int, mini_batch_size: int) -> str | None:
    """Why the kernel cannot be had here; None if it can.

    Long mini-batches on sm_100 the compiler turns into a trap, or not into code at all: in TTT-MLP's backward, and in
    TTT-Linear's with wide heads under Triton 3.6.
    """
    if not 32 < mini_batch_size <= MAX_MINI_BATCH_SIZE or architecture() != "sm_100":
        return None
    if op == "mlp_backward":
        return f"on sm_100 trains TTT-MLP with a mini_batch_size of up to 32; given {mini_batch_size}"
    if op == "linear_backward" and triton_version() <= (3, 6) and head_dim > 64:
        return (
            f"on sm_100 trains head dimension {head_dim} with mini_batch_size {mini_batch_size} under a Triton newer "
            f"than 3.6; given {triton.__version__}"
        )
    return None


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors a kernel reads without strides."""
    return tuple(None if x is None else x.contiguous() for x in tensors)


def strided(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[tuple[int, ...], ...]]:
    """The tensors a kernel reads by strides, and these.

    Triton compiles another kernel where a stride becomes one or a multiple of 16, or is so no more. Expanded tensors
    have strides of zero. Where those would be another kernel's they are copied, so that every call launches the same.
    Expanded weights of head dimensions that are multiples of 16 never are.
    """
    read, strides = [], []
    for x in tensors:
        usual = [1]
        for size in reversed(x.shape[1:]):
            usual.insert(0, usual[0] * size)
        alike = [_kind(n) for n in x.stride()] == [_kind(n) for n in usual]
        read.append(x if alike else x.contiguous())
        strides.append(x.stride() if alike else tuple(usual))
    return tuple(read), tuple(strides)


def _kind(stride: int) -> tuple[bool, bool]:
    return stride == 1, stride % 16 == 0


def new_tokens(x: Tensor, starts: Tensor | None, features: int | None = None) -> Tensor:
    """Memory for a result per token of x, contiguous; zero where spans may leave tokens out.

    Of x's shape, or with another number of features.
    """
    allocate = torch.empty if starts is None else torch.zeros
    shape = x.shape if features is None else (*x.shape[:-1], features)
    return allocate(shape, dtype=x.dtype, device=x.device)


Gradients = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]
"""Of the tokens and the rates, of the weights, the sums of every sequence, and of decays and initial weights."""


def new_gradients(scan: Scan) -> Gradients:
    """Memory for the gradients of the tokens and the rates, of the weights, and for the sums of every sequence.

    The sums are dγ and dβ, and ds of the mini-batches' outputs and of their updates. Where something is forgotten there
    is memory for the gradients of ln a and, of every sequence, of the initial weights.
    """
    N, (H, D), K = scan.weights[0].shape[0], scan.ln_weight.shape, scan.token_scale.numel()

    def new(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=torch.float32, device=scan.q.device) for shape in shapes)

    d_tokens, d_decays = tuple(new_tokens(x, scan.starts) for x in scan.tokens), tuple[Tensor, ...]()
    weights = [tuple(w.shape) for w in scan.weights]
    if scan.log_decay is not None:
        d_decays = new_tokens(scan.log_decay, scan.starts), *new(*weights)
    return d_tokens, new(*weights), new((N, H, D), (N, H, D), (N, H, K), (N, H, K)), d_decays


def all_gradients(
    d_tokens: tuple[Tensor, ...],
    d_weights: tuple[Tensor, ...],
    sums: tuple[Tensor, ...],
    d_decays: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """All gradients of a backward, in the order of the arguments, from what ``new_gradients`` allocated."""
    d_gamma, d_beta, d_scale, d_last_scale = (x.sum(0) for x in sums)
    d_scale = d_scale.sum(0)
    d_scale[-1] += d_last_scale.sum()
    return *d_tokens, d_scale, *d_weights, d_gamma, d_beta, *d_decays[:1], *(x.sum(0) for x in d_decays[1:])
