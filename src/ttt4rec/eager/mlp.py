"""TTT-MLP: one mini-batch forwards, replayed and back, and the walk over all of them.

The forward is (11) to (13). The backward goes through P2 and the update of W2 and b2, through P1 and the update
of W1 and b1, through G1 and G2, and last through Z2 and Z1. The forward keeps Z1 and G2, which with the weights
suffice to replay an update.

Numbers in brackets are equations of docs/mathematics.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu

from ..arguments import Scan
from .gelu import Gelu
from .tiles import DualLayer, InnerGradient, Normalised, Rates, affine
from .walk import walk_backward, walk_forward


def mlp_scan(scan: Scan) -> tuple[Tensor, ...]:
    """Run the inner loop, as ``linear_scan`` does.

    Returns:
        Outputs ``[B, L, H, D]``, the four weights after each sequence's last complete mini-batch, and what the
        backward needs: Z1 ``[B, L, H, F]``, G2 ``[B, L, H, D]`` and the checkpoints (see ``checkpoints``).
    """
    return walk_forward(_forward_step, [scan.weights[0].shape[-1], scan.q.shape[-1]], scan)


def mlp_scan_backward(scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, inner_lr, token_scale, the four weights, γ and β; those of the weights per sequence."""
    return walk_backward(_replay_step, _backward_step, scan, kept, grads)


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weights: Sequence[Tensor],
    rates: Rates,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    W1, W2 = weights
    Z1 = torch.bmm(k, W1)
    gelu = Gelu(Z1)
    X2 = gelu.value_with_one()
    G2 = InnerGradient(torch.bmm(X2, W2), k[..., :-1], v, gamma, beta, eps).value()
    G1 = torch.bmm(G2, W2[:, :-1].mT).mul_(gelu.slope())
    first, second = DualLayer(k, G1, W1, rates), DualLayer(X2, G2, W2, rates)
    P2 = second.output(Gelu(first.output(q)).value_with_one())
    first.update()
    second.update()
    return P2, (Z1, G2)


def _replay_step(k: Tensor, Z1: Tensor, G2: Tensor, weights: Sequence[Tensor], rates: Rates) -> None:
    W1, W2 = weights
    gelu = Gelu(Z1)
    X2 = gelu.value_with_one()
    G1 = torch.bmm(G2, W2[:, :-1].mT).mul_(gelu.slope())
    DualLayer(k, G1, W1, rates).update()
    DualLayer(X2, G2, W2, rates).update()


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
    """One step of the walk back; d_weights are moved, in place, to before the mini-batch."""
    (W1, W2), (dW1, dW2) = weights, d_weights
    # The forward's values.
    gelu = Gelu(Z1)
    X2, slope = gelu.value_with_one(), gelu.slope()
    G2_W2 = torch.bmm(G2, W2[:, :-1].mT)
    first, second = DualLayer(k, G2_W2 * slope, W1, rates), DualLayer(X2, G2, W2, rates)
    inner = InnerGradient(torch.bmm(X2, W2), k[..., :-1], v, gamma, beta, eps)
    gelu_bar = Gelu(first.output(q))
    norm = Normalised(second.output(gelu_bar.value_with_one()), eps)
    # Outputs and updates.
    dX2_bar, dX2, dG2 = second.backward(norm.jacobian_product(dO * gamma), dW2)
    dq, dk, dG1 = first.backward(dX2_bar.mul_(gelu_bar.slope()), dW1)
    # G1, (26), then G2, Z2 and Z1.
    E = dG1.new_zeros(X2.shape)  # with nothing for the bias
    torch.mul(dG1, slope, out=E[..., :-1])
    dG2.baddbmm_(E[..., :-1], W2[:, :-1])
    dZ2, de, dgamma = inner.backward(dG2, G2)
    dW2 += torch.bmm(X2.mT, dZ2).baddbmm_(E.mT, G2)
    dZ1 = dX2.baddbmm_(dZ2, W2[:, :-1].mT).mul_(slope).addcmul_(dG1.mul_(G2_W2), gelu.curvature())
    dW1 += torch.bmm(k.mT, dZ1)
    dk.add_(de).baddbmm_(dZ1, W1[:, :-1].mT)
    return dq.add_(dO), dk, de.neg(), dgamma.addcmul_(dO, norm.x_hat), de.add_(dO)
