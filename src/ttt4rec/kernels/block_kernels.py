# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""What stands between the products of long mini-batches: kernels over rows of features, which read each number once.

A program has R tokens of one head of one sequence, all features of them. Tokens are contiguous ``[rows, r, width]``, r
a multiple of R; keys and queries are wider than their features, by a one and zeros.

Numbers in brackets are equations of docs/mathematics.md.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .hidden_layer import gelu
from .primitives import (
    centred,
    inner_gradient,
    inner_gradient_backward,
    layer_norm_backward,
    only_features,
    recentred,
    rounded,
    total,
)


class Rows(NamedTuple):
    """The compile-time sizes and types of a kernel; to the layer norm's jit helpers a row is one head."""

    rows: int  # R
    head_dim: int  # features
    features: int  # the power of two that holds them
    operand: Any  # as in ``Tile``
    dot: Any


@triton.jit
def rows_of(sizes: tl.constexpr):
    """Numbers of the program's tokens among all, [R]."""
    return tl.program_id(0).to(tl.int64) * sizes.rows + tl.arange(0, sizes.rows)


@triton.jit
def places(width, sizes: tl.constexpr):
    """Offsets of the program's tokens in a tensor of rows so wide, and which are features, [R, F] and [1, F]."""
    features = tl.arange(0, sizes.features)
    return rows_of(sizes)[:, None] * width + features[None, :], (features < sizes.head_dim)[None, :]


@triton.jit
def load(pointer, width, sizes: tl.constexpr):
    """Features of the program's tokens in float32, [R, F]."""
    offsets, wanted = places(width, sizes)
    return tl.load(pointer + offsets, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, x, sizes: tl.constexpr):
    """Features of the program's tokens, rounded to nearest if they are stored as operands."""
    offsets, wanted = places(sizes.head_dim, sizes)
    if pointer.dtype.element_ty != tl.float32:
        x = rounded(x, sizes)
    tl.store(pointer + offsets, x, mask=wanted)


@triton.jit
def store_padded(pointer, x, last, width, sizes: tl.constexpr):
    """The same in wider rows: behind the features one number, and zeros."""
    offsets, wanted = places(width, sizes)
    tl.store(pointer + offsets, rounded(x, sizes), mask=wanted)
    behind = tl.arange(0, 8)
    offsets = rows_of(sizes)[:, None] * width + sizes.head_dim + behind[None, :]
    tl.store(pointer + offsets, rounded(tl.where(behind == 0, last, 0.0)[None, :], sizes))


@triton.jit
def load_parameter(pointer, tokens, sizes: tl.constexpr):
    """γ or β of the program's row of ``[rows, D]``, [1, F]."""
    features = tl.arange(0, sizes.features)
    row = tl.program_id(0).to(tl.int64) * sizes.rows // tokens
    return tl.load(pointer + row * sizes.head_dim + features, mask=features < sizes.head_dim, other=0.0)[None, :]


@triton.jit
def store_sum(pointer, x, sizes: tl.constexpr):
    """The program's own sum over its tokens, in ``[programs, D]``."""
    features = tl.arange(0, sizes.features)
    at = tl.program_id(0).to(tl.int64) * sizes.head_dim + features
    tl.store(pointer + at, total(x, 0), mask=features < sizes.head_dim)


@triton.jit
def load_error(Z, k, v, gamma, beta, width, tokens, eps, sizes: tl.constexpr):
    """x̂ and r of Z, γ, and e, (6); v - k by itself, as both may be larger by far."""
    x_hat, r = recentred(centred(load(Z, sizes.head_dim, sizes), sizes), eps, sizes)
    target = load(v, sizes.head_dim, sizes) - load(k, width, sizes)
    gamma = load_parameter(gamma, tokens, sizes)
    return x_hat, r, gamma, gamma * x_hat + (load_parameter(beta, tokens, sizes) - target)


@triton.jit(do_not_specialize=["tokens"])
def inner_gradient_kernel(
    Z,  # [rows, r, D] float32
    k,  # [rows, r, width]
    v,  # [rows, r, D]
    gamma,  # [rows, D] float32, as beta
    beta,
    G,  # [rows, r, D]
    width,
    tokens,  # r
    eps,
    sizes: tl.constexpr,
):
    """G, (6)."""
    x_hat, r, scale, error = load_error(Z, k, v, gamma, beta, width, tokens, eps, sizes)
    store(G, inner_gradient(scale * error, x_hat, r, sizes), sizes)


@triton.jit(do_not_specialize=["tokens"])
def inner_gradient_backward_kernel(
    Z,
    k,
    v,
    gamma,
    beta,
    dG,  # [rows, r, D] float32
    G,
    dZ,  # [rows, r, D]
    de,  # [rows, r, D] float32
    d_gamma,  # [programs, D] float32, as d_beta
    d_beta,
    width,
    tokens,
    eps,
    sizes: tl.constexpr,
):
    """dZ, de, and sums of dγ and dβ, (21) and (23)."""
    x_hat, r, scale, error = load_error(Z, k, v, gamma, beta, width, tokens, eps, sizes)
    dG_rows, G_rows = load(dG, sizes.head_dim, sizes), load(G, sizes.head_dim, sizes)
    along_G = total(dG_rows * G_rows, 1)[:, None]
    dZ_rows, d_error, d_scale = inner_gradient_backward(dG_rows, along_G, G_rows, error, x_hat, r, scale, sizes)
    store(dZ, dZ_rows, sizes)
    store(de, d_error, sizes)
    store_sum(d_gamma, d_scale, sizes)
    store_sum(d_beta, d_error, sizes)


