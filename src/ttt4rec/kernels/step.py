# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""One token more for many streams, whose states lie in a pool: one program a stream and head.

A stream keeps of every token of its mini-batch a row with the inputs X and the steps U of each inner layer; (30) is
the layer's output at a token. A program reads W, b and the i kept rows, and writes one row; W and b only at a
mini-batch's last token. It has one row x and no matrix product worth a tensor core: all products are float32
multiplications and sums.

Numbers in brackets are equations of docs/mathematics.md.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import TokenStep
from . import launch
from .forgetting import forgotten, share_lost
from .hidden_layer import gelu
from .primitives import total


class StepTile(NamedTuple):
    """The compile-time sizes of a step."""

    mini_batch: int  # K
    kept: int  # K - 1 padded to a power of two
    head_dim: int  # D
    features: int  # D padded to a power of two
    hidden: int  # of TTT-MLP
    chunk: int  # hidden features held at a time, a power of two
    chunks: int
    record: int  # numbers of a record
    second_at: int  # in a record: TTT-MLP's W2 and b2,
    rows_at: int  # and the rows
    row: int  # numbers of a kept token's row
    k_at: int  # in a row, as all below
    u1_at: int
    x2_at: int  # of TTT-MLP, as u2
    u2_at: int
    v_at: int
    lr_at: int
    decay_at: int


# Chunk of hidden features and warps of a program by padded head dimension: what fits the registers without spills.
LINEAR_BLOCKS = {16: (0, 1), 32: (0, 1), 64: (0, 4), 128: (0, 8)}
MLP_BLOCKS = {16: (64, 2), 32: (128, 8), 64: (256, 8), 128: (64, 8)}


@triton.jit
def times(x, W):
    """x W, [in] by [in, out]."""
    return total(x[:, None] * W, 0)


@triton.jit
def times_rows(W, x):
    """W x, [in, out] by [out]: x Wᵀ."""
    return total(W * x[None, :], 1)


@triton.jit
def standardised(z, real, eps, tile: tl.constexpr):
    """x̂ and r, (1), of a vector [F]."""
    centred = tl.where(real, z - total(z, 0) / tile.head_dim, 0.0)
    r = tl.rsqrt(eps - total(-centred * centred, 0) / tile.head_dim)  # by minus squares: see ``total``
    return centred * r, r


@triton.jit
def inner_step(z, k, v, lr, gamma, beta, real, eps, tile: tl.constexpr):
    """The steps U, by (6), from z at the key."""
    x_hat, r = standardised(z, real, eps, tile)
    y = gamma * (gamma * x_hat + beta - (v - k))
    y -= total(y, 0) / tile.head_dim + x_hat * (total(y * x_hat, 0) / tile.head_dim)
    return tl.where(real, lr * r * y, 0.0)


@triton.jit
def output(p, q, gamma, beta, real, eps, tile: tl.constexpr):
    """q + LN(p)."""
    p_hat, _ = standardised(p, real, eps, tile)
    return q + gamma * p_hat + beta


@triton.jit
def load(pointer, offsets, mask):
    """Float32 values, zero where masked out."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def outer_mask(rows, columns):
    """Where both exist, [rows, columns]."""
    return rows[:, None] & columns[None, :]


@triton.jit
def stepped(W, b, x, u, s, X, U, rows, columns, width: tl.constexpr, out: tl.constexpr, tile: tl.constexpr):
    """W and b after a mini-batch, (9), of which x and u are the last token.

    rows and columns are the part of W that is held; X and U point into the first of the kept rows.
    """
    step = s * u
    W -= x[:, None] * step[None, :]
    b -= step
    for j in tl.range(0, tile.mini_batch - 1):
        x_j = load(X, j * tile.row + rows, rows < width)
        step_j = s * load(U, j * tile.row + columns, columns < out)
        W -= x_j[:, None] * step_j[None, :]
        b -= step_j
    return W, b


@triton.jit
def load_share_lost(decays, kept_rows, place, tile: tl.constexpr):
    """1 - A of the mini-batch that is complete with the program's token; kept_rows are the tokens' before."""
    log_decay, _ = decays
    before = tl.arange(0, tile.kept)
    earlier = load(kept_rows, before * tile.row + tile.decay_at, before < place)
    return share_lost(tl.load(log_decay + tl.program_id(0)).to(tl.float32) + tl.sum(earlier, 0))


@triton.jit
def initial_weights(decays, H, tile: tl.constexpr):
    """Where the initial weights of the program's head begin; they lie as in a record."""
    _, initial = decays
    return initial + (tl.program_id(0) % H) * tile.rows_at


