# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""The views of x and the inner rates: one launch that reads x once, or the library's products and one launch more.

Numbers in brackets are equations of docs/mathematics.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Projection
from . import launch
from .primitives import dot
from .projection import columns, contiguous, exact_product, flat, fused, load_angles, prepare, turned


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def fused_forward_kernel(
    x,  # [T, C]
    weights,  # three of [C, C], output features first
    rates,  # w_lr [H, C], b_lr [H]
    table,  # cos, sin [K, D/2]
    positions,  # [num_positions]
    views,  # three of [T, C]
    inner_lr,  # [T, H]
    num_tokens,
    num_positions,
    base_lr,
    exact: tl.constexpr,  # product of the rates
    sizes: tl.constexpr,
):
    """One program: R tokens, all their results, (31)."""
    lr_weight, lr_bias = rates
    rows = tl.program_id(0).to(tl.int64) * sizes.rows + tl.arange(0, sizes.rows)
    inputs = tl.arange(0, sizes.inputs)
    exists, own = rows < num_tokens, inputs < sizes.width
    X = tl.load(x + rows[:, None] * sizes.width + inputs[None, :], mask=exists[:, None] & own[None, :], other=0.0)

    heads = tl.arange(0, sizes.head_columns)
    mask = (heads < sizes.heads)[:, None] & own[None, :]
    w = tl.load(lr_weight + heads[:, None] * sizes.width + inputs[None, :], mask=mask, other=0.0)
    store_rates(dot(X, tl.trans(w), exact), lr_bias, inner_lr, rows, num_tokens, base_lr, sizes)

    for first in tl.range(0, sizes.width, sizes.features):
        outputs = first + tl.arange(0, sizes.features)
        if sizes.rotated > 0:
            cos, sin = load_angles(table, positions, rows, num_tokens, num_positions, first, sizes)
        W_mask = (outputs < sizes.width)[:, None] & own[None, :]
        for i in tl.static_range(3):
            W = tl.load(weights[i] + outputs[:, None] * sizes.width + inputs[None, :], mask=W_mask, other=0.0)
            view = dot(X, tl.trans(W), sizes)
            if i < sizes.rotated:
                view = turned(view, cos, sin, sizes)
            target = views[i] + rows[:, None] * sizes.width + outputs[None, :]
            tl.store(target, view.to(sizes.operand), mask=exists[:, None] & (outputs < sizes.width)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_positions"])
def rotation_kernel(
    x,  # [T, C]
    rates,  # w_lr [H, C], b_lr [H]
    table,  # cos, sin [K, D/2]
    positions,  # [num_positions]
    views,  # three of [T, C], to be rotated in place
    inner_lr,  # [T, H]
    num_tokens,
    num_positions,
    base_lr,
    exact: tl.constexpr,  # product of the rates
    sizes: tl.constexpr,
):
    """One program: what is left to do for R tokens when their views are products without rotation."""
    lr_weight, lr_bias = rates
    rows = tl.program_id(0).to(tl.int64) * sizes.rows + tl.arange(0, sizes.rows)
    R: tl.constexpr = sizes.rows
    P: tl.constexpr = sizes.head_columns
    heads = tl.arange(0, P)
    logits = tl.zeros((R, P), tl.float32)
    for first in tl.range(0, sizes.width, sizes.features):
        features = first + tl.arange(0, sizes.features)
        own = features < sizes.width
        offsets = rows[:, None] * sizes.width + features[None, :]
        mask = (rows < num_tokens)[:, None] & own[None, :]
        w_mask = (heads < sizes.heads)[:, None] & own[None, :]
        w = tl.load(lr_weight + heads[:, None] * sizes.width + features[None, :], mask=w_mask, other=0.0)
        logits += dot(tl.load(x + offsets, mask=mask, other=0.0), tl.trans(w), exact)
        if sizes.rotated > 0:
            cos, sin = load_angles(table, positions, rows, num_tokens, num_positions, first, sizes)
        for i in tl.static_range(3):
            if i < sizes.rotated:
                view = tl.load(views[i] + offsets, mask=mask, other=0.0).to(tl.float32)
                tl.store(views[i] + offsets, turned(view, cos, sin, sizes).to(sizes.operand), mask=mask)
    store_rates(logits, lr_bias, inner_lr, rows, num_tokens, base_lr, sizes)


@triton.jit
def store_rates(logits, bias, inner_lr, rows, num_tokens, base_lr, sizes: tl.constexpr):
    """Add the bias to logits [R, heads] and store the rates."""
    heads = tl.arange(0, sizes.head_columns)
    logits += tl.load(bias + heads, mask=heads < sizes.heads, other=0.0).to(tl.float32)[None, :]
    mask = (rows < num_tokens)[:, None] & (heads < sizes.heads)[None, :]
    rate = tl.sigmoid(logits) * (base_lr / sizes.head_dim)
    tl.store(inner_lr + rows[:, None] * sizes.heads + heads[None, :], rate, mask=mask)


@launch.on_its_device
def projection(given: Projection) -> tuple[Tensor, ...]:
    """A view ``[B, L, H, D]`` for each weight, and the rates ``[B, L, H]``, float32.

    Raises:
        ValueError: the kernels do not run that dtype.
    """
    results, prepared = prepare_projection(given)
    prepared.run()
    return results


def prepare_projection(given: Projection) -> tuple[tuple[Tensor, ...], launch.Launch]:
    """Allocate the results and make the launch that fills them, of views computed before where that is faster."""
    x, weights, dtype, (B, L, C) = given.x, given.weights, given.dtype, given.x.shape
    H, D = given.lr_weight.shape[0], 2 * given.cos.shape[1]
    whole = fused("forward", C, dtype)
    sizes, blocks = columns("fused_forward" if whole else "rotation", given)
    inner_lr = torch.empty((B, L, H), dtype=torch.float32, device=x.device)
    if whole:
        views = [torch.empty((B, L, H, D), dtype=dtype, device=x.device) for _ in weights]
    else:
        views = [(flat(x).to(dtype) @ w.to(dtype).t()).view(B, L, H, D) for w in weights]
    kernel = fused_forward_kernel if whole else rotation_kernel
    arguments = (
        flat(x),
        *((contiguous(*weights),) if whole else ()),
        contiguous(given.lr_weight, given.lr_bias),
        contiguous(given.cos, given.sin),
        given.positions.contiguous(),
        tuple(views),
        inner_lr,
        B * L,
        given.positions.numel(),
        given.base_lr,
        exact_product(x, given.lr_weight),
    )
    return (*views, inner_lr), prepare(kernel, triton.cdiv(B * L, sizes.rows), arguments, blocks, sizes)
