"""The walk over mini-batches, forwards and back, that both inner models share."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .layout import RowChunk, by_token, row_chunks
from .tiles import Normalised, Rates

ForwardStep = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
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
) -> tuple[Tensor, ...]:
    """Run ``step`` over every mini-batch of every sequence.

    ``step(q, k, v, gamma, beta, weights, rates, eps)`` returns the inner model's outputs at the queries and the
    tensors ``[R, r, width]`` to keep, and updates the weights, one ``[R, in + 1, out]`` a layer, in place; q and k
    have the one for the bias. Returns o, the outgoing weights, the kept.
    """
    dtype, scale = weights[0].dtype, _causal_scale(token_scale, weights[0].dtype)
    o = _for_tokens(tokens[0].shape, tokens[0].dtype, inner_lr.device, spans)
    kept = [_for_tokens((*o.shape[:3], width), dtype, o.device, spans) for width in kept_widths]
    outgoing = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
    q_all, k_all, v_all, lr_all = (by_token(x, spans[0]) for x in (*tokens, inner_lr))
    results = [by_token(x, spans[0]) for x in (o, *kept)]
    for chunk in _chunks(tokens[0], spans, token_scale, weights):
        rows = [chunk.affine(W, b, dtype) for W, b in _layers(weights)]
        gamma, beta = (chunk.per_head(p, dtype) for p in layer_norm)
        for part in chunk.mini_batches:
            n, r = part.rows, part.length
            q, k = part.read_with_one(q_all, dtype), part.read_with_one(k_all, dtype)
            rates = Rates(part.read(lr_all, dtype), scale[:r, :r], part.complete)
            P, keep = step(q, k, part.read(v_all, dtype), gamma[:n], beta[:n], [W[:n] for W in rows], rates, eps)
            o_part = torch.addcmul(beta[:n], gamma[:n], Normalised(P, eps).x_hat).add_(q[..., :-1])
            for source, out in zip((o_part, *keep), results, strict=True):
                part.write(source, out)
        for source, (W, b) in zip(rows, _layers(outgoing), strict=True):
            chunk.write_affine(source, W, b)
    return o, *outgoing, *kept


def walk_backward(
    step: BackwardStep,
    grad_o: Tensor,
    grad_weights: Sequence[Tensor],
    tokens: Sequence[Tensor],
    inner_lr: Tensor,
    token_scale: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    layer_norm: tuple[Tensor, Tensor],
    spans: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> tuple[Tensor, ...]:
    """Run ``step`` from the last mini-batch to the first, starting at the outgoing weights.

    ``step(dO, q, k, v, *kept, gamma, beta, weights, d_weights, rates, eps)`` moves weights and d_weights, in place,
    to before the mini-batch and returns dq, dk, dv, and dγ, dβ of every token. Returns dq, dk, dv, d lr, d s, the
    weights' gradients per sequence, dγ, dβ.
    """
    dtype, scale = weights[0].dtype, _causal_scale(token_scale, weights[0].dtype)
    d_tokens = [_for_tokens(x.shape, x.dtype, x.device, spans) for x in (*tokens, inner_lr)]
    d_scale = torch.zeros(token_scale.shape, dtype=dtype, device=inner_lr.device)
    d_layer_norm = [torch.zeros(p.shape, dtype=dtype, device=p.device) for p in layer_norm]
    incoming = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
    dO_all, q_all, k_all, *others, lr_all = (by_token(x, spans[0]) for x in (grad_o, *tokens, *kept, inner_lr))
    results = [by_token(x, spans[0]) for x in d_tokens]
    for chunk in _chunks(tokens[0], spans, token_scale, weights):
        rows, d_rows = ([chunk.affine(W, b, dtype) for W, b in _layers(side)] for side in (weights, grad_weights))
        gamma, beta = (chunk.per_head(p, dtype) for p in layer_norm)
        for part in reversed(chunk.mini_batches):
            n, r = part.rows, part.length
            rates = Rates(part.read(lr_all, dtype), scale[:r, :r], part.complete)
            q, k = part.read_with_one(q_all, dtype), part.read_with_one(k_all, dtype)
            own = (part.read(dO_all, dtype), q, k, *(part.read(x, dtype) for x in others), gamma[:n], beta[:n])
            *d_qkv, dgamma, dbeta = step(*own, [W[:n] for W in rows], [W[:n] for W in d_rows], rates, eps)
            d_lr, d_scale_part = rates.backward()
            for source, out in zip((*d_qkv, d_lr), results, strict=True):
                part.write(source, out)
            d_scale[:r] += d_scale_part
            for source, out in zip((dgamma, dbeta), d_layer_norm, strict=True):
                out += source.unflatten(0, (-1, out.shape[0])).sum((0, 2))
        for source, (W, b) in zip(d_rows, _layers(incoming), strict=True):
            chunk.write_affine(source, W, b)
    return *d_tokens, d_scale, *incoming, *d_layer_norm


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


def _layers(weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(W, b) of every inner layer."""
    return zip(weights[::2], weights[1::2], strict=True)


def _chunks(
    q: Tensor, spans: tuple[Tensor | None, Tensor | None], token_scale: Tensor, weights: Sequence[Tensor]
) -> Iterator[RowChunk]:
    widest = token_scale.numel() * weights[0].shape[-1] * weights[0].element_size()
    return row_chunks(q, *spans, token_scale.numel(), widest)
