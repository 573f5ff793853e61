"""In front of the inner loop: the views of the input, rotated, and the inner rates; causal convolutions."""

import torch
from torch import Tensor

from ..arguments import Convolution, Projection
from .operator import Operator
from .samples import Draw, Sizes


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in range(count))


def _angles(sizes: Sizes, draw: Draw) -> tuple[Tensor, Tensor]:
    """The cos and sin of any."""
    angles = draw.wide.normal(sizes.K, sizes.D // 2)
    return angles.cos(), angles.sin()


def _fake(given: Projection, _: str) -> tuple[Tensor, ...]:
    (B, L, C), H = given.x.shape, given.lr_weight.shape[0]
    views = [given.x.new_empty(B, L, H, C // H, dtype=given.dtype) for _ in given.weights]
    return *views, given.x.new_empty(B, L, H, dtype=torch.promote_types(given.x.dtype, torch.float32))


def _gradient_dtype(given: Projection, field: str) -> torch.dtype | None:
    return torch.promote_types(given.x.dtype, torch.float32) if field == "lr_bias" else None


def _sample(sizes: Sizes, draw: Draw, *, rotated: int = 2, by_row: bool = False) -> Projection:
    """Places are those of every row by itself, or all rows'."""
    B, L, H, D, K = sizes
    C, places = H * D, draw.places(K, B, L) if by_row else draw.places(K, L)
    weights = tuple(draw.weight(C, C, fan=C) for _ in range(3))
    rates, angles = (draw.weight(H, C, fan=C), draw.normal(H)), _angles(sizes, draw)
    return Projection(draw.normal(B, L, C), weights, *rates, *angles, places, rotated, 1.0, draw.dtype)


projection = Operator(
    "projection",
    Projection,
    (*_numbered("view", 3), "inner_lr"),
    _fake,
    _sample,
    groups={"weights": _numbered("weight", 3)},
    differentiable=4,
    gradients=("x", "weights", "lr_weight", "lr_bias"),
    kept=("inner_lr",),
    gradient_dtype=_gradient_dtype,
)
"""Three views ``[B, L, H, D]``, then the rates ``[B, L, H]``, float32 at least."""


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


CONVOLUTIONS = {count: _declare_convolution(count) for count in (1, 2)}
"""By how many there are, since schemas are flat: a block's own, and those of queries and keys."""
