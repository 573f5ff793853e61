# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""Gradients of the projections: one launch that reads every token once, or one that packs and the library's products.

Sums over tokens are taken in a fixed order. Gradients of the logits are rounded to the operands' type like the others.

Numbers in brackets are equations of docs/mathematics.md.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Projection
from . import launch
from .primitives import dot, total
from .projection import (
    PARTIAL_SUMS,
    columns,
    contiguous,
    flat,
    fused,
    load_angles,
    logit_gradient,
    prepare,
    turned,
)


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def fused_backward_kernel(
    grads,  # of the three views [T, C]
    rates,  # the gradient of the rates, and the rates [T, H]
    x,  # [T, C]
    weights,  # three of [C, C], and w_lr [H, C]
    table,  # cos, sin [K, D/2]
    positions,  # [num_positions]
    dx,  # [T, C]
    d_weights,  # one [P, C, C] a weight and [P, H, C], float32
    d_bias,  # [P, H]
    num_tokens,
    num_positions,
    base_lr,
    sizes: tl.constexpr,
):
    """One program of P: every P-th block of R tokens, the weights' gradients in registers; (32)."""
    grad0, grad1, grad2 = grads
    grad_lr, inner_lr = rates
    weight0, weight1, weight2, lr_weight = weights
    d_weight0, d_weight1, d_weight2, d_lr_weight = d_weights
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    features, heads = tl.arange(0, sizes.inputs), tl.arange(0, sizes.head_columns)
    own = features < sizes.width
    square = features[:, None] * sizes.width + features[None, :]
    square_mask = own[:, None] & own[None, :]
    W0 = tl.load(weight0 + square, mask=square_mask, other=0.0)
    W1 = tl.load(weight1 + square, mask=square_mask, other=0.0)
    W2 = tl.load(weight2 + square, mask=square_mask, other=0.0)
    head_offsets = heads[:, None] * sizes.width + features[None, :]
    head_mask = (heads < sizes.heads)[:, None] & own[None, :]
    w = tl.load(lr_weight + head_offsets, mask=head_mask, other=0.0)
    N: tl.constexpr = sizes.inputs
    P: tl.constexpr = sizes.head_columns
    dW0 = tl.zeros((N, N), tl.float32)
    dW1 = tl.zeros_like(dW0)
    minus_dW2 = tl.zeros_like(dW0)
    dw = tl.zeros((P, N), tl.float32)
    db = tl.zeros((P,), tl.float32)
    for block in tl.range(program, tl.cdiv(num_tokens, sizes.rows), num_programs):
        rows = tl.arange(0, sizes.rows).to(tl.int64) + block * sizes.rows
        offsets = rows[:, None] * sizes.width + features[None, :]
        mask = (rows < num_tokens)[:, None] & own[None, :]
        X = tl.load(x + offsets, mask=mask, other=0.0)
        d0 = tl.load(grad0 + offsets, mask=mask, other=0.0).to(tl.float32)
        d1 = tl.load(grad1 + offsets, mask=mask, other=0.0).to(tl.float32)
        d2 = tl.load(grad2 + offsets, mask=mask, other=0.0)
        if sizes.rotated > 0:
            cos, sin = load_angles(table, positions, rows, num_tokens, num_positions, 0, sizes)
            d0 = turned(d0, cos, -sin, sizes)
            d1 = turned(d1, cos, -sin, sizes)
        dz = logit_gradient(grad_lr, inner_lr, rows, num_tokens, base_lr, sizes)
        d_X = dot(d0, W0, sizes) + dot(d1, W1, sizes) + dot(d2, W2, sizes) + dot(dz, w, sizes)
        tl.store(dx + offsets, d_X.to(dx.dtype.element_ty), mask=mask)
        dW0 += dot(tl.trans(d0), X, sizes)
        dW1 += dot(tl.trans(d1), X, sizes)
        # Subtracted, which no product does by itself: so this one, and those before, have read X and d2 when Triton's
        # pipeline copies the next tokens over them.
        minus_dW2 -= dot(tl.trans(d2), X, sizes)
        dw += dot(tl.trans(dz), X, sizes)
        db += total(dz, 0)
    partial = program.to(tl.int64) * sizes.width * sizes.width
    tl.store(d_weight0 + partial + square, dW0, mask=square_mask)
    tl.store(d_weight1 + partial + square, dW1, mask=square_mask)
    tl.store(d_weight2 + partial + square, -minus_dW2, mask=square_mask)
    tl.store(d_lr_weight + program * sizes.heads * sizes.width + head_offsets, dw, mask=head_mask)
    tl.store(d_bias + program * sizes.heads + heads, db, mask=heads < sizes.heads)


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def packing_kernel(
    grads,  # of the three views [T, C]
    rates,  # the gradient of the rates, and the rates [T, H]
    table,  # cos, sin [K, D/2]
    positions,  # [num_positions]
    packed,  # [T, 3C + heads]
    num_tokens,
    num_positions,
    base_lr,
    sizes: tl.constexpr,
):
    """One program: the gradients of R tokens' views, turned back, side by side, and the logits' behind."""
    grad_lr, inner_lr = rates
    rows = tl.program_id(0).to(tl.int64) * sizes.rows + tl.arange(0, sizes.rows)
    exists = (rows < num_tokens)[:, None]
    target = packed + rows[:, None] * (3 * sizes.width + sizes.head_columns)
    for first in tl.range(0, sizes.width, sizes.features):
        features = first + tl.arange(0, sizes.features)
        mask = exists & (features < sizes.width)[None, :]
        if sizes.rotated > 0:
            cos, sin = load_angles(table, positions, rows, num_tokens, num_positions, first, sizes)
        for i in tl.static_range(3):
            d = tl.load(grads[i] + rows[:, None] * sizes.width + features[None, :], mask=mask, other=0.0)
            if i < sizes.rotated:
                d = turned(d.to(tl.float32), cos, -sin, sizes).to(sizes.operand)
            tl.store(target + i * sizes.width + features[None, :], d, mask=mask)
    dz = logit_gradient(grad_lr, inner_lr, rows, num_tokens, base_lr, sizes).to(sizes.operand)
    tl.store(target + 3 * sizes.width + tl.arange(0, sizes.head_columns)[None, :], dz, mask=exists)


