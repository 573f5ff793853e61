"""The inner loops for CPUs in C++, and a catalogue's softmax and best items, compiled for the machine at first use.

The inner loops have the algorithm and the functions of the fused kernels and of ``ttt4rec.eager``. What differs is
where the numbers are: one row, a (sequence, head) pair, is walked at a time with its weights and tiles in the first
cache, and only tokens, inner gradients and the weights at either end pass through memory.
"""

import functools
from typing import Any

import torch

from ..arguments import BestItems, FullSoftmax, ItemTable, LayerParts, ModelParts, Scan, TokenStep, WholeLayer
from ..item_blocks import score_dtype
from . import build
from .cache import BuildError
from .full_softmax import (
    full_softmax_nll,
    full_softmax_nll_backward,
    full_softmax_total_nll,
    full_softmax_total_nll_backward,
    softmax_refusal,
)
from .inner_loop import (
    linear_forgetting_scan,
    linear_forgetting_scan_backward,
    linear_scan,
    linear_scan_backward,
    mlp_forgetting_scan,
    mlp_forgetting_scan_backward,
    mlp_scan,
    mlp_scan_backward,
)
from .item_index import best_items, index_items
from .step import forgetting_token_step, token_step
from .whole_layer import layer_passes
from .whole_step import layer_step, model_step

__all__ = [
    "best_items",
    "forgetting_token_step",
    "full_softmax_nll",
    "full_softmax_nll_backward",
    "full_softmax_total_nll",
    "full_softmax_total_nll_backward",
    "index_items",
    "layer_passes",
    "layer_step",
    "linear_forgetting_scan",
    "linear_forgetting_scan_backward",
    "linear_scan",
    "linear_scan_backward",
    "mlp_forgetting_scan",
    "mlp_forgetting_scan_backward",
    "mlp_scan",
    "mlp_scan_backward",
    "model_step",
    "refusal",
    "softmax_refusal",
    "token_step",
]

_MULTIPLE = 8  # of features: the lanes of a vector


def refusal(operator: str, arguments: Any) -> str | None:
    """Why this backend cannot compute an operator, or its backward, on these arguments; None if it can.

    The first call for a shape compiles it.
    """
    if isinstance(arguments, FullSoftmax):
        return softmax_refusal(arguments.h.device, score_dtype(arguments.h, arguments.table))
    if isinstance(arguments, ItemTable):
        return softmax_refusal(arguments.table.device, arguments.table.dtype)
    if isinstance(arguments, BestItems):
        return softmax_refusal(arguments.h.device, arguments.h.dtype)
    if isinstance(arguments, LayerParts | ModelParts):
        layer = arguments if isinstance(arguments, LayerParts) else arguments.blocks[0].layer
        (H, C), records = layer.around.lr_weight.shape, layer.records
        return shape_refusal(records.device, layer.around.inner, C // H, layer.hidden, records.dtype, build.STEP)
    if isinstance(arguments, WholeLayer):
        (H, C), w, inner = arguments.around.lr_weight.shape, arguments.weights[0], arguments.around.inner
        surroundings = shape_refusal(w.device, "linear", C // H, 0, w.dtype, build.PASS)
        inside = shape_refusal(w.device, inner, C // H, arguments.hidden, w.dtype, build.INNER_LOOP)
        return surroundings or inside
    if isinstance(arguments, Scan):
        dtype, sources = arguments.weights[0].dtype, build.INNER_LOOP
    elif isinstance(arguments, TokenStep):
        dtype, sources = arguments.records.dtype, build.STEP
    else:
        return None
    return shape_refusal(arguments.q.device, arguments.inner, arguments.q.shape[-1], arguments.hidden, dtype, sources)


@functools.cache
def shape_refusal(
    device: torch.device,
    inner: str,
    head_dim: int,
    hidden: int,
    dtype: torch.dtype,
    sources: build.Sources = build.INNER_LOOP,
) -> str | None:
    """Why the inner loop or step of a shape cannot be computed; None if it can. The first call for a shape compiles it.

    Args:
        device: of the tensors.
        inner: the inner model's name.
        head_dim: D.
        hidden: F, 0 if there are no hidden features.
        dtype: of the weights.
        sources: ``build.INNER_LOOP`` or ``build.STEP``.
    """
    if device.type != "cpu":
        return f"runs on CPU tensors; given {device}"
    if inner not in build.INNER_MODELS:
        return f"computes the inner models {', '.join(build.INNER_MODELS)}; given {inner}"
    if head_dim % _MULTIPLE or hidden % _MULTIPLE:
        return f"takes head and hidden dimensions that are multiples of {_MULTIPLE}; given {head_dim} and {hidden}"
    try:
        build.library(inner, head_dim, hidden, build.SCALARS[dtype], sources)
    except BuildError as error:
        return build.refusal(error)
    return None
