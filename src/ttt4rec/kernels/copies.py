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

from ..arguments import Scan
from .primitives import first_rows, load_rates, load_rows, parameter_head, parameter_mask, rounded, weight_mask


@triton.jit
def checkpoint_number(token, segment, tile: tl.constexpr):
    """Which checkpoint has the segment that begins at a token of the flattened tokens."""
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
def store_copy(copies, number, W, b, head, H, tile: tl.constexpr):
    """Copy TTT-Linear's weights."""
    W_place, b_place = copy_places(number, head, H, tile)
    tl.store(copies + W_place, W, mask=weight_mask(head, H, tile))
    tl.store(copies + b_place, b, mask=parameter_mask(head, H, tile) & first_rows(tile))


@triton.jit
def load_copy(copies, number, head, H, tile: tl.constexpr):
    """What ``store_copy`` stored."""
    W_place, b_place = copy_places(number, head, H, tile)
    W = tl.load(copies + W_place, mask=weight_mask(head, H, tile), other=0.0)
    return W, tl.load(copies + b_place, mask=parameter_mask(head, H, tile), other=0.0)


@triton.jit
def state_places(number, head, H, tile: tl.constexpr):
    """Offsets of W1 and b1 in the two memories of TTT-Linear's states."""
    D: tl.constexpr = tile.head_dim
    stacked, features = tl.arange(0, tile.heads * tile.features), tl.arange(0, tile.features)
    base = number.to(tl.int64) * H + head
    W = (stacked // tile.features) * (D * D) + (stacked % tile.features) * D
    b = parameter_head(tile) * D
    return base * (D * D) + (W[:, None] + features[None, :]), base * D + (b[:, None] + features[None, :])


@triton.jit
def store_state(states, number, W, b, head, H, tile: tl.constexpr):
    """TTT-Linear's weights before a mini-batch, W as operand if its memory is of operands."""
    weights, biases = states
    W_place, b_place = state_places(number, head, H, tile)
    if weights.dtype.element_ty != tl.float32:
        W = rounded(W, tile)
    tl.store(weights + W_place, W, mask=weight_mask(head, H, tile))
    tl.store(biases + b_place, b, mask=parameter_mask(head, H, tile) & first_rows(tile))


@triton.jit
def load_state(states, number, head, H, tile: tl.constexpr):
    """What ``store_state`` stored."""
    weights, biases = states
    W_place, b_place = state_places(number, head, H, tile)
    W = tl.load(weights + W_place, mask=weight_mask(head, H, tile), other=0.0)
    return W, tl.load(biases + b_place, mask=parameter_mask(head, H, tile), other=0.0)


@triton.jit
def load_steps(k, G, inner_lr, mini_batch, H, tile: tl.constexpr):
    """Keys of a mini-batch, the kept inner gradients and the rates."""
    rows, _, _, _ = mini_batch
    k_rows = load_rows(k, mini_batch, tile)
    G_rows = load_rows(G, mini_batch, tile)
    lr = load_rates(inner_lr, mini_batch, H, tile)
    return k_rows, G_rows, tl.where(rows, lr, 0.0)


def places(scan: Scan) -> tuple[int, Tensor | None]:
    """How many copies of mini-batches one segment of each sequence needs, and where each sequence's begin.

    Without reading lengths on the host that is the most that sequences of these tokens can need.
    """
    (B, L), K, lengths, segment = scan.q.shape[:2], scan.token_scale.numel(), scan.lengths, scan.segment
    if lengths is None:
        return B * min(segment, triton.cdiv(L, K)), None
    N = lengths.numel()
    needed = (lengths.long() + (K - 1)).div(K, rounding_mode="floor").clamp_max(segment)
    return min(N * segment, B * L // K + N), needed.cumsum(0) - needed


def new_states(scan: Scan) -> tuple[Tensor, Tensor | None]:
    """Memory for a copy of every mini-batch of one segment of each sequence, and where each sequence's copies begin."""
    number, first = places(scan)
    numbers, H = sum(w.shape[2:].numel() for w in scan.weights), scan.q.shape[2]
    return torch.empty(number, H, numbers, dtype=torch.float32, device=scan.q.device), first


def new_linear_states(scan: Scan) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """``new_states`` of TTT-Linear: memory for W1 ``[number, H, D, D]`` and for b1 ``[number, H, D]``.

    The way back has W as an operand of products only. There its states are in the tokens' dtype, unless something is
    forgotten: what is lost of weights needs all of their bits.
    """
    number, first = places(scan)
    q, (H, D) = scan.q, scan.ln_weight.shape
    dtype = q.dtype if scan.log_decay is None else torch.float32
    W = torch.empty(number, H, D, D, dtype=dtype, device=q.device)
    return (W, torch.empty(number, H, D, dtype=torch.float32, device=q.device)), first
