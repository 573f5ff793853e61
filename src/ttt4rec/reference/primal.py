"""The primal form: the definition, one token at a time, its inner gradients taken by autograd.

Numbers in brackets are equations of docs/mathematics.md.
"""

import torch
from torch import Tensor

from .inner_models import InnerModel, Weights, forgotten, inner_loss, layer_norm


def primal_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    weights: Weights,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    model: InnerModel,
    eps: float = 1e-6,
    log_decay: Tensor | None = None,
    initial: Weights = (),
) -> tuple[Tensor, Weights]:
    """Run the inner loop token by token, (3) and (4), and with decays (40).

    Args:
        q: queries ``[B, L, H, D]``.
        k: keys ``[B, L, H, D]``.
        v: values ``[B, L, H, D]``.
        inner_lr: ``lr`` ``[B, L, H]``.
        token_scale: ``s`` ``[K]``; its length is the mini-batch size.
        weights: the inner model's weights per sequence and head.
        ln_weight: γ ``[H, D]``.
        ln_bias: β ``[H, D]``.
        model: ``linear_model`` or ``mlp_model``.
        eps: added to the variance.
        log_decay: ``ln a`` of every token ``[B, L, H]``; None: nothing is forgotten.
        initial: with it, the weights W̄ towards which the others decay ``[H, ...]``.

    Returns:
        Outputs ``[B, L, H, D]`` and the weights after the last complete mini-batch.
    """
    K = token_scale.numel()
    inner_gradient = torch.func.grad(inner_loss)
    start, gradient_sums = weights, tuple(torch.zeros_like(w) for w in weights)
    outputs = []
    for t in range(q.shape[1]):
        i = t % K
        q_t, k_t, v_t = (x[:, t].unsqueeze(-2) for x in (q, k, v))  # [B, H, 1, D]
        gradients = inner_gradient(start, k_t, v_t, ln_weight, ln_bias, model, eps)
        gradient_sums = tuple(
            total + inner_lr[:, t].reshape(g.shape[:2] + (1,) * (g.dim() - 2)) * g
            for total, g in zip(gradient_sums, gradients, strict=True)
        )
        weights_i = tuple(w - token_scale[i] * total for w, total in zip(start, gradient_sums, strict=True))
        output = q_t + layer_norm(model(q_t, weights_i), ln_weight, ln_bias, eps)
        outputs.append(output.squeeze(-2))
        if i == K - 1:
            if log_decay is not None:
                lost = forgotten(start, log_decay[:, t + 1 - K : t + 1], initial)
                weights_i = tuple(w - x for w, x in zip(weights_i, lost, strict=True))
            start, gradient_sums = weights_i, tuple(torch.zeros_like(w) for w in weights)
    return torch.stack(outputs, dim=1), start
