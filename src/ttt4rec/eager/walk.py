"""The walk over mini-batches, forwards and back, that both inner models share.

The forward keeps the weights before every segment of mini-batches. The walk back takes one segment after the other,
from the last. It replays the segment's updates, forwards, and then goes back over it with the weights before each of
its mini-batches at hand. They are the forward's, to the last bit. A long segment is done in parts, for the memory.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .checkpoints import HELD_BYTES, LEAST_HELD, Checkpoints, layers, room_for, steps_ahead
from .layout import CACHE_BYTES, MiniBatch, RowChunk, by_token, row_chunks
from .tiles import Normalised, Rates

ForwardStep = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
ReplayStep = Callable[..., None]
BackwardStep = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def walk_forward(
    step: ForwardStep,
    kept_widths: Sequence[int],
    tokens: Sequence[Tensor],
    inner_lr: Tensor,
    token_scale: Tensor,
    weights: Sequence[Tensor],
    layer_norm: tuple[Tensor, Tensor],
    spans: tuple[Tensor | None, Tensor | None],
    eps: float,
    segment: int,
) -> tuple[Tensor, ...]:
    """Run ``step`` over every mini-batch of every sequence.

    ``step(q, k, v, gamma, beta, weights, rates, eps)`` returns the inner model's outputs at the queries and the
    tensors ``[R, r, width]`` to keep, and updates the weights, one ``[R, in + 1, out]`` a layer, in place; q and k
    have the one for the bias. Returns o, the outgoing weights, the kept,
    the checkpoints.
    """
    dtype, scale = weights[0].dtype, _causal_scale(token_scale, weights[0].dtype)
    o = _for_tokens(tokens[0].shape, tokens[0].dtype, inner_lr.device, spans)
    kept = [_for_tokens((*o.shape[:3], width), dtype, o.device, spans) for width in kept_widths]
    outgoing = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
    q_all, k_all, v_all, lr_all = (by_token(x, spans[0]) for x in (*tokens, inner_lr))
    results = [by_token(x, spans[0]) for x in (o, *kept)]
    checkpoints = Checkpoints.empty(o.shape[0] * o.shape[1], token_scale.numel(), segment, weights)
    for chunk in _chunks(tokens[0], spans, token_scale, weights):
        rows = [chunk.affine(W, b, dtype) for W, b in layers(weights)]
        gamma, beta = (chunk.per_head(p, dtype) for p in layer_norm)
        for part in chunk.mini_batches:
            n, r = part.rows, part.length
            if part.place and part.place % segment == 0:
                checkpoints.write(chunk, part, rows)
            q, k = part.read_with_one(q_all, dtype), part.read_with_one(k_all, dtype)
            rates = Rates(part.read(lr_all, dtype), scale[:r, :r], part.complete)
            P, keep = step(q, k, part.read(v_all, dtype), gamma[:n], beta[:n], [W[:n] for W in rows], rates, eps)
            o_part = torch.addcmul(beta[:n], gamma[:n], Normalised(P, eps).x_hat).add_(q[..., :-1])
            for source, out in zip((o_part, *keep), results, strict=True):
                part.write(source, out)
        for source, (W, b) in zip(rows, layers(outgoing), strict=True):
            chunk.write_affine(source, W, b)
    return o, *outgoing, *kept, checkpoints.memory


def walk_backward(
    replay: ReplayStep,
    step: BackwardStep,
    grad_o: Tensor,
    grad_weights: Sequence[Tensor],
    tokens: Sequence[Tensor],
    inner_lr: Tensor,
    token_scale: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    checkpoints: Tensor,
    layer_norm: tuple[Tensor, Tensor],
    spans: tuple[Tensor | None, Tensor | None],
    eps: float,
    segment: int,
) -> tuple[Tensor, ...]:
    """Run ``step`` from the last mini-batch to the first, at the weights before each.

    ``replay(k, *kept, weights, rates)`` updates the weights in place, as the forward did. ``step(dO, q, k, v, *kept,
    gamma, beta, weights, d_weights, rates, eps)`` moves d_weights, in place, to before the mini-batch. It returns dq,
    dk, dv, and dγ, dβ of every token. Returns dq, dk, dv, d lr, d s, the weights' gradients per sequence, dγ, dβ.
    """
    dtype, scale = weights[0].dtype, _causal_scale(token_scale, weights[0].dtype)
    d_tokens = [_for_tokens(x.shape, x.dtype, x.device, spans) for x in (*tokens, inner_lr)]
    d_scale = torch.zeros(token_scale.shape, dtype=dtype, device=inner_lr.device)
    d_layer_norm = [torch.zeros(p.shape, dtype=dtype, device=p.device) for p in layer_norm]
    incoming = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
    dO_all, q_all, k_all, v_all, *kept_all, lr_all = (by_token(x, spans[0]) for x in (grad_o, *tokens, *kept, inner_lr))
    results = [by_token(x, spans[0]) for x in d_tokens]
    kept_weights = Checkpoints(checkpoints, token_scale.numel(), segment)
    for chunk in _chunks(tokens[0], spans, token_scale, weights, LEAST_HELD):
        d_rows = [chunk.affine(W, b, dtype) for W, b in layers(grad_weights)]
        gamma, beta = (chunk.per_head(p, dtype) for p in layer_norm)
        own_replay = partial(_replay, replay, k_all, kept_all, lr_all, scale)
        for part, rows in _from_the_last(chunk, segment, kept_weights, weights, own_replay):
            n, r = part.rows, part.length
            rates = Rates(part.read(lr_all, dtype), scale[:r, :r], part.complete)
            q, k = part.read_with_one(q_all, dtype), part.read_with_one(k_all, dtype)
            own = (part.read(dO_all, dtype), q, k, *(part.read(x, dtype) for x in (v_all, *kept_all)))
            *d_qkv, dgamma, dbeta = step(*own, gamma[:n], beta[:n], rows, [W[:n] for W in d_rows], rates, eps)
            d_lr, d_scale_part = rates.backward()
            for source, out in zip((*d_qkv, d_lr), results, strict=True):
                part.write(source, out)
            d_scale[:r] += d_scale_part
            for source, out in zip((dgamma, dbeta), d_layer_norm, strict=True):
                out += source.unflatten(0, (-1, out.shape[0])).sum((0, 2))
        for source, (W, b) in zip(d_rows, layers(incoming), strict=True):
            chunk.write_affine(source, W, b)
    return *d_tokens, d_scale, *incoming, *d_layer_norm


def _from_the_last(
    chunk: RowChunk, segment: int, checkpoints: Checkpoints, weights: Sequence[Tensor], replay: Callable[..., None]
) -> Iterator[tuple[MiniBatch, list[Tensor]]]:
    """Every mini-batch of a chunk, from the last, with fresh weights before it."""
    for first in reversed(range(0, len(chunk.mini_batches), segment)):
        parts = chunk.mini_batches[first : first + segment]
        rows = checkpoints.read(chunk, parts[0], weights)
        room = room_for(sum(W.numel() * W.element_size() for W in rows))
        yield from _segment_from_the_last(parts, rows, room, replay)


def _segment_from_the_last(
    parts: Sequence[MiniBatch], rows: list[Tensor], room: int, replay: Callable[..., None]
) -> Iterator[tuple[MiniBatch, list[Tensor]]]:
    """As above, of a segment or the end of one, with at most ``room`` states held; rows are those before the first."""
    while len(parts) > room:
        ahead = steps_ahead(len(parts), room)
        later = [W.clone() for W in rows]
        for part in parts[:ahead]:
            replay(part, later)
        yield from _segment_from_the_last(parts[ahead:], later, room - 1, replay)
        parts = parts[:ahead]
    before = []
    for part in parts[:-1]:
        before.append([W[: part.rows].clone() for W in rows])
        replay(part, rows)
    before.append([W[: parts[-1].rows] for W in rows])
    for part in reversed(parts):
        yield part, before.pop()


def _replay(
    step: ReplayStep,
    k: Tensor,
    kept: Sequence[Tensor],
    inner_lr: Tensor,
    scale: Tensor,
    part: MiniBatch,
    weights: Sequence[Tensor],
) -> None:
    """The update of one mini-batch, which is not a sequence's last, once more, in place."""
    dtype, rows = weights[0].dtype, [W[: part.rows] for W in weights]
    rates = Rates(part.read(inner_lr, dtype), scale, part.complete)
    step(part.read_with_one(k, dtype), *(part.read(x, dtype) for x in kept), rows, rates)


def _causal_scale(token_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, K]: -s_i for i >= j, else 0."""
    K = token_scale.numel()
    return -token_scale.to(dtype)[:, None].expand(K, K).tril()


def _for_tokens(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, spans: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """Memory for results, zeros where tokens may lie outside every sequence."""
    make = torch.empty if spans[0] is None else torch.zeros
    return make(tuple(shape), dtype=dtype, device=device)


def _chunks(
    q: Tensor,
    spans: tuple[Tensor | None, Tensor | None],
    token_scale: Tensor,
    weights: Sequence[Tensor],
    states: int = 0,
) -> Iterator[RowChunk]:
    """Chunks of rows, small enough for that many states to be held."""
    size = weights[0].element_size()
    widest = token_scale.numel() * weights[0].shape[-1] * size
    state = sum(w.shape[2:].numel() for w in weights) * size
    return row_chunks(q, *spans, token_scale.numel(), max(widest, states * state * CACHE_BYTES // HELD_BYTES))
