"""TTT-MLP: forward and reversible backward over all mini-batches of all sequences.

The closed form, per mini-batch, with U = G2 W2ᵀ. Forward::

    Z1 = K W1 + b1      X2 = gelu(Z1)       Z2 = X2 W2 + b2     G2 = inner gradient at Z2
    G1 = U ∘ gelu'(Z1)  P1 = dual output of (Q, K, G1; W1, b1)  X̄2 = gelu(P1)
    P2 = dual output of (X̄2, X2, G2; W2, b2)                     O = Q + LN(P2)

Backward: through P2 and the update of (W2, b2), through P1 and the update of (W1, b1), through G1 and G2, and last
through Z2 and Z1. Z1 and G2 are kept by the forward; they suffice to rebuild, in this order, W2, G1 and W1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu

from .tiles import InnerGradient, Normalised, Rates, dual_backward, dual_output, linear_backward_, update
from .walk import walk_backward, walk_forward

_gelu_backward = torch.ops.aten.gelu_backward


def mlp_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    b2: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Run the inner loop; arguments as in ``linear_forward``, with W1 ``[N, H, D, F]`` and W2 ``[N, H, F, D]``.

    Returns:
        Outputs ``[B, L, H, D]``, the four weights after each sequence's last complete mini-batch, and what the
        backward needs: Z1 ``[B, L, H, F]`` and G2 ``[B, L, H, D]``.
    """
    return walk_forward(
        _forward_step, [W1.shape[-1], q.shape[-1]], (q, k, v), inner_lr, token_scale, (W1, b1, W2, b2),
        (ln_weight, ln_bias), (starts, lengths), eps,
    )  # fmt: skip


def mlp_backward(
    grad_o: Tensor,
    grad_W1: Tensor,
    grad_b1: Tensor,
    grad_W2: Tensor,
    grad_b2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    b2: Tensor,
    Z1: Tensor,
    G2: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of ``mlp_forward``, in the order of its first eleven arguments; those of the weights per sequence."""
    return walk_backward(
        _backward_step, grad_o, (grad_W1, grad_b1, grad_W2, grad_b2), (q, k, v), inner_lr, token_scale,
        (W1, b1, W2, b2), (Z1, G2), (ln_weight, ln_bias), (starts, lengths), eps,
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
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    W1, b1, W2, b2 = weights
    Z1 = torch.baddbmm(b1.unsqueeze(1), k, W1)
    X2 = gelu(Z1, approximate="tanh")
    Z2 = torch.baddbmm(b2.unsqueeze(1), X2, W2)
    G2 = InnerGradient(Z2, k, v, gamma, beta, eps).value()
    G1 = _gelu_backward(G2 @ W2.mT, Z1, approximate="tanh")
    X2_bar = gelu(dual_output(q, k, G1, W1, b1, rates), approximate="tanh")
    P2 = dual_output(X2_bar, X2, G2, W2, b2, rates)
    update(W1, b1, k, G1, rates, sign=-1)
    update(W2, b2, X2, G2, rates, sign=-1)
    return P2, (Z1, G2)


def _backward_step(
    dO: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    Z1: Tensor,
    G2: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weights: Sequence[Tensor],
    d_weights: Sequence[Tensor],
    rates: Rates,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of the walk back; weights and d_weights are moved, in place, to before the mini-batch."""
    W1, b1, W2, b2 = weights
    dW1, db1, dW2, db2 = d_weights
    # Rebuild the weights before the mini-batch, and the forward's values at them.
    X2 = gelu(Z1, approximate="tanh")
    update(W2, b2, X2, G2, rates, sign=1)
    U = G2 @ W2.mT
    G1 = _gelu_backward(U, Z1, approximate="tanh")
    update(W1, b1, k, G1, rates, sign=1)
    inner = InnerGradient(torch.baddbmm(b2.unsqueeze(1), X2, W2), k, v, gamma, beta, eps)
    P1 = dual_output(q, k, G1, W1, b1, rates)
    X2_bar = gelu(P1, approximate="tanh")
    norm = Normalised(dual_output(X2_bar, X2, G2, W2, b2, rates), eps)
    # Outputs and updates.
    dP2 = norm.jacobian_product(dO * gamma)
    dX2_bar, dX2, dG2 = dual_backward(dP2, X2_bar, X2, G2, W2, dW2, db2, rates)
    dP1 = _gelu_backward(dX2_bar, P1, approximate="tanh")
    dq, dk, dG1 = dual_backward(dP1, q, k, G1, W1, dW1, db1, rates)
    # G1 = U ∘ gelu'(Z1) and U = G2 W2ᵀ.
    dU = _gelu_backward(dG1, Z1, approximate="tanh")
    dG2.baddbmm_(dU, W2)
    dW2.baddbmm_(dU.mT, G2)
    # G2, then Z2 and Z1.
    dZ2, de, dgamma, dbeta = inner.backward(dG2, G2)
    linear_backward_(dZ2, X2, dW2, db2)
    dZ1 = _gelu_backward(dX2.baddbmm_(dZ2, W2.mT), Z1, approximate="tanh")
    dZ1.addcmul_(dG1.mul_(U), gelu_second_derivative(Z1))
    linear_backward_(dZ1, k, dW1, db1)
    dk.add_(de).baddbmm_(dZ1, W1.mT)
    dgamma.add_((dO * norm.x_hat).sum(1))
    dbeta.add_(dO.sum(1))
    return dq.add_(dO), dk, de.neg_(), dgamma, dbeta


def gelu_second_derivative(x: Tensor) -> Tensor:
    """Second derivative of the tanh gelu: ``(1 - h²) (u' + x u''/2 - x h u'²)``, h = tanh u, u = c (x + a x³)."""
    c, a = 0.7978845608028654, 0.044715
    x_squared = x.square()
    h = torch.tanh_((x_squared * (a * c)).add_(c).mul_(x))
    slope = x_squared.mul_(3 * a * c).add_(c)  # u'; and x u''/2 = 3 a c x² = u' - c
    result = (slope * 2).sub_(c).sub_(slope.square_().mul_(h).mul_(x))
    return result.mul_(h.square_().neg_().add_(1))
