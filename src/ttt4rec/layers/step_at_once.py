"""A layer's step in one call of compiled code, where nothing would see its parts.

One token through a layer takes a few microseconds to compute, and a hundred times that by operators and modules. So the
step asks for the shortest way first. It is taken only if the parts would have done the same, and nobody looks on:
modules that something was done to, autocast, tracing and modes of PyTorch go by the parts.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import LayerStep
from ..operators.backends import shortcut
from ..operators.transforms import transformed
from ..reference import rotation
from .pool import StatePool
from .projection import plain


def step_at_once(layer: Any, x: Tensor, pool: StatePool, slots: Tensor) -> Tensor | None:
    """As ``TTTLayer.step`` of a layer; None, and nothing has changed, if the parts must do it, or refuse it."""
    owner: Any = pool.layer
    if layer.backend == "reference" or owner is not layer or not _unobserved():
        return None
    if type(x) is not Tensor or type(slots) is not Tensor or not x.is_cpu or not slots.is_cpu:
        return None
    if x.dim() != 2 or x.shape[1] != layer.width or x.dtype is not pool.records.dtype or not x.shape[0]:
        return None
    if slots.dtype is not torch.int64 or slots.shape != x.shape[:1]:
        return None
    given = _arguments(layer, x.contiguous(), pool, slots.contiguous())
    if given is None:
        return None
    compute = shortcut("layer_step", layer.backend, given)
    return None if compute is None else compute(given)


def _unobserved() -> bool:
    """Whether PyTorch just computes: no autocast, no tracing, no transform, no mode that sees operators."""
    return not (
        torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or transformed()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )


def _arguments(layer: Any, x: Tensor, pool: StatePool, slots: Tensor) -> LayerStep | None:
    """What the layer has, as it is now; None if something was done to a part of it."""
    C, H, D, K, modules = layer.width, layer.num_heads, layer.head_dim, layer.mini_batch_size, layer._modules
    mamba = layer.backbone == "mamba"
    names = ("query", "value", "gate") if mamba else ("query", "key", "value")
    parts: list[Any] = [modules.get(name) for name in (*names, "output", "norm")]
    if any(part is None or not plain(part) for part in parts):
        return None
    own = layer._parameters
    parameters: list[Any] = [own.get(name) for name in ("token_offset", "inner_lr_weight", "inner_lr_bias")]
    parameters += [own.get(name) for name in ("inner_norm_weight", "inner_norm_bias")]
    shapes: list[tuple[int, ...]] = [(K,), (H, C), (H,), (H, D), (H, D)]
    norm = parts[-1]
    parameters += [norm.weight, norm.bias]
    parameters += [part.weight for part in parts[:-1]]
    shapes += [(C,), (C,), *[(C, C)] * 4]
    if mamba:
        convs = [modules["query_conv"], modules["key_conv"]]
        parameters += [conv._parameters.get(name) for conv in convs for name in ("weight", "bias")]
        shapes += [(C, layer.conv_kernel), (C,)] * 2
    if not _fit(x.dtype, parameters, shapes) or not _fit(x.dtype, [pool.records], [pool.records.shape]):
        return None
    offset, lr_weight, lr_bias, gamma, beta, norm_weight, norm_bias, *weights = parameters
    bound = float("inf") if layer.max_inner_step is None else layer.max_inner_step
    return LayerStep(
        x, slots, pool.records, pool.position, pool.conv, layer.inner, pool.hidden,
        *_table(K, D, layer.rope_theta, x.dtype), offset, tuple(weights[:3]), tuple(weights[4:]), weights[3],
        lr_weight, lr_bias, gamma, beta, norm_weight, norm_bias,
        layer.adapt, layer.base_lr, layer.inner_lr_scale, bound, norm.eps, 1e-6,
    )  # fmt: skip


def _fit(dtype: torch.dtype, tensors: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether all are there, in a CPU's memory and contiguous, of one dtype and of their shapes."""
    return all(
        type(x) in (nn.Parameter, Tensor) and x.dtype is dtype and x.shape == shape and x.is_cpu and x.is_contiguous()
        for x, shape in zip(tensors, shapes, strict=True)
    )


@functools.lru_cache(maxsize=64)
def _table(K: int, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rotation's cos and sin at every place of a mini-batch."""
    return rotation(torch.arange(K), head_dim, theta, dtype)
