# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""Jit helpers named after the mathematics, shared by all kernels.

A program runs P heads of one sequence. One mini-batch of one tensor is a tile of R rows: row r is token
``r % (R/P)`` of head ``r // (R/P)``. Three shapes occur, with F the head dimension padded to a power of two:

- *rows* ``[R, F]``: one value per token and feature.
- *expanded* ``[R, P·F]``: the same, every head's features in a column block of its own, zero elsewhere. An expanded
  tile times the heads' stacked weights ``[P·F, F]`` is every head times its own weights.
- *pairs* ``[R, R]``: one value per two tokens.

A head's parameters, b, γ and β, are rows too: as many as tokens up to sixteen of them, where a sum over tokens costs
a product of one instruction and a broadcast nothing; beyond, one row serves a program's one head, [1, F].

Tiles carry zeros where there is no token, no head or no feature. All arithmetic is float32; ``dot`` alone rounds its
operands. Layer norms see only inputs whose mean over the features is zero (see ``centred``).

Numbers in brackets are equations of docs/mathematics.md.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """The compile-time sizes and types of a kernel."""

    mini_batch: int  # K
    heads: int  # P
    rows: int  # R, a power of two >= 16
    head_dim: int  # D
    features: int  # F, a power of two >= 16
    operand: Any  # Triton dtype to which a matrix product's operands are rounded
    dot: Any  # Triton dtype in which they are multiplied; float32 under the interpreter, which has no bfloat16
    precision: str  # of float32 products
    hidden: int = 0  # features of the inner MLP's hidden layer
    chunk: int = 0  # C of them at a time, a power of two >= 16
    chunks: int = 0


@triton.jit
def rounded(x, tile: tl.constexpr):
    """x in the input dtype, rounded to nearest; the interpreter alone would cut bfloat16 off."""
    if tile.dot == tl.float32 and tile.operand == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -0x10000).to(tl.float32, bitcast=True)
    return x.to(tile.operand)


@triton.jit
def dot(a, b, tile: tl.constexpr, onto=None):
    """Matrix product of operands rounded to the input dtype, summed in float32, onto a float32 tile if one is given."""
    a = rounded(a, tile).to(tile.dot)
    b = rounded(b, tile).to(tile.dot)
    if onto is not None:
        onto = tl.broadcast_to(onto, (a.shape[0], b.shape[1]))
    return tl.dot(a, b, onto, input_precision=tile.precision)


@triton.jit
def product(a, b):
    """a b, rounded by itself in every kernel; of a product and a sum that it goes into the compiler may make one."""
    return tl.fma(a.to(tl.float32), b.to(tl.float32), 0.0)


@triton.jit
def subtracted(x, scale, y):
    """x - s ∘ y in one operation, in every kernel."""
    return tl.fma(-scale, y, x)


@triton.jit
def plus(a, b):
    """a + b, with a no product but a sum with zero, which the compiler leaves out where a cannot be -0."""
    return (a + 0.0) + b


@triton.jit
def total(x, axis: tl.constexpr):
    """Sum over an axis of which a lane may hold one term only, the same in all lanes.

    Lanes exchange terms, and each adds two. If those were products, each would fuse its own with the other's, which
    was rounded. The lanes' sums would differ in their last bit, and which of them is stored would be left to chance.
    Squares, which cannot be -0, have to come with a minus sign.
    """
    return tl.reduce(x, axis, plus)


@triton.jit
def mean(x, tile: tl.constexpr):
    """Mean over the features, [n, 1], of which a lane holds two at least: their sum is no product (see ``total``)."""
    return tl.sum(x, 1)[:, None] * (1.0 / tile.head_dim)


@triton.jit
def only_features(x, tile: tl.constexpr):
    """Zero in the columns that pad the features."""
    if tile.head_dim != tile.features:
        x = tl.where(tl.arange(0, tile.features)[None, :] < tile.head_dim, x, 0.0)
    return x