@triton.jit
def store_decay(decays, row, tile: tl.constexpr):
    """Write ln a to the token's row, of a layer that forgets."""
    if decays is not None:
        log_decay, _ = decays
        tl.store(row + tile.decay_at, tl.load(log_decay + tl.program_id(0)).to(tl.float32))


@triton.jit
def program_stream(slots, offset, H):
    """The program's head among all N·H of the pool; its token's place in the mini-batch."""
    stream = tl.program_id(0) // H
    slot = tl.load(slots + stream).to(tl.int64)
    return slot * H + tl.program_id(0) % H, tl.load(offset + stream).to(tl.int32)


@triton.jit
def load_token(tokens, rates, layer_norm, place, H, tile: tl.constexpr):
    """q, k, v, γ and β [F]; lr and s."""
    q, k, v = tokens
    inner_lr, token_scale = rates
    gamma, beta = layer_norm
    features = tl.arange(0, tile.features)
    here = tl.program_id(0).to(tl.int64) * tile.head_dim + features
    parameters = (tl.program_id(0) % H) * tile.head_dim + features
    real = features < tile.head_dim
    q, k, v = load(q, here, real), load(k, here, real), load(v, here, real)
    gamma, beta = load(gamma, parameters, real), load(beta, parameters, real)
    lr = tl.load(inner_lr + tl.program_id(0)).to(tl.float32)
    return q, k, v, gamma, beta, lr, tl.load(token_scale + place).to(tl.float32)


@triton.jit(do_not_specialize=["H"])
def linear_step_kernel(
    tokens,  # q, k, v [B, H, D]
    rates,  # inner_lr [B, H], token_scale [K]
    layer_norm,  # γ, β [H, D]
    slots,  # [B]
    offset,  # [B]
    records,  # [N, H, R]: W, b, and K rows (k, U, v, lr, ln a)
    decays,  # ln a [B, H], and W̄ and b̄ as in a record [H, numbers]; None: nothing is forgotten
    o,  # [B, H, D]
    H,
    eps,
    tile: tl.constexpr,
):
    """p = the layer at q; o = q + LN(p)."""
    D: tl.constexpr = tile.head_dim
    head, place = program_stream(slots, offset, H)
    q, k, v, gamma, beta, lr, s = load_token(tokens, rates, layer_norm, place, H, tile)
    features, before = tl.arange(0, tile.features), tl.arange(0, tile.kept)
    real = features < D
    square, square_mask = features[:, None] * D + features[None, :], outer_mask(real, real)
    kept, kept_mask = before[:, None] * tile.row + features[None, :], outer_mask(before < place, real)
    M = records + head * tile.record
    keys, steps = M + tile.rows_at + tile.k_at, M + tile.rows_at + tile.u1_at

    W = load(M, square, square_mask)
    b = load(M, D * D + features, real)
    u = inner_step(times(k, W) + b, k, v, lr, gamma, beta, real, eps, tile)
    U = load(steps, kept, kept_mask)
    A = times_rows(load(keys, kept, kept_mask), q) + 1.0
    p = times(q, W) + b - s * (times(A, U) + (total(q * k, 0) + 1.0) * u)
    here = tl.program_id(0).to(tl.int64) * D + features
    tl.store(o + here, output(p, q, gamma, beta, real, eps, tile).to(o.dtype.element_ty), mask=real)

    if place == tile.mini_batch - 1:
        if decays is not None:
            share, initial = load_share_lost(decays, M + tile.rows_at, place, tile), initial_weights(decays, H, tile)
            W = forgotten(W, load(initial, square, square_mask), share)
            b = forgotten(b, load(initial, D * D + features, real), share)
        W, b = stepped(W, b, k, u, s, keys, steps, features, features, D, D, tile)
        tl.store(M + square, W, mask=square_mask)
        tl.store(M + D * D + features, b, mask=real)
    else:
        row = M + tile.rows_at + place * tile.row
        tl.store(row + tile.k_at + features, k, mask=real)
        tl.store(row + tile.u1_at + features, u, mask=real)
        tl.store(row + tile.v_at + features, v, mask=real)
        tl.store(row + tile.lr_at, lr)
        store_decay(decays, row, tile)


@triton.jit
def load_hidden(M1, M2, c, D: tl.constexpr, F: tl.constexpr, tile: tl.constexpr):
    """W1 [features, chunk], b1 [chunk] and W2 [chunk, features] of a chunk of hidden features."""
    features, hidden = tl.arange(0, tile.features), c * tile.chunk + tl.arange(0, tile.chunk)
    W1 = load(M1, features[:, None] * F + hidden[None, :], outer_mask(features < D, hidden < F))
    W2 = load(M2, hidden[:, None] * D + features[None, :], outer_mask(hidden < F, features < D))
    return W1, load(M1, D * F + hidden, hidden < F), W2


