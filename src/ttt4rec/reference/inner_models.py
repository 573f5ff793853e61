"""The two inner models f(x; W), the layer norm around them, and the inner loss.

Numbers in brackets are equations of docs/mathematics.md.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Weights = tuple[Tensor, ...]
"""``(W1, b1)`` for TTT-Linear, ``(W1, b1, W2, b2)`` for TTT-MLP; ``[B, H, in, out]`` and ``[B, H, out]``."""

InnerModel = Callable[[Tensor, Weights], Tensor]


def linear_model(x: Tensor, weights: Weights) -> Tensor:
    """TTT-Linear's inner model, ``x W1 + b1``, for x ``[B, H, n, D]``."""
    W1, b1 = weights
    return x @ W1 + b1.unsqueeze(-2)


def mlp_model(x: Tensor, weights: Weights) -> Tensor:
    """TTT-MLP's inner model, ``gelu_tanh(x W1 + b1) W2 + b2``, for x ``[B, H, n, D]``."""
    W1, b1, W2, b2 = weights
    hidden = F.gelu(x @ W1 + b1.unsqueeze(-2), approximate="tanh")
    return hidden @ W2 + b2.unsqueeze(-2)


def layer_norm(z: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float) -> Tensor:
    """Layer norm per head: z ``[B, H, n, D]``, ``ln_weight`` (γ) and ``ln_bias`` (β) ``[H, D]``, biased variance."""
    centred = z - z.mean(-1, keepdim=True)
    inverse_std = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return ln_weight.unsqueeze(-2) * centred * inverse_std + ln_bias.unsqueeze(-2)


def inner_loss(
    weights: Weights, k: Tensor, v: Tensor, ln_weight: Tensor, ln_bias: Tensor, model: InnerModel, eps: float
) -> Tensor:
    """Return the inner loss (2), a scalar, for k and v ``[B, H, n, D]``.

    The sum runs over sequences and heads too. They share no weights, so its gradient is each one's own.
    """
    error = layer_norm(model(k, weights), ln_weight, ln_bias, eps) - (v - k)
    return 0.5 * error.square().sum()


def forgotten(weights: Weights, log_decay: Tensor, initial: Weights) -> Weights:
    """``(1 - A) (W - W̄)`` of (40), for weights ``[B, H, ...]``, ``ln a [B, K, H]`` and initial weights ``[H, ...]``."""
    lost = -log_decay.sum(1).expm1()
    shares = (lost.reshape(lost.shape + (1,) * (w.dim() - 2)) for w in weights)
    return tuple(share * (w - start) for w, share, start in zip(weights, shares, initial, strict=True))