@triton.jit
def centred(x, tile: tl.constexpr):
    """x minus its mean over the features.

    A layer norm does not see the mean of its input, and inner gradients have none. So with every row of W and b centred
    once, x W + b has mean zero in every mini-batch, and no layer norm needs to compute it.
    """
    return only_features(x - mean(x, tile), tile)


@triton.jit
def centred_weights(x, tile: tl.constexpr):
    """``centred``, with the same bits in every kernel: in float64 the order of the sum does not matter.

    It is exact unless features are 2²³ times as large as others, and then rounds at 2⁻²⁹ of what float32 rounds at.
    """
    return only_features(x - mean(x.to(tl.float64), tile).to(tl.float32), tile)


@triton.jit
def normalised(x, eps, tile: tl.constexpr):
    """x̂ and r, (1), of x of mean zero."""
    r = tl.rsqrt(mean(x * x, tile) + eps)
    return x * r, r


@triton.jit
def recentred(x, eps, tile: tl.constexpr):
    """x̂ and r for x of mean nearly zero.

    Rounding lets the mean of a long sum of updates drift. Being small, it can be taken off the mean square in the same
    round of sums, without cancellation: var(x) = mean(x²) - mean(x)².
    """
    drift = mean(x, tile)
    r = tl.rsqrt(mean(x * x, tile) - drift * drift + eps)
    return only_features((x - drift) * r, tile), r


@triton.jit
def layer_norm_backward(dx_hat, x_hat, r, tile: tl.constexpr):
    """Gradient of x from the one of x̂: J dx̂, (5)."""
    return only_features(product(r, dx_hat - mean(dx_hat, tile) - x_hat * mean(dx_hat * x_hat, tile)), tile)


@triton.jit
def inner_gradient(y, x_hat, r, tile: tl.constexpr):
    """G, (6), for x̂ of mean nearly zero.

    Its mean is taken off last. An inner step that is too large grows what it should shrink, and would grow a mean of
    rounding errors from step to step.
    """
    G = y - x_hat * mean(y * x_hat, tile)
    return only_features(product(r, G - mean(G, tile)), tile)


@triton.jit
def inner_gradient_backward(dG, dG_dot_G, G, error, x_hat, r, gamma, tile: tl.constexpr):
    """Gradients through G, (21) and (23); error is e; dG_dot_G is Σ dG ∘ G per row, [R, 1].

    Returns, [R, F] each, dZ of the layer norm's input, d error, and the terms of dγ.
    """
    along_x_hat = mean(dG * x_hat, tile)
    dy = only_features(r * (dG - mean(dG, tile) - x_hat * along_x_hat), tile)  # J dG
    d_error = gamma * dy
    y_along_x_hat = mean(gamma * error * x_hat, tile)
    dx_hat = gamma * d_error
    inner = mean(dx_hat * x_hat, tile) + dG_dot_G * (1.0 / tile.head_dim)
    dZ = r * (dx_hat - mean(dx_hat, tile) - x_hat * inner - y_along_x_hat * dy - along_x_hat * G)
    return only_features(dZ, tile), d_error, dy * error + d_error * x_hat


