"""The public inner loops: arguments validated once, here; state in, state out.

Whatever way a sequence is cut into calls, packed or padded, the outputs are the same numbers.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..arguments import Scan
from ..inner_models import LINEAR, MLP, InnerModel
from ..operators import FORGETTING_SCANS, SCANS, Backend, choose_backend
from ..operators.transforms import has_values
from ..precision import autocast_dtype, without_autocast
from .spans import Spans, dense_spans, last_tokens
from .state import TTTState
from .validation import as_mask, check_inner_loop_arguments, check_log_decay


class Rates(NamedTuple):
    """How much is learned and forgotten; see ``ttt_linear``."""

    inner_lr: Tensor
    token_scale: Tensor
    log_decay: Tensor | None = None


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
    log_decay: Tensor | None = None,
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
        mask: bool ``[B, L]``, True for tokens, which must be adjacent in a row; or as integers, 1 and 0. Padding yields
            zeros and leaves the state alone.
        cu_seqlens: int ``[N + 1]``: the sequences ``[cu[n], cu[n+1])`` packed in q ``[1, total, H, D]``.
        log_decay: ``ln a``, at most 0, of every token ``[B, L, H]``: how much stays of what was learned, the rest goes
            back to the initial weights when a mini-batch ends; None: nothing is forgotten.
        eps: added to the layer norm's variance.
        backend: ``"reference"`` is the dual form under autograd. ``"triton"`` has the fused kernels for GPUs,
            ``"native"`` the same algorithm in C++ for CPUs, compiled at its first use, and ``"eager"`` the same in
            PyTorch. ``"auto"`` takes the first of these three that can run; within transforms of ``torch.func`` and
            forward-mode differentiation it takes ``"reference"``.

    Returns:
        Outputs ``[B, L, H, D]`` in q's dtype, and the outgoing state. State and arithmetic are float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: a shape, a combination or a value is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: the backend cannot run here.
    """
    return inner_loop(
        LINEAR, (q, k, v), Rates(inner_lr, token_scale, log_decay), (W1, b1), (ln_weight, ln_bias), mini_batch_size,
        state, mask, cu_seqlens, eps, backend,
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
    log_decay: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, TTTState]:
    """TTT-MLP (Sun et al. 2024, section 2): the inner model is ``gelu_tanh(x W1 + b1) W2 + b2``.

    Arguments, results and errors as in ``ttt_linear``, with initial weights W1 ``[H, D, F]``, b1 ``[H, F]``,
    W2 ``[H, F, D]`` and b2 ``[H, D]``. F is 4D in the paper.
    """
    return inner_loop(
        MLP, (q, k, v), Rates(inner_lr, token_scale, log_decay), (W1, b1, W2, b2), (ln_weight, ln_bias),
        mini_batch_size, state, mask, cu_seqlens, eps, backend,
    )  # fmt: skip


