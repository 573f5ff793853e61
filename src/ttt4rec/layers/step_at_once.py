"""A layer's step in one call of compiled code, where nothing would see its parts.

One token through a layer takes a few microseconds to compute, and a hundred times that by operators and modules. So the
step asks for the shortest way first. It is taken only if the parts would have done the same, and nobody looks on:
modules that something was done to, autocast, tracing and modes of PyTorch go by the parts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import Around, Forget, LayerParts, Step
from ..inner_models import INNER_MODELS
from ..operators.backends import shortcut
from ..operators.transforms import transformed
from .pool import StatePool
from .projection import all_hooked, untouched
from .rotary import rotary_table
from .standing import prepared


def step_at_once(layer: Any, x: Tensor, pool: StatePool, slots: Tensor) -> Tensor | None:
    """As ``TTTLayer.step`` of a layer; None, and nothing has changed, if the parts must do it, or refuse it."""
    if not unobserved() or not are_rows(x, slots) or x.dim() != 2 or x.shape[1] != layer.width:
        return None
    if x.dtype is not pool.records.dtype:
        return None
    found = prepared(pool, layer, pool.tensors, lambda _: _prepare(layer, pool))
    return None if found is None else found[0](x.contiguous(), slots.contiguous())


def _prepare(layer: Any, pool: StatePool) -> Step | None:
    parts = None if layer.backend == "reference" else layer_parts(layer, pool)
    compute = None if parts is None else shortcut("layer_step", layer.backend, parts)
    return None if compute is None else compute(parts)


def unobserved() -> bool:
    """Whether PyTorch just computes: no autocast, tracing, transform, hook of all modules, or mode that sees more."""
    return not (
        torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or transformed()
        or all_hooked()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )


def are_rows(x: Tensor, slots: Tensor) -> bool:
    """Whether x has a row for each of at least one int64 slot, both plain tensors in a CPU's memory."""
    plain_tensors = type(x) is Tensor and type(slots) is Tensor and x.is_cpu and slots.is_cpu
    return plain_tensors and slots.dtype is torch.int64 and slots.shape == x.shape[:1] and slots.shape[0] > 0


def layer_parts(layer: Any, pool: StatePool) -> LayerParts | None:
    """What a layer has, as it is now; None if something was done to a part of it, or the pool is another's."""
    if patched(layer):
        return None
    around, dtype = layer_around(layer, pool.records.dtype), pool.records.dtype
    if around is None or pool.layer != layer or not fit(dtype, (pool.records,), (pool.records.shape,)):
        return None
    bound = float("inf") if layer.max_inner_step is None else float(layer.max_inner_step)
    parts = LayerParts(around, pool.records, pool.position, pool.conv, pool.hidden, bool(layer.adapt), bound)
    if not layer.forgets:
        return parts
    forget = _forget(layer, dtype)
    return None if forget is None else parts._replace(forget=forget)


def _forget(layer: Any, dtype: torch.dtype) -> Forget | None:
    """How a layer forgets, as it is now; None if something was done to its parameters."""
    H, D, model, own = layer.num_heads, layer.head_dim, INNER_MODELS[layer.inner], layer._parameters
    shapes = model.shapes(D, model.expansion * D)
    bias, weight, initial = own.get("forget_bias"), own.get("forget_weight"), [own.get(name) for name in shapes]
    expected = [(H,), *((H, *shape) for shape in shapes.values())]
    if not fit(dtype, (bias, *initial), expected):
        return None
    if weight is not None and not fit(dtype, (weight,), [(H, layer.width)]):
        return None
    return Forget(bias, weight, tuple(initial))


def layer_around(layer: Any, dtype: torch.dtype) -> Around | None:
    """What surrounds a layer's inner loop, as it is now; None if something was done to a part of it."""
    C, H, D, K, modules = layer.width, layer.num_heads, layer.head_dim, layer.mini_batch_size, layer._modules
    mamba, own = layer.backbone == "mamba", layer._parameters
    names = ("query", "value", "gate", "output") if mamba else ("query", "key", "value", "output")
    linears, norm = [modules.get(name) for name in names], modules.get("norm")
    if not all(is_like(x, nn.Linear) for x in linears) or not is_like(norm, nn.LayerNorm):
        return None
    weights: list[Any] = [x._parameters.get("weight") for x in linears]
    offset, lr_weight, lr_bias, gamma, beta = (own.get(name) for name in _OWN)
    norm_weight, norm_bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if any(x._parameters.get("bias") is not None for x in linears):
        return None
    tensors: list[Any] = [offset, lr_weight, lr_bias, gamma, beta, norm_weight, norm_bias, *weights]
    shapes = [(K,), (H, C), (H,), (H, D), (H, D), (C,), (C,), *[(C, C)] * 4]
    convolutions: list[Any] = []
    if mamba:
        both = (modules["query_conv"], modules["key_conv"])
        convolutions = [conv._parameters.get(name) for conv in both for name in ("weight", "bias")]
        shapes += [(C, layer.conv_kernel), (C,)] * 2
    if not fit(dtype, (*tensors, *convolutions), shapes):
        return None
    table = rotary_table(K, D, layer.rope_theta, dtype, weights[0].device)
    return Around(
        tuple(weights[:3]), weights[3], lr_weight, lr_bias, offset, gamma, beta, norm_weight, norm_bias,
        tuple(convolutions), *table, float(layer.base_lr), float(layer.inner_lr_scale), norm.eps, 1e-6, layer.inner,
    )  # fmt: skip


_OWN = ("token_offset", "inner_lr_weight", "inner_lr_bias", "inner_norm_weight", "inner_norm_bias")


def is_like(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind, no subclass, and nothing was done to it, except to its parameters."""
    return type(module) is kind and untouched(module)


def patched(module: Any) -> bool:
    """Whether a method of a module was replaced, in it alone."""
    return any(callable(getattr(type(module), name, None)) for name in module.__dict__)


def fit(dtype: torch.dtype, tensors: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether all are there, in a CPU's memory and contiguous, of one dtype and of their shapes."""
    for x, shape in zip(tensors, shapes, strict=True):
        if type(x) is not nn.Parameter and type(x) is not Tensor:
            return False
        if x.dtype is not dtype or x.shape != shape or not x.is_cpu or not x.is_contiguous():
            return False
    return True
