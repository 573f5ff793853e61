"""What the layer derives from its input before the inner loop: rotated views, inner rates, token scales."""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate interleaved feature pairs (2i, 2i+1) by the angle ``position · θ^(-2i/D)`` (RoPE).

    TTT restarts positions in every mini-batch: pass ``t mod K``.

    Args:
        x: ``[B, L, H, D]`` with D even.
        positions: integers ``[B, L]`` or ``[L]``.
        theta: the base of the frequencies.

    Returns:
        The rotated tensor, shape and dtype of x.
    """
    D = x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, D, 2, device=x.device, dtype=dtype) / D
    angles = positions.unsqueeze(-1).to(dtype) * theta ** (-exponents)  # [.., L, D/2]
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)  # broadcast over heads
    even, odd = x.to(dtype).unflatten(-1, (D // 2, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def inner_learning_rate(x: Tensor, weight: Tensor, bias: Tensor, base_lr: float) -> Tensor:
    """``lr = base_lr · sigmoid(x · w_lr + b_lr) / D`` per token and head.

    Args:
        x: the layer's input ``[B, L, C]``.
        weight: w_lr ``[H, C]``.
        bias: b_lr ``[H]``.
        base_lr: η_base.

    Returns:
        ``[B, L, H]``, float32 at least.
    """
    head_dim = x.shape[-1] // weight.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    return base_lr * torch.sigmoid(logits) / head_dim


def token_scale(offset: Tensor) -> Tensor:
    """``s_i = max(0, 1/(i+1) + τ_i)`` for the learned offsets τ ``[K]``, i counted from 0 in the mini-batch."""
    positions = torch.arange(1, offset.numel() + 1, device=offset.device, dtype=offset.dtype)
    return (1 / positions + offset).clamp_min(0)
