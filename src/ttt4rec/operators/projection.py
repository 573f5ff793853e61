"""In front of the inner loop: the views of the input, rotated, and the inner rates; the Mamba backbone's convolutions.

Schemas are flat, so there is one operator for each number of views.
"""

import torch
from torch import Tensor

from ..arguments import Convolution, Projection
from .operator import Operator
from .samples import Draw, Sizes

VIEWS, OUTPUTS = (1, 2, 3), (1, 2)
"""How many views or convolutions of one input there may be."""


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in range(count))


def _angles(sizes: Sizes, draw: Draw) -> tuple[Tensor, Tensor]:
    """The cos and sin of any."""
    angles = draw.wide.normal(sizes.K, sizes.D // 2)
    return angles.cos(), angles.sin()


def _declare_projection(count: int) -> Operator[Projection]:
    """``count`` views ``[B, L, H, D]``, then the rates ``[B, L, H]``, float32 at least."""

    def fake(given: Projection, _: str) -> tuple[Tensor, ...]:
        (B, L, C), H = given.x.shape, given.lr_weight.shape[0]
        views = [given.x.new_empty(B, L, H, C // H, dtype=given.dtype) for _ in given.weights]
        return *views, given.x.new_empty(B, L, H, dtype=torch.promote_types(given.x.dtype, torch.float32))

    def gradient_dtype(given: Projection, field: str) -> torch.dtype | None:
        return torch.promote_types(given.x.dtype, torch.float32) if field == "lr_bias" else None

    def sample(sizes: Sizes, draw: Draw, *, rotated: int = 2, by_row: bool = False) -> Projection:
        """The rotated ones are at most all; places are those of every row by itself, or the same."""
        B, L, H, D, K = sizes
        C, places = H * D, draw.places(K, B, L) if by_row else draw.places(K, L)
        weights = tuple(draw.weight(C, C, fan=C) for _ in range(count))
        rates, angles = (draw.weight(H, C, fan=C), draw.normal(H)), _angles(sizes, draw)
        return Projection(draw.normal(B, L, C), weights, *rates, *angles, places, min(rotated, count), 1.0, draw.dtype)

    return Operator(
        f"projection_{count}",
        Projection,
        (*_numbered("view", count), "inner_lr"),
        fake,
        sample,
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

    def sample(sizes: Sizes, draw: Draw, *, taps: int = 4, lead: int = 0, plain: bool = False) -> Convolution:
        """Of rows that hold sequences of K tokens, rotated; plain: of one, and not rotated."""
        B, L, H, D, K = sizes
        C, places = H * D, draw.places(K, B, L)
        weights = tuple(draw.weight(C, taps, fan=taps) for _ in range(count))
        x, biases = draw.normal(B, lead + L, C), tuple(draw.normal(C) for _ in range(count))
        if plain:
            return Convolution(x, weights, biases, None, None, None, None, lead)
        return Convolution(x, weights, biases, *_angles(sizes, draw), places, places, lead)

    return Operator(
        f"convolution_{count}",
        Convolution,
        _numbered("y", count),
        fake,
        sample,
        function="convolution",
        groups={"weights": _numbered("weight", count), "biases": _numbered("bias", count)},
        differentiable=count,
        gradients=("x", "weights", "biases"),
    )


PROJECTIONS = {count: _declare_projection(count) for count in VIEWS}
CONVOLUTIONS = {count: _declare_convolution(count) for count in OUTPUTS}
