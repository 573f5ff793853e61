"""A layer's forward and backward as one node of autograd, where nothing would see its parts.

A small call spends its time in operators, not in arithmetic. So a layer on a CPU that nothing was done to, given
sequences that begin, asks for the shortest way first. All else goes by the parts.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..arguments import LayerForward
from ..inner_models import INNER_MODELS
from ..operators.backends import shortcut
from ..operators.transforms import is_batched, refuse_transforms, transformed
from .functional import segment_length
from .step_at_once import fit, layer_around, unobserved

LARGEST = 1 << 16
"""Numbers of the input. Beyond, operators take little of the time, and one node, which holds all until its end,
more memory."""


def layer_at_once(layer: Any, x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """As ``TTTLayer.forward`` of checked arguments; None if the parts must do it."""
    if layer.backend not in ("auto", "native") or not layer.adapt or layer.max_inner_step is not None or layer.forgets:
        return None
    if type(x) is not Tensor or not x.is_cpu or not 0 < x.numel() <= LARGEST or not unobserved():
        return None
    given = _arguments(layer, x.contiguous(), cu_seqlens)
    compute = None if given is None else shortcut("layer_forward", layer.backend, given)
    if given is None or compute is None:
        return None
    flat = _tensors(given)
    if torch.is_grad_enabled() and any(t.requires_grad for t in flat):
        y: Tensor = _AtOnce.apply(given, compute, *flat)  # type: ignore[no-untyped-call]
        return y
    return compute(given)[0]  # type: ignore[no-any-return]


def _arguments(layer: Any, x: Tensor, cu_seqlens: Tensor | None) -> LayerForward | None:
    """What a layer computes with; None if something was done to a part of it."""
    if x.dtype not in (torch.float32, torch.float64):
        return None
    around, model = layer_around(layer, x.dtype), INNER_MODELS.get(layer.inner)
    if around is None or model is None:
        return None
    H, D = layer.num_heads, layer.head_dim
    shapes = model.shapes(D, model.expansion * D)
    weights: tuple[Any, ...] = tuple(layer._parameters.get(name) for name in model.weights)
    if not fit(x.dtype, weights, [(H, *shapes[name]) for name in model.weights]):
        return None
    starts, lengths = (None, None) if cu_seqlens is None else (cu_seqlens[:-1].long(), cu_seqlens.diff().long())
    segment = segment_length(model, tuple(w[None] for w in weights), layer.mini_batch_size)
    return LayerForward(around, x, weights, starts, lengths, segment)


def _tensors(given: LayerForward) -> tuple[Tensor, ...]:
    """What has gradients, in the order in which ``layer_backward`` gives them."""
    around = given.around
    single = tuple(getattr(around, name) for name in _SINGLE)
    return given.x, *single, *around.projections, *around.convolutions, *given.weights


def _replaced(given: LayerForward, flat: Sequence[Tensor]) -> LayerForward:
    """The arguments with other tensors, in the order of ``_tensors``."""
    tensors = iter(flat)
    x = next(tensors)
    single: dict[str, Any] = {name: next(tensors) for name in _SINGLE}
    projections, convolutions, weights = (
        tuple(islice(tensors, len(x))) for x in (given.around.projections, given.around.convolutions, given.weights)
    )
    around = given.around._replace(projections=projections, convolutions=convolutions, **single)
    return given._replace(around=around, x=x, weights=weights)


_SINGLE = (
    "output", "lr_weight", "lr_bias", "token_offset", "ln_weight", "ln_bias", "norm_weight", "norm_bias"
)  # fmt: skip


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: LayerForward, compute: Any, *flat: Tensor) -> Tensor:
        y: Tensor
        y, kept = compute(given)
        ctx.save_for_backward(*flat, *kept)
        nothing = (flat[0].new_empty(0),) * len(flat)
        ctx.given, ctx.num_inputs = _replaced(given, nothing), len(flat)  # tensors are autograd's to keep
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if transformed() or is_batched(dy):
            refuse_transforms("TTTLayer")
        given, compute = (ctx.given, ctx.num_inputs), _Derivative.apply if torch.is_grad_enabled() else _gradients
        return None, None, *compute(*given, dy, *ctx.saved_tensors)


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return _gradients(*arguments)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> NoReturn:
        refuse_transforms("TTTLayer")


def _gradients(given: LayerForward, num_inputs: int, dy: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    given = _replaced(given, saved[:num_inputs])
    backward = shortcut("layer_backward", "native", given)
    assert backward is not None
    return backward(given, saved[num_inputs:], dy)  # type: ignore[no-any-return]
