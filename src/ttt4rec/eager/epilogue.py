"""Behind the inner loop: layer norm over the width, gate and output projection; the backward normalises again."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def epilogue_forward(
    o: Tensor, gate: Tensor | None, mask: Tensor | None, parameters: Sequence[Tensor], eps: float
) -> Tensor:
    """``(gelu(gate) ∘ LN(o)) Wᵀ``, zero at padding.

    Args:
        o: the inner loop's outputs ``[B, L, H, D]``.
        gate: ``[B, L, C]``; None: no gate.
        mask: bool ``[B, L]``, True for tokens; None: all are.
        parameters: γ and β ``[C]``, and the weight ``[C, C]``, output features first.
        eps: added to the layer norm's variance.

    Returns:
        y ``[B, L, C]`` in o's dtype, in which the product is taken; the arithmetic before is float32 at least.
    """
    h, *_ = _normed(o, parameters, eps)
    if gate is not None:
        h *= F.gelu(gate.to(h.dtype), approximate="tanh")
    y = h.to(o.dtype) @ parameters[2].to(o.dtype).t()
    return y if mask is None else y.masked_fill_(~mask.unsqueeze(-1), 0)


def epilogue_backward(
    dy: Tensor, o: Tensor, gate: Tensor | None, mask: Tensor | None, parameters: Sequence[Tensor], eps: float
) -> list[Tensor]:
    """Gradients of o, of γ, β and the weight, and of the gate if there is one, from that of y."""
    dy = dy if mask is None else dy.masked_fill(~mask.unsqueeze(-1), 0)
    h, x, mean, rstd, gamma, beta = _normed(o, parameters, eps)
    dn = (dy @ parameters[2].to(o.dtype)).to(h.dtype)
    d_gate = []
    if gate is not None:
        wide = gate.to(h.dtype)
        d_gate = [torch.ops.aten.gelu_backward(dn * h, wide, approximate="tanh").to(gate.dtype)]
        value = F.gelu(wide, approximate="tanh")
        h, dn = h.mul_(value), dn.mul_(value)
    d_weight = dy.flatten(0, 1).t() @ h.to(o.dtype).flatten(0, 1)
    width, wanted = list(gamma.shape), [True] * 3
    dx, d_gamma, d_beta = torch.ops.aten.native_layer_norm_backward(dn, x, width, mean, rstd, gamma, beta, wanted)
    gradients = zip((d_gamma, d_beta, d_weight), parameters, strict=True)
    return [dx.to(o.dtype).view(o.shape), *(d.to(p.dtype) for d, p in gradients), *d_gate]


def _normed(o: Tensor, parameters: Sequence[Tensor], eps: float) -> tuple[Tensor, ...]:
    """LN(o) ``[B, L, C]``, float32 at least; o likewise, its mean and 1/σ, γ and β."""
    dtype = torch.promote_types(o.dtype, torch.float32)
    x, gamma, beta = (y.to(dtype) for y in (o.flatten(2), *parameters[:2]))
    normed, mean, rstd = torch.native_layer_norm(x, gamma.shape, gamma, beta, eps)
    return normed, x, mean, rstd, gamma, beta
