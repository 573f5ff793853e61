"""The public inner loops: arguments validated once, here; state in, state out.

Whatever way a sequence is cut into calls, packed or padded, the outputs are the same numbers.
"""

import functools
import importlib.util
import logging
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from . import ops, reference
from .precision import autocast_dtype, without_autocast
from .spans import Spans, dense_spans, last_tokens
from .state import TTTState
from .transforms import transformed
from .validation import check_inner_loop_arguments, has_values

Backend = Literal["auto", "reference", "eager", "native", "triton"]
MAX_HEAD_DIM, MAX_MINI_BATCH_SIZE = 128, 64  # of the fused kernels
_log = logging.getLogger(__name__)


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    mini_batch_size: int,
    state: TTTState | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, TTTState]:
    """TTT-Linear (Sun et al. 2024, section 2): the inner model is ``x W1 + b1``.

    Args:
        q: queries ``[B, L, H, D]``, float32, bfloat16, float16 or float64, as are k and v.
        k: keys.
        v: values.
        inner_lr: each token's own inner rate ``lr_j``, ``[B, L, H]``.
        token_scale: ``s_i >= 0`` for each place i in a mini-batch, ``[K]``; η[i, j] = s_i lr_j.
        W1: initial weights ``[H, D, D]``; a given state takes their place.
        b1: initial bias ``[H, D]``.
        ln_weight: γ of the layer norm ``[H, D]``.
        ln_bias: β ``[H, D]``.
        mini_batch_size: K.
        state: where the streams stopped; None starts at the initial weights.
        mask: bool ``[B, L]``, True for tokens, which must be adjacent in a row. Padding yields zeros and leaves the
            state alone.
        cu_seqlens: int ``[N + 1]``: the sequences ``[cu[n], cu[n+1])`` packed in q ``[1, total, H, D]``.
        eps: added to the layer norm's variance.
        backend: ``"reference"`` is the dual form under autograd; ``"triton"`` the fused kernels for GPUs; ``"native"``
            the same algorithm in C++ for CPUs, compiled at its first use; ``"eager"`` the same written in PyTorch;
            ``"auto"`` the first of ``"triton"``, ``"native"`` and ``"eager"`` that can run, or, within transforms of
            ``torch.func`` and forward-mode differentiation, ``"reference"``.

    Returns:
        Outputs ``[B, L, H, D]`` in q's dtype, and the outgoing state. State and arithmetic are float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: a shape, a combination or a value is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: the backend cannot run here.
    """
    return _inner_loop(
        (q, k, v), inner_lr, token_scale, (W1, b1), (ln_weight, ln_bias), mini_batch_size, state, mask, cu_seqlens,
        eps, backend,
    )  # fmt: skip


def ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    b2: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    mini_batch_size: int,
    state: TTTState | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, TTTState]:
    """TTT-MLP (Sun et al. 2024, section 2): the inner model is ``gelu_tanh(x W1 + b1) W2 + b2``.

    Arguments, results and errors as in ``ttt_linear``, with initial weights W1 ``[H, D, F]``, b1 ``[H, F]``,
    W2 ``[H, F, D]`` and b2 ``[H, D]``; F is 4D in the paper.
    """
    return _inner_loop(
        (q, k, v), inner_lr, token_scale, (W1, b1, W2, b2), (ln_weight, ln_bias), mini_batch_size, state, mask,
        cu_seqlens, eps, backend,
    )  # fmt: skip


