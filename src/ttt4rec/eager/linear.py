"""TTT-Linear: one mini-batch forwards and back, and the walk over all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .tiles import InnerGradient, Normalised, Rates, dual_backward, dual_output, linear_backward_, update
from .walk import walk_backward, walk_forward


def linear_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Run the inner loop. Tokens outside every sequence get zero outputs.

    Args:
        q: ``[B, L, H, D]``, as k and v; any float dtype, computed in that of W1.
        k: keys.
        v: values.
        inner_lr: lr ``[B, L, H]``.
        token_scale: s ``[K]``.
        W1: ``[N, H, D, D]``, float32 or float64, as b1, for the N sequences.
        b1: ``[N, H, D]``.
        ln_weight: γ ``[H, D]``.
        ln_bias: β ``[H, D]``.
        starts: first token of each sequence in the flattened tokens ``[N]``, or None: every batch row is one.
        lengths: their lengths ``[N]``, or None.
        eps: added to the layer norm's variance.

    Returns:
        Outputs ``[B, L, H, D]``, W1 and b1 after each sequence's last complete mini-batch, and the inner gradients
        G ``[B, L, H, D]`` that the backward needs.
    """
    return walk_forward(
        _forward_step, [q.shape[-1]], (q, k, v), inner_lr, token_scale, (W1, b1), (ln_weight, ln_bias),
        (starts, lengths), eps,
    )  # fmt: skip


def linear_backward(
    grad_o: Tensor,
    grad_W1: Tensor,
    grad_b1: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    G: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of ``linear_forward``, in the order of its first nine arguments; dW1 and db1 per sequence.

    W1 and b1 are the outgoing weights, from which the walk starts, and grad_W1 and grad_b1 belong to them.
    """
    return walk_backward(
        _backward_step, grad_o, (grad_W1, grad_b1), (q, k, v), inner_lr, token_scale, (W1, b1), (G,),
        (ln_weight, ln_bias), (starts, lengths), eps,
    )  # fmt: skip


def _forward_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weights: Sequence[Tensor],
    rates: Rates,
    eps: float,
) -> tuple[Tensor, tuple[Tensor]]:
    W, b = weights
    Z = torch.baddbmm(b.unsqueeze(1), k, W)
    G = InnerGradient(Z, k, v, gamma, beta, eps).value()
    P = dual_output(q, k, G, W, b, rates)
    update(W, b, k, G, rates, sign=-1)
    return P, (G,)


def _backward_step(
    dO: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    G: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weights: Sequence[Tensor],
    d_weights: Sequence[Tensor],
    rates: Rates,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (W, b), (dW, db) = weights, d_weights
    # Rebuild the weights before the mini-batch, and the forward's values at them.
    update(W, b, k, G, rates, sign=1)
    inner = InnerGradient(torch.baddbmm(b.unsqueeze(1), k, W), k, v, gamma, beta, eps)
    norm = Normalised(dual_output(q, k, G, W, b, rates), eps)
    # Output and update, then G, then Z.
    dP = norm.jacobian_product(dO * gamma)
    dq, dk, dG = dual_backward(dP, q, k, G, W, dW, db, rates)
    dZ, de, dgamma, dbeta = inner.backward(dG, G)
    linear_backward_(dZ, k, dW, db)
    dk.add_(de).baddbmm_(dZ, W.mT)
    dgamma.add_((dO * norm.x_hat).sum(1))
    dbeta.add_(dO.sum(1))
    return dq.add_(dO), dk, de.neg_(), dgamma, dbeta
