"""The operators in front of the inner loop: schema, shapes for tracing, autograd, choice of kernel or eager path."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from . import eager, reference
from .precision import autocast_dtype, without_autocast
from .transforms import operator
from .validation import check_device


class Rope(NamedTuple):
    """How tokens are rotated."""

    cos: Tensor  # of the angles at every place in a mini-batch [K, D/2], float32 or float64
    sin: Tensor
    positions: Tensor  # every token's place [L] or [B, L]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate x ``[B, L, C]``, all heads alike."""
        heads = x.unflatten(-1, (-1, 2 * self.cos.shape[1]))
        return reference.rotate(heads, self.cos[self.positions], self.sin[self.positions]).flatten(-2)


def project(
    x: Tensor,
    linears: Sequence[nn.Module],
    lr_weight: Tensor,
    lr_bias: Tensor,
    rope: Rope,
    rotated: int,
    base_lr: float,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    """Project x ``[B, L, C]`` to C features with every module, rotate the first results, and compute the inner rates.

    Products are taken in x's dtype, or in that of autocast; rates are float32 at least and never see autocast. Modules
    that something was done to (replaced by an adapter or a quantised one, hooked, parametrised) are called one by one.

    Args:
        x: the input.
        linears: ``nn.Linear`` without bias, or what stands in its place.
        lr_weight: w_lr ``[H, C]``.
        lr_bias: b_lr ``[H]``.
        rope: the rotation.
        rotated: how many of the results are rotated.
        base_lr: η_base.
        backend: see ``ttt4rec.functional.ttt_linear``.

    Returns:
        One ``[B, L, H, D]`` a module, and the rates ``[B, L, H]``.

    Raises:
        TypeError: x's dtype is not that of the weights.
    """
    device = x.device.type
    if backend == "reference" or not all(map(plain, linears)):
        views = [linear(x) for linear in linears]
        views = [rope.rotate(view) if i < rotated else view for i, view in enumerate(views)]
        with without_autocast(device):
            inner_lr = reference.inner_learning_rate(x, lr_weight, lr_bias, base_lr)
        return [view.unflatten(-1, (lr_weight.shape[0], -1)) for view in views], inner_lr
    weights: list[Tensor] = [linear.weight for linear in linears]  # type: ignore[misc]
    check_device("x's", x.device, weight=weights[0], lr_weight=lr_weight, lr_bias=lr_bias)
    dtype = autocast_dtype(x.dtype, device)
    if dtype is None and x.dtype != weights[0].dtype:
        raise TypeError(f"x must have the parameters' dtype {weights[0].dtype}; given {x.dtype}")
    results: list[Tensor] = rope_projection(
        x, weights, lr_weight, lr_bias, *rope, rotated, base_lr, dtype or x.dtype, backend == "triton"
    )
    return results[:-1], results[-1]


def plain(module: nn.Module) -> bool:
    """Whether calling the module would do no more than multiply by its weight, or normalise with weight and bias."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    hooks = hooks or modules._global_forward_hooks or modules._global_forward_pre_hooks  # of all modules there are
    hooks = hooks or modules._global_backward_hooks or modules._global_backward_pre_hooks
    biased = {nn.Linear: False, nn.LayerNorm: True}.get(type(module))
    if hooks or biased is None or "forward" in module.__dict__ or biased != (module.bias is not None):
        return False
    # a subclass of Tensor may be no matrix of floats: quantised, split between processes
    return all(type(p) in (nn.Parameter, Tensor) for p in (module.weight, module.bias) if p is not None)


def causal_convolutions(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rope: Rope | None,
    offsets: Tensor | None,
    lead: int,
    backend: str,
) -> list[Tensor]:
    """Depthwise convolutions ``y_t = b + Σ_j w_j x_{t - (taps - 1) + j}`` of x, each rotated if there is a rope.

    Args:
        x: ``[B, lead + L, C]``, with zeros before it; its first ``lead`` tokens have no output.
        weights: each ``[C, taps]``.
        biases: each ``[C]``.
        rope: the rotation of the L outputs.
        offsets: how far back an output may read, int64 ``[B, L]``; None: to the beginning of x.
        lead: number of context tokens.
        backend: see ``ttt4rec.functional.ttt_linear``.

    Returns:
        One ``[B, L, C]`` a weight.
    """
    if backend == "reference":
        reach = None if offsets is None else F.pad(offsets, (lead, 0))
        parameters = [(w.to(x.dtype), b.to(x.dtype)) for w, b in zip(weights, biases, strict=True)]
        plain = [reference.causal_convolution(x, w, b, reach)[:, lead:] for w, b in parameters]
        return plain if rope is None else [rope.rotate(y) for y in plain]
    return list(rope_convolution(x, weights, biases, *(rope or (None, None, None)), offsets, lead, backend == "triton"))


def path_of(kernel: bool) -> ModuleType:
    """The package that computes: the kernels, which are imported only when asked for, or eager."""
    if not kernel:
        return eager
    from . import kernels

    return kernels


@operator("rope_projection")
def rope_projection(
    x: Tensor,
    weights: Sequence[Tensor],
    lr_weight: Tensor,
    lr_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rotated: int,
    base_lr: float,
    dtype: torch.dtype,
    kernel: bool,
) -> list[Tensor]:
    """Views ``[B, L, H, D]`` of x ``[B, L, C]``, the first ``rotated`` of them rotated, and the rates ``[B, L, H]``."""
    path = path_of(kernel)
    with without_autocast(x.device.type):
        return path.projection_forward(  # type: ignore[no-any-return]
            x, weights, lr_weight, lr_bias, cos, sin, positions, rotated, base_lr, dtype
        )


@operator("rope_projection_backward")
def rope_projection_backward(
    grads: Sequence[Tensor],
    grad_lr: Tensor,
    inner_lr: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    lr_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    rotated: int,
    base_lr: float,
    dtype: torch.dtype,
    kernel: bool,
) -> list[Tensor]:
    """Gradients of x, the weights, w_lr and b_lr."""
    path = path_of(kernel)
    with without_autocast(x.device.type):
        return path.projection_backward(  # type: ignore[no-any-return]
            grads, grad_lr, inner_lr, x, weights, lr_weight, cos, sin, positions, rotated, base_lr, dtype
        )


@rope_projection.register_fake
def _(x: Tensor, weights: Sequence[Tensor], lr_weight: Tensor, *rest: Any) -> list[Tensor]:
    B, L, C = x.shape
    H, dtype = lr_weight.shape[0], rest[-2]
    views = [x.new_empty(B, L, H, C // H, dtype=dtype) for _ in weights]
    return [*views, x.new_empty(B, L, H, dtype=torch.promote_types(x.dtype, torch.float32))]


@rope_projection_backward.register_fake
def _(
    grads: Sequence[Tensor],
    grad_lr: Tensor,
    inner_lr: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    lr_weight: Tensor,
    *rest: Any,
) -> list[Tensor]:
    like = [y.new_empty(y.shape) for y in (x, *weights, lr_weight)]
    return [*like, grad_lr.new_empty(lr_weight.shape[0])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, lr_weight, lr_bias, cos, sin, positions, *ctx.options = inputs
    ctx.lr_bias_dtype = lr_bias.dtype
    ctx.save_for_backward(output[-1], x, lr_weight, cos, sin, positions, *weights)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    inner_lr, x, lr_weight, cos, sin, positions, *weights = ctx.saved_tensors
    dx, *d_weights, d_lr_weight, d_lr_bias = rope_projection_backward(
        grads[:-1], grads[-1], inner_lr, x, weights, lr_weight, cos, sin, positions, *ctx.options
    )
    return dx, d_weights, d_lr_weight, d_lr_bias.to(ctx.lr_bias_dtype), *[None] * (3 + len(ctx.options))


rope_projection.register_autograd(_backward, setup_context=_save)


@operator("rope_convolution")
def rope_convolution(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    offsets: Tensor | None,
    lead: int,
    kernel: bool,
) -> list[Tensor]:
    """Causal convolutions ``[B, L, C]`` of x ``[B, lead + L, C]``, rotated where there are angles."""
    return path_of(kernel).convolution_forward(  # type: ignore[no-any-return]
        x, weights, biases, cos, sin, positions, offsets, lead
    )


@operator("rope_convolution_backward")
def rope_convolution_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    offsets: Tensor | None,
    lead: int,
    kernel: bool,
) -> list[Tensor]:
    """Gradients of x, the weights and the biases."""
    return path_of(kernel).convolution_backward(  # type: ignore[no-any-return]
        grads, x, weights, biases, cos, sin, positions, offsets, lead
    )


@rope_convolution.register_fake
def _(x: Tensor, weights: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], x.shape[1] - rest[-2], x.shape[2]) for _ in weights]


@rope_convolution_backward.register_fake
def _(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return [y.new_empty(y.shape) for y in (x, *weights, *biases)]


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, *rope_and_offsets, ctx.lead, ctx.kernel = inputs
    ctx.save_for_backward(x, *rope_and_offsets, *weights, *biases)


def _backward_convolution(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, cos, sin, positions, offsets, *parameters = ctx.saved_tensors
    count = len(parameters) // 2
    weights, biases = parameters[:count], parameters[count:]
    dx, *gradients = rope_convolution_backward(
        grads, x, weights, biases, cos, sin, positions, offsets, ctx.lead, ctx.kernel
    )
    return dx, gradients[:count], gradients[count:], *[None] * 6


rope_convolution.register_autograd(_backward_convolution, setup_context=_save_convolution)
