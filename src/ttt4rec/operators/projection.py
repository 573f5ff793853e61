"""In front of the inner loop: the views of the input, rotated, and the inner rates; the Mamba backbone's convolutions.

Schemas are flat, so there is one operator for each number of views.
"""

import torch
from torch import Tensor

from ..arguments import Convolution, Projection
from .operator import Operator

VIEWS, OUTPUTS = (1, 2, 3), (1, 2)
"""How many views or convolutions of one input there may be."""


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in range(count))


def _declare_projection(count: int) -> Operator[Projection]:
    """``count`` views ``[B, L, H, D]``, then the rates ``[B, L, H]``, float32 at least."""

    def fake(given: Projection, _: str) -> tuple[Tensor, ...]:
        (B, L, C), H = given.x.shape, given.lr_weight.shape[0]
        views = [given.x.new_empty(B, L, H, C // H, dtype=given.dtype) for _ in given.weights]
        return *views, given.x.new_empty(B, L, H, dtype=torch.promote_types(given.x.dtype, torch.float32))

    def gradient_dtype(given: Projection, field: str) -> torch.dtype | None:
        return torch.promote_types(given.x.dtype, torch.float32) if field == "lr_bias" else None

    return Operator(
        f"projection_{count}",
        Projection,
        (*_numbered("view", count), "inner_lr"),
        fake,
        function="projection",
        groups={"weights": _numbered("weight", count)},
        differentiable=count + 1,
        gradients=("x", "weights", "lr_weight", "lr_bias"),
        kept=("inner_lr",),
        gradient_dtype=gradient_dtype,
    )


def _declare_convolution(count: int) -> Operator[Convolution]:
    """``count`` outputs ``[B, L, C]`` in x's dtype."""

    def fake(given: Convolution, _: str) -> tuple[Tensor, ...]:
        B, L, C = given.x.shape
        return tuple(given.x.new_empty(B, L - given.lead, C) for _ in given.weights)

    return Operator(
        f"convolution_{count}",
        Convolution,
        _numbered("y", count),
        fake,
        function="convolution",
        groups={"weights": _numbered("weight", count), "biases": _numbered("bias", count)},
        differentiable=count,
        gradients=("x", "weights", "biases"),
    )


PROJECTIONS = {count: _declare_projection(count) for count in VIEWS}
CONVOLUTIONS = {count: _declare_convolution(count) for count in OUTPUTS}
