"""The loss of items under the softmax over all of them: every state's own, and the sum, computed with its gradients."""

import torch
from torch import Tensor

from ..arguments import FullSoftmax
from ..item_blocks import score_dtype
from .operator import Gradients, Operator
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


_GRADIENTS = Gradients(("h", "table"), differentiable=1)

full_softmax_nll = Operator(
    "full_softmax_nll", FullSoftmax, ("nll", "lse"), _fake, _sample, gradients=_GRADIENTS._replace(kept=("lse",))
)
"""Losses ``[N]``, and the logarithms of the softmax's denominators, float64 ``[N]``; scores are computed twice."""

full_softmax_total_nll = Operator(
    "full_softmax_total_nll",
    FullSoftmax,
    ("total", "grad_h", "grad_table"),
    _fake_total,
    _sample,
    gradients=_GRADIENTS._replace(kept=("grad_h", "grad_table")),
)
"""Their sum, and its gradients of h and table, float32 (float64), which the backward multiplies."""
