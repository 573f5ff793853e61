"""A layer's forward and backward as one node of autograd, where nothing would see its parts; of large calls as two.

A small call spends its time in operators, not in arithmetic. So a layer on a CPU that nothing was done to, given
sequences that begin, asks for the shortest way first. All else goes by the parts.

A node holds all that it keeps until its backward has ended. Of a large call that would be more memory than of the
parts. So what stands behind the inner loop is a node of its own, and what that alone needs is free before the way back
through the inner loop begins.
"""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..arguments import LayerForward
from ..inner_models import INNER_MODELS
from ..operators.backends import shortcut
from ..operators.transforms import is_batched, refuse_transforms, transformed
from .functional import segment_length
from .step_at_once import fit, layer_around, unobserved

LARGEST = 1 << 16
"""Numbers of the input of which the whole layer is one node."""


def layer_at_once(layer: Any, x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """As ``TTTLayer.forward`` of checked arguments; None if the parts must do it."""
    if layer.backend not in ("auto", "native") or not layer.adapt or layer.max_inner_step is not None:
        return None
    if type(x) is not Tensor or not x.is_cpu or not x.numel() or not unobserved():
        return None
    given = _arguments(layer, x.contiguous(), cu_seqlens)
    if given is None:
        return None
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(given, _WHOLE))
    between: tuple[Tensor, ...] = ()
    for part in (_WHOLE,) if x.numel() <= LARGEST or not recorded else (_INSIDE, _OUTSIDE):
        forward, backward = (shortcut(f"{part.name}_{way}", layer.backend, given) for way in ("forward", "backward"))
        if forward is None or backward is None:
            return None
        if recorded:
            work = part, forward, backward, given
            between = _Node.apply(*work, *_tensors(given, part), *between)  # type: ignore[no-untyped-call]
        else:
            between, _ = forward(given)
    (y,) = between
    return y


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


class _Part(NamedTuple):
    """A node: what it is called in a backend, and which tensors of the arguments have gradients in it."""

    name: str
    single: tuple[str, ...]
    groups: tuple[str, ...]
    has_x: bool


_BEHIND = ("output", "norm_weight", "norm_bias")
_BEFORE = ("lr_weight", "lr_bias", "token_offset", "ln_weight", "ln_bias")
_GROUPS = ("projections", "convolutions")
_WHOLE = _Part("layer", (*_BEHIND, *_BEFORE), _GROUPS, True)
_INSIDE = _Part("inside", _BEFORE, _GROUPS, True)
_OUTSIDE = _Part("outside", _BEHIND, (), False)


def _tensors(given: LayerForward, part: _Part) -> tuple[Tensor, ...]:
    """What has gradients in a part, in the order in which its backward gives them."""
    around = given.around
    single = tuple(getattr(around, name) for name in part.single)
    groups = tuple(chain.from_iterable(getattr(around, name) for name in part.groups))
    return *single, *((given.x, *groups, *given.weights) if part.has_x else ())


def _replaced(given: LayerForward, part: _Part, flat: Sequence[Tensor]) -> LayerForward:
    """The arguments with other tensors, in the order of ``_tensors``."""
    tensors = iter(flat)
    changed: dict[str, Any] = {name: next(tensors) for name in part.single}
    if part.has_x:
        x = next(tensors)
        changed |= {name: tuple(islice(tensors, len(getattr(given.around, name)))) for name in part.groups}
        given = given._replace(x=x, weights=tuple(islice(tensors, len(given.weights))))
    return given._replace(around=given.around._replace(**changed))


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part: _Part, forward: Any, backward: Any, given: LayerForward, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        own = _tensors(given, part)
        outputs: tuple[Tensor, ...]
        outputs, kept = forward(given, *flat[len(own) :])
        ctx.save_for_backward(*flat, *kept)
        # Tensors are autograd's to keep; of what stands behind the inner loop, x tells its shape alone.
        given = _replaced(given, part, (flat[0].new_empty(0),) * len(own))
        if not part.has_x:
            given = given._replace(x=flat[0].new_empty(1).expand(given.x.shape))
        ctx.work = part, backward, given, len(own), len(flat), len(flat) + len(kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if transformed() or any(is_batched(d) for d in grads):
            refuse_transforms("TTTLayer")
        compute = _Derivative.apply if torch.is_grad_enabled() else _gradients
        return None, None, None, None, *compute(*ctx.work, *ctx.saved_tensors, *grads)


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return _gradients(*arguments)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> NoReturn:
        refuse_transforms("TTTLayer")


def _gradients(
    part: _Part, backward: Any, given: LayerForward, own: int, inputs: int, kept: int, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Of a node's ``own`` tensors and what other parts gave it, of ``tensors``: these, what was kept, and gradients."""
    given = _replaced(given, part, tensors[:own])
    return backward(given, tensors[own:inputs], tensors[inputs:kept], tensors[kept:])  # type: ignore[no-any-return]