@launch.on_its_device
def projection_backward(given: Projection, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of x, of the three weights, w_lr and b_lr, the last float32, from the gradients of views and rates.

    The rates are kept. Errors as in ``projection``. Two runs give the same bits.
    """
    results, prepared = prepare_projection_backward(given, kept, grads)
    prepared.run()
    x, dtype, weights = given.x, given.dtype, (*given.weights, given.lr_weight)
    if fused("backward", x.shape[2], dtype):
        dx, *partial_sums = results
        *d_weights, d_bias = (partial.sum(0) for partial in partial_sums)
    else:
        (packed,) = results
        H, C = given.lr_weight.shape
        stacked = torch.cat([w.to(dtype) for w in weights])
        packed = packed[:, : 3 * C + H]  # the padding behind is there for the alignment of rows
        dx = packed @ stacked
        *d_weights, d_lr_weight = (packed.t() @ flat(x).to(dtype)).split([C, C, C, H])
        d_weights, d_bias = [*d_weights, d_lr_weight], packed[:, 3 * C :].sum(0, dtype=torch.float32)
    own = [d.to(w.dtype, copy=True) for d, w in zip(d_weights, weights, strict=True)]
    return dx.to(x.dtype).view(x.shape), *own, d_bias


def prepare_projection_backward(
    given: Projection, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[list[Tensor], launch.Launch]:
    """Make a launch and what it fills: dx and the parameters' partial sums, or the packed gradients."""
    x, dtype, (inner_lr,), (*d_views, grad_lr) = given.x, given.dtype, kept, grads
    H, C = given.lr_weight.shape
    num_tokens = x.shape[0] * x.shape[1]
    whole = fused("backward", C, dtype)
    operands: tuple[Any, ...] = ()
    outputs: tuple[Any, ...]
    sizes, blocks = columns("fused_backward" if whole else "packing", given)
    num_programs = triton.cdiv(num_tokens, sizes.rows)
    if whole:
        num_programs = min(num_programs, PARTIAL_SUMS)
        shapes = [(num_programs, C, C)] * 3 + [(num_programs, H, C), (num_programs, H)]
        partial_sums = [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes]
        results = [torch.empty(x.shape, dtype=x.dtype, device=x.device), *partial_sums]
        kernel = fused_backward_kernel
        operands = (flat(x), contiguous(*given.weights, given.lr_weight))
        outputs = (results[0], tuple(partial_sums[:-1]), partial_sums[-1])
    else:
        results = [torch.empty((num_tokens, 3 * C + sizes.head_columns), dtype=dtype, device=x.device)]
        kernel, outputs = packing_kernel, (results[0],)
    arguments = (
        tuple(flat(g) for g in d_views),
        contiguous(grad_lr, inner_lr),
        *operands,
        contiguous(given.cos, given.sin),
        given.positions.contiguous(),
        *outputs,
        num_tokens,
        given.positions.numel(),
        given.base_lr,
    )
    return results, prepare(kernel, num_programs, arguments, blocks, sizes)
