"""One token more for many streams, whose states lie in a pool.

A stream inside a mini-batch keeps of every token of it what the outputs after that token need. With X the inputs of
an inner layer and U = lr ∘ G its steps, the weights at token i are ``W - s_i Σ_{j <= i} X_jᵀ U_j``, so::

    x (W - s_i Σ X_jᵀ U_j) + b - s_i Σ U_j  =  [x, 1, A] M,    A_j = -s_i (x · X_j + 1),    M = [W; b; U]

The pool holds M as it stands. All of its tensors end in K - 1 rows, one for each token of the mini-batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad

from .tiles import InnerGradient, Normalised

CACHE_BYTES = 1 << 21
"""Streams go in chunks whose matrices, gathered from the pool, are about this large."""


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
    pool: Sequence[Tensor],
    eps: float,
) -> Tensor:
    """Advance B streams by one token each, in place. On a GPU nothing waits for the host.

    Args:
        q: ``[B, H, D]``, as k and v; any float dtype, computed in that of the pool.
        k: keys.
        v: values.
        inner_lr: lr ``[B, H]``.
        token_scale: s ``[K]``.
        ln_weight: γ ``[H, D]``.
        ln_bias: β ``[H, D]``.
        slots: the streams' places in the pool, all different, int64 ``[B]``.
        offset: how many tokens of their mini-batch they have read, int64 ``[B]``.
        pool: of N streams, contiguous: M ``[N, H, in + K, out]`` of each inner layer, X ``[N, H, K - 1, in]`` of each,
            v ``[N, H, K - 1, D]`` and lr ``[N, H, K - 1, 1]``. A row of each is written; where the token completes its
            mini-batch, W and b.
        eps: added to the layer norm's variance.

    Returns:
        Outputs ``[B, H, D]`` in q's dtype.
    """
    H, K, dtype = q.shape[1], token_scale.numel(), pool[0].dtype
    layers = len(pool) // 2 - 1
    order, chunks = _chunks(offset, K, pool[:layers])
    slots, offset = slots[order], offset[order]
    heads = (slots[:, None] * H + torch.arange(H, device=q.device)).flatten()  # which of the pool's N·H
    place = offset.repeat_interleave(H)
    scale = -token_scale.to(dtype)[place].view(-1, 1, 1)
    eta = scale * (torch.arange(K - 1, device=q.device) < place[:, None]).unsqueeze(1)  # -s_i for every kept token
    q_rows, *tokens = (x[order].to(dtype).flatten(0, 1).unsqueeze(1) for x in (q, k, v, inner_lr.unsqueeze(-1)))
    gamma, beta = (p.to(dtype).repeat(slots.numel(), 1).unsqueeze(1) for p in (ln_weight, ln_bias))
    o, new = torch.empty_like(q_rows), []
    for chunk in chunks:
        own, here = slots[chunk.first : chunk.stop], slice(chunk.first * H, chunk.stop * H)
        gathered = [_gathered(x, own, x.shape[2] - (K - 1) + chunk.tokens) for x in pool[: 2 * layers]]
        M, X = gathered[:layers], gathered[layers:]
        initial = [m[:, : -1 - chunk.tokens] for m in M]
        g, b = gamma[here], beta[here]
        new.append(steps(*(x[here] for x in tokens), g, b, initial, eps))
        for target, x in zip(gathered, new[-1], strict=True):
            target[:, -1:] = x
        eta_here = torch.cat((eta[here, :, : chunk.tokens], scale[here]), -1)
        P = _outputs(q_rows[here], M, X, eta_here)
        torch.addcmul(b, g, Normalised(P, eps).x_hat, out=o[here]).add_(q_rows[here])
        if chunk.complete:
            last = slice(-chunk.complete * H, None)
            eta_last = eta_here[last].mT * (place[here][last] == K - 1).view(-1, 1, 1)
            for target, m, x, w in zip(pool, M, X, initial, strict=False):
                keys = pad(x[last], (0, 1), value=1.0) * eta_last
                w = torch.baddbmm(w[last], keys.mT, m[last, -1 - chunk.tokens :])
                target[:, :, : w.shape[1]].index_copy_(0, own[-chunk.complete :], w.unflatten(0, (-1, H)))
    if K > 1:
        row = place.clamp_max(K - 2) - (K - 1)  # from behind; what a complete mini-batch leaves there, nobody reads
        written = (*(torch.cat(parts) for parts in zip(*new, strict=True)), *tokens[1:])
        for target, x in zip(pool, written, strict=True):
            target.view(-1, target.shape[-1]).index_copy_(0, (heads + 1) * target.shape[2] + row, x.squeeze(1))
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
    tokens: int  # kept ones of the stream that has most
    complete: int  # how many streams at the end may complete their mini-batch


def _chunks(offset: Tensor, K: int, matrices: Sequence[Tensor]) -> tuple[Tensor, list[_Chunk]]:
    """The order in which streams go, by their number of kept tokens, and which go together."""
    if not offset.is_cpu:
        return _everything(offset, K)
    size = max(1, CACHE_BYTES // sum(m[0].numel() * m.element_size() for m in matrices))
    order = offset.argsort(stable=True)
    places = offset[order].tolist()
    parts = [(first, min(first + size, len(places))) for first in range(0, len(places), size)]
    return order, [_Chunk(a, b, places[b - 1], places[a:b].count(K - 1)) for a, b in parts]


def _everything(offset: Tensor, K: int) -> tuple[Tensor, list[_Chunk]]:
    """For a GPU, where the host must not wait for the positions: all streams together, any of them at any token."""
    B = offset.numel()
    return torch.arange(B, device=offset.device), [_Chunk(0, B, K - 1, B)]


def _affine(x: Tensor, weights: Tensor) -> Tensor:
    return torch.baddbmm(weights[:, -1:], x, weights[:, :-1])


def _gathered(x: Tensor, slots: Tensor, rows: int) -> Tensor:
    """The first rows of some of the pool's streams, and room for one row more, ``[n·H, rows + 1, width]``."""
    room = x.new_empty(slots.numel(), x.shape[1], rows + 1, x.shape[3])
    torch.index_select(x[:, :, :rows], 0, slots, out=room[:, :, :rows])
    return room.flatten(0, 1)


def _outputs(x: Tensor, matrices: Sequence[Tensor], inputs: Sequence[Tensor], eta: Tensor) -> Tensor:
    """The inner model's outputs at the queries x ``[R, 1, D]``; eta is ``-s_i`` for every token ``[R, 1, n]``."""
    for i, (M, X) in enumerate(zip(matrices, inputs, strict=True)):
        if i:
            x = gelu(x, approximate="tanh")
        A = torch.bmm(x, X.mT).add_(1).mul_(eta)
        x = torch.bmm(torch.cat((x, x.new_ones(1).expand(x.shape[0], 1, 1), A), -1), M)
    return x
