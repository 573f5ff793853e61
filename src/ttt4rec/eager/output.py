"""Behind the inner loop: layer norm over the width, gate and output projection; the backward normalises again."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import Output


def output(given: Output) -> tuple[Tensor]:
    """y ``[B, L, C]`` in o's dtype, in which the product is taken; the arithmetic before is float32 at least."""
    dtype = given.o.dtype
    h, *_ = _normed(given)
    if given.gate is not None:
        h *= F.gelu(given.gate.to(h.dtype), approximate="tanh")
    y = h.to(dtype) @ given.weight.to(dtype).t()
    return (y if given.mask is None else y.masked_fill_(~given.mask.unsqueeze(-1), 0),)


def output_backward(given: Output, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of o, the gate (empty if there is none), γ, β and the weight; nothing is kept."""
    (dy,), o, gate, dtype = grads, given.o, given.gate, given.o.dtype
    dy = dy if given.mask is None else dy.masked_fill(~given.mask.unsqueeze(-1), 0)
    h, x, mean, rstd, gamma, beta = _normed(given)
    dn = (dy @ given.weight.to(dtype)).to(h.dtype)
    d_gate = o.new_empty(0)
    if gate is not None:
        wide = gate.to(h.dtype)
        d_gate = torch.ops.aten.gelu_backward(dn * h, wide, approximate="tanh").to(gate.dtype)
        value = F.gelu(wide, approximate="tanh")
        h, dn = h.mul_(value), dn.mul_(value)
    d_weight = dy.flatten(0, 1).t() @ h.to(dtype).flatten(0, 1)
    width, wanted = list(gamma.shape), [True] * 3
    dx, d_gamma, d_beta = torch.ops.aten.native_layer_norm_backward(dn, x, width, mean, rstd, gamma, beta, wanted)
    parameters = (given.norm_weight, given.norm_bias, given.weight)
    gradients = zip((d_gamma, d_beta, d_weight), parameters, strict=True)
    return dx.to(dtype).view(o.shape), d_gate, *(d.to(p.dtype) for d, p in gradients)


def _normed(given: Output) -> tuple[Tensor, ...]:
    """LN(o) ``[B, L, C]``, float32 at least; o likewise, its mean and 1/σ, γ and β."""
    dtype = torch.promote_types(given.o.dtype, torch.float32)
    x, gamma, beta = (y.to(dtype) for y in (given.o.flatten(2), given.norm_weight, given.norm_bias))
    normed, mean, rstd = torch.native_layer_norm(x, gamma.shape, gamma, beta, given.eps)
    return normed, x, mean, rstd, gamma, beta
