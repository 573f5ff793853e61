"""TTT-Linear: one mini-batch forwards and back, and the walk over all of them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..arguments import Scan
from .pieces import Pieces, pieces_for
from .tiles import InnerGradient, affine
from .walk import walk_backward, walk_forward


def linear_scan(scan: Scan, pieces: Pieces | None = None) -> tuple[Tensor, ...]:
    """Run the inner loop. Tokens outside every sequence get zero outputs.

    Returns:
        Outputs ``[B, L, H, D]``, W1 and b1 after each sequence's last complete mini-batch, and what the backward needs:
        the inner gradients G ``[B, L, H, D]`` and the checkpoints (see ``checkpoints``).
    """
    return walk_forward(_forward_step, pieces or pieces_for(scan), [scan.q.shape[-1]], scan)


def linear_scan_backward(
    scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...], pieces: Pieces | None = None
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, inner_lr, token_scale, W1, b1, γ and β; the weights' per sequence."""
    return walk_backward(_replay_step, _backward_step, pieces or pieces_for(scan), scan, kept, grads)


def linear_steps(
    k: Tensor, v: Tensor, lr: Tensor, gamma: Tensor, beta: Tensor, weights: Sequence[Tensor], eps: float
) -> tuple[Tensor, ...]:
    """U of tokens ``[R, n, D]`` read at weights ``[W; b]``, for ``step``."""
    return (InnerGradient(affine(k, weights[0]), k, v, gamma, beta, eps).value().mul_(lr),)


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
) -> tuple[Tensor, tuple[Tensor]]:
    W = pieces.weights(weights[0])
    G = pieces.inner_gradient(W.affine(k), k, v, gamma, beta, eps).value()
    layer = pieces.layer(k, G, W, rates)
    P = layer.output(q)
    layer.update()
    return P, (G,)


def _replay_step(pieces: Pieces, k: Tensor, G: Tensor, weights: Sequence[Tensor], rates: Any) -> None:
    pieces.layer(k, G, pieces.weights(weights[0]), rates).update()


def _backward_step(
    pieces: Pieces,
    dO: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    G: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weights: Sequence[Tensor],
    d_weights: Sequence[Tensor],
    rates: Any,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    W, (dW,) = pieces.weights(weights[0]), d_weights
    # The forward's values.
    layer = pieces.layer(k, G, W, rates)
    inner = pieces.inner_gradient(W.affine(k), k, v, gamma, beta, eps)
    norm = pieces.output_norm(layer.output(q), eps)
    # Output and update, then G, then Z.
    dq, dk, dG = layer.backward(norm.backward(dO, gamma), dW)
    dZ, de, dgamma = inner.backward(dG, G)
    W.add_outer(dW, k, dZ)
    dk = W.back(dZ, onto=dk.add_(de))
    return dq.add_(dO), dk, de.neg(), *norm.parameters(dO, dgamma, de)
