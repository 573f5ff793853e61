# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""Jit helpers for the hidden layer of TTT-MLP's inner model.

Its features come in *chunks* of C columns: [R, C] per token, [P·F, C] of the stacked weights, W2 transposed. There is
one chunk where the state fits into registers. Otherwise the state waits in memory, that is in the cache, from where a
mini-batch takes one chunk after the other.

Numbers in brackets are equations of docs/mathematics.md.
"""

import triton
import triton.language as tl

from .primitives import (
    dot,
    first_rows,
    parameter_head,
    parameter_mask,
    parameter_offsets,
    product,
    row_offsets,
    subtracted,
    token_sums,
)


@triton.jit
def gelu(x):
    """Tanh-GELU and its first and second derivative, (14), x of any size; δ = exp(-w) σ².

    Beyond ±10 the sigmoid has no more digits to give, and what is left of δ must not meet the cubes of a large x.
    """
    low = tl.where(x < -10.0, -10.0, x)
    x = tl.minimum(low, 10.0)
    square = x * x
    slope = 1.5957691216057308 + 0.21406444881780076 * square  # w' = 2c (1 + 3a x²)
    exponential = tl.exp2(x * (-2.302208198144325 - 0.1029432395800235 * square))  # exp(-w)
    sigmoid = 1.0 / (1.0 + exponential)
    delta = exponential * sigmoid * sigmoid  # 1 - σ would cancel
    curve = 2.0 * slope + x * (0.4281288976356015 * x + (1.0 - 2.0 * sigmoid) * slope * slope)
    return product(low, sigmoid), sigmoid + x * delta * slope, delta * curve


@triton.jit
def hidden_columns(chunk, tile: tl.constexpr):
    """Indices of a chunk of hidden features, [C]."""
    return chunk * tile.chunk + tl.arange(0, tile.chunk)


@triton.jit
def hidden_mask(rows, columns, tile: tl.constexpr):
    """Which elements of a chunk exist, given which rows do."""
    return rows[:, None] & (columns < tile.hidden)[None, :]


@triton.jit
def hidden_offsets(chunk, H, tile: tl.constexpr):
    """Offsets of a mini-batch's chunk in a contiguous ``[B, L, H, hidden]``, from its first token and head, [R, C]."""
    return row_offsets(H, tile)[:, None] * tile.hidden + hidden_columns(chunk, tile)[None, :]


@triton.jit
def load_hidden(Z1, mini_batch, chunk, H, tile: tl.constexpr):
    """A mini-batch of a chunk of the rounded Z1, contiguous ``[B, L, H, hidden]``, as float32 [R, C].

    It becomes a product with the identity, which changes no 16-bit number: so it is laid out as products are, and the
    compiler does not compute its GELU over again in the layout of every operand that depends on it.
    """
    rows, _, at, _ = mini_batch
    Z1_at = Z1 + at * tile.hidden + hidden_offsets(chunk, H, tile)
    x = tl.load(Z1_at, mask=hidden_mask(rows, hidden_columns(chunk, tile), tile), other=0.0)
    if tile.operand != tl.float32:
        tokens = tl.arange(0, tile.rows)
        x = dot(tl.where(tokens[:, None] == tokens[None, :], 1.0, 0.0), x, tile)
    return x.to(tl.float32)


@triton.jit
def store_hidden(Z1, x, mini_batch, chunk, H, tile: tl.constexpr):
    """Store a chunk x [R, C] of the rounded Z1."""
    rows, _, at, _ = mini_batch
    Z1_at = Z1 + at * tile.hidden + hidden_offsets(chunk, H, tile)
    tl.store(Z1_at, x, mask=hidden_mask(rows, hidden_columns(chunk, tile), tile))


