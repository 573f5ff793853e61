"""In front of the inner loop: the views of the input, rotated, and the inner rates."""

import torch
from torch import Tensor

from ..arguments import Projection
from .operator import Gradients, Operator, numbered
from .samples import Draw, Sizes, angles


def _fake(given: Projection, _: str) -> tuple[Tensor, ...]:
    (B, L, C), H = given.x.shape, given.lr_weight.shape[0]
    views = [given.x.new_empty(B, L, H, C // H, dtype=given.dtype) for _ in given.weights]
    return *views, given.x.new_empty(B, L, H, dtype=torch.promote_types(given.x.dtype, torch.float32))


def _gradient_dtype(given: Projection, field: str) -> torch.dtype | None:
    return torch.promote_types(given.x.dtype, torch.float32) if field == "lr_bias" else None


def _sample(sizes: Sizes, draw: Draw, *, rotated: int = 2, by_row: bool = False) -> Projection:
    """Places are every row's own, or all rows'."""
    B, L, H, D, K = sizes
    C, places = H * D, draw.places(K, B, L) if by_row else draw.places(K, L)
    weights = tuple(draw.weight(C, C, fan=C) for _ in range(3))
    rates, turns = (draw.weight(H, C, fan=C), draw.normal(H)), angles(sizes, draw)
    return Projection(draw.normal(B, L, C), weights, *rates, *turns, places, rotated, 1.0, draw.dtype)


projection = Operator(
    "projection",
    Projection,
    (*numbered("view", 3), "inner_lr"),
    _fake,
    _sample,
    groups={"weights": numbered("weight", 3)},
    gradients=Gradients(("x", "weights", "lr_weight", "lr_bias"), 4, kept=("inner_lr",), dtype=_gradient_dtype),
)
"""Three views ``[B, L, H, D]``, then the rates ``[B, L, H]``, float32 at least."""
