# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""Copies of the weights, with which the way back works at the forward's own numbers.

The mini-batches of a sequence come in *segments*. Of each but the first the forward copies the weights before it into
the *checkpoints*. The way back takes one segment after the other, from the last. It replays the segment's updates,
forwards, from its checkpoint or from the incoming weights, and copies the weights before each mini-batch into its own
memory, the *states*; from there it walks back over the segment.

A copy has the weights of a head in a row, float32, ``[number, H, numbers]``, as kernels hold them: what is centred is
centred, and W2 is transposed. Segments begin at least one segment apart, so of those that begin among the same
segment · K of all tokens there is one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    first_rows,
    parameter_head,
    parameter_mask,
    row_offsets,
    tile_offsets,
    weight_mask,
)


@triton.jit
def checkpoint_number(token, segment, tile: tl.constexpr):
    """Which checkpoint is that of the segment that begins at a token of the flattened tokens."""
    return token // (segment * tile.mini_batch) - 1


@triton.jit
def first_state(first_states, sequence, L, segment, tile: tl.constexpr):
    """Number of the state that a sequence's segments begin at; sequences of one length need no list of them."""
    if first_states is None:
        number = sequence.to(tl.int64) * tl.minimum(segment, tl.cdiv(L, tile.mini_batch))
    else:
        number = tl.load(first_states + sequence)
    return number


@triton.jit
def copy_places(number, head, H, tile: tl.constexpr):
    """Offsets of W1 and b1 in a copy."""
    D: tl.constexpr = tile.head_dim
    numbers: tl.constexpr = D * D + D
    stacked, features = tl.arange(0, tile.heads * tile.features), tl.arange(0, tile.features)
    base = (number.to(tl.int64) * H + head) * numbers
    W = (stacked // tile.features) * numbers + (stacked % tile.features) * D
    b = parameter_head(tile) * numbers + D * D
    return base + (W[:, None] + features[None, :]), base + (b[:, None] + features[None, :])


@triton.jit
def store_copy(memory, number, W, b, head, H, tile: tl.constexpr):
    """Copy TTT-Linear's weights."""
    W_place, b_place = copy_places(number, head, H, tile)
    tl.store(memory + W_place, W, mask=weight_mask(head, H, tile))
    tl.store(memory + b_place, b, mask=parameter_mask(head, H, tile) & first_rows(tile))


@triton.jit
def load_copy(memory, number, head, H, tile: tl.constexpr):
    """What ``store_copy`` stored."""
    W_place, b_place = copy_places(number, head, H, tile)
    W = tl.load(memory + W_place, mask=weight_mask(head, H, tile), other=0.0)
    return W, tl.load(memory + b_place, mask=parameter_mask(head, H, tile), other=0.0)


@triton.jit
def load_steps(tokens, inner_lr, at, rows, mask, H, tile: tl.constexpr):
    """Keys of a mini-batch, the kept inner gradients and the rates; tokens are q, k, v and G."""
    here = at * tile.head_dim + tile_offsets(H, tile)
    k_rows = tl.load(tokens[1] + here, mask=mask, other=0.0)
    G_rows = tl.load(tokens[3] + here, mask=mask, other=0.0)
    lr = tl.load(inner_lr + at + row_offsets(H, tile), mask=rows, other=0.0)
    return k_rows, G_rows, tl.where(rows, lr, 0.0)


def new_checkpoints(q: Tensor, weights: tuple[Tensor, ...], mini_batch_size: int, segment: int) -> Tensor:
    """Memory for a copy of every segment but each sequence's first: zeros, as the other backends give."""
    return _copies(q.shape[0] * q.shape[1] // (segment * mini_batch_size) + 2, weights).zero_()


def new_states(
    q: Tensor, lengths: Tensor | None, weights: tuple[Tensor, ...], mini_batch_size: int, segment: int
) -> tuple[Tensor, Tensor | None]:
    """Memory for a copy of every mini-batch of one segment of each sequence, and where each sequence's copies begin.

    Without reading lengths on the host there is memory for the most that sequences of such tokens can need.
    """
    B, L = q.shape[:2]
    if lengths is None:
        return _copies(B * min(segment, triton.cdiv(L, mini_batch_size)), weights), None
    N = lengths.numel()
    needed = (lengths.long() + (mini_batch_size - 1)).div(mini_batch_size, rounding_mode="floor").clamp_max(segment)
    number = min(N * segment, B * L // mini_batch_size + N)
    return _copies(number, weights), needed.cumsum(0) - needed


def _copies(number: int, weights: tuple[Tensor, ...]) -> Tensor:
    numbers = sum(w.shape[2:].numel() for w in weights)
    return torch.empty(number, weights[0].shape[1], numbers, dtype=torch.float32, device=weights[0].device)
