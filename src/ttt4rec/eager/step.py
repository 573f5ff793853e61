"""One token more for many streams, whose states lie in a pool.

A stream inside a mini-batch keeps of every token of it what the outputs after that token need. With X the inputs of
an inner layer and U = lr ∘ G its steps, the weights at token i are ``W - s_i Σ_{j <= i} X_jᵀ U_j``, so::

    x (W - s_i Σ X_jᵀ U_j) + b - s_i Σ U_j  =  [x, 1, A] M,    A_j = -s_i (x · X_j + 1),    M = [W; b; U]

A stream's record of a head is M of every inner layer as it stands, X of every layer, and v and lr, which only a
``TTTState`` needs. Each of them ends in K rows, one a token; in the last stands the token that is being read.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad

from .tiles import InnerGradient, Normalised

CACHE_BYTES = 1 << 21
"""Streams go in chunks whose records, gathered from the pool, are about this large."""


def record_shapes(D: int, hidden: int, K: int) -> list[tuple[int, int]]:
    """Rows and width of the parts of a record: M and X of every layer, v, lr; hidden is 0 for TTT-Linear."""
    layers = [(D, hidden), (hidden, D)] if hidden else [(D, D)]
    return [*((rows + 1 + K, out) for rows, out in layers), *((K, rows) for rows, _ in layers), (K, D), (K, 1)]


def record_parts(records: Tensor, D: int, hidden: int, K: int) -> list[Tensor]:
    """Views of the parts of records ``[..., R]``, ``[..., rows, width]`` each."""
    shapes = record_shapes(D, hidden, K)
    parts = records[..., : sum(map(prod, shapes))].split([*map(prod, shapes)], -1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def token_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    slots: Tensor,
    offset: Tensor,
    records: Tensor,
    hidden: int,
    eps: float,
) -> Tensor:
    """Advance B streams by one token each, in place. On a GPU nothing waits for the host.

    Args:
        q: ``[B, H, D]``, as k and v; any float dtype, computed in that of the records.
        k: keys.
        v: values.
        inner_lr: lr ``[B, H]``.
        token_scale: s ``[K]``.
        ln_weight: γ ``[H, D]``.
        ln_bias: β ``[H, D]``.
        slots: the streams' places in the pool, all different, int64 ``[B]``.
        offset: how many tokens of their mini-batch they have read, int64 ``[B]``.
        records: of the pool's N streams ``[N, H, R]``, contiguous, with the parts of ``record_shapes``. A row of each
            part is written; where the token completes its mini-batch, W and b.
        hidden: F of TTT-MLP; 0 for TTT-Linear.
        eps: added to the layer norm's variance.

    Returns:
        Outputs ``[B, H, D]`` in q's dtype.
    """
    (H, D), K, dtype = q.shape[1:], token_scale.numel(), records.dtype
    layers = 2 if hidden else 1
    order, chunks = _chunks(offset, K, records)
    slots, offset = slots[order], offset[order]
    place = offset.repeat_interleave(H)
    index = torch.arange(K, device=q.device)
    there = (index < place[:, None]) | (index == K - 1)
    eta = (-token_scale.to(dtype)[place, None] * there).unsqueeze(1)  # -s_i for every token that is there
    q_rows, *tokens = (x.index_select(0, order).to(dtype).flatten(0, 1).unsqueeze(1) for x in (q, k, v, inner_lr.unsqueeze(-1)))
    gamma, beta = (p.to(dtype).repeat(slots.numel(), 1).unsqueeze(1) for p in (ln_weight, ln_bias))
    parts = record_parts(records, D, hidden, K)
    o, new = torch.empty_like(q_rows), []
    for first, stop, complete in chunks:
        own, here = slots[first:stop], slice(first * H, stop * H)
        M_and_X = record_parts(records.index_select(0, own).flatten(0, 1), D, hidden, K)[:-2]
        M, X = M_and_X[:layers], M_and_X[layers:]
        weights, g, b = [m[:, :-K] for m in M], gamma[here], beta[here]
        k_here, v_here, lr_here = (x[here] for x in tokens)
        new.append(steps(k_here, v_here, lr_here, g, b, weights, eps))
        for target, x in zip(M_and_X, new[-1], strict=True):
            target[:, -1:] = x
        P = _outputs(q_rows[here], M, X, eta[here])
        torch.addcmul(b, g, Normalised(P, eps).x_hat, out=o[here]).add_(q_rows[here])
        if complete:
            last = slice(-complete * H, None)
            eta_last = eta[here][last].mT * (place[here][last] == K - 1).view(-1, 1, 1)
            for target, m, x, w in zip(parts, M, X, weights, strict=False):
                keys = pad(x[last], (0, 1), value=1.0) * eta_last
                w = torch.baddbmm(w[last], keys.mT, m[last, -K:])
                target[:, :, :-K].index_copy_(0, own[-complete:], w.unflatten(0, (-1, H)))
    heads = torch.arange(H, device=q.device)
    written = (*(torch.cat(rows) for rows in zip(*new, strict=True)), *tokens[1:])
    for target, x in zip(parts, written, strict=True):
        target[slots[:, None], heads, offset[:, None] - K] = x.view(-1, H, x.shape[-1])
    return torch.empty_like(q).index_copy_(0, order, o.view(q.shape).to(q.dtype))


def steps(
    k: Tensor, v: Tensor, lr: Tensor, gamma: Tensor, beta: Tensor, weights: Sequence[Tensor], eps: float
) -> tuple[Tensor, ...]:
    """U of each inner layer and X of each, for n tokens ``[R, n, D]`` at the same weights ``[W; b]``.

    lr is ``[R, n, 1]``, γ and β are ``[R, 1, D]``.
    """
    Z = _affine(k, weights[0])
    if len(weights) == 1:
        return InnerGradient(Z, k, v, gamma, beta, eps).value().mul_(lr), k
    X2 = gelu(Z, approximate="tanh")
    U2 = InnerGradient(_affine(X2, weights[1]), k, v, gamma, beta, eps).value().mul_(lr)
    U1: Tensor = torch.ops.aten.gelu_backward(U2 @ weights[1][:, :-1].mT, Z, approximate="tanh")
    return U1, U2, k, X2


class _Chunk(NamedTuple):
    first: int  # of the streams in order
    stop: int
    complete: int  # how many of them, at the end, may complete their mini-batch


def _chunks(offset: Tensor, K: int, records: Tensor) -> tuple[Tensor, list[_Chunk]]:
    """The order in which streams go, by their place in the mini-batch, and which go together."""
    if not offset.is_cpu:
        return _everything(offset)
    size = max(1, CACHE_BYTES // (records[0].numel() * records.element_size()))
    order = offset.argsort(stable=True)
    places = offset[order].tolist()
    parts = [(first, min(first + size, len(places))) for first in range(0, len(places), size)]
    return order, [_Chunk(a, b, places[a:b].count(K - 1)) for a, b in parts]


def _everything(offset: Tensor) -> tuple[Tensor, list[_Chunk]]:
    """For a GPU, where the host must not wait for the positions: all streams together, any of them at any token."""
    B = offset.numel()
    return torch.arange(B, device=offset.device), [_Chunk(0, B, B)]


def _affine(x: Tensor, weights: Tensor) -> Tensor:
    return torch.baddbmm(weights[:, -1:], x, weights[:, :-1])


def _outputs(x: Tensor, matrices: Sequence[Tensor], inputs: Sequence[Tensor], eta: Tensor) -> Tensor:
    """The inner model's outputs at the queries x ``[R, 1, D]``; eta is ``-s_i`` for every token ``[R, 1, n]``."""
    for i, (M, X) in enumerate(zip(matrices, inputs, strict=True)):
        if i:
            x = gelu(x, approximate="tanh")
        A = torch.bmm(x, X.mT).add_(1).mul_(eta)
        x = torch.bmm(torch.cat((x, x.new_ones(1).expand(x.shape[0], 1, 1), A), -1), M)
    return x
