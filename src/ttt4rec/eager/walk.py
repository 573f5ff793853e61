"""The walk over mini-batches, forwards and back, that both inner models share."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layout import RowChunk, row_chunks
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
    tensors ``[R, K, width]`` to keep, and updates the weights in place. Returns o, the outgoing weights, the kept.
    """
    dtype, scale = weights[0].dtype, _causal_scale(token_scale, weights[0].dtype)
    o = torch.zeros(tokens[0].shape, dtype=tokens[0].dtype, device=inner_lr.device)
    kept = [torch.zeros(*o.shape[:3], width, dtype=dtype, device=o.device) for width in kept_widths]
    outgoing = [w.clone(memory_format=torch.contiguous_format) for w in weights]
    for chunk in _chunks(tokens[0], spans, token_scale, weights):
        rows = [chunk.gather(x, dtype) for x in tokens]
        lr = chunk.gather(inner_lr, dtype)
        gamma, beta = (chunk.per_head(p, dtype) for p in layer_norm)
        chunk_weights = [chunk.weights(w, dtype) for w in weights]
        o_rows = torch.empty_like(rows[0])
        kept_rows = [lr.new_empty(*lr.shape, width) for width in kept_widths]
        for t, n in enumerate(chunk.alive):
            rates = Rates(lr[t, :n], scale, chunk.complete[t])
            alive_weights = [w[:n] for w in chunk_weights]
            q, k, v = (x[t, :n] for x in rows)
            P, keep = step(q, k, v, gamma[:n], beta[:n], alive_weights, rates, eps)
            torch.addcmul(beta[:n], gamma[:n], Normalised(P, eps).x_hat, out=o_rows[t, :n]).add_(q)
            for destination, x in zip(kept_rows, keep, strict=True):
                destination[t, :n] = x
        for source, out in zip((o_rows, *kept_rows), (o, *kept), strict=True):
            chunk.scatter(source, out)
        for source, out in zip(chunk_weights, outgoing, strict=True):
            chunk.write_weights(source, out)
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
    to before the mini-batch and returns dq, dk, dv, dγ, dβ. Returns dq, dk, dv, d lr, d s, the weights' gradients
    per sequence, dγ, dβ.
    """
    dtype, scale = weights[0].dtype, _causal_scale(token_scale, weights[0].dtype)
    d_tokens = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (*tokens, inner_lr)]
    d_scale = torch.zeros(token_scale.shape, dtype=dtype, device=inner_lr.device)
    d_layer_norm = [torch.zeros(p.shape, dtype=dtype, device=p.device) for p in layer_norm]
    incoming = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]
    for chunk in _chunks(tokens[0], spans, token_scale, weights):
        rows = [chunk.gather(x, dtype) for x in (grad_o, *tokens, *kept)]
        lr = chunk.gather(inner_lr, dtype)
        gamma, beta = (chunk.per_head(p, dtype) for p in layer_norm)
        chunk_weights = [chunk.weights(w, dtype) for w in weights]
        d_weights = [chunk.weights(w, dtype) for w in grad_weights]
        d_rows = [torch.empty_like(x) for x in (*rows[1:4], lr)]
        d_gamma, d_beta = (torch.zeros_like(p).squeeze(1) for p in (gamma, beta))
        for t in reversed(range(len(chunk.alive))):
            n = chunk.alive[t]
            rates = Rates(lr[t, :n], scale, chunk.complete[t])
            alive = [[w[:n] for w in side] for side in (chunk_weights, d_weights)]
            *d_qkv, dgamma_t, dbeta_t = step(*(x[t, :n] for x in rows), gamma[:n], beta[:n], *alive, rates, eps)
            d_lr, d_scale_t = rates.backward()
            for destination, x in zip(d_rows, (*d_qkv, d_lr), strict=True):
                destination[t, :n] = x
            d_scale += d_scale_t
            d_gamma[:n] += dgamma_t
            d_beta[:n] += dbeta_t
        for source, out in zip(d_rows, d_tokens, strict=True):
            chunk.scatter(source, out)
        for source, out in zip((d_gamma, d_beta), d_layer_norm, strict=True):
            out += source.view(-1, *out.shape).sum(0)
        for source, out in zip(d_weights, incoming, strict=True):
            chunk.write_weights(source, out)
    return *d_tokens, d_scale, *incoming, *d_layer_norm


def _causal_scale(token_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, K]: s_i for i >= j, else 0."""
    K = token_scale.numel()
    return token_scale.to(dtype)[:, None].expand(K, K).tril()


def _chunks(
    q: Tensor, spans: tuple[Tensor | None, Tensor | None], token_scale: Tensor, weights: Sequence[Tensor]
) -> list[RowChunk]:
    widest = token_scale.numel() * weights[0].shape[-1] * weights[0].element_size()
    return row_chunks(q, *spans, token_scale.numel(), widest)
