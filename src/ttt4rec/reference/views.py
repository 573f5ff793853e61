"""What the layer derives from its input before the inner loop: rotated views, inner rates, token scales.

Numbers in brackets are equations of docs/mathematics.md.
"""

import torch
from torch import Tensor


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles ``position · θ^(-2i/D)`` (RoPE), ``[..., D/2]`` for positions ``[...]``.

    TTT restarts positions in every mini-batch: pass ``t mod K``. Computed in ``dtype``.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angles = positions.unsqueeze(-1).to(dtype) * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved feature pairs (2i, 2i+1) of x ``[B, L, H, D]`` by angles ``[L, D/2]`` or ``[B, L, D/2]``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor, reach: Tensor | None = None) -> Tensor:
    """``y_t = b + Σ_j w_j x_{t - (taps - 1) + j}`` of x ``[B, L, C]``, zeros before it; w ``[C, taps]``, b ``[C]``.

    A reach ``[B, L]`` says how far back each y may look: beyond, it sees zeros too.
    """
    L, taps = x.shape[1], weight.shape[1]
    padded = torch.nn.functional.pad(x, (0, 0, taps - 1, 0))
    terms = [padded[:, j : j + L] * weight[:, j] for j in range(taps)]
    if reach is not None:
        terms = [term.masked_fill((reach < taps - 1 - j).unsqueeze(-1), 0) for j, term in enumerate(terms)]
    return bias + sum(terms)


def inner_learning_rate(x: Tensor, weight: Tensor, bias: Tensor, base_lr: float, head_dim: int) -> Tensor:
    """The rates lr, (31), per token and head.

    Args:
        x: the layer's input ``[B, L, C]``.
        weight: w_lr ``[H, C]``.
        bias: b_lr ``[H]``.
        base_lr: η_base.
        head_dim: D.

    Returns:
        ``[B, L, H]``, float32 at least.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    return base_lr * torch.sigmoid(logits) / head_dim


def token_scale(offset: Tensor) -> Tensor:
    """s, (31), of the learned offsets τ ``[K]``."""
    positions = torch.arange(1, offset.numel() + 1, device=offset.device, dtype=offset.dtype)
    return (1 / positions + offset).clamp_min(0)