def _inner_loop(
    tokens: tuple[Tensor, Tensor, Tensor],
    inner_lr: Tensor,
    token_scale: Tensor,
    initial: tuple[Tensor, ...],
    layer_norm: tuple[Tensor, Tensor],
    K: int,
    state: TTTState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    backend: Backend,
) -> tuple[Tensor, TTTState]:
    check_inner_loop_arguments(tokens, inner_lr, token_scale, initial, layer_norm, K, state, mask, cu_seqlens)
    backend = choose_backend(backend, tokens[0], K, "linear" if len(initial) == 2 else "mlp")
    tokens = autocast(*tokens)
    B, L = tokens[0].shape[:2]
    dtype = torch.promote_types(tokens[0].dtype, torch.float32)
    spans = make_spans(mask, cu_seqlens, L)
    N = B if spans is None else spans.starts.numel()
    inner_lr, token_scale = inner_lr.to(dtype), token_scale.to(dtype)
    sequence_tokens: tuple[Tensor, ...] = (*tokens, inner_lr)
    extended = None
    if state is None:
        weights = tuple(w.to(dtype).expand(N, *w.shape) for w in initial)
        starts, lengths = dense_spans(B, L, tokens[0].device) if spans is None else (spans.starts, spans.lengths)
        seen = lengths
    else:
        # A mini-batch is taken up again by running its pending tokens once more, in front of the new ones.
        weights, pending = state.weights, state.position % K
        dense = Spans.from_mask(torch.ones(B, L, dtype=torch.bool, device=tokens[0].device)) if spans is None else spans
        extended = dense.with_context(K - 1)
        contexts = (torch.zeros_like(state.pending_k), state.pending_k, state.pending_v, state.pending_lr)
        sequence_tokens = tuple(map(extended.join, contexts, sequence_tokens))
        starts, lengths = extended.first - pending, extended.lengths + pending
        seen = state.position + extended.lengths
    scan_spans = (None, None) if spans is None and state is None else (starts, lengths)
    with without_autocast(tokens[0].device.type):  # the inner loop chooses its own precision
        o, *outgoing = _scan(sequence_tokens, token_scale, weights, layer_norm, scan_spans, eps, backend)
    _, k, v, lr = sequence_tokens
    pending_k, pending_v, pending_lr = (last_tokens(x.to(dtype), starts, lengths, K - 1, seen % K) for x in (k, v, lr))
    if extended is not None:
        o = extended.part(o)
    return o, TTTState(tuple(outgoing), pending_k, pending_v, pending_lr, seen)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does to the arguments of ``scaled_dot_product_attention``."""
    dtype = autocast_dtype(q.dtype, q.device.type) or q.dtype
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _scan(
    tokens: tuple[Tensor, ...],
    token_scale: Tensor,
    weights: tuple[Tensor, ...],
    layer_norm: tuple[Tensor, Tensor],
    spans: tuple[Tensor | None, Tensor | None],
    eps: float,
    backend: Backend,
) -> tuple[Tensor, ...]:
    """Outputs and outgoing weights of sequences that all start at a mini-batch boundary."""
    if backend == "reference":
        return _reference_scan(tokens, token_scale, weights, layer_norm, spans, eps)
    operator = ops.linear_scan if len(weights) == 2 else ops.mlp_scan
    segment = segment_length(token_scale.numel(), weights)
    outputs: tuple[Tensor, ...] = operator(*tokens, token_scale, *weights, *layer_norm, *spans, eps, segment, backend)
    return outputs[: 1 + len(weights)]


def segment_length(mini_batch_size: int, weights: tuple[Tensor, ...]) -> int:
    """How many mini-batches lie between two copies of the weights ``[N, H, ...]`` that the forward keeps.

    A copy is at most an eighth of what is kept of the tokens between two of them: q, k, v and the inner gradients, and
    Z1 of TTT-MLP. Shorter segments than sixteen mini-batches would save no time.
    """
    D, hidden = weights[0].shape[2], weights[0].shape[3] if len(weights) == 4 else 0
    numbers = sum(w.shape[2:].numel() for w in weights)
    return max(16, -(-8 * numbers // (mini_batch_size * (4 * D + hidden))))


def _reference_scan(
    tokens: tuple[Tensor, ...],
    token_scale: Tensor,
    weights: tuple[Tensor, ...],
    layer_norm: tuple[Tensor, Tensor],
    spans: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> tuple[Tensor, ...]:
    """The dual form; unequal sequences padded, with every one's weights at rest after its last complete mini-batch.

    Weights that were never updated come out as copies: the state is not to follow the parameters.
    """
    dtype, K = weights[0].dtype, token_scale.numel()
    q, k, v, lr = (x.to(dtype) for x in tokens)
    gamma, beta = (p.to(dtype) for p in layer_norm)
    starts, lengths = spans
    if starts is None or lengths is None:
        o, outgoing = reference.dual_form(q, k, v, lr, token_scale, weights, gamma, beta, eps=eps)
        return o.to(tokens[0].dtype), *(w.clone() for w in outgoing)
    # Where nothing may depend on values, a sequence may be as long as a row.
    longest = max(lengths.tolist(), default=0) if has_values(lengths) else q.shape[1]
    slots = torch.arange(longest, device=q.device)
    valid, total = slots < lengths[:, None], q.shape[0] * q.shape[1]
    index = torch.where(valid, starts[:, None] + slots, total)  # padding reads and writes a spare zero behind the end
    q, k, v, lr = (torch.cat((x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])))[index] for x in (q, k, v, lr))
    outputs = [q[:, :0]]
    for start in range(0, longest, K):
        q_t, k_t, v_t, lr_t = (x[:, start : start + K] for x in (q, k, v, lr))
        o, updated = reference.dual_form(q_t, k_t, v_t, lr_t, token_scale, weights, gamma, beta, eps=eps)
        outputs.append(o)
        complete = lengths >= start + K
        weights = tuple(
            torch.where(complete.view(-1, *[1] * (w.dim() - 1)), new, w)
            for new, w in zip(updated, weights, strict=True)
        )
    o = torch.cat(outputs, 1).flatten(0, 1)
    o = o.new_zeros(total + 1, *o.shape[1:]).index_copy(0, index.flatten(), o)
    return o[:-1].unflatten(0, tokens[0].shape[:2]).to(tokens[0].dtype), *(w.clone() for w in weights)


def make_spans(mask: Tensor | None, cu_seqlens: Tensor | None, L: int) -> Spans | None:
    """Where the sequences are; None when every row is one."""
    if mask is not None:
        return Spans.from_mask(mask)
    return None if cu_seqlens is None else Spans.from_cu_seqlens(cu_seqlens, L)


def check_backend(backend: str) -> None:
    """Raise unless there is such a backend."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; given {backend!r}")


