"""The views of the input and their inner rates: one matrix product each, the rotation a complex product in place.

A pair of features (2i, 2i+1) is a complex number and its rotation a product with ``cos + i sin``. A rotation is undone
by the conjugate, so the backward needs nothing of the forward but the rates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def projection_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lr_weight: Tensor,
    lr_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rotated: int,
    base_lr: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Project x with every weight, rotate the first ``rotated`` of the results, and compute the inner rates.

    Args:
        x: ``[B, L, C]``.
        weights: each ``[C, C]``, output features first.
        lr_weight: w_lr ``[H, C]``.
        lr_bias: b_lr ``[H]``.
        cos: of the angles at every place in a mini-batch ``[K, D/2]``, float32 or float64.
        sin: the same.
        positions: every token's place in its mini-batch, ``[L]`` or ``[B, L]``.
        rotated: how many results to rotate.
        base_lr: η_base.
        dtype: in which to multiply, and of the results.

    Returns:
        A view ``[B, L, H, D]`` for each weight, and the rates ``[B, L, H]``, float32 at least.
    """
    tokens, heads = x.reshape(-1, x.shape[-1]), (lr_weight.shape[0], 2 * cos.shape[1])
    narrow = tokens.to(dtype)
    views = [(narrow @ w.to(dtype).t()).view(*x.shape) for w in weights]
    if rotated:
        table = rotation_table(cos, sin, positions, heads[0])
        views[:rotated] = [turn(view, table) for view in views[:rotated]]
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = torch.addmm(lr_bias.to(wide), tokens.to(wide), lr_weight.to(wide).t())
    rates = logits.sigmoid_().mul_(base_lr).div_(heads[1])
    return [*(view.unflatten(-1, heads) for view in views), rates.unflatten(0, x.shape[:2])]


def projection_backward(
    grads: Sequence[Tensor],
    grad_lr: Tensor,
    inner_lr: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    lr_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rotated: int,
    base_lr: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of x, of every weight, and of w_lr and b_lr, from those of the views and the rates.

    The gradient of x is summed in ``dtype``.
    """
    tokens, wide = x.reshape(-1, x.shape[-1]), inner_lr.dtype
    narrow = tokens.to(dtype)
    d_views = [g.to(dtype).reshape(x.shape) for g in grads]
    if rotated:
        table = rotation_table(cos, -sin, positions, lr_weight.shape[0])
        d_views[:rotated] = [turned(g, table) for g in d_views[:rotated]]
    d_logits = grad_lr * inner_lr * (1 - inner_lr * (2 * cos.shape[1] / base_lr))  # lr = base_lr · sigmoid / D
    d_logits = d_logits.flatten(0, 1)
    dx = d_logits.to(dtype) @ lr_weight.to(dtype)
    d_weights = []
    for g, w in zip(d_views, weights, strict=True):
        g = g.flatten(0, 1)
        dx.addmm_(g, w.to(dtype))
        d_weights.append((g.t() @ narrow).to(w.dtype))
    d_lr_weight = (d_logits.t() @ tokens.to(wide)).to(lr_weight.dtype)
    return [dx.to(x.dtype).view(x.shape), *d_weights, d_lr_weight, d_logits.sum(0)]


def rotation_table(cos: Tensor, sin: Tensor, positions: Tensor, num_heads: int) -> Tensor:
    """``cos + i sin`` for all heads at every token, complex ``[L, C/2]`` or ``[B, L, C/2]``.

    The heads share their angles, but a product whose rows are as long as x's is much faster than one per head.
    """
    table = torch.complex(cos, sin).repeat(1, num_heads)
    return table.index_select(0, positions.flatten()).view(*positions.shape, -1)


def turned(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x ``[B, L, C]`` into fresh memory."""
    pairs = torch.view_as_complex(x.to(table.real.dtype).contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def turn(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x ``[B, L, C]``, in place where it already has the precision of the table."""
    wide = x.to(table.real.dtype)
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(table)
    return wide.to(x.dtype)
