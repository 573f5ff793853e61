"""A layer's forward and backward as one node of autograd, where nothing would see its parts; of large calls as two.

A small call spends its time in operators, not in arithmetic. So a layer on a CPU that nothing was done to, given
sequences that begin, asks for the shortest way first. All else goes by the parts.

A node holds all that it keeps until its backward has ended. Of a large call that would be more memory than of the
parts. So what stands behind the inner loop is a node of its own, and what that alone needs is free before the way back
through the inner loop begins.
"""

from itertools import chain
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..arguments import LayerForward
from ..inner_models import INNER_MODELS
from ..operators.backends import shortcut
from ..operators.transforms import is_batched, refuse_transforms, transformed
from .forgetting import GATES
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
    whole = _tensors(given, _WHOLE)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in whole)
    between: tuple[Tensor, ...] = ()
    for part in (_WHOLE,) if x.numel() <= LARGEST or not recorded else (_INSIDE, _OUTSIDE):
        passes = shortcut(f"{part.name}_passes", layer.backend, given)
        if passes is None:
            return None
        if recorded:
            tensors = whole if part is _WHOLE else _tensors(given, part)
            between = _Node.apply(part, passes, given, len(tensors), *tensors, *between)  # type: ignore[no-untyped-call]
        else:
            between, _ = passes[0](given)
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
    gates = {name: shape_of(H, layer.width) for name, shape_of in GATES[layer.forget].items()}
    forgetting: tuple[Any, ...] = tuple(layer._parameters.get(name) for name in gates)
    if not fit(x.dtype, (*weights, *forgetting), [*((H, *shapes[name]) for name in model.weights), *gates.values()]):
        return None
    starts, lengths = (None, None) if cu_seqlens is None else (cu_seqlens[:-1].long(), cu_seqlens.diff().long())
    segment = segment_length(model, tuple(w[None] for w in weights), layer.mini_batch_size)
    return LayerForward(around, x, weights, starts, lengths, segment, forgetting)


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
    return *single, *((given.x, *groups, *given.forgetting, *given.weights) if part.has_x else ())


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: _Part, passes: Any, given: LayerForward, own: int, *flat: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...]
        outputs, kept = passes[0](given, *flat[own:])
        ctx.save_for_backward(*flat, *kept)
        # Of the arguments only parameters stay; x, which is autograd's to keep, tells its shape behind the inner loop.
        x = given.x.new_empty(1).expand(given.x.shape)
        ctx.work = part, passes[1], given._replace(x=x), own, len(flat), len(flat) + len(kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if transformed() or any(map(is_batched, grads)):
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
    if part.has_x:
        given = given._replace(x=tensors[len(part.single)])
    return backward(given, tensors[own:inputs], tensors[inputs:kept], tensors[kept:])  # type: ignore[no-any-return]
