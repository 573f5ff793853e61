# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-Linear backward: one launch that walks the mini-batches from the last to the first.

It goes segment by segment. The updates of a segment are replayed from the weights before it, which leaves the forward's
weights before each mini-batch in memory, that is in the cache; then the segment is walked back.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Scan
from . import copies, launch
from .copies import checkpoint_number, first_state, load_copy, load_steps, store_copy
from .primitives import (
    causal,
    centred,
    dot,
    expanded,
    first_rows,
    inner_gradient_backward,
    layer_norm_backward,
    load_layer_norm,
    mini_batch_place,
    normalised,
    own,
    parameter_mask,
    parameter_offsets,
    program_place,
    rounded,
    row_offsets,
    row_token,
    store_head_sums,
    store_token_sums,
    tile_offsets,
    token_sums,
    updated,
    weight_mask,
    weight_offsets,
)


@triton.jit
def first_weights(weights, strides, checkpoints, place, begin, segment, tile: tl.constexpr):
    """W and b before the segment that begins at mini-batch begin of a sequence."""
    sequence, first, _, head, H = place
    if begin == 0:
        W_at = weights[0] + weight_offsets(strides[2], sequence, head, tile)
        b_at = weights[1] + parameter_offsets(strides[3], sequence, head, tile)
        W = centred(tl.load(W_at, mask=weight_mask(head, H, tile), other=0.0), tile)
        b = centred(tl.load(b_at, mask=parameter_mask(head, H, tile), other=0.0), tile)
    else:
        number = checkpoint_number(first + begin * tile.mini_batch, segment, tile)
        W, b = load_copy(checkpoints, number, head, H, tile)
    return W, b


@triton.jit
def replay(W, b, tokens, rates, states, number, place, begin, end, tile: tl.constexpr):
    """Copy the weights before each of mini-batches begin to end - 1 to the states from that number on.

    Given are those before the first. Updates are made as the forward made them; only complete mini-batches have one.
    """
    first, length, head, H = place[1:]
    last_scale = tl.load(rates[1] + tile.mini_batch - 1)
    store_copy(states, number, W, b, head, H, tile)
    for m in tl.range(begin, end - 1):
        start = m * tile.mini_batch
        rows, mask = mini_batch_place(start, length, head, H, tile)
        k_rows, G, lr = load_steps(tokens, rates[0], (first + start) * H + head, rows, mask, H, tile)
        U = lr[:, None] * G.to(tl.float32)
        W, b = updated(W, b, expanded(k_rows, tile), U, last_scale, tile)
        store_copy(states, number + (m + 1 - begin), W, b, head, H, tile)


@triton.jit
def through_output(dO, q_rows, k_rows, U, W, b, gamma, minus_scale, eps, tile: tl.constexpr):
    """Through O = Q + LN(out): dQ, C, -dout and -dC, and what the tokens add to dγ and ds."""
    C = tl.where(causal(tile), dot(q_rows, tl.trans(k_rows), tile) + 1.0, 0.0)
    CU = dot(C, U, tile)
    p_hat, p_r = normalised(dot(expanded(q_rows, tile), W, tile, b) + minus_scale * CU, eps, tile)
    minus_dout = layer_norm_backward(gamma * dO, p_hat, -p_r, tile)
    minus_dC = tl.where(causal(tile), dot(minus_scale * minus_dout, tl.trans(U), tile), 0.0)
    d_q = dO - dot(minus_dC, k_rows, tile, own(dot(minus_dout, tl.trans(W), tile), tile))
    return d_q, C, minus_dout, minus_dC, dO * p_hat, tl.sum(minus_dout * CU, 1)