@triton.jit
def inner_outputs(M1, M2, k, b2, tile: tl.constexpr):
    """z2 = b2 + gelu(k W1 + b1) W2; and of the last chunk its weights, x2 and gelu'(z1)."""
    D: tl.constexpr = tile.head_dim
    F: tl.constexpr = tile.hidden
    W1, b1, W2 = load_hidden(M1, M2, 0, D, F, tile)
    x2, slope, _ = gelu(times(k, W1) + b1)
    z2 = b2 + times(x2, W2)
    for c in tl.range(1, tile.chunks):
        W1, b1, W2 = load_hidden(M1, M2, c, D, F, tile)
        x2, slope, _ = gelu(times(k, W1) + b1)
        z2 += times(x2, W2)
    return z2, (W1, b1, W2), x2, slope


@triton.jit
def store_chunk(M1, M2, state, b2, k, u1, x2, u2, s, place, decays, H, c, tile: tl.constexpr):
    """Write a chunk's u1 and x2 to the token's row, or, where it completes its mini-batch, W1, b1, W2 and b2."""
    D: tl.constexpr = tile.head_dim
    F: tl.constexpr = tile.hidden
    W1, b1, W2 = state
    features, hidden = tl.arange(0, tile.features), c * tile.chunk + tl.arange(0, tile.chunk)
    real = features < D
    kept_rows = M1 + tile.rows_at
    if place == tile.mini_batch - 1:
        keys, steps1 = kept_rows + tile.k_at, kept_rows + tile.u1_at
        inputs2, steps2 = kept_rows + tile.x2_at, kept_rows + tile.u2_at
        if decays is not None:  # one layer after the other, for the sake of registers
            share, initial1 = load_share_lost(decays, kept_rows, place, tile), initial_weights(decays, H, tile)
            W1 = forgotten(
                W1, load(initial1, features[:, None] * F + hidden[None, :], outer_mask(real, hidden < F)), share
            )
            b1 = forgotten(b1, load(initial1, D * F + hidden, hidden < F), share)
        W1, b1 = stepped(W1, b1, k, u1, s, keys, steps1, features, hidden, D, F, tile)
        if decays is not None:
            initial2 = initial1 + tile.second_at
            W2 = forgotten(
                W2, load(initial2, hidden[:, None] * D + features[None, :], outer_mask(hidden < F, real)), share
            )
            b2 = forgotten(b2, load(initial2, F * D + features, real), share)
        W2, b2 = stepped(W2, b2, x2, u2, s, inputs2, steps2, hidden, features, F, D, tile)
        tl.store(M1 + features[:, None] * F + hidden[None, :], W1, mask=outer_mask(real, hidden < F))
        tl.store(M1 + D * F + hidden, b1, mask=hidden < F)
        tl.store(M2 + hidden[:, None] * D + features[None, :], W2, mask=outer_mask(hidden < F, real))
        tl.store(M2 + F * D + features, b2, mask=real)
    else:
        row = kept_rows + place * tile.row
        tl.store(row + tile.u1_at + hidden, u1, mask=hidden < F)
        tl.store(row + tile.x2_at + hidden, x2, mask=hidden < F)


