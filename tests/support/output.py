"""What follows the inner loop: inputs, the definition in float64, and a backend's results."""

import torch
from torch import Tensor

from ttt4rec.arguments import Output

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def make_inputs(
    B: int, L: int, H: int, D: int, gated: bool, masked: bool = True, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """o, gate, mask, γ, β, W and the gradient of y."""
    C = H * D
    o, d_y = 3 + torch.randn(B, L, H, D), torch.randn(B, L, C)  # a mean, which cancels
    gate = 2 * torch.randn(B, L, C) if gated else None
    parameters = [1 + 0.3 * torch.randn(C), 0.3 * torch.randn(C), torch.randn(C, C) / C**0.5]
    mask = (torch.rand(B, L) < 0.7).to(DEVICE) if masked else None
    o, gate, *parameters, d_y = (x if x is None else x.to(DEVICE, dtype) for x in (o, gate, *parameters, d_y))
    return [o, gate, mask, *parameters, d_y]


def definition(o, gate, mask, norm_weight, norm_bias, weight):
    """Outputs as the mathematics has them."""
    x = o.flatten(2)
    centred = x - x.mean(-1, keepdim=True)
    h = norm_weight * centred * (centred.square().mean(-1, keepdim=True) + EPS) ** -0.5 + norm_bias
    if gate is not None:
        h = h * gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    y = h @ weight.t()
    return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0)


def defined_results(inputs):
    """Outputs and gradients of o, the gate, γ, β and W, in float64."""
    o, gate, mask, *parameters, d_y = (x if x is None or x.dtype == torch.bool else x.double() for x in inputs)
    leaves = [x.requires_grad_() for x in (o, gate, *parameters) if x is not None]
    y = definition(o, gate, mask, *parameters)
    return [y.detach(), *torch.autograd.grad(y, leaves, d_y)]


def run(path, inputs):
    """Outputs and gradients in the same order."""
    *arguments, d_y = inputs
    given = Output(*arguments, EPS)
    d_o, d_gate, *d_parameters = path.output_backward(given, (), (d_y,))
    gradients = [d_o, *([] if given.gate is None else [d_gate]), *d_parameters]
    return [*path.output(given), *gradients]