@triton.jit(do_not_specialize=["L", "H", "segment"])
def linear_backward_kernel(
    grads,  # of o [B, L, H, D], of W1 [N, H, D, D] and b1 [N, H, D]
    tokens,  # q, k, v and the forward's G [B, L, H, D]
    rates,  # inner_lr [B, L, H], token_scale [K]
    weights,  # the incoming W1 [N, H, D, D], b1 [N, H, D]
    memory,  # checkpoints and states [number, H, D² + D], and each sequence's first state [N] or None
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    d_tokens,  # of q, k, v [B, L, H, D] and inner_lr [B, L, H]
    d_weights,  # of W1, b1
    partial_sums,  # per sequence: γ and β's gradients [N, H, D], s's and the updates' share of s_last's [N, H, K]
    strides,  # of W1's and b1's gradients and of weights; all others are contiguous
    L,
    H,
    segment,  # mini-batches
    eps,
    tile: tl.constexpr,
):
    """One program: P heads of one sequence, from the last mini-batch to the first; dW and db in registers.

    x̂, y, out, U = lr ∘ G and C = tril(Q Kᵀ + 1) as in the forward, at the forward's weights:
    dout = layer norm's backward of γ ∘ dO           d(CU) = -s ∘ dout,  dC = tril(d(CU) Uᵀ)
    dU = Cᵀ d(CU) - s_last X,  X = K dW + db         dG = lr ∘ dU,  dlr = Σ_d G ∘ dU
    ds = -Σ_d dout ∘ (C U),  ds_last -= Σ U ∘ X
    dZ, de, dγ from dG                               dV = -de
    dQ = dO + dout Wᵀ + dC K                         dK = de + dZ Wᵀ + dCᵀ Q - s_last U dWᵀ
    dW ← dW + Qᵀ dout + Kᵀ dZ                        db ← db + Σ_i dout_i + Σ_j dZ_j

    In the code all but dO, dq and the parameters' gradients carry the opposite sign, with which they enter nearly
    everywhere.
    """
    grad_o, grad_W, grad_b = grads
    q, _, v, _ = tokens
    inner_lr, token_scale = rates
    dq, dk, dv, d_lr = d_tokens
    checkpoints, states, first_states = memory
    sequence, head, first, length = program_place(spans, L, H, tile)
    place = sequence, first, length, head, H

    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    D: tl.constexpr = tile.head_dim
    positions = row_token(tile)
    b_mask, W_mask = parameter_mask(head, H, tile), weight_mask(head, H, tile)
    gamma, beta = load_layer_norm(layer_norm, head, H, tile)
    minus_scale = -tl.load(token_scale + positions, mask=positions < tile.mini_batch, other=0.0)[:, None]
    last_scale = tl.load(token_scale + tile.mini_batch - 1)
    dW = tl.load(grad_W + weight_offsets(strides[0], sequence, head, tile), mask=W_mask, other=0.0)
    db = tl.load(grad_b + parameter_offsets(strides[1], sequence, head, tile), mask=b_mask, other=0.0)

    d_gamma = tl.zeros((R, F), tl.float32)
    d_beta = tl.zeros((R, F), tl.float32)
    d_scale = tl.zeros((R,), tl.float32)
    d_last_scale = tl.zeros((R,), tl.float32)
    state = first_state(first_states, sequence, L, segment, tile)
    num_mini_batches = tl.cdiv(length, tile.mini_batch)
    num_segments = tl.cdiv(num_mini_batches, segment)
    for s in tl.range(0, num_segments, num_stages=1):
        begin = (num_segments - 1 - s) * segment
        end = min(begin + segment, num_mini_batches)
        W, b = first_weights(weights, strides, checkpoints, place, begin, segment, tile)
        tl.debug_barrier()  # until all threads have read the states of the segment behind
        replay(W, b, tokens, rates, states, state, place, begin, end, tile)
        tl.debug_barrier()
        for t in tl.range(0, end - begin):
            start = (end - 1 - t) * tile.mini_batch
            rows, mask = mini_batch_place(start, length, head, H, tile)
            at = (first + start) * H + head
            here = at * D + tile_offsets(H, tile)
            W, b = load_copy(states, state + (end - 1 - t - begin), head, H, tile)
            k_rows, G, lr = load_steps(tokens, inner_lr, at, rows, mask, H, tile)
            committed = tl.where(start + tile.mini_batch <= length, 1.0, 0.0)
            s_last = committed * last_scale
            K, U = expanded(k_rows, tile), lr[:, None] * G.to(tl.float32)

            # Through the output.
            q_rows = tl.load(q + here, mask=mask, other=0.0)
            dO = tl.load(grad_o + here, mask=mask, other=0.0).to(tl.float32)
            d_q, C, minus_dout, minus_dC, d_gamma_terms, d_scale_terms = through_output(
                dO, q_rows, k_rows, U, W, b, gamma, minus_scale, eps, tile
            )
            d_gamma += d_gamma_terms
            d_beta += dO
            d_scale += d_scale_terms
            tl.store(dq + here, rounded(d_q, tile), mask=mask)

            # Through the steps.
            X = dot(K, dW, tile, db)
            minus_dU = dot(tl.trans(C), minus_scale * minus_dout, tile, s_last * X)
            d_last_scale -= committed * tl.sum(U * X, 1)
            # Read again, from the cache, as there are no registers to keep them in.
            k_rows, G, lr = load_steps(tokens, inner_lr, at, rows, mask, H, tile)
            G = G.to(tl.float32)
            minus_dlr = tl.sum(G * minus_dU, 1)
            tl.store(d_lr + at + row_offsets(H, tile), -minus_dlr, mask=rows)

            # Through the inner gradient.
            K, Q = expanded(k_rows, tile), expanded(q_rows, tile)
            x_hat, r = normalised(dot(K, W, tile, b), eps, tile)
            v_rows = tl.load(v + here, mask=mask, other=0.0)
            error = gamma * x_hat + beta - (v_rows.to(tl.float32) - k_rows.to(tl.float32))
            minus_dZ, minus_de, minus_d_gamma = inner_gradient_backward(
                lr[:, None] * minus_dU, (lr * minus_dlr)[:, None], G, error, x_hat, r, gamma, tile
            )
            d_gamma -= minus_d_gamma
            d_beta -= minus_de
            tl.store(dv + here, rounded(minus_de, tile), mask=mask)
            through_W = own(dot(minus_dZ, tl.trans(W), tile) + s_last * dot(U, tl.trans(dW), tile), tile)
            dW -= dot(tl.trans(Q), minus_dout, tile) + dot(tl.trans(K), minus_dZ, tile)
            db -= token_sums(minus_dout, tile) + token_sums(minus_dZ, tile)

            # The last product: Triton splits all tiles among the warps as suits its shape, and [R, F] repeats least.
            minus_dk = dot(tl.trans(minus_dC), q_rows, tile, minus_de + through_W)
            tl.store(dk + here, rounded(-minus_dk, tile), mask=mask)

    tl.store(d_weights[0] + weight_offsets((H * D * D, D * D, D, 1), sequence, head, tile), dW, mask=W_mask)
    once = b_mask & first_rows(tile)
    tl.store(d_weights[1] + parameter_offsets((H * D, D, 1), sequence, head, tile), db, mask=once)
    store_head_sums(partial_sums[0], d_gamma, sequence, head, H, tile)
    store_head_sums(partial_sums[1], d_beta, sequence, head, H, tile)
    store_token_sums(partial_sums[2], d_scale, sequence, head, H, tile)
    store_token_sums(partial_sums[3], d_last_scale, sequence, head, H, tile)