@triton.jit(do_not_specialize=["H"])
def mlp_step_kernel(
    tokens,  # q, k, v [B, H, D]
    rates,  # inner_lr [B, H], token_scale [K]
    layer_norm,  # γ, β [H, D]
    slots,  # [B]
    offset,  # [B]
    records,  # [N, H, R]: W1, b1, W2, b2, and K rows (k, U1, X2, U2, v, lr, ln a)
    decays,  # ln a [B, H], and the initial weights as in a record [H, numbers]; None: nothing is forgotten
    o,  # [B, H, D]
    H,
    eps,
    tile: tl.constexpr,
):
    """TTT-MLP, (11) to (13), in small letters for the one token.

    The hidden features come in chunks, all of them at once where they fit the registers. Where they do not, weights
    are loaded twice, the second time, soon after, from the cache.
    """
    D: tl.constexpr = tile.head_dim
    F: tl.constexpr = tile.hidden
    head, place = program_stream(slots, offset, H)
    q, k, v, gamma, beta, lr, s = load_token(tokens, rates, layer_norm, place, H, tile)
    features, before = tl.arange(0, tile.features), tl.arange(0, tile.kept)
    real = features < D
    kept, kept_mask = before[:, None] * tile.row + features[None, :], outer_mask(before < place, real)
    M1 = records + head * tile.record
    M2, kept_rows = M1 + tile.second_at, M1 + tile.rows_at

    b2 = load(M2, F * D + features, real)
    z2, state, x2, slope = inner_outputs(M1, M2, k, b2, tile)
    W1, b1, W2 = state
    u2 = inner_step(z2, k, v, lr, gamma, beta, real, eps, tile)
    A1 = times_rows(load(kept_rows + tile.k_at, kept, kept_mask), q) + 1.0
    own1 = total(q * k, 0) + 1.0
    A2 = tl.full((tile.kept,), 1.0, tl.float32)
    own2 = 1.0
    p2 = b2
    for c in tl.range(0, tile.chunks):
        if tile.chunks > 1:
            W1, b1, W2 = load_hidden(M1, M2, c, D, F, tile)
            x2, slope, _ = gelu(times(k, W1) + b1)
        hidden = c * tile.chunk + tl.arange(0, tile.chunk)
        u1 = times_rows(W2, u2) * slope
        rows, rows_mask = before[:, None] * tile.row + hidden[None, :], outer_mask(before < place, hidden < F)
        U1 = load(kept_rows + tile.u1_at, rows, rows_mask)
        x2_bar, _, _ = gelu(times(q, W1) + b1 - s * (times(A1, U1) + own1 * u1))
        p2 += times(x2_bar, W2)
        A2 += times_rows(load(kept_rows + tile.x2_at, rows, rows_mask), x2_bar)
        own2 += total(x2_bar * x2, 0)
        store_chunk(M1, M2, (W1, b1, W2), b2, k, u1, x2, u2, s, place, decays, H, c, tile)
    U2 = load(kept_rows + tile.u2_at, kept, kept_mask)
    p2 -= s * (times(A2, U2) + own2 * u2)
    here = tl.program_id(0).to(tl.int64) * D + features
    tl.store(o + here, output(p2, q, gamma, beta, real, eps, tile).to(o.dtype.element_ty), mask=real)
    if place < tile.mini_batch - 1:
        row = kept_rows + place * tile.row
        tl.store(row + tile.k_at + features, k, mask=real)
        tl.store(row + tile.u2_at + features, u2, mask=real)
        tl.store(row + tile.v_at + features, v, mask=real)
        tl.store(row + tile.lr_at, lr)
        store_decay(decays, row, tile)


KERNELS = {"linear": (linear_step_kernel, LINEAR_BLOCKS), "mlp": (mlp_step_kernel, MLP_BLOCKS)}
"""Of each inner model, with the chunk of hidden features and the warps by padded head dimension."""


@launch.on_its_device
def token_step(step: TokenStep) -> tuple[Tensor]:
    """Outputs ``[B, H, D]`` in q's dtype; the host waits for nothing.

    A stream's new token is written to a row of its record, or, where it completes its mini-batch, W and b are.

    Raises:
        ValueError: the kernels do not run that dtype, head dimension or mini-batch size.
    """
    o, prepared = prepare_token_step(step)
    prepared.run()
    return (o,)


def prepare_token_step(step: TokenStep) -> tuple[Tensor, launch.Launch]:
    """Allocate the outputs and make the launch that fills them."""
    q, hidden, (B, H, D), K, record = step.q, step.hidden, step.q.shape, step.token_scale.numel(), step.record
    launch.plan("linear_forward", q.unsqueeze(1), K)  # raises where no kernel runs
    kernel, blocks = KERNELS[step.inner]
    chunk, num_warps = blocks[launch.padded(D)]
    _, second_at, *_ = record.weights_at
    *_, rows_at = record.weights_at
    k_at, u1_at, *of_second, v_at, lr_at, decay_at = record.row_at
    x2_at, u2_at = of_second or (0, 0)
    tile = StepTile(
        mini_batch=K,
        kept=triton.next_power_of_2(max(1, K - 1)),
        head_dim=D,
        features=launch.padded(D),
        hidden=hidden,
        chunk=chunk,
        chunks=triton.cdiv(hidden, chunk) if hidden else 0,
        record=step.records.shape[2],
        second_at=second_at,
        rows_at=rows_at,
        row=record.row_size,
        k_at=k_at,
        u1_at=u1_at,
        x2_at=x2_at,
        u2_at=u2_at,
        v_at=v_at,
        lr_at=lr_at,
        decay_at=decay_at,
    )
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decays = None if step.log_decay is None else launch.contiguous(step.log_decay, step.initial)
    arguments = (
        launch.contiguous(step.q, step.k, step.v),
        launch.contiguous(step.inner_lr, step.token_scale),
        launch.contiguous(step.ln_weight, step.ln_bias),
        step.slots.contiguous(),
        step.offset.contiguous(),
        step.records,
        decays,
        o,
        H,
        step.eps,
        tile,
    )
    return o, launch.Launch(kernel, (B * H,), arguments, launch.Blocks(num_warps, 1))
