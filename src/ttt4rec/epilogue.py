"""The operator behind the inner loop: schema, shapes for tracing, autograd, choice of kernel or eager path."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .precision import without_autocast
from .projection import path_of, plain
from .transforms import operator


def finish(
    o: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    norm: nn.Module,
    output: nn.Module,
    backend: str,
) -> Tensor:
    """Layer norm over the width, gate ``gelu(gate) ∘ (·)`` and output projection; zeros at padding.

    The product is taken in o's dtype, which is that of autocast where that is enabled; what comes before is float32 at
    least. Modules that something was done to (replaced by an adapter or a quantised one, hooked, parametrised) are
    called one by one.

    Args:
        o: the inner loop's outputs ``[B, L, H, D]``.
        gate: ``[B, L, C]``; None: no gate.
        mask: bool ``[B, L]``, True for tokens; None: all are.
        norm: ``nn.LayerNorm`` over C, or what stands in its place.
        output: ``nn.Linear`` without bias, or what stands in its place.
        backend: see ``ttt4rec.functional.ttt_linear``.

    Returns:
        The layer's outputs ``[B, L, C]``.
    """
    result: Tensor
    if backend != "reference" and isinstance(norm, nn.LayerNorm) and plain(norm) and plain(output):
        parameters = [norm.weight, norm.bias, output.weight]
        result = epilogue(o, gate, mask, parameters, norm.eps, backend == "triton")
        return result
    of_norm = next(norm.parameters(), None)  # what stands in its place may have none
    h = norm(rearrange(o, "b l h d -> b l (h d)").to(o.dtype if of_norm is None else of_norm.dtype))
    if gate is not None:
        h = F.gelu(gate, approximate="tanh") * h
    result = output(h.to(o.dtype))
    return result if mask is None else result.masked_fill(~mask.unsqueeze(-1), 0)


@operator("epilogue")
def epilogue(
    o: Tensor, gate: Tensor | None, mask: Tensor | None, parameters: Sequence[Tensor], eps: float, kernel: bool
) -> Tensor:
    """``(gelu(gate) ∘ LN(o)) Wᵀ`` ``[B, L, C]`` of o ``[B, L, H, D]`` and gate ``[B, L, C]``, zero at padding."""
    with without_autocast(o.device.type):
        return path_of(kernel).epilogue_forward(  # type: ignore[no-any-return]
            o, gate, mask, parameters, eps
        )


@operator("epilogue_backward")
def epilogue_backward(
    dy: Tensor,
    o: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    eps: float,
    kernel: bool,
) -> list[Tensor]:
    """Gradients of o and the parameters, and of the gate if there is one."""
    with without_autocast(o.device.type):
        return path_of(kernel).epilogue_backward(  # type: ignore[no-any-return]
            dy, o, gate, mask, parameters, eps
        )


@epilogue.register_fake
def _(o: Tensor, *rest: Any) -> Tensor:
    return o.new_empty(*o.shape[:2], o.shape[2] * o.shape[3])


@epilogue_backward.register_fake
def _(
    dy: Tensor, o: Tensor, gate: Tensor | None, mask: Tensor | None, parameters: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (o, *parameters, gate) if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, parameters, ctx.eps, ctx.kernel = inputs
    ctx.save_for_backward(*tensors, *parameters)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    o, gate, mask, *parameters = ctx.saved_tensors
    d_o, *gradients = epilogue_backward(dy, o, gate, mask, parameters, ctx.eps, ctx.kernel)
    d_gate = gradients[3] if gate is not None else None
    return d_o, d_gate, None, gradients[:3], None, None


epilogue.register_autograd(_backward, setup_context=_save)
