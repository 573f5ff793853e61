"""The dual form: the same numbers as the primal form, one mini-batch at a time, matmuls only.

Numbers in brackets are equations of docs/mathematics.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .inner_models import Weights, forgotten, layer_norm


def dual_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    weights: Weights,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    inner: str,
    eps: float = 1e-6,
    log_decay: Tensor | None = None,
    initial: Weights = (),
) -> tuple[Tensor, Weights]:
    """Run the inner loop mini-batch by mini-batch; results and arguments as in ``primal_form``.

    ``inner`` is the inner model's name, ``"linear"`` or ``"mlp"``.
    """
    K, L = token_scale.numel(), q.shape[1]
    mini_batch = MINI_BATCHES[inner]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    inner_lr = inner_lr.transpose(1, 2)
    outputs = []
    for start in range(0, L, K):
        tokens = slice(start, min(start + K, L))
        r = tokens.stop - start  # a last, short mini-batch uses the first r rows of η
        eta = torch.tril(token_scale[:r, None] * inner_lr[:, :, None, tokens])  # η[i, j] = s_i lr_j, i >= j
        out, updated = mini_batch(
            q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], eta, weights, ln_weight, ln_bias, eps
        )
        outputs.append(q[:, :, tokens] + layer_norm(out, ln_weight, ln_bias, eps))
        if r == K:
            if log_decay is not None:
                lost = forgotten(weights, log_decay[:, tokens], initial)
                updated = tuple(w - x for w, x in zip(updated, lost, strict=True))
            weights = updated
    return torch.cat(outputs, dim=2).transpose(1, 2), weights


def linear_mini_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weights: Weights,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Weights]:
    """TTT-Linear over one mini-batch, (10): q, k, v ``[B, H, K, D]``, eta ``[B, H, K, K]`` lower triangular."""
    W1, b1 = weights
    Z = k @ W1 + b1.unsqueeze(-2)
    G = layer_norm_gradient(Z, v - k, ln_weight, ln_bias, eps)
    A = _attention(q, k, eta)
    out = q @ W1 + b1.unsqueeze(-2) - A @ G
    return out, _updated(W1, b1, k, G, eta)


def mlp_mini_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    weights: Weights,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Weights]:
    """TTT-MLP over one mini-batch, (11) to (13): the dual form applied to each of its two layers."""
    W1, b1, W2, b2 = weights
    Z1 = k @ W1 + b1.unsqueeze(-2)
    X2 = F.gelu(Z1, approximate="tanh")
    Z2 = X2 @ W2 + b2.unsqueeze(-2)
    G2 = layer_norm_gradient(Z2, v - k, ln_weight, ln_bias, eps)
    G1 = (G2 @ W2.transpose(-1, -2)) * gelu_derivative(Z1)
    Z1_bar = q @ W1 + b1.unsqueeze(-2) - _attention(q, k, eta) @ G1
    X2_bar = F.gelu(Z1_bar, approximate="tanh")
    out = X2_bar @ W2 + b2.unsqueeze(-2) - _attention(X2_bar, X2, eta) @ G2
    return out, (*_updated(W1, b1, k, G1, eta), *_updated(W2, b2, X2, G2, eta))


MINI_BATCHES = {"linear": linear_mini_batch, "mlp": mlp_mini_batch}
"""The dual form of every inner model."""


def layer_norm_gradient(Z: Tensor, target: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float) -> Tensor:
    """G, (6): the inner loss's gradient at Z, for targets v - k."""
    centred = Z - Z.mean(-1, keepdim=True)
    r = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    x_hat = centred * r
    gamma = ln_weight.unsqueeze(-2)
    y = gamma * (gamma * x_hat + ln_bias.unsqueeze(-2) - target)
    return r * (y - y.mean(-1, keepdim=True) - x_hat * (y * x_hat).mean(-1, keepdim=True))


def gelu_derivative(x: Tensor) -> Tensor:
    """Derivative of the tanh approximation of gelu."""
    c, a = 0.7978845608028654, 0.044715  # sqrt(2/π) and the cubic coefficient
    tanh = torch.tanh(c * (x + a * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * c * (1 + 3 * a * x.square())


def _attention(queries: Tensor, keys: Tensor, eta: Tensor) -> Tensor:
    """The pairs (7) times η, which is lower triangular already."""
    return eta * (queries @ keys.transpose(-1, -2) + 1)


def _updated(W: Tensor, b: Tensor, X: Tensor, G: Tensor, eta: Tensor) -> Weights:
    """W and b after the mini-batch, (9)."""
    eta_last = eta[..., -1, :].unsqueeze(-1)
    return W - (eta_last * X).transpose(-1, -2) @ G, b - (eta_last * G).sum(-2)
