"""TTT-Linear: one mini-batch forwards and back, and the walk over all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import Scan
from .tiles import DualLayer, InnerGradient, Normalised, Rates, affine
from .walk import walk_backward, walk_forward


def linear_scan(scan: Scan) -> tuple[Tensor, ...]:
    """Run the inner loop. Tokens outside every sequence get zero outputs.

    Returns:
        Outputs ``[B, L, H, D]``, W1 and b1 after each sequence's last complete mini-batch, and what the backward needs:
        the inner gradients G ``[B, L, H, D]`` and the checkpoints (see ``checkpoints``).
    """
    return walk_forward(_forward_step, [scan.q.shape[-1]], scan)


def linear_scan_backward(scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, inner_lr, token_scale, W1, b1, γ and β; those of the weights per sequence."""
    return walk_backward(_replay_step, _backward_step, scan, kept, grads)


def linear_steps(
    k: Tensor, v: Tensor, lr: Tensor, gamma: Tensor, beta: Tensor, weights: Sequence[Tensor], eps: float
) -> tuple[Tensor, ...]:
    """U of tokens ``[R, n, D]`` read at weights ``[W; b]``, for ``step``."""
    return (InnerGradient(affine(k, weights[0]), k, v, gamma, beta, eps).value().mul_(lr),)


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
    (W,) = weights
    G = InnerGradient(torch.bmm(k, W), k[..., :-1], v, gamma, beta, eps).value()
    layer = DualLayer(k, G, W, rates)
    P = layer.output(q)
    layer.update()
    return P, (G,)


def _replay_step(k: Tensor, G: Tensor, weights: Sequence[Tensor], rates: Rates) -> None:
    DualLayer(k, G, weights[0], rates).update()


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
    (W,), (dW,) = weights, d_weights
    # The forward's values.
    layer = DualLayer(k, G, W, rates)
    inner = InnerGradient(torch.bmm(k, W), k[..., :-1], v, gamma, beta, eps)
    norm = Normalised(layer.output(q), eps)
    # Output and update, then G, then Z.
    dq, dk, dG = layer.backward(norm.jacobian_product(dO * gamma), dW)
    dZ, de, dgamma = inner.backward(dG, G)
    dW += torch.bmm(k.mT, dZ)
    dk.add_(de).baddbmm_(dZ, W[:, :-1].mT)
    return dq.add_(dO), dk, de.neg(), dgamma.addcmul_(dO, norm.x_hat), de.add_(dO)
