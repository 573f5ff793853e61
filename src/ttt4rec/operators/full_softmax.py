"""The loss of items under the softmax over all of them: every state's own, and the sum, computed with its gradients."""

from typing import Any

import torch
from torch import Tensor

from ..arguments import FullSoftmax
from ..item_blocks import score_dtype
from .operator import Operator
from .samples import Draw, Sizes


def _sample(sizes: Sizes, draw: Draw) -> FullSoftmax:
    """K items more than a head has features."""
    B, L, H, D, K = sizes
    N, C, num_items = B * L, H * D, D + K
    return FullSoftmax(draw.normal(N, C), draw.normal(num_items + 1, C), 1 + draw.places(num_items, N))


def _fake(given: FullSoftmax, _: str) -> tuple[Tensor, ...]:
    h = given.h
    nll = h.new_empty(h.shape[0], dtype=score_dtype(h, given.table))
    return nll, h.new_empty(h.shape[0], dtype=torch.float64)


def _fake_total(given: FullSoftmax, _: str) -> tuple[Tensor, ...]:
    h, table = given.h, given.table
    dtype = score_dtype(h, table)
    return tuple(h.new_empty(shape, dtype=dtype) for shape in ((), h.shape, table.shape))


_GRADIENTS: dict[str, Any] = {"differentiable": 1, "gradients": ("h", "table")}

full_softmax_nll = Operator(
    "full_softmax_nll", FullSoftmax, ("nll", "lse"), _fake, _sample, kept=("lse",), **_GRADIENTS
)
"""Losses ``[N]``, and the logarithms of the softmax's denominators, float64 ``[N]``; scores are computed twice."""

full_softmax_total_nll = Operator(
    "full_softmax_total_nll",
    FullSoftmax,
    ("total", "grad_h", "grad_table"),
    _fake_total,
    _sample,
    kept=("grad_h", "grad_table"),
    **_GRADIENTS,
)
"""Their sum, and its gradients of h and table, float32 (float64), which the backward multiplies."""
