# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""Where the three kernels of TTT-MLP's backward by segments find what they give each other.

A *slot* is a place for one mini-batch of a segment, numbered as states are (see ``copies``). It has the weights before
the mini-batch, operands rounded as operands are, and what the walk back needs of its tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Scan
from . import copies
from .hidden_layer import hidden_columns, hidden_state_masks
from .primitives import Tile, first_rows, parameter_head, parameter_mask, rounded


class Slots(NamedTuple):
    """Memory for the mini-batches of one segment of each sequence, the first dimension numbers slots."""

    weights: Tensor  # W1 and transposed W2 [n, H, 2 D hidden], operands
    biases: Tensor  # b1 and b2 [n, H, hidden + D], float32
    hidden: Tensor  # -dP1 and X̄2 [n, H, 2, R, hidden], operands
    rows: Tensor  # -dP2 [n, H, R, F], an operand
    pairs: Tensor  # -dC1 and -dC2 [n, H, 2, R, R], operands
    sums: Tensor  # the part of -dG2 that needs no gradient of weights, and Z2 [n, H, 2, R, F], float32


def new_slots(scan: Scan, tile: Tile) -> tuple[Slots, Tensor | None]:
    """Memory for slots, and each sequence's first slot, as ``copies.new_states`` has it."""
    number, first = copies.places(scan)
    q, H, R, F = scan.q, scan.q.shape[2], tile.rows, tile.features
    D, hidden, width = tile.head_dim, tile.hidden, tile.chunk * tile.chunks

    def operands(*shape: int) -> Tensor:
        return torch.empty(number, H, *shape, dtype=q.dtype, device=q.device)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(number, H, *shape, dtype=torch.float32, device=q.device)

    return Slots(
        operands(2 * D * hidden),
        numbers(hidden + D),
        operands(2, R, width),
        operands(R, F),
        operands(2, R, R),
        numbers(2, R, F),
    ), first


@triton.jit
def segment_bounds(length, back, segment, tile: tl.constexpr):
    """First mini-batch, and that behind the last, of a sequence's segment with ``back`` behind it; none: 0 twice."""
    mini_batches = tl.cdiv(length, tile.mini_batch)
    begin = (tl.cdiv(mini_batches, segment) - 1 - back) * segment
    end = tl.where(begin < 0, 0, min(begin + segment, mini_batches))
    return tl.maximum(begin, 0), end


@triton.jit
def weight_places(slot, head, H, chunk, tile: tl.constexpr):
    """Offsets of a chunk of a slot's W1 [F, C] and b1, and of W2 and b2 from them on."""
    n: tl.constexpr = tile.hidden
    D: tl.constexpr = tile.head_dim
    base = slot.to(tl.int64) * H + head
    columns = hidden_columns(chunk, tile)[None, :]
    W1 = (tl.arange(0, tile.features) * n)[:, None] + columns
    b1, b2 = (parameter_head(tile) * 0)[:, None] + columns, (parameter_head(tile) * 0)[:, None]
    return base * (2 * D * n) + W1, base * (n + D) + b1, base * (n + D) + n + b2 + tl.arange(0, tile.features)[None, :]


@triton.jit
def store_weights_in_slot(slots, slot, state, b2, head, H, chunk, tile: tl.constexpr):
    """A chunk of W1, b1 and W2; with the first chunk b2."""
    W1, b1, W2 = state
    weights, biases, _, _, _, _ = slots
    W_at, b1_at, b2_at = weight_places(slot, head, H, chunk, tile)
    W_mask, b_mask = hidden_state_masks(head, H, chunk, tile)
    tl.store(weights + W_at, rounded(W1, tile), mask=W_mask)
    tl.store(weights + tile.head_dim * tile.hidden + W_at, rounded(W2, tile), mask=W_mask)
    tl.store(biases + b1_at, b1, mask=b_mask & first_rows(tile))
    if chunk == 0:
        tl.store(biases + b2_at, b2, mask=parameter_mask(head, H, tile) & first_rows(tile))


@triton.jit
def load_W1_of_slot(slots, slot, head, H, chunk, tile: tl.constexpr):
    """A chunk of W1, an operand, and b1."""
    weights, biases, _, _, _, _ = slots
    W_at, b1_at, _ = weight_places(slot, head, H, chunk, tile)
    W_mask, b_mask = hidden_state_masks(head, H, chunk, tile)
    return tl.load(weights + W_at, mask=W_mask, other=0.0), tl.load(biases + b1_at, mask=b_mask, other=0.0)


@triton.jit
def load_W2_of_slot(slots, slot, head, H, chunk, tile: tl.constexpr):
    """A chunk of the transposed W2, an operand."""
    weights, _, _, _, _, _ = slots
    W_at, _, _ = weight_places(slot, head, H, chunk, tile)
    W_mask, _ = hidden_state_masks(head, H, chunk, tile)
    return tl.load(weights + tile.head_dim * tile.hidden + W_at, mask=W_mask, other=0.0)


@triton.jit
def load_b2_of_slot(slots, slot, head, H, tile: tl.constexpr):
    """b2."""
    _, biases, _, _, _, _ = slots
    _, _, b2_at = weight_places(slot, head, H, 0, tile)
    return tl.load(biases + b2_at, mask=parameter_mask(head, H, tile), other=0.0)


@triton.jit
def tile_places(slot, head, H, which, width: tl.constexpr, columns, tile: tl.constexpr):
    """Offsets of columns of a tile [R, width], the first or second of a slot's two."""
    number = (slot.to(tl.int64) * H + head) * 2 + which
    return number * (tile.rows * width) + tl.arange(0, tile.rows)[:, None] * width + columns[None, :]


@triton.jit
def hidden_places(slot, head, H, which, chunk, tile: tl.constexpr):
    """Offsets of a chunk of -dP1, 0, or X̄2, 1."""
    return tile_places(slot, head, H, which, tile.chunk * tile.chunks, hidden_columns(chunk, tile), tile)


@triton.jit
def pair_places(slot, head, H, which, tile: tl.constexpr):
    """Offsets of -dC1, 0, or -dC2, 1."""
    return tile_places(slot, head, H, which, tile.rows, tl.arange(0, tile.rows), tile)


@triton.jit
def sum_places(slot, head, H, which, tile: tl.constexpr):
    """Offsets of -dG2's part, 0, or Z2, 1."""
    return tile_places(slot, head, H, which, tile.features, tl.arange(0, tile.features), tile)


@triton.jit
def row_places(slot, head, H, tile: tl.constexpr):
    """Offsets of -dP2."""
    number = slot.to(tl.int64) * H + head
    columns = tl.arange(0, tile.features)[None, :]
    return number * (tile.rows * tile.features) + tl.arange(0, tile.rows)[:, None] * tile.features + columns