@triton.jit
def row_token(tile: tl.constexpr):
    """Each row's position in the mini-batch, [R]."""
    return tl.arange(0, tile.rows) % (tile.rows // tile.heads)


@triton.jit
def row_head(tile: tl.constexpr):
    """Each row's head among the program's, [R]."""
    return tl.arange(0, tile.rows) // (tile.rows // tile.heads)


@triton.jit
def parameter_rows(tile: tl.constexpr):
    """Indices of the rows of a tile of parameters, [R] or [1]."""
    rows: tl.constexpr = tile.rows if tile.rows == 16 or tile.heads > 1 else 1
    return tl.arange(0, rows)


@triton.jit
def parameter_head(tile: tl.constexpr):
    """Head of every row of a tile of parameters among the program's, [R] or [1]."""
    return parameter_rows(tile) // (tile.rows // tile.heads)


@triton.jit
def own_columns(tile: tl.constexpr):
    """Where an expanded tile may be other than zero, [R, P·F]."""
    return row_head(tile)[:, None] == (tl.arange(0, tile.heads * tile.features) // tile.features)[None, :]


@triton.jit
def same_head(tile: tl.constexpr):
    """Pairs of rows of one head, [R, R]."""
    return row_head(tile)[:, None] == row_head(tile)[None, :]


@triton.jit
def token_sums(x, tile: tl.constexpr):
    """[R, F] summed over each head's tokens, as a tile of parameters: by a product, in one order in every kernel."""
    if tile.rows == 16 or tile.heads > 1:
        sums = dot(tl.where(same_head(tile), 1.0, 0.0), x, tile)
    else:  # a product has sixteen rows at least, of which one is wanted
        sums = dot(tl.full((16, tile.rows), 1.0, tl.float32), x, tile)
        sums = tl.sum(tl.where(tl.arange(0, 16)[:, None] == 0, sums, 0.0), 0)[None, :]
    return sums


@triton.jit
def updated(W, b, K, U, scale, tile: tl.constexpr):
    """W and b after a mini-batch, (9), the products summed by themselves: weights, which may be larger, round once."""
    return subtracted(W, scale, dot(tl.trans(K), U, tile)), subtracted(b, scale, token_sums(U, tile))


@triton.jit
def causal(tile: tl.constexpr):
    """Pairs i >= j of tokens of one head, [R, R]."""
    rows = tl.arange(0, tile.rows)
    return same_head(tile) & (rows[:, None] >= rows[None, :])


@triton.jit
def either(a, b):
    """One of two bit patterns of which the other is zero; unlike a sum it costs nothing where zeros are known."""
    return a | b


@triton.jit
def own(x, tile: tl.constexpr):
    """[R, P·F] to [R, F]: of every row, its own head's columns."""
    if tile.heads > 1:
        bits = tl.where(own_columns(tile), x.to(tl.int32, bitcast=True), 0)
        bits = tl.reduce(tl.reshape(bits, (tile.rows, tile.heads, tile.features)), 1, either)
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def expanded(x, tile: tl.constexpr):
    """[R, F] to [R, P·F]."""
    for _ in tl.static_range(0, tile.heads // 2):
        if x.shape[1] < tile.heads * tile.features:
            x = tl.reshape(tl.permute(tl.join(x, x), (0, 2, 1)), (tile.rows, 2 * x.shape[1]))
    if tile.heads > 1:
        x = tl.where(own_columns(tile), x, 0.0)
    return x


@triton.jit
def program_place(spans, L, H, tile: tl.constexpr):
    """The program's sequence and first head; the sequence's first token in the flattened tokens, and its length; H."""
    head_groups = tl.cdiv(H, tile.heads)
    sequence = tl.program_id(0) // head_groups
    head = (tl.program_id(0) % head_groups) * tile.heads
    starts, lengths = spans
    if starts is None:
        first = sequence.to(tl.int64) * L
        length = L
    else:
        first = tl.load(starts + sequence).to(tl.int64)
        length = tl.load(lengths + sequence).to(tl.int32)
    return sequence, head, first, length, H


@triton.jit
def mini_batch_place(start, place, offsets, tile: tl.constexpr):
    """Where the mini-batch at a sequence's token start lies, given a program's place and ``tile_offsets``.

    Which rows exist, [R], and which elements, [R, F]. Then the offset of the first token and head in a contiguous
    ``[B, L, H]``, and the offsets of the elements in a contiguous ``[B, L, H, D]``, [R, F].
    """
    _, head, first, length, H = place
    exist = head + row_head(tile) < H
    rows = exist & (row_token(tile) < min(tile.mini_batch, length - start))
    mask = rows[:, None] & (tl.arange(0, tile.features)[None, :] < tile.head_dim)
    at = (first + start) * H + head
    return rows, mask, at, at * tile.head_dim + offsets


@triton.jit
def row_offsets(H, tile: tl.constexpr):
    """Offsets of a mini-batch's rows in a contiguous ``[B, L, H]``, from its first token and head, [R]."""
    return row_token(tile) * H + row_head(tile)


@triton.jit
def tile_offsets(H, tile: tl.constexpr):
    """Offsets of a mini-batch's elements in a contiguous ``[B, L, H, D]``, from its first token and head, [R, F]."""
    return row_offsets(H, tile)[:, None] * tile.head_dim + tl.arange(0, tile.features)[None, :]


@triton.jit
def weight_offsets(strides, sequence, head, tile: tl.constexpr):
    """Offsets of the stacked weights ``[P·F, F]`` in ``[N, H, D, D]``."""
    sequence_stride, head_stride, row_stride, column_stride = strides
    stacked = tl.arange(0, tile.heads * tile.features)
    heads = head + stacked // tile.features
    rows = sequence.to(tl.int64) * sequence_stride + heads.to(tl.int64) * head_stride
    rows += (stacked % tile.features).to(tl.int64) * row_stride
    return rows[:, None] + tl.arange(0, tile.features).to(tl.int64)[None, :] * column_stride


@triton.jit
def weight_mask(head, H, tile: tl.constexpr):
    """Which of the stacked weights exist, [P·F, F]."""
    stacked = tl.arange(0, tile.heads * tile.features)
    rows = (head + stacked // tile.features < H) & (stacked % tile.features < tile.head_dim)
    return rows[:, None] & (tl.arange(0, tile.features) < tile.head_dim)[None, :]


@triton.jit
def parameter_offsets(strides, sequence, head, tile: tl.constexpr):
    """Offsets in ``[N, H, D]`` of a tile of parameters, [R, F] or [1, F]."""
    sequence_stride, head_stride, feature_stride = strides
    rows = sequence.to(tl.int64) * sequence_stride + (head + parameter_head(tile)).to(tl.int64) * head_stride
    return rows[:, None] + tl.arange(0, tile.features)[None, :] * feature_stride


@triton.jit
def parameter_mask(head, H, tile: tl.constexpr):
    """Which of a tile of parameters exist."""
    features = tl.arange(0, tile.features)
    return (head + parameter_head(tile) < H)[:, None] & (features < tile.head_dim)[None, :]


@triton.jit
def first_rows(tile: tl.constexpr):
    """One row per head of a tile of parameters, for storing each once."""
    return (parameter_rows(tile) % (tile.rows // tile.heads) == 0)[:, None]


@triton.jit
def load_weights(pointers, strides, place, tile: tl.constexpr):
    """TTT-Linear's stacked W, [P·F, F], and b, a tile of parameters."""
    W, b = pointers
    W_strides, b_strides = strides
    sequence, head, _, _, H = place
    W_at = W + weight_offsets(W_strides, sequence, head, tile)
    b_at = b + parameter_offsets(b_strides, sequence, head, tile)
    return (
        tl.load(W_at, mask=weight_mask(head, H, tile), other=0.0),
        tl.load(b_at, mask=parameter_mask(head, H, tile), other=0.0),
    )


@triton.jit
def store_weights(pointers, weights, place, tile: tl.constexpr):
    """Store TTT-Linear's weights in a contiguous ``[N, H, D, D]`` and ``[N, H, D]``."""
    W_out, b_out = pointers
    W, b = weights
    sequence, head, _, _, H = place
    D: tl.constexpr = tile.head_dim
    W_mask, once = weight_mask(head, H, tile), parameter_mask(head, H, tile) & first_rows(tile)
    tl.store(W_out + weight_offsets((H * D * D, D * D, D, 1), sequence, head, tile), W, mask=W_mask)
    tl.store(b_out + parameter_offsets((H * D, D, 1), sequence, head, tile), b, mask=once)


@triton.jit
def store_head_sums(pointer, x, place, tile: tl.constexpr):
    """Sum x [R, F] over each head's rows and store it in a contiguous ``[N, H, D]``."""
    sequence, head, _, _, H = place
    heads, features = head + tl.arange(0, tile.heads), tl.arange(0, tile.features)
    sums = tl.sum(tl.reshape(x, (tile.heads, tile.rows // tile.heads, tile.features)), 1)
    offsets = (sequence.to(tl.int64) * H + heads)[:, None] * tile.head_dim + features[None, :]
    tl.store(pointer + offsets, sums, mask=(heads < H)[:, None] & (features < tile.head_dim)[None, :])


@triton.jit
def load_rows(pointer, mini_batch, tile: tl.constexpr):
    """A mini-batch of a contiguous ``[B, L, H, D]``, [R, F]."""
    _, mask, _, elements = mini_batch
    return tl.load(pointer + elements, mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, x, mini_batch, tile: tl.constexpr):
    """Store x [R, F], rounded, as a mini-batch of a contiguous ``[B, L, H, D]``."""
    _, mask, _, elements = mini_batch
    tl.store(pointer + elements, rounded(x, tile), mask=mask)


@triton.constexpr_function
def loads_ahead(tile):
    """Whether TTT-Linear's loops carry loaded rows from one mini-batch to the next.

    So small tiles of one head Triton wants to have in several layouts, and then puts none of its copies ahead.
    """
    return tile.heads == 1 and tile.rows == 16 and tile.features <= 32


@triton.jit
def load_rates(inner_lr, mini_batch, H, tile: tl.constexpr):
    """A mini-batch of the rates, contiguous ``[B, L, H]``, [R]."""
    rows, _, at, _ = mini_batch
    return tl.load(inner_lr + at + row_offsets(H, tile), mask=rows, other=0.0)


@triton.jit
def store_rates(pointer, x, mini_batch, H, tile: tl.constexpr):
    """Store x [R] as a mini-batch of a contiguous ``[B, L, H]``."""
    rows, _, at, _ = mini_batch
    tl.store(pointer + at + row_offsets(H, tile), x, mask=rows)


@triton.jit
def load_scale(token_scale, tile: tl.constexpr):
    """s of every row, [R, 1]."""
    positions = row_token(tile)
    return tl.load(token_scale + positions, mask=positions < tile.mini_batch, other=0.0)[:, None]


@triton.jit
def load_layer_norm(layer_norm, head, H, tile: tl.constexpr, one_row: tl.constexpr = False):
    """γ and β, contiguous ``[H, D]``, as tiles of parameters; one head's as one row, if that is wanted."""
    gamma, beta = layer_norm
    rows: tl.constexpr = 1 if one_row and tile.heads == 1 else parameter_rows(tile).shape[0]
    heads = head + tl.arange(0, rows) // (tile.rows // tile.heads)
    features = tl.arange(0, tile.features)
    offsets = heads[:, None] * tile.head_dim + features[None, :]
    mask = (heads < H)[:, None] & (features < tile.head_dim)[None, :]
    return (
        tl.load(gamma + offsets, mask=mask, other=0.0).to(tl.float32),
        tl.load(beta + offsets, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def store_token_sums(pointer, x, place, tile: tl.constexpr):
    """Store x [R] in a contiguous ``[N, H, K]``."""
    sequence, head, _, _, H = place
    heads, positions = head + row_head(tile), row_token(tile)
    offsets = (sequence.to(tl.int64) * H + heads) * tile.mini_batch + positions
    tl.store(pointer + offsets, x, mask=(heads < H) & (positions < tile.mini_batch))


@triton.jit
def store_sums(pointers, sums, place, tile: tl.constexpr):
    """Store a sequence's gradients of γ and β, [R, F], of s, [R] or pairs yet to be summed, and of s_last, [R]."""
    d_gamma, d_beta, d_scale, d_last_scale = sums
    gamma_sums, beta_sums, scale_sums, last_scale_sums = pointers
    store_head_sums(gamma_sums, d_gamma, place, tile)
    store_head_sums(beta_sums, d_beta, place, tile)
    if len(d_scale.shape) == 2:
        d_scale = tl.sum(d_scale, 1)
    store_token_sums(scale_sums, d_scale, place, tile)
    store_token_sums(last_scale_sums, d_last_scale, place, tile)