@triton.jit
def hidden_state_masks(head, H, chunk, tile: tl.constexpr):
    """Which elements of a chunk of stacked W1 or W2, [P·F, C], and of b1 exist."""
    columns, stacked = hidden_columns(chunk, tile), tl.arange(0, tile.heads * tile.features)
    stacked_exist = (head + stacked // tile.features < H) & (stacked % tile.features < tile.head_dim)
    return hidden_mask(stacked_exist, columns, tile), hidden_mask(head + parameter_head(tile) < H, columns, tile)


@triton.jit
def hidden_state_places(strides, place, chunk, tile: tl.constexpr):
    """Offsets of a chunk of W1 ``[N, H, D, hidden]``, b1 ``[N, H, hidden]`` and W2 ``[N, H, hidden, D]``; two masks.

    W1 and W2 are stacked, [P·F, C], W2 transposed, and have one mask; b1 is a tile of parameters, [R, C] or [1, C].
    """
    W1_strides, b1_strides, W2_strides, _ = strides
    W1_by_sequence, W1_by_head, W1_by_input, W1_by_column = W1_strides
    b1_by_sequence, b1_by_head, b1_by_column = b1_strides
    W2_by_sequence, W2_by_head, W2_by_column, W2_by_output = W2_strides
    sequence, head, _, _, H = place
    columns = hidden_columns(chunk, tile)
    stacked = tl.arange(0, tile.heads * tile.features)
    heads, features = (head + stacked // tile.features).to(tl.int64), (stacked % tile.features).to(tl.int64)
    W_mask, b_mask = hidden_state_masks(head, H, chunk, tile)
    b_heads = head + parameter_head(tile)
    n, columns = sequence.to(tl.int64), columns.to(tl.int64)
    W1_rows = n * W1_by_sequence + heads * W1_by_head + features * W1_by_input
    b1_rows = n * b1_by_sequence + b_heads.to(tl.int64) * b1_by_head
    W2_rows = n * W2_by_sequence + heads * W2_by_head + features * W2_by_output
    return (
        W1_rows[:, None] + columns[None, :] * W1_by_column,
        b1_rows[:, None] + columns[None, :] * b1_by_column,
        W2_rows[:, None] + columns[None, :] * W2_by_column,
        W_mask,
        b_mask,
    )


@triton.jit
def contiguous_strides(H, tile: tl.constexpr):
    """Strides of contiguous W1, b1, W2 and b2."""
    n: tl.constexpr = tile.hidden
    D: tl.constexpr = tile.head_dim
    return (H * D * n, D * n, n, 1), (H * n, n, 1), (H * n * D, n * D, D, 1), (H * D, D, 1)


@triton.jit
def load_state(weights, strides, place, chunk, tile: tl.constexpr, centre: tl.constexpr = False):
    """A chunk of W1, b1 and W2; on demand with the rows of W2 centred."""
    W1_in, b1_in, W2_in, _ = weights
    W1_at, b1_at, W2_at, W_mask, b_mask = hidden_state_places(strides, place, chunk, tile)
    W1 = tl.load(W1_in + W1_at, mask=W_mask, other=0.0)
    b1 = tl.load(b1_in + b1_at, mask=b_mask, other=0.0)
    W2 = tl.load(W2_in + W2_at, mask=W_mask, other=0.0)
    if centre:
        W2 = centred_columns(W2, tile)
    return W1, b1, W2


@triton.jit
def store_state(weights, strides, state, place, chunk, tile: tl.constexpr):
    """Store a chunk of W1, b1 and W2."""
    W1_out, b1_out, W2_out, _ = weights
    W1, b1, W2 = state
    W1_at, b1_at, W2_at, W_mask, b_mask = hidden_state_places(strides, place, chunk, tile)
    tl.store(W1_out + W1_at, W1, mask=W_mask)
    tl.store(b1_out + b1_at, b1, mask=b_mask & first_rows(tile))
    tl.store(W2_out + W2_at, W2, mask=W_mask)


@triton.jit
def take_chunk(state, weights, strides, place, chunk, tile: tl.constexpr):
    """A chunk of a state, or of its gradient: what registers hold or, where it is cut, what waits in memory."""
    if tile.chunks > 1:
        state = load_state(weights, strides, place, chunk, tile)
    return state


@triton.jit
def put_chunk(state, weights, strides, place, chunk, tile: tl.constexpr):
    """Put back what ``take_chunk`` took, and return what registers hold of the state: it, or nothing."""
    if tile.chunks > 1:
        store_state(weights, strides, state, place, chunk, tile)
        state = ()
    return state


@triton.jit
def first_chunks(weights, strides, memory, contiguous, place, tile: tl.constexpr, centre: tl.constexpr = False):
    """What registers hold of a state, or of its gradient, at the beginning; where it is cut, memory gets the chunks."""
    if tile.chunks == 1:
        state = load_state(weights, strides, place, 0, tile, centre)
    else:
        for chunk in tl.range(0, tile.chunks, num_stages=1):
            store_state(
                memory, contiguous, load_state(weights, strides, place, chunk, tile, centre), place, chunk, tile
            )
        state = ()
    wait_for_stores(tile)
    return state


@triton.jit
def load_b2(weights, strides, place, tile: tl.constexpr):
    """b2, a tile of parameters."""
    _, _, _, b2 = weights
    _, _, _, b2_strides = strides
    sequence, head, _, _, H = place
    b2_at = b2 + parameter_offsets(b2_strides, sequence, head, tile)
    return tl.load(b2_at, mask=parameter_mask(head, H, tile), other=0.0)


@triton.jit
def store_b2(weights, strides, b2, place, tile: tl.constexpr):
    """Store b2."""
    _, _, _, b2_out = weights
    _, _, _, b2_strides = strides
    sequence, head, _, _, H = place
    once = parameter_mask(head, H, tile) & first_rows(tile)
    tl.store(b2_out + parameter_offsets(b2_strides, sequence, head, tile), b2, mask=once)


@triton.jit
def updated_state(state, K, lr, G1, U2, X2, scale, tile: tl.constexpr):
    """A chunk of W1, b1 and W2 after a mini-batch; ``updated`` tells why products are subtracted whole."""
    W1, b1, W2 = state
    b1 = subtracted(b1, scale, token_sums(product(lr, G1), tile))
    W1 = subtracted(W1, scale, dot(tl.trans(product(lr, K)), G1, tile))
    W2 = subtracted(W2, scale, dot(tl.trans(U2), X2, tile))
    return W1, b1, W2


@triton.jit
def copy_places(number, head, H, chunk, tile: tl.constexpr):
    """Offsets of a chunk of W1, b1 and W2, and of b2, in a copy (see ``copies``); W2 lies there as W1 does."""
    n: tl.constexpr = tile.hidden
    D: tl.constexpr = tile.head_dim
    numbers: tl.constexpr = 2 * D * n + n + D
    base = (number.to(tl.int64) * H + head) * numbers
    stacked, features = tl.arange(0, tile.heads * tile.features), tl.arange(0, tile.features)
    columns, b_rows = hidden_columns(chunk, tile)[None, :], (parameter_head(tile) * numbers)[:, None]
    W1 = ((stacked // tile.features) * numbers + (stacked % tile.features) * n)[:, None] + columns
    b1, b2 = b_rows + (D * n + columns), b_rows + (2 * D * n + n + features[None, :])
    return base + W1, base + b1, base + (W1 + (D * n + n)), base + b2


@triton.jit
def store_hidden_copy(copies, number, state, b2, head, H, chunk, tile: tl.constexpr):
    """Copy a chunk of W1, b1 and W2, and b2."""
    W1, b1, W2 = state
    W1_at, b1_at, W2_at, b2_at = copy_places(number, head, H, chunk, tile)
    W_mask, b_mask = hidden_state_masks(head, H, chunk, tile)
    tl.store(copies + W1_at, W1, mask=W_mask)
    tl.store(copies + b1_at, b1, mask=b_mask & first_rows(tile))
    tl.store(copies + W2_at, W2, mask=W_mask)
    tl.store(copies + b2_at, b2, mask=parameter_mask(head, H, tile) & first_rows(tile))


@triton.jit
def load_hidden_copy(copies, number, head, H, chunk, tile: tl.constexpr):
    """A copied chunk of W1, b1 and W2."""
    W1_at, b1_at, W2_at, _ = copy_places(number, head, H, chunk, tile)
    W_mask, b_mask = hidden_state_masks(head, H, chunk, tile)
    return (
        tl.load(copies + W1_at, mask=W_mask, other=0.0),
        tl.load(copies + b1_at, mask=b_mask, other=0.0),
        tl.load(copies + W2_at, mask=W_mask, other=0.0),
    )


@triton.jit
def load_copied_b2(copies, number, head, H, tile: tl.constexpr):
    """Copied b2."""
    _, _, _, b2_at = copy_places(number, head, H, 0, tile)
    return tl.load(copies + b2_at, mask=parameter_mask(head, H, tile), other=0.0)


@triton.jit
def centred_columns(W, tile: tl.constexpr):
    """Stacked weights [P·F, C] minus their mean over each head's features: ``centred_weights`` of the transpose."""
    heads = tl.reshape(W, (tile.heads, tile.features, tile.chunk))
    means = tl.sum(heads.to(tl.float64), 1)[:, None, :] * (1.0 / tile.head_dim)
    heads -= means.to(tl.float32)
    W = tl.reshape(heads, (tile.heads * tile.features, tile.chunk))
    stacked = tl.arange(0, tile.heads * tile.features)
    return tl.where((stacked % tile.features < tile.head_dim)[:, None], W, 0.0)


@triton.jit
def wait_for_stores(tile: tl.constexpr):
    """Until all threads of the program see what each of them has stored of a state, or its gradient, in chunks."""
    if tile.chunks > 1:
        tl.debug_barrier()
