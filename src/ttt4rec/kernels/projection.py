# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""What the projection kernels share: their sizes, the choice between them by width, and the rotation of a tile.

Up to a width the fused kernels run, which read x once for all results. The fused forward reads every weight once a
program, ``6 C² / R`` bytes of bfloat16 a token and R tokens a program, from the cache. The library's products with the
rotation behind them move about 13 C bytes a token more through memory. The fused backward sums the weights' gradients
``[3C + H, C]`` in registers. Both widths were chosen on paper, by bytes and registers, and not measured.

Numbers in brackets are equations of docs/mathematics.md.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Projection
from . import launch

FUSED_WIDTH = {"forward": 256, "backward": 64}
FUSED_WIDTH_SINGLE = {"forward": 64, "backward": 0}  # of float32, whose tiles take twice the room and more products
PARTIAL_SUMS = 128  # programs of the fused backward, each with its own sum of the weights' gradients


class Product(NamedTuple):
    """Types of a matrix product, as in ``primitives.Tile``."""

    operand: Any
    dot: Any
    precision: str


class Columns(NamedTuple):
    """The compile-time sizes and types of a projection kernel."""

    width: int  # C
    inputs: int  # C padded to a power of two
    features: int  # output features at a time, a power of two
    head_dim: int  # D
    heads: int  # H
    head_columns: int  # H padded to a power of two >= 16
    rotated: int  # results that are rotated
    rows: int  # tokens at a time
    operand: Any  # as in ``Product``, of everything but the rates' products
    dot: Any
    precision: str


Choice = tuple[int, int, launch.Blocks]  # rows, features, warps and stages
TABLE: dict[str, dict[int, Choice]] = {  # op: {largest width: choice}, for bfloat16 and float16
    "fused_forward": {
        64: (64, 64, launch.Blocks(4, 2)),
        128: (64, 32, launch.Blocks(4, 2)),
        256: (64, 32, launch.Blocks(4, 1)),
    },
    "rotation": {1 << 31: (32, 64, launch.Blocks(4, 2))},
    "fused_backward": {64: (32, 64, launch.Blocks(8, 2))},
    "packing": {1 << 31: (32, 64, launch.Blocks(4, 1))},
}
TABLE_BY_ARCHITECTURE = {"gfx942": {"fused_backward": {64: (64, 64, launch.Blocks(4, 1))}}}


def fused(direction: str, width: int, dtype: torch.dtype) -> bool:
    """Whether the ``"forward"`` or ``"backward"`` of a width is one kernel or the library's products and a kernel."""
    return width <= (FUSED_WIDTH_SINGLE if dtype == torch.float32 else FUSED_WIDTH)[direction]


def choose(op: str, width: int, dtype: torch.dtype) -> Choice:
    """Rows, features and blocks of a kernel."""
    table = (TABLE | TABLE_BY_ARCHITECTURE.get(launch.architecture(), {}))[op]
    rows, features, blocks = next(choice for largest, choice in table.items() if width <= largest)
    return (rows // 2 if dtype == torch.float32 else rows), features, launch.fenced(blocks)


def columns(op: str, given: Projection) -> tuple[Columns, launch.Blocks]:
    """Choose the blocks and the compile-time sizes of a launch.

    Raises:
        ValueError: the kernels do not run that dtype.
    """
    for dtype in (given.x.dtype, given.dtype):
        if dtype not in launch.TRITON_DTYPE:
            raise ValueError(f"kernels' inputs must be float32, bfloat16 or float16; given {dtype}")
    H, C = given.lr_weight.shape
    inputs = launch.padded(C)
    rows, features, blocks = choose(op, C, given.dtype)
    sizes = Columns(
        width=C,
        inputs=inputs,
        features=min(features, inputs),
        head_dim=2 * given.cos.shape[1],
        heads=H,
        head_columns=launch.padded(H),
        rotated=given.rotated,
        rows=rows,
        **product(given.dtype)._asdict(),
    )
    return sizes, blocks


def exact_product(x: Tensor, lr_weight: Tensor) -> Product:
    """Types of the rates' products, which are exact: half precision only where x and w_lr both come in it."""
    return product(x.dtype if x.dtype == lr_weight.dtype else torch.float32)


def product(dtype: torch.dtype) -> Product:
    """Types of a product whose operands are rounded to dtype."""
    operand = launch.TRITON_DTYPE[dtype]
    precision = "tf32x3" if launch.architecture().startswith("sm_") else "ieee"
    return Product(operand, tl.float32 if launch.interpreted() else operand, precision)


def flat(x: Tensor) -> Tensor:
    """``[B, L, ...]`` to contiguous ``[B·L, rest]``."""
    return x.flatten(0, 1).flatten(1).contiguous()


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors a kernel reads without strides."""
    return tuple(x.contiguous() for x in tensors)


def prepare(
    kernel: Any, num_programs: int, arguments: Sequence[Any], blocks: launch.Blocks, sizes: Columns
) -> launch.Launch:
    """A launch of as many programs."""
    return launch.Launch(kernel, (num_programs,), (*arguments, sizes), blocks)


@triton.jit
def load_angles(table, positions, rows, num_tokens, num_positions, first, sizes: tl.constexpr):
    """cos and sin [R, N/2] at tokens ``rows`` and output features ``first`` to ``first + N``; all heads share them."""
    cos, sin = table
    place = tl.load(positions + rows % num_positions, mask=rows < num_tokens, other=0)
    pairs = (first // 2 + tl.arange(0, sizes.features // 2)) % (sizes.head_dim // 2)
    offsets = place[:, None] * (sizes.head_dim // 2) + pairs[None, :]
    return tl.load(cos + offsets), tl.load(sin + offsets)


@triton.jit
def turned(x, cos, sin, sizes: tl.constexpr):
    """Rotate the pairs (2i, 2i+1) of x [R, N]; a thread holds both features of a pair."""
    even, odd = tl.split(tl.reshape(x, (sizes.rows, sizes.features // 2, 2)))
    return tl.interleave(even * cos - odd * sin, odd * cos + even * sin)


@triton.jit
def logit_gradient(grad_lr, inner_lr, rows, num_tokens, base_lr, sizes: tl.constexpr):
    """Gradient [R, heads] of the logits from the rates', (32), contiguous ``[B·L, H]``."""
    heads = tl.arange(0, sizes.head_columns)
    offsets = rows[:, None] * sizes.heads + heads[None, :]
    mask = (rows < num_tokens)[:, None] & (heads < sizes.heads)[None, :]
    lr = tl.load(inner_lr + offsets, mask=mask, other=0.0)
    return tl.load(grad_lr + offsets, mask=mask, other=0.0) * lr * (1.0 - lr * (sizes.head_dim / base_lr))
