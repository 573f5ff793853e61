"""A layer's forward and backward as one node of autograd, where nothing would see its parts; of large calls as two.

A small call spends its time in operators, not in arithmetic. So a layer on a CPU that nothing was done to, given
sequences that begin, asks for the shortest way first. All else goes by the parts.

A node holds all that it keeps until its backward has ended. Of a large call that would be more memory than of the
parts. So what stands behind the inner loop is a node of its own, and what that alone needs is free before the way back
through the inner loop begins.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..arguments import WholeLayer
from ..inner_models import INNER_MODELS
from ..operators.backends import shortcut
from ..operators.transforms import is_batched, refuse_transforms, transformed
from .forgetting import GATES
from .functional import segment_length
from .standing import prepared
from .step_at_once import fit, layer_around, patched, unobserved

LARGEST = 1 << 16
"""Numbers of the input of which the whole layer is one node."""


class _Passes(NamedTuple):
    """A layer's passes, prepared."""

    compute: Any  # of a backend: forwards and backwards of all parts
    order: Callable[[list[Tensor | None]], tuple[Tensor, ...]]  # of all tensors those of ``WholeLayer``, in their order
    dtype: torch.dtype


def layer_at_once(layer: Any, x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """As ``TTTLayer.forward`` of checked arguments; None if the parts must do it."""
    if layer.backend not in ("auto", "native") or x.dtype not in (torch.float32, torch.float64):
        return None
    if type(x) is not Tensor or not x.is_cpu or not x.numel() or not unobserved():
        return None
    found = prepared(layer, layer, (), lambda tensors: _prepare(layer, tensors))
    if found is None:
        return None
    (compute, order, dtype), tensors = found
    if x.dtype is not dtype:
        return None
    x, parameters = x.contiguous(), order(tensors)
    spans = None if cu_seqlens is None else _spans(cu_seqlens)
    recorded = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    between: tuple[Tensor, ...] = ()
    for part in (_WHOLE,) if x.numel() <= LARGEST or not recorded else (_INSIDE, _OUTSIDE):
        given = parameters[part.own] if part is _OUTSIDE else (*parameters[part.own], x)
        if recorded:
            between = _Node.apply(part, compute, spans, len(given), *given, *between)  # type: ignore[no-untyped-call]
        else:
            between, _ = compute.forward(given, between, spans)
    (y,) = between
    return y


def _spans(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """First tokens and lengths, in memory of their own: the way back needs them as they were checked."""
    bounds = cu_seqlens.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    return bounds[:-1], bounds.diff()


def _prepare(layer: Any, tensors: list[Tensor | None]) -> _Passes | None:
    """None if something was done to the layer or a part of it, or no backend has its passes."""
    if not layer.adapt or layer.max_inner_step is not None or patched(layer):
        return None
    given = _whole_layer(layer)
    make = None if given is None else shortcut("layer_passes", layer.backend, given)
    if given is None or make is None:
        return None
    place = {id(x): i for i, x in enumerate(tensors)}
    return _Passes(make(given), itemgetter(*(place[id(x)] for x in given.tensors)), given.weights[0].dtype)


def _whole_layer(layer: Any) -> WholeLayer | None:
    """What a layer computes with; None if something was done to a part of it."""
    model, dtype = INNER_MODELS.get(layer.inner), layer.token_offset.dtype
    around = layer_around(layer, dtype) if dtype in (torch.float32, torch.float64) else None
    if around is None or model is None:
        return None
    H, D = layer.num_heads, layer.head_dim
    shapes = model.shapes(D, model.expansion * D)
    weights: tuple[Any, ...] = tuple(layer._parameters.get(name) for name in model.weights)
    gates = {name: shape_of(H, layer.width) for name, shape_of in GATES[layer.forget].items()}
    forgetting: tuple[Any, ...] = tuple(layer._parameters.get(name) for name in gates)
    if not fit(dtype, (*weights, *forgetting), [*((H, *shapes[name]) for name in model.weights), *gates.values()]):
        return None
    segment = segment_length(model, tuple(w[None] for w in weights), layer.mini_batch_size)
    return WholeLayer(around, weights, segment, forgetting)


class _Part(NamedTuple):
    """A node: its passes, and which of the layer's parameters have gradients in it."""

    forward: str
    backward: str
    own: slice


_WHOLE = _Part("forward", "backward", slice(None))
_INSIDE = _Part("inside_forward", "inside_backward", slice(3, None))
_OUTSIDE = _Part("outside_forward", "outside_backward", slice(3))


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: _Part, compute: Any, spans: Any, own: int, *flat: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...]
        outputs, kept = getattr(compute, part.forward)(flat[:own], flat[own:], spans)
        ctx.save_for_backward(*flat, *kept)
        ctx.work = getattr(compute, part.backward), spans, own, len(flat), len(flat) + len(kept)
        ctx.bytes = _bytes((*flat, *kept))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if transformed() or any(map(is_batched, grads)):
            refuse_transforms("TTTLayer")
        compute = _Derivative.apply if torch.is_grad_enabled() else _gradients
        # with strides that are others by now, or that a hook made, they would be misread
        saved, given = ([*map(Tensor.contiguous, tensors)] for tensors in (ctx.saved_tensors, grads))
        if _bytes(saved) != ctx.bytes:
            raise RuntimeError(
                "parameters and input of a layer must have one dtype, shape and device in its forward and backward; "
                "given others in the backward, as after a call of layer.float()"
            )
        return None, None, None, None, *compute(*ctx.work, *saved, *given)


def _bytes(tensors: Sequence[Tensor]) -> list[int]:
    """How many bytes of memory compiled code may touch behind each address.

    Autograd counts no changes by ``.data``, which is how modules move, and gives the backward what is there now.
    """
    return [x.nbytes if x.is_cpu else 0 for x in tensors]


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return _gradients(*arguments)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> NoReturn:
        refuse_transforms("TTTLayer")


def _gradients(backward: Any, spans: Any, own: int, inputs: int, kept: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Of a node's ``own`` tensors and what other parts gave it, of ``tensors``: these, what was kept, and gradients."""
    return backward(tensors[:own], tensors[own:inputs], spans, tensors[inputs:kept], tensors[kept:])  # type: ignore[no-any-return]
