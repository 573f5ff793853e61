"""How kernels are launched: block sizes from a table, types of the matrix products, spans and strides."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import Tile

TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Blocks(NamedTuple):
    """How one kernel is cut into programs and threads."""

    num_warps: int
    num_stages: int
    heads: int = 1  # heads of one sequence in a program


DEFAULT_BLOCKS = {
    ("linear_forward", 16): Blocks(1, 3),
    ("linear_forward", 32): Blocks(1, 3),
    ("linear_forward", 64): Blocks(4, 3),
    ("linear_forward", 128): Blocks(8, 3),
    ("linear_backward", 16): Blocks(1, 2),
    ("linear_backward", 32): Blocks(1, 2),
    ("linear_backward", 64): Blocks(8, 2),
    ("linear_backward", 128): Blocks(8, 2),
}


def padded(size: int) -> int:
    """The power of two, at least 16, that holds size."""
    return max(16, triton.next_power_of_2(size))


def blocks(op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype, num_heads: int) -> Blocks:
    """Look the block sizes up."""
    return DEFAULT_BLOCKS[op, padded(head_dim)]


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def make_tile(head_dim: int, mini_batch_size: int, dtype: torch.dtype, heads: int) -> Tile:
    """The compile-time sizes for one launch."""
    operand = TRITON_DTYPE[dtype]
    return Tile(
        mini_batch=mini_batch_size,
        heads=heads,
        rows=max(16, heads * triton.next_power_of_2(mini_batch_size)),
        head_dim=head_dim,
        features=padded(head_dim),
        operand=operand,
        dot=tl.float32 if interpreted() else operand,
        precision="ieee",
    )


class Launch(NamedTuple):
    """A kernel with everything it needs to run, or to be compiled only."""

    kernel: Any
    grid: tuple[int]
    arguments: tuple[Any, ...]
    blocks: Blocks

    def run(self) -> None:
        """Run the kernel, unless there is no program to run."""
        if self.grid[0] > 0:
            self.kernel[self.grid](*self.arguments, **self.options())

    def options(self) -> dict[str, Any]:
        """Triton's compile options."""
        return {"num_warps": self.blocks.num_warps, "num_stages": self.blocks.num_stages, "enable_fp_fusion": True}


def num_sequences(q: Tensor, starts: Tensor | None) -> int:
    """N: one sequence per batch row unless starts says otherwise."""
    return q.shape[0] if starts is None else starts.numel()


def new_tokens(x: Tensor, starts: Tensor | None) -> Tensor:
    """Memory for a result per token of x, contiguous; zero where spans may leave tokens out."""
    allocate = torch.empty if starts is None else torch.zeros
    return allocate(x.shape, dtype=x.dtype, device=x.device)
