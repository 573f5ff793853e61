"""The walk over mini-batches, forwards and back, that both inner models share.

The forward keeps the weights before every segment of mini-batches. The walk back takes one segment after the other,
from the last. It replays the segment's updates, forwards, and then goes back over it with the weights before each of
its mini-batches at hand. They are the forward's, to the last bit.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..arguments import Scan
from .checkpoints import HELD_BYTES, LEAST_HELD, Checkpoints, layers, room_for, steps_ahead
from .forgetting import Forgetting, forget
from .layout import CACHE_BYTES, MiniBatch, RowChunk, by_token, row_chunks
from .pieces import Pieces

ForwardStep = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
ReplayStep = Callable[..., None]
BackwardStep = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def walk_forward(step: ForwardStep, pieces: Pieces, kept_widths: Sequence[int], scan: Scan) -> tuple[Tensor, ...]:
    """Run ``step`` over every mini-batch of every sequence.

    ``step(pieces, q, k, v, gamma, beta, weights, rates, eps)`` returns the inner model's outputs at the queries and the
    tensors ``[R, r, width]`` to keep. It updates the weights, one ``[R, in + 1, out]`` a layer, in place. q and k have
    the one for the bias. Returns o, the outgoing weights, the kept, the checkpoints.
    """
    weights, starts = scan.weights, scan.starts
    dtype, operand, scale = weights[0].dtype, pieces.operand(scan), _scales(scan, pieces)
    o = _for_tokens(scan.q.shape, scan.q.dtype, scan)
    kept = [_for_tokens((*o.shape[:3], width), operand, scan) for width in kept_widths]
    outgoing = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
    q_all, k_all, v_all, lr_all = (by_token(x, starts) for x in scan.tokens)
    results = [by_token(x, starts) for x in (o, *kept)]
    checkpoints, forgetting = Checkpoints.empty(scan), Forgetting(scan)
    for chunk in _chunks(scan, pieces):
        rows = [chunk.affine(W, b, dtype) for W, b in layers(weights)]
        gamma, beta = (chunk.per_head(p, dtype) for p in (scan.ln_weight, scan.ln_bias))
        for part in chunk.mini_batches:
            n = part.rows
            if part.place and part.place % scan.segment == 0:
                checkpoints.write(chunk, part, rows)
            q, k = (part.read_with_one(x, operand, pieces.ones) for x in (q_all, k_all))
            rates = pieces.rates(part.read(lr_all, dtype), scale, part.complete)
            own = (q, k, part.read(v_all, operand), gamma[:n], beta[:n], [W[:n] for W in rows])
            lost = forgetting.lost(part, rows)
            P, keep = step(pieces, *own, rates, scan.eps)
            forget(rows, lost)
            o_part = pieces.output_norm(P, scan.eps).output(q, gamma[:n], beta[:n])
            for source, out in zip((o_part, *keep), results, strict=True):
                part.write(source, out)
        for source, (W, b) in zip(rows, layers(outgoing), strict=True):
            chunk.write_affine(source, W, b)
    return o, *outgoing, *kept, checkpoints.memory


def walk_backward(
    replay: ReplayStep,
    step: BackwardStep,
    pieces: Pieces,
    scan: Scan,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Run ``step`` from the last mini-batch to the first, at the weights before each.

    ``replay(pieces, k, *kept, weights, rates)`` updates the weights in place, as the forward did. ``step(pieces, dO, q,
    k, v, *kept, gamma, beta, weights, d_weights, rates, eps)`` moves d_weights, in place, to before the mini-batch. It
    returns dq, dk, dv, and dγ, dβ of every token or of some of them together. Returns
    dq, dk, dv, d lr, d s, the weights' gradients per sequence, dγ, dβ, and with decays theirs and the initial weights'.

    Args:
        replay: see above.
        step: see above.
        pieces: what both are made of.
        scan: what the forward was given.
        kept: what it kept, checkpoints last.
        grads: of o and the outgoing weights.
    """
    weights, (*kept_tokens, checkpoints), (grad_o, *grad_weights) = scan.weights, kept, grads
    dtype, operand, scale = weights[0].dtype, pieces.operand(scan), _scales(scan, pieces)
    d_tokens = [_for_tokens(x.shape, x.dtype, scan) for x in scan.tokens]
    d_scale = torch.zeros(scan.token_scale.shape, dtype=dtype, device=scan.q.device)
    d_layer_norm = [torch.zeros(p.shape, dtype=dtype, device=p.device) for p in (scan.ln_weight, scan.ln_bias)]
    incoming = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
    by_tokens = (by_token(x, scan.starts) for x in (*scan.tokens, grad_o, *kept_tokens))
    q_all, k_all, v_all, lr_all, dO_all, *kept_all = by_tokens
    results = [by_token(x, scan.starts) for x in d_tokens]
    kept_weights, forgetting = Checkpoints(checkpoints, scan), Forgetting(scan)
    d_log_decay = [] if scan.log_decay is None else [torch.zeros_like(scan.log_decay, dtype=dtype)]
    for chunk in _chunks(scan, pieces, LEAST_HELD):
        d_rows = [chunk.affine(W, b, dtype) for W, b in layers(grad_weights)]
        gamma, beta = (chunk.per_head(p, dtype) for p in (scan.ln_weight, scan.ln_bias))
        own_replay = partial(_replay, replay, pieces, operand, k_all, kept_all, lr_all, scale, forgetting)
        for part, rows in _from_the_last(chunk, scan.segment, kept_weights, own_replay):
            n, r = part.rows, part.length
            rates = pieces.rates(part.read(lr_all, dtype), scale, part.complete)
            q, k = (part.read_with_one(x, operand, pieces.ones) for x in (q_all, k_all))
            own = (part.read(dO_all, operand), q, k, *(part.read(x, operand) for x in (v_all, *kept_all)))
            d_own = [W[:n] for W in d_rows]
            lost = forgetting.backward(part, rows, d_own)
            *d_qkv, dgamma, dbeta = step(pieces, *own, gamma[:n], beta[:n], rows, d_own, rates, scan.eps)
            if lost is not None:
                forget(d_own, lost.to_initial)
                part.write(lost.log_decay, by_token(d_log_decay[0], scan.starts))
            d_lr, d_scale_part = rates.backward()
            for source, out in zip((*d_qkv, d_lr), results, strict=True):
                part.write(source, out)
            d_scale[:r] += d_scale_part[:r]
            for source, out in zip((dgamma, dbeta), d_layer_norm, strict=True):
                out += source.unflatten(0, (-1, out.shape[0])).sum((0, 2))
        for source, (W, b) in zip(d_rows, layers(incoming), strict=True):
            chunk.write_affine(source, W, b)
    return *d_tokens, d_scale, *incoming, *d_layer_norm, *d_log_decay, *forgetting.d_initial()