def inner_loop(
    model: InnerModel,
    tokens: tuple[Tensor, Tensor, Tensor],
    rates: Rates,
    initial: tuple[Tensor, ...],
    layer_norm: tuple[Tensor, Tensor],
    K: int,
    state: TTTState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    backend: Backend,
) -> tuple[Tensor, TTTState]:
    """The inner loop of an inner model, whose weights are ``initial``; the rest as in ``ttt_linear``."""
    inner_lr, token_scale, log_decay = rates
    mask = as_mask(mask)
    check_inner_loop_arguments(model, tokens, inner_lr, token_scale, initial, layer_norm, K, state, mask, cu_seqlens)
    check_log_decay(log_decay, inner_lr, state)
    backend = choose_backend(backend, tokens[0], tokens[0].shape[-1], K, model.name)
    tokens = autocast(*tokens)
    B, L = tokens[0].shape[:2]
    dtype = torch.promote_types(tokens[0].dtype, torch.float32)
    spans = make_spans(mask, cu_seqlens, L)
    N = B if spans is None else spans.starts.numel()
    inner_lr, token_scale = inner_lr.to(dtype), token_scale.to(dtype)
    decays = [] if log_decay is None else [log_decay.to(dtype)]
    sequence_tokens: tuple[Tensor, ...] = (*tokens, inner_lr, *decays)
    extended = None
    if state is None:
        weights = tuple(w.to(dtype).expand(N, *w.shape) for w in initial)
        starts, lengths = dense_spans(B, L, tokens[0].device) if spans is None else (spans.starts, spans.lengths)
        seen = lengths
    else:
        # A mini-batch is taken up again by running its pending tokens once more, in front of the new ones.
        weights, inside = state.weights, state.position % K
        dense = Spans.from_mask(torch.ones(B, L, dtype=torch.bool, device=tokens[0].device)) if spans is None else spans
        extended = dense.with_context(K - 1)
        contexts = [torch.zeros_like(state.pending_k), state.pending_k, state.pending_v, state.pending_lr]
        contexts += [] if state.pending_log_decay is None else [state.pending_log_decay]
        sequence_tokens = tuple(map(extended.join, contexts, sequence_tokens))
        starts, lengths = extended.first - inside, extended.lengths + inside
        seen = state.position + extended.lengths
    q, k, v, lr, *decays = sequence_tokens
    segment = segment_length(model, weights, K)
    scan = Scan(q, k, v, lr, token_scale, weights, *layer_norm, starts, lengths, eps, segment, model.name)
    if spans is None and state is None:  # every row is a sequence, which backends need not look up
        scan = scan._replace(starts=None, lengths=None)
    if decays:
        scan = scan._replace(log_decay=decays[0], initial=tuple(w.to(dtype) for w in initial))
    o, *outgoing = _scan(model, scan, backend)
    pending = (last_tokens(x.to(dtype), starts, lengths, K - 1, seen % K) for x in (k, v, lr, *decays))
    pending_k, pending_v, pending_lr, *pending_decays = pending
    if extended is not None:
        o = extended.part(o)
    left = pending_decays[0] if pending_decays else None
    return o, TTTState(tuple(outgoing), pending_k, pending_v, pending_lr, seen, pending_log_decay=left)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does to the arguments of ``scaled_dot_product_attention``."""
    dtype = autocast_dtype(q.dtype, q.device.type) or q.dtype
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _scan(model: InnerModel, scan: Scan, backend: Backend) -> tuple[Tensor, ...]:
    """Outputs and outgoing weights of sequences that all start at a mini-batch boundary."""
    if backend == "reference":
        with without_autocast(scan.q.device.type):  # the inner loop chooses its own precision
            return _reference_scan(scan)
    scans = SCANS if scan.log_decay is None else FORGETTING_SCANS
    return scans[model.name](scan, backend)[: 1 + len(scan.weights)]


def segment_length(model: InnerModel, weights: tuple[Tensor, ...], mini_batch_size: int) -> int:
    """How many mini-batches lie between two copies of the weights ``[N, H, ...]`` that the forward keeps.

    A copy is at most an eighth of what is kept of the tokens between two of them: q, k, v and the inner gradients, and
    Z1 of TTT-MLP. Shorter segments would save no time, unless mini-batches are long: a segment has 1,024 tokens or
    sixteen mini-batches at least, whichever is less.
    """
    D, hidden = weights[0].shape[2:]
    kept = mini_batch_size * (3 * D + sum(model.kept_widths(D, hidden)))
    return max(min(16, -(-1024 // mini_batch_size)), -(-8 * model.numbers(D, hidden) // kept))


def _reference_scan(scan: Scan) -> tuple[Tensor, ...]:
    """The dual form; unequal sequences padded, with every one's weights at rest after its last complete mini-batch.

    Weights that were never updated come out as copies: the state is not to follow the parameters.
    """
    token_scale, weights = scan.token_scale, scan.weights
    dual_form = partial(reference.dual_form, inner=scan.inner, eps=scan.eps, initial=scan.initial)
    dtype, K = weights[0].dtype, token_scale.numel()
    decay = [] if scan.log_decay is None else [scan.log_decay]
    q, k, v, lr, gamma, beta = (x.to(dtype) for x in (*scan.tokens, scan.ln_weight, scan.ln_bias))
    starts, lengths = scan.starts, scan.lengths
    if starts is None or lengths is None:
        o, outgoing = dual_form(q, k, v, lr, token_scale, weights, gamma, beta, log_decay=scan.log_decay)
        return o.to(scan.q.dtype), *(w.clone() for w in outgoing)
    # Where nothing may depend on values, a sequence may be as long as a row.
    longest = max(lengths.tolist(), default=0) if has_values(lengths) else q.shape[1]
    slots = torch.arange(longest, device=q.device)
    valid, total = slots < lengths[:, None], q.shape[0] * q.shape[1]
    index = torch.where(valid, starts[:, None] + slots, total)  # padding reads and writes a spare zero behind the end
    q, k, v, lr, *decay = (
        torch.cat((x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])))[index] for x in (q, k, v, lr, *decay)
    )
    outputs = [q[:, :0]]
    for start in range(0, longest, K):
        q_t, k_t, v_t, lr_t, *decay_t = (x[:, start : start + K] for x in (q, k, v, lr, *decay))
        own = decay_t[0] if decay_t else None
        o, updated = dual_form(q_t, k_t, v_t, lr_t, token_scale, weights, gamma, beta, log_decay=own)
        outputs.append(o)
        complete = lengths >= start + K
        weights = tuple(
            torch.where(complete.view(-1, *[1] * (w.dim() - 1)), new, w)
            for new, w in zip(updated, weights, strict=True)
        )
    o = torch.cat(outputs, 1).flatten(0, 1)
    o = o.new_zeros(total + 1, *o.shape[1:]).index_copy(0, index.flatten(), o)
    return o[:-1].unflatten(0, scan.q.shape[:2]).to(scan.q.dtype), *(w.clone() for w in weights)


def make_spans(mask: Tensor | None, cu_seqlens: Tensor | None, L: int) -> Spans | None:
    """Where the sequences are; None when every row is one."""
    if mask is not None:
        return Spans.from_mask(mask)
    return None if cu_seqlens is None else Spans.from_cu_seqlens(cu_seqlens, L)