@triton.jit(do_not_specialize=["tokens"])
def output_kernel(
    P,  # [rows, r, D] float32
    q,  # [rows, r, width]
    gamma,
    beta,
    o,  # [rows, r, D]
    width,
    tokens,
    eps,
    sizes: tl.constexpr,
):
    """O = Q + LN(P)."""
    x_hat, _ = recentred(centred(load(P, sizes.head_dim, sizes), sizes), eps, sizes)
    normed = load_parameter(gamma, tokens, sizes) * x_hat + load_parameter(beta, tokens, sizes)
    store(o, load(q, width, sizes) + normed, sizes)


@triton.jit(do_not_specialize=["tokens"])
def output_backward_kernel(P, dO, gamma, dP, d_gamma, d_beta, tokens, eps, sizes: tl.constexpr):
    """dP, and sums of what dO gives γ and β, (15)."""
    x_hat, r = recentred(centred(load(P, sizes.head_dim, sizes), sizes), eps, sizes)
    d_out = load(dO, sizes.head_dim, sizes)
    store(dP, layer_norm_backward(load_parameter(gamma, tokens, sizes) * d_out, x_hat, r, sizes), sizes)
    store_sum(d_gamma, d_out * x_hat, sizes)
    store_sum(d_beta, d_out, sizes)


@triton.jit
def gelu_kernel(Z, X, width, sizes: tl.constexpr):
    """gelu(Z), and behind it a one."""
    value, _, _ = gelu(load(Z, sizes.head_dim, sizes))
    store_padded(X, only_features(value, sizes), 1.0, width, sizes)


@triton.jit
def slope_kernel(Z, x, out, width, padded: tl.constexpr, sizes: tl.constexpr):
    """x ∘ gelu'(Z), and if padded zeros behind it."""
    _, slope, _ = gelu(load(Z, sizes.head_dim, sizes))
    x = load(x, sizes.head_dim, sizes) * slope
    if padded:
        store_padded(out, x, 0.0, width, sizes)
    else:
        store(out, x, sizes)


@triton.jit
def hidden_backward_kernel(Z, dX, dG, before, dZ, sizes: tl.constexpr):
    """dZ1, (27), from dX2, dG1 and G2_W2."""
    _, slope, curvature = gelu(load(Z, sizes.head_dim, sizes))
    through = load(dG, sizes.head_dim, sizes) * load(before, sizes.head_dim, sizes) * curvature
    store(dZ, load(dX, sizes.head_dim, sizes) * slope + through, sizes)


@triton.jit
def scaled_kernel(x, scale, period, y, out, dots, sizes: tl.constexpr):
    """Rows times a number each, of which there are as many as the period, and their products with the rows of y."""
    rows = rows_of(sizes)
    x_rows = load(x, sizes.head_dim, sizes)
    store(out, tl.load(scale + rows % period)[:, None] * x_rows, sizes)
    if y is not None:
        tl.store(dots + rows, total(x_rows * load(y, sizes.head_dim, sizes), 1))


@triton.jit
def causal_kernel(pairs, out, add: tl.constexpr, sizes: tl.constexpr):
    """tril(pairs + add) of blocks of as many tokens as a row has features."""
    columns = tl.arange(0, sizes.features)
    kept = (rows_of(sizes) % sizes.head_dim)[:, None] >= columns[None, :]
    store(out, tl.where(kept, load(pairs, sizes.head_dim, sizes) + add, 0.0), sizes)


@triton.jit(do_not_specialize=["blocks"])
def running_kernel(
    sums,  # [rows, blocks, numbers] float32
    last,  # [rows, numbers] float32, or None
    out,  # [rows, blocks, numbers]
    all,  # [rows, numbers] float32
    blocks,
    numbers,
    sizes: tl.constexpr,
):
    """Of every block the sum of all before it, or after it and of what is last; and the sum of all. F numbers each."""
    parts = tl.cdiv(numbers, sizes.features)
    row = (tl.program_id(0) // parts).to(tl.int64)
    columns = tl.program_id(0) % parts * sizes.features + tl.arange(0, sizes.features)
    wanted = columns < numbers
    F: tl.constexpr = sizes.features
    sum, behind = tl.zeros((F,), tl.float32), 0.0
    if last is not None:
        behind = tl.load(last + row * numbers + columns, mask=wanted, other=0.0)
    for i in range(blocks):
        block = i if last is None else blocks - 1 - i
        at = (row * blocks + block) * numbers + columns
        tl.store(out + at, rounded(sum + behind, sizes), mask=wanted)
        sum += tl.load(sums + at, mask=wanted, other=0.0)
    tl.store(all + row * numbers + columns, sum + behind, mask=wanted)