def _from_the_last(
    chunk: RowChunk, segment: int, checkpoints: Checkpoints, replay: Callable[..., None]
) -> Iterator[tuple[MiniBatch, list[Tensor]]]:
    """Every mini-batch of a chunk, from the last, with fresh weights before it."""
    for first in reversed(range(0, len(chunk.mini_batches), segment)):
        parts = chunk.mini_batches[first : first + segment]
        rows = checkpoints.read(chunk, parts[0])
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
    pieces: Pieces,
    operand: torch.dtype,
    k: Tensor,
    kept: Sequence[Tensor],
    inner_lr: Tensor,
    scale: Tensor,
    forgetting: Forgetting,
    part: MiniBatch,
    weights: Sequence[Tensor],
) -> None:
    """The update of one mini-batch, which is not a sequence's last, once more, in place."""
    dtype, rows = weights[0].dtype, [W[: part.rows] for W in weights]
    rates = pieces.rates(part.read(inner_lr, dtype), scale, part.complete)
    keys = part.read_with_one(k, operand, pieces.ones)
    lost = forgetting.lost(part, rows)
    step(pieces, keys, *(part.read(x, operand) for x in kept), rows, rates)
    forget(rows, lost)


def _scales(scan: Scan, pieces: Pieces) -> Tensor:
    """s as the pieces' rates take it."""
    scales: Tensor = pieces.rates.scales(scan.token_scale.to(scan.weights[0].dtype))
    return scales


def _for_tokens(shape: Sequence[int], dtype: torch.dtype, scan: Scan) -> Tensor:
    """Memory for results, zeros where tokens may lie outside every sequence."""
    make = torch.empty if scan.starts is None else torch.zeros
    return make(tuple(shape), dtype=dtype, device=scan.q.device)


def _chunks(scan: Scan, pieces: Pieces, states: int = 0) -> Iterator[RowChunk]:
    """Chunks of rows, on a CPU small enough for that many states to be held."""
    weights, K = scan.weights, scan.token_scale.numel()
    size = weights[0].element_size()
    widest, state = K * weights[0].shape[-1] * size, sum(w.shape[2:].numel() for w in weights) * size
    row_bytes = widest if scan.q.is_cuda else max(widest, states * state * CACHE_BYTES // HELD_BYTES)
    return row_chunks(scan.q, scan.starts, scan.lengths, K, row_bytes, pieces.block)
