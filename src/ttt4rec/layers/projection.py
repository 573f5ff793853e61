"""In front of the inner loop: views of the input with their rotation, inner rates, convolutions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from .. import reference
from ..arguments import Convolution, Projection
from ..checks import check_device
from ..operators import CONVOLUTIONS, projection
from ..precision import autocast_dtype, without_autocast


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
    """Project x ``[B, L, C]`` to C features three times, rotate the first results, and compute the inner rates.

    Products are taken in x's dtype, or in autocast's; rates are float32 at least and never see autocast. Modules
    that something was done to (replaced by an adapter or a quantised one, hooked, parametrised) are called one by one.

    Args:
        x: the input.
        linears: three ``nn.Linear`` without bias, or what stands in its place.
        lr_weight: w_lr ``[H, C]``.
        lr_bias: b_lr ``[H]``.
        rope: the rotation.
        rotated: how many of the results are rotated.
        base_lr: η_base.
        backend: see ``ttt4rec.ttt_linear``.

    Returns:
        One ``[B, L, H, D]`` a module, and the rates ``[B, L, H]``.

    Raises:
        TypeError: x's dtype is not the weights'.
    """
    device = x.device.type
    if backend == "reference" or not all(map(plain, linears)):
        views = [linear(x) for linear in linears]
        views = [rope.rotate(view) if i < rotated else view for i, view in enumerate(views)]
        with without_autocast(device):
            inner_lr = reference.inner_learning_rate(x, lr_weight, lr_bias, base_lr, 2 * rope.cos.shape[1])
        return [view.unflatten(-1, (lr_weight.shape[0], -1)) for view in views], inner_lr
    weights: list[Tensor] = [linear.weight for linear in linears]  # type: ignore[misc]
    check_device("x's", x.device, weight=weights[0], lr_weight=lr_weight, lr_bias=lr_bias)
    dtype = autocast_dtype(x.dtype, device)
    if dtype is None and x.dtype != weights[0].dtype:
        raise TypeError(f"x must have the parameters' dtype {weights[0].dtype}; given {x.dtype}")
    given = Projection(x, tuple(weights), lr_weight, lr_bias, *rope, rotated, base_lr, dtype or x.dtype)
    *views, inner_lr = projection(given, backend)
    return views, inner_lr


def plain(module: nn.Module) -> bool:
    """Whether calling the module would do no more than multiply by its weight, or normalise with weight and bias."""
    biased = {nn.Linear: False, nn.LayerNorm: True}.get(type(module))
    if biased is None or not untouched(module) or all_hooked() or biased != (module.bias is not None):
        return False
    # a subclass of Tensor may be no matrix of floats: quantised, split between processes
    return all(type(p) in (nn.Parameter, Tensor) for p in (module.weight, module.bias) if p is not None)


def untouched(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's ``forward``, except hooks of all modules."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def all_hooked() -> bool:
    """Whether there are hooks of all modules."""
    return bool(
        modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


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
        backend: see ``ttt4rec.ttt_linear``.

    Returns:
        One ``[B, L, C]`` a weight.
    """
    if backend == "reference":
        reach = None if offsets is None else F.pad(offsets, (lead, 0))
        parameters = [(w.to(x.dtype), b.to(x.dtype)) for w, b in zip(weights, biases, strict=True)]
        plain = [reference.causal_convolution(x, w, b, reach)[:, lead:] for w, b in parameters]
        return plain if rope is None else [rope.rotate(y) for y in plain]
    cos, sin, positions = rope or (None, None, None)
    given = Convolution(x, tuple(weights), tuple(biases), cos, sin, positions, offsets, lead)
    return list(CONVOLUTIONS[len(weights)](given, backend))
