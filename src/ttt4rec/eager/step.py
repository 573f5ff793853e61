"""One token more for many streams, whose states lie in a pool.

A stream inside a mini-batch keeps of every token of it what the outputs (30) of later ones need: the inputs X of each
inner layer and its steps U. A stream's record of a head is ``inner_models.Record``; v and lr in its rows only a
``TTTState`` needs. In the last row stands the token that is being read.

Numbers in brackets are equations of docs/mathematics.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad

from ..arguments import TokenStep
from ..inner_models import Record
from .forgetting import forget, lost
from .linear import linear_steps
from .mlp import mlp_steps
from .tiles import Normalised, affine

CACHE_BYTES = 1 << 21
"""Streams go in chunks whose records, gathered from the pool, are about this large."""


STEPS = {"linear": linear_steps, "mlp": mlp_steps}
"""Of every inner model: X, U of the layers, except the first X, which is k."""


def token_step(step: TokenStep) -> tuple[Tensor]:
    """Advance B streams by one token each, in place. On a GPU nothing waits for the host.

    A row of the record is written; where the token completes its mini-batch, W and b.

    Returns:
        Outputs ``[B, H, D]`` in q's dtype.
    """
    q, k, v, inner_lr, token_scale, ln_weight, ln_bias, slots, offset, records, inner, _, eps, *_ = step
    H, K, dtype, out_dtype, record = q.shape[1], token_scale.numel(), records.dtype, q.dtype, step.record
    order, chunks = _chunks(offset, K, records)
    slots, offset = slots[order], offset[order]
    place = offset.repeat_interleave(H)
    index = torch.arange(K, device=q.device)
    there = (index < place[:, None]) | (index == K - 1)
    eta = (-token_scale.to(dtype)[place, None] * there).unsqueeze(1)  # -s_i for every token that is there
    q, k, v, lr = (
        x.index_select(0, order).to(dtype).flatten(0, 1).unsqueeze(1) for x in (q, k, v, inner_lr[..., None])
    )
    gamma, beta = (p.to(dtype).repeat(slots.numel(), 1).unsqueeze(1) for p in (ln_weight, ln_bias))
    log_decay = None if step.log_decay is None else step.log_decay.index_select(0, order).to(dtype).view(-1, 1)
    pool_weights, pool_rows = record.parts(records)
    P = torch.empty_like(q)
    new = records.new_zeros(q.shape[0], 1, pool_rows.shape[-1])
    for first, stop, complete in chunks:
        own, here = slots[first:stop], slice(first * H, stop * H)
        weights, rows = record.parts(records.index_select(0, own).flatten(0, 1))
        tokens = k[here], v[here], lr[here]
        write_rows(inner, new[here], tokens, (gamma[here], beta[here]), weights, eps)
        if log_decay is not None:
            record.row_parts(new[here])[-1].copy_(log_decay[here, None])
        rows[:, -1:] = new[here]
        P[here] = _outputs(q[here], record, weights, rows, eta[here])
        if complete:
            last = slice(-complete * H, None)
            completes = (place[here][last] == K - 1).view(-1, 1, 1)
            before = [w[last] for w in weights]
            updated = _updated(record, before, rows[last], eta[here][last] * completes)
            if step.initial is not None:
                total = record.row_parts(rows[last])[-1].sum(1, keepdim=True) * completes
                forget(updated, lost(total, before, record.weight_parts(step.initial.to(dtype))))
            for target, w in zip(pool_weights, updated, strict=True):
                target.index_copy_(0, own[-complete:], w.unflatten(0, (-1, H)))
    pool_rows[slots[:, None], torch.arange(H, device=q.device), offset[:, None] - K] = new.view(-1, H, new.shape[-1])
    o = torch.addcmul(beta, gamma, Normalised(P, eps).x_hat).add_(q).view(-1, H, q.shape[-1])
    return (torch.empty_like(o, dtype=out_dtype).index_copy_(0, order, o.to(out_dtype)),)


def write_rows(
    inner: str,
    rows: Tensor,
    tokens: tuple[Tensor, Tensor, Tensor],
    layer_norm: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    eps: float,
) -> None:
    """As ``operators.step.write_rows``."""
    k, v, lr = tokens
    parts = (k, *STEPS[inner](*tokens, *layer_norm, weights, eps), v, lr)
    torch.cat(parts, -1, out=rows[..., : sum(part.shape[-1] for part in parts)])


class _Chunk(NamedTuple):
    first: int  # of the streams in order
    stop: int
    complete: int  # how many of them, at the end, may complete their mini-batch


def _chunks(offset: Tensor, K: int, records: Tensor) -> tuple[Tensor, list[_Chunk]]:
    """The order in which streams go, by their place in the mini-batch, and the groups that go together."""
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


def _layers(record: Record, weights: Sequence[Tensor], rows: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``[W; b]``, X and U of every inner layer."""
    parts = record.row_parts(rows)
    return list(zip(weights, parts[:-3:2], parts[1:-3:2], strict=True))


def _outputs(x: Tensor, record: Record, weights: Sequence[Tensor], rows: Tensor, eta: Tensor) -> Tensor:
    """The inner model's outputs at the queries x ``[R, 1, D]``; eta is ``-s_i`` for every token ``[R, 1, K]``."""
    for i, (W, X, U) in enumerate(_layers(record, weights, rows)):
        if i:
            x = gelu(x, approximate="tanh")
        A = torch.bmm(x, X.mT).add_(1).mul_(eta)
        x = affine(x, W).baddbmm_(A, U)
    return x


def _updated(record: Record, weights: Sequence[Tensor], rows: Tensor, eta: Tensor) -> list[Tensor]:
    """``[W; b]`` after the K tokens of a mini-batch, eta as in ``_outputs``."""
    return [torch.baddbmm(W, (pad(X, (0, 1), value=1.0) * eta.mT).mT, U) for W, X, U in _layers(record, weights, rows)]