@launch.on_its_device
def linear_scan_backward(scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, lr, s, the weights per sequence, γ and β, from those of o and the outgoing weights.

    G and the checkpoints are kept. Errors as in ``linear_scan``. Sums over sequences are taken in a fixed order: two
    runs give the same bits.
    """
    launch.check_compiler("linear_backward", scan.q.shape[-1], scan.token_scale.numel())
    results, sums, prepared = prepare_linear_scan_backward(scan, kept, grads)
    prepared.run()
    return launch.with_sums(results, sums)


def prepare_linear_scan_backward(
    scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], launch.Launch]:
    """Allocate the results and the sums per sequence, and make the launch that fills them."""
    q, weights, (G, checkpoints), (grad_o, *grad_weights) = scan.q, scan.weights, kept, grads
    L, H = q.shape[1:3]
    choice, tile = launch.plan("linear_backward", q, scan.token_scale.numel())
    d_tokens, d_weights, sums = launch.new_gradients(scan)
    given, given_strides = launch.strided(*grad_weights)
    weights, strides = launch.strided(*weights)
    arguments = (
        (grad_o.contiguous(), *given),
        launch.contiguous(*scan[:3], G),
        launch.contiguous(scan.inner_lr, scan.token_scale),
        weights,
        (checkpoints, *copies.new_states(scan)),
        launch.contiguous(scan.ln_weight, scan.ln_bias),
        launch.contiguous(scan.starts, scan.lengths),
        d_tokens,
        d_weights,
        sums,
        (*given_strides, *strides),
        L,
        H,
        scan.segment,
        scan.eps,
        tile,
    )
    grid = (weights[0].shape[0] * triton.cdiv(H, choice.heads),)
    prepared = launch.Launch(linear_backward_kernel, grid, arguments, choice)
    return (*d_tokens, *d_weights), sums, prepared