def choose_backend(backend: Backend, q: Tensor, K: int, inner: str | None = None) -> Backend:
    """What runs: ``"auto"`` becomes the kernels, where there is a GPU and they can run, or else stays what it is.

    Within transforms and forward-mode differentiation ``"auto"`` is ``"reference"``, the only one that knows them.
    Which of the other paths it otherwise means, the operators choose.

    Args:
        backend: what was asked for.
        q: tokens ``[..., D]``.
        K: mini-batch size.
        inner: of the inner loop, ``"linear"`` or ``"mlp"``, which is to have a backward where gradients are enabled.

    Raises:
        RuntimeError: ``"triton"`` was asked for and cannot run; it never falls back silently.
        ValueError: there is no such backend.
    """
    check_backend(backend)
    if backend == "auto" and transformed():
        return "reference"
    if backend not in ("auto", "triton") or (backend == "auto" and not q.is_cuda):
        return backend
    traced = torch.compiler.is_compiling()
    refusal = _kernel_refusal(q, K)
    if refusal is None and inner is not None and torch.is_grad_enabled() and not traced:
        from .kernels import launch

        refusal = launch.compiler_refusal(f"{inner}_backward", q.shape[-1], K)
    if refusal is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend 'triton' {refusal}")
    if not traced:
        _tell(refusal)
    return "auto"


@functools.cache
def _tell(refusal: str) -> None:
    """Once for each reason."""
    _log.warning("a slower path than the fused kernels runs on the GPU: backend 'triton' %s", refusal)


def _kernel_refusal(q: Tensor, K: int) -> str | None:
    """Why the fused kernels cannot run on these tensors; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on CUDA tensors, or on others with TRITON_INTERPRET=1; given {q.device}"
    if q.dtype == torch.float64 or q.shape[-1] > MAX_HEAD_DIM or K > MAX_MINI_BATCH_SIZE:
        return (
            f"takes float32, bfloat16 and float16, head dimensions up to {MAX_HEAD_DIM} and "
            f"mini-batches up to {MAX_MINI_BATCH_SIZE}; given {q.dtype}, {q.shape[-1]} and {K}"
        )
    return None
