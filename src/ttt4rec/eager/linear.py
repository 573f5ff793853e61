"""TTT-Linear: one mini-batch forwards and back, and the walk over all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .tiles import DualLayer, InnerGradient, Normalised, Rates
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
    segment: int,
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
        segment: mini-batches between two checkpoints.

    Returns:
        Outputs ``[B, L, H, D]``, W1 and b1 after each sequence's last complete mini-batch, and what the backward needs:
        the inner gradients G ``[B, L, H, D]`` and the checkpoints (see ``checkpoints``).
    """
    return walk_forward(
        _forward_step, [q.shape[-1]], (q, k, v), inner_lr, token_scale, (W1, b1), (ln_weight, ln_bias),
        (starts, lengths), eps, segment,
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
    checkpoints: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
    segment: int,
) -> tuple[Tensor, ...]:
    """Gradients of ``linear_forward``, in the order of its first nine arguments; dW1 and db1 per sequence.

    W1 and b1 are the incoming weights; grad_W1 and grad_b1 are the gradients of the outgoing ones.
    """
    return walk_backward(
        _replay_step, _backward_step, grad_o, (grad_W1, grad_b1), (q, k, v), inner_lr, token_scale, (W1, b1), (G,),
        checkpoints, (ln_weight, ln_bias), (starts, lengths), eps, segment,
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
