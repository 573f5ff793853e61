"""TTT-MLP: one mini-batch forwards, replayed and back, and the walk over all of them.

The forward is (11) to (13). The backward goes through P2 and the update of W2 and b2, through P1 and the update
of W1 and b1, through G1 and G2, and last through Z2 and Z1. The forward keeps Z1 and G2, which with the weights
suffice to replay an update.

Numbers in brackets are equations of docs/mathematics.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from ..arguments import Scan
from .pieces import Pieces, pieces_for
from .tiles import InnerGradient, affine
from .walk import walk_backward, walk_forward


def mlp_scan(scan: Scan, pieces: Pieces | None = None) -> tuple[Tensor, ...]:
    """Run the inner loop, as ``linear_scan`` does.

    Returns:
        Outputs ``[B, L, H, D]``, the four weights after each sequence's last complete mini-batch, and what the
        backward needs: Z1 ``[B, L, H, F]``, G2 ``[B, L, H, D]`` and the checkpoints (see ``checkpoints``).
    """
    return walk_forward(_forward_step, pieces or pieces_for(scan), [scan.hidden, scan.q.shape[-1]], scan)


def mlp_scan_backward(
    scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...], pieces: Pieces | None = None
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, inner_lr, token_scale, the four weights, γ and β; the weights' per sequence."""
    return walk_backward(_replay_step, _backward_step, pieces or pieces_for(scan), scan, kept, grads)


def mlp_steps(
    k: Tensor, v: Tensor, lr: Tensor, gamma: Tensor, beta: Tensor, weights: Sequence[Tensor], eps: float
) -> tuple[Tensor, ...]:
    """U1, X2, U2 of tokens ``[R, n, D]`` read at weights ``[W; b]``, for ``step``."""
    Z1 = affine(k, weights[0])
    X2 = gelu(Z1, approximate="tanh")
    U2 = InnerGradient(affine(X2, weights[1]), k, v, gamma, beta, eps).value().mul_(lr)
    U1 = torch.ops.aten.gelu_backward(U2 @ weights[1][:, :-1].mT, Z1, approximate="tanh")
    return U1, X2, U2


def _forward_step(
    pieces: Pieces,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weights: Sequence[Tensor],
    rates: Any,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    W1, W2 = map(pieces.weights, weights)
    Z1 = pieces.rounded(W1.affine(k))
    gelu = pieces.gelu(Z1)
    X2 = gelu.value_with_one()
    G2 = pieces.inner_gradient(W2.affine(X2), k, v, gamma, beta, eps).value()
    G1 = gelu.times_slope(W2.back(G2))
    first, second = pieces.layer(k, G1, W1, rates), pieces.layer(X2, G2, W2, rates)
    P2 = second.output(pieces.gelu(first.output(q)).value_with_one())
    first.update()
    second.update()
    return P2, (Z1, G2)


def _replay_step(pieces: Pieces, k: Tensor, Z1: Tensor, G2: Tensor, weights: Sequence[Tensor], rates: Any) -> None:
    W1, W2 = map(pieces.weights, weights)
    gelu = pieces.gelu(Z1)
    X2 = gelu.value_with_one()
    G1 = gelu.times_slope(W2.back(G2))
    pieces.layer(k, G1, W1, rates).update()
    pieces.layer(X2, G2, W2, rates).update()


def _backward_step(
    pieces: Pieces,
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
    rates: Any,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of the walk back; d_weights are moved, in place, to before the mini-batch."""
    (W1, W2), (dW1, dW2) = map(pieces.weights, weights), d_weights
    # The forward's values.
    gelu = pieces.gelu(Z1)
    X2 = gelu.value_with_one()
    G2_W2 = W2.back(G2)
    first = pieces.layer(k, gelu.times_slope(G2_W2), W1, rates)
    second = pieces.layer(X2, G2, W2, rates)
    inner = pieces.inner_gradient(W2.affine(X2), k, v, gamma, beta, eps)
    gelu_bar = pieces.gelu(first.output(q))
    norm = pieces.output_norm(second.output(gelu_bar.value_with_one()), eps)
    # Outputs and updates.
    dX2_bar, dX2, dG2 = second.backward(norm.backward(dO, gamma), dW2)
    dq, dk, dG1 = first.backward(gelu_bar.times_slope(dX2_bar), dW1)
    # G1, (26), then G2, Z2 and Z1.
    E = gelu.times_slope_with_zero(dG1)
    dZ2, de, dgamma = inner.backward(W2.forth(E, onto=dG2), G2)
    W2.add_outer(dW2, X2, dZ2, (E, G2))
    dZ1 = gelu.backward(W2.back(dZ2, onto=dX2), dG1, G2_W2)
    W1.add_outer(dW1, k, dZ1)
    dk = W1.back(dZ1, onto=dk.add_(de))
    return dq.add_(dO), dk, de.neg(), *norm.parameters(dO, dgamma, de)
