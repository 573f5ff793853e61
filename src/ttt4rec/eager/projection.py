"""The views of the input and their inner rates: one matrix product each, the rotation a complex product in place.

A pair of features (2i, 2i+1) is a complex number and its rotation a product with ``cos + i sin``. A rotation is undone
by the conjugate, so the backward needs nothing of the forward but the rates.

Numbers in brackets are equations of docs/mathematics.md.
"""

import torch
from torch import Tensor

from ..arguments import Projection


def projection(given: Projection) -> tuple[Tensor, ...]:
    """Project x with every weight, rotate the first of the results, and compute the inner rates.

    Returns:
        A view ``[B, L, H, D]`` for each weight, and the rates ``[B, L, H]``, float32 at least.
    """
    x, heads = given.x, (given.lr_weight.shape[0], 2 * given.cos.shape[1])
    tokens = x.reshape(-1, x.shape[-1])
    narrow = tokens.to(given.dtype)
    views = [(narrow @ w.to(given.dtype).t()).view(*x.shape) for w in given.weights]
    if given.rotated:
        table = rotation_table(given.cos, given.sin, given.positions, heads[0])
        views[: given.rotated] = [turn(view, table) for view in views[: given.rotated]]
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = torch.addmm(given.lr_bias.to(wide), tokens.to(wide), given.lr_weight.to(wide).t())
    rates = logits.sigmoid_().mul_(given.base_lr).div_(heads[1])
    return *(view.unflatten(-1, heads) for view in views), rates.unflatten(0, x.shape[:2])


def projection_backward(given: Projection, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of x, of every weight, and of w_lr and b_lr, from the rates and the gradients of views and rates.

    The gradient of x is summed in ``dtype``.
    """
    x, lr_weight, dtype, (inner_lr,), (*d_views, grad_lr) = given.x, given.lr_weight, given.dtype, kept, grads
    tokens, wide = x.reshape(-1, x.shape[-1]), inner_lr.dtype
    narrow = tokens.to(dtype)
    d_views = [g.to(dtype).reshape(x.shape) for g in d_views]
    if given.rotated:
        table = rotation_table(given.cos, -given.sin, given.positions, lr_weight.shape[0])
        d_views[: given.rotated] = [turned(g, table) for g in d_views[: given.rotated]]
    # dz, (32)
    d_logits = grad_lr * inner_lr * (1 - inner_lr * (2 * given.cos.shape[1] / given.base_lr))
    d_logits = d_logits.flatten(0, 1)
    dx = d_logits.to(dtype) @ lr_weight.to(dtype)
    d_weights = []
    for g, w in zip(d_views, given.weights, strict=True):
        g = g.flatten(0, 1)
        dx.addmm_(g, w.to(dtype))
        d_weights.append((g.t() @ narrow).to(w.dtype))
    d_lr_weight = (d_logits.t() @ tokens.to(wide)).to(lr_weight.dtype)
    return dx.to(x.dtype).view(x.shape), *d_weights, d_lr_weight, d_logits.sum(0)


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
