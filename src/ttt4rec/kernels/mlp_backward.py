# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-MLP backward: one launch that walks the mini-batches from the last to the first, segment by segment.

The updates of a segment are replayed first, which leaves the forward's weights before each mini-batch in memory, that
is in the cache. On the walk back the hidden features are passed over three times. Every pass computes the forward's
values again; where there is only one chunk the compiler sees that they are the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Scan
from . import copies, launch
from .copies import first_state, load_steps
from .hidden_layer import (
    contiguous_strides,
    gelu,
    hidden_columns,
    hidden_mask,
    hidden_offsets,
    load_copied_b2,
    load_hidden,
    load_hidden_copy,
    load_state,
    store_state,
    wait_for_stores,
)
from .mlp_replay import first_weights, replay
from .primitives import (
    causal,
    dot,
    expanded,
    first_rows,
    inner_gradient_backward,
    layer_norm_backward,
    load_layer_norm,
    mini_batch_place,
    own,
    parameter_mask,
    parameter_offsets,
    program_place,
    recentred,
    rounded,
    row_offsets,
    row_token,
    store_head_sums,
    store_token_sums,
    tile_offsets,
    token_sums,
)


@triton.jit
def part_places(place, chunk, tile: tl.constexpr):
    """Offsets and mask of a chunk of a program's rows in ``[N, H, R, hidden]``."""
    sequence, head, H = place
    columns, tokens = hidden_columns(chunk, tile), tl.arange(0, tile.rows)
    rows = (sequence.to(tl.int64) * H + head) * tile.rows + tokens
    return rows[:, None] * tile.hidden + columns[None, :], hidden_mask(tokens >= 0, columns, tile)


@triton.jit
def store_part(pointer, x, place, chunk, tile: tl.constexpr):
    """Store x [R, C]."""
    offsets, mask = part_places(place, chunk, tile)
    tl.store(pointer + offsets, x, mask=mask)


@triton.jit
def load_part(pointer, place, chunk, tile: tl.constexpr):
    """Load what ``store_part`` stored."""
    offsets, mask = part_places(place, chunk, tile)
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def forward_values(Z1, state, mini_batch, tile: tl.constexpr):
    """Of a chunk, at the weights before the mini-batch: G2 W2ᵀ; G1; X̄2 and gelu' at P1."""
    W1, b1, W2 = state
    _, Q, G2, _, A1, _, minus_scale, _ = mini_batch
    G2_W2 = dot(G2, W2, tile)
    G1 = G2_W2 * gelu(Z1)[1]
    X2_bar, bar_slope, _ = gelu(dot(Q, W1, tile, b1) + minus_scale * dot(A1, G1, tile))
    return G2_W2, G1, X2_bar, bar_slope


@triton.jit
def add_chunk(Z1, state, dW2, mini_batch, sums, tile: tl.constexpr):
    """Add what a chunk contributes to X̄2 X2ᵀ, X2 W2, X̄2 W2 and X2 dW2.

    The last product decides how all tiles of a loop are spread over the warps: it must not be a square of tokens.
    """
    _, _, W2 = state
    X2, _, _ = gelu(Z1)
    _, _, X2_bar, _ = forward_values(Z1, state, mini_batch, tile)
    X2_bar_X2 = dot(X2_bar, tl.trans(X2), tile, sums[0])
    X2_W2 = dot(X2, tl.trans(W2), tile, sums[1])
    X2_bar_W2 = dot(X2_bar, tl.trans(W2), tile, sums[2])
    return X2_bar_X2, X2_W2, X2_bar_W2, dot(X2, tl.trans(dW2), tile, sums[3])


@triton.jit
def through_output(dO, G2_rows, X2_bar_X2, outer, own_rates, minus_scale, s_last, gamma, eps, tile: tl.constexpr):
    """Through O = Q + LN(P2) and the outer layer's steps; outer is X̄2 W2 + b2 and X2 dW2 + db2.

    Returns -dP2; what of -dG2 does not pass through G1; -dC2; what the tokens add to dγ; C2 and -dP2 G2ᵀ; and
    Σ G2 ∘ (X2 dW2 + db2).
    """
    X2_bar_W2, X2_dW2 = outer
    lr, lr_columns = own_rates[:, None], own_rates[None, :]
    C2 = tl.where(causal(tile), X2_bar_X2 + 1.0, 0.0)
    A2 = C2 * lr_columns
    p_hat, p_r = recentred(X2_bar_W2 + minus_scale * dot(A2, G2_rows, tile), eps, tile)
    minus_dP2 = layer_norm_backward(gamma * dO, p_hat, -p_r, tile)
    dP2_G2 = dot(minus_dP2, tl.trans(G2_rows), tile)
    minus_dC2 = tl.where(causal(tile), minus_scale * lr_columns * dP2_G2, 0.0)
    minus_dG2 = dot(tl.trans(A2), minus_scale * minus_dP2, tile, s_last * lr * X2_dW2)
    along_dW = tl.sum(G2_rows.to(tl.float32) * X2_dW2, 1)
    return minus_dP2, minus_dG2, minus_dC2, dO * p_hat, (C2, dP2_G2), along_dW


@triton.jit
def through_outputs(Z1, state, d_state, mini_batch, minus_dP2, minus_dC2, sums, tile: tl.constexpr):
    """Through a chunk's outputs, steps and G1.

    Returns dW1, db1 and dW2 without what passes through Z1; that part of -dZ1 which does not pass through Z2; and the
    chunk added to -dP1 G1ᵀ, -dP1 W1ᵀ, G1 dW1ᵀ, -E W2 and Σ G1 ∘ (K dW1 + db1).
    """
    W1, _, W2 = state
    dW1, db1, dW2 = d_state
    K, Q, G2, U2, A1, lr, minus_scale, s_last = mini_batch
    dP1_G1, dP1_W1, G1_dW1, E_W2, along_dW1 = sums
    X2, slope, curve = gelu(Z1)
    G2_W2, G1, X2_bar, bar_slope = forward_values(Z1, state, mini_batch, tile)
    minus_dP1 = dot(minus_dC2, X2, tile, dot(minus_dP2, W2, tile)) * bar_slope
    dP1_G1 = dot(minus_dP1, tl.trans(G1), tile, dP1_G1)
    dP1_W1 = dot(minus_dP1, tl.trans(W1), tile, dP1_W1)
    K_dW1 = dot(K, dW1, tile, db1)
    along_dW1 += tl.sum(G1 * K_dW1, 1)
    minus_dG1 = dot(tl.trans(A1), minus_scale * minus_dP1, tile, s_last * lr * K_dW1)
    minus_E = minus_dG1 * slope
    E_W2 = dot(minus_E, tl.trans(W2), tile, E_W2)
    G1_dW1 = dot(G1, tl.trans(dW1), tile, G1_dW1)
    minus_dX2 = dot(tl.trans(minus_dC2), X2_bar, tile, s_last * dot(U2, dW2, tile))
    minus_dZ1 = minus_dX2 * slope + minus_dG1 * G2_W2 * curve
    db1 -= token_sums(minus_dP1, tile)
    dW1 -= dot(tl.trans(Q), minus_dP1, tile)
    dW2 -= dot(tl.trans(minus_dP2), X2_bar, tile, dot(tl.trans(G2), minus_E, tile))
    return dW1, db1, dW2, minus_dZ1, (dP1_G1, dP1_W1, G1_dW1, E_W2, along_dW1)


@triton.jit
def through_inputs(Z1, minus_dZ1, state, d_state, K, minus_dZ2, dZ1_W1, tile: tl.constexpr):
    """Through a chunk's Z2 and Z1: dW1, db1 and dW2 before the mini-batch, and the chunk added to -dZ1 W1ᵀ."""
    W1, _, W2 = state
    dW1, db1, dW2 = d_state
    X2, slope, _ = gelu(Z1)
    minus_dZ1 += dot(minus_dZ2, W2, tile) * slope
    dZ1_W1 = dot(minus_dZ1, tl.trans(W1), tile, dZ1_W1)
    db1 -= token_sums(minus_dZ1, tile)
    dW1 -= dot(tl.trans(K), minus_dZ1, tile)
    dW2 -= dot(tl.trans(minus_dZ2), X2, tile)
    return dW1, db1, dW2, dZ1_W1


@triton.jit(do_not_specialize=["L", "H", "segment"])
def mlp_backward_kernel(
    grads,  # of o [B, L, H, D]; of W1, b1, W2, b2
    tokens,  # q, k, v and the forward's G2 [B, L, H, D], Z1 [B, L, H, hidden]
    rates,  # inner_lr [B, L, H], token_scale [K]
    weights,  # the incoming W1 [N, H, D, hidden], b1 [N, H, hidden], W2 [N, H, hidden, D], b2 [N, H, D]
    memory,  # checkpoints and states [number, H, 2 D hidden + hidden + D], and each sequence's first state [N] or None
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    d_tokens,  # of q, k, v [B, L, H, D] and inner_lr [B, L, H]
    d_weights,  # of W1, b1, W2, b2
    partial_sums,  # per sequence: γ and β's gradients [N, H, D], s's and the updates' share of s_last's [N, H, K]
    scratch,  # for chunks: a part of a mini-batch's -dZ1 [N, H, R, hidden]
    strides,  # of W1, b1, W2, b2 and of their gradients; all others are contiguous
    L,
    H,
    segment,  # mini-batches
    eps,
    tile: tl.constexpr,
):
    """One program: P heads of one sequence, from the last mini-batch to the first.

    X2, G1, U1, U2, P1, X̄2, P2 and C1 = tril(Q Kᵀ + 1), C2 = tril(X̄2 X2ᵀ + 1) as in the forward, at its weights.
    dP2 = layer norm's backward of γ ∘ dO            dC2 = tril(-s ∘ dP2 U2ᵀ)
    dP1 = (dP2 W2ᵀ + dC2 X2) ∘ gelu'(P1)             dC1 = tril(-s ∘ dP1 U1ᵀ)
    dU2 = C2ᵀ (-s ∘ dP2) - s_last (X2 dW2 + db2)     dU1 = C1ᵀ (-s ∘ dP1) - s_last (K dW1 + db1)
    dG1 = lr ∘ dU1                                   E = dG1 ∘ gelu'(Z1), the gradient of G2 W2ᵀ
    dG2 = lr ∘ dU2 + E W2                            dlr = Σ G1 ∘ dU1 + Σ G2 ∘ dU2
    dZ2, de, dγ from dG2                             dV = -de
    dX2 = dC2ᵀ X̄2 - s_last U2 dW2ᵀ + dZ2 W2ᵀ         dZ1 = dX2 ∘ gelu'(Z1) + dG1 ∘ (G2 W2ᵀ) ∘ gelu''(Z1)
    dQ = dO + dP1 W1ᵀ + dC1 K                        dK = de + dZ1 W1ᵀ + dC1ᵀ Q - s_last U1 dW1ᵀ
    dW1 ← dW1 + Qᵀ dP1 + Kᵀ dZ1                      dW2 ← dW2 + X̄2ᵀ dP2 + X2ᵀ dZ2 + Eᵀ G2
    ds = -Σ dP1 ∘ C1 U1 - Σ dP2 ∘ C2 U2              ds_last -= Σ U1 ∘ (K dW1 + db1) + Σ U2 ∘ (X2 dW2 + db2)

    In the code, as in TTT-Linear's, all but dO, dq and the parameters' gradients carry the opposite sign.
    """
    q, _, v, _, Z1_kept = tokens
    inner_lr, token_scale = rates
    dq, dk, dv, d_lr = d_tokens
    checkpoints, states, first_states = memory
    sequence, head, first, length = program_place(spans, L, H, tile)
    walk, place = (sequence, first, length, head, H), (sequence, head, H)
    d_state, contiguous = d_weights[:3], contiguous_strides(place, tile)

    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    PF: tl.constexpr = tile.heads * tile.features
    C: tl.constexpr = tile.chunk
    D: tl.constexpr = tile.head_dim
    positions = row_token(tile)
    gamma, beta = load_layer_norm(layer_norm, head, H, tile)
    minus_scale = -tl.load(token_scale + positions, mask=positions < tile.mini_batch, other=0.0)[:, None]
    last_scale = tl.load(token_scale + tile.mini_batch - 1)
    b_mask = parameter_mask(head, H, tile)
    db2 = tl.load(grads[4] + parameter_offsets(strides[7], sequence, head, tile), mask=b_mask, other=0.0)
    if tile.chunks == 1:
        dW1, db1, dW2 = load_state(grads[1:4], strides[4:7], place, 0, tile)
    else:
        for chunk in tl.range(0, tile.chunks, num_stages=1):
            loaded = load_state(grads[1:4], strides[4:7], place, chunk, tile)
            store_state(d_state, contiguous, loaded, place, chunk, tile)
    wait_for_stores(tile)

    d_gamma, d_beta = tl.zeros((R, F), tl.float32), tl.zeros((R, F), tl.float32)
    d_scale, d_last_scale = tl.zeros((R, R), tl.float32), tl.zeros((R,), tl.float32)
    no_pairs, no_rows = tl.zeros((R, R), tl.float32), tl.zeros((R, PF), tl.float32)
    Z1 = tl.zeros((R, C), tl.float32)
    minus_dZ1 = Z1
    state = first_state(first_states, sequence, L, segment, tile)
    num_mini_batches = tl.cdiv(length, tile.mini_batch)
    num_segments = tl.cdiv(num_mini_batches, segment)
    for s in tl.range(0, num_segments, num_stages=1):
        begin = (num_segments - 1 - s) * segment
        end = min(begin + segment, num_mini_batches)
        tl.debug_barrier()  # until all threads have read the states of the segment behind
        for chunk in tl.range(0, tile.chunks, num_stages=1):
            chunk_state, b2 = first_weights(weights, strides, checkpoints, walk, begin, segment, chunk, tile)
            replay(chunk_state, b2, tokens, rates, states, state, walk, begin, end, chunk, tile)
        tl.debug_barrier()
        for t in tl.range(0, end - begin):
            start = (end - 1 - t) * tile.mini_batch
            rows, mask = mini_batch_place(start, length, head, H, tile)
            at = (first + start) * H + head
            here = at * D + tile_offsets(H, tile)
            Z1_here = Z1_kept + at * tile.hidden
            before = state + (end - 1 - t - begin)
            q_rows = tl.load(q + here, mask=mask, other=0.0)
            k_rows, G2_rows, own_rates = load_steps(tokens, inner_lr, at, rows, mask, H, tile)
            lr, lr_columns = own_rates[:, None], own_rates[None, :]
            K, Q, G2 = expanded(k_rows, tile), expanded(q_rows, tile), expanded(G2_rows, tile)
            committed = tl.where(start + tile.mini_batch <= length, 1.0, 0.0)
            s_last = committed * last_scale
            U2_rows = lr * G2_rows.to(tl.float32)
            C1 = tl.where(causal(tile), dot(q_rows, tl.trans(k_rows), tile) + 1.0, 0.0)
            A1 = C1 * lr_columns
            mini_batch = K, Q, G2, expanded(U2_rows, tile), A1, lr, minus_scale, s_last

            # The forward's values.
            b2 = load_copied_b2(states, before, head, H, tile)
            if tile.chunks == 1:
                W1, b1, W2 = load_hidden_copy(states, before, head, H, 0, tile)
            X2_bar_X2, X2_W2, X2_bar_W2, X2_dW2 = no_pairs, no_rows, no_rows, no_rows
            for chunk in tl.range(0, tile.chunks, num_stages=1):
                Z1 = load_hidden(Z1_here + hidden_offsets(chunk, H, tile), rows, chunk, tile)
                if tile.chunks > 1:
                    W1, b1, W2 = load_hidden_copy(states, before, head, H, chunk, tile)
                    dW1, db1, dW2 = load_state(d_state, contiguous, place, chunk, tile)
                sums = X2_bar_X2, X2_W2, X2_bar_W2, X2_dW2
                X2_bar_X2, X2_W2, X2_bar_W2, X2_dW2 = add_chunk(Z1, (W1, b1, W2), dW2, mini_batch, sums, tile)

            # Through the output and the outer layer's steps.
            dO = tl.load(grads[0] + here, mask=mask, other=0.0).to(tl.float32)
            outer = own(X2_bar_W2, tile) + b2, own(X2_dW2, tile) + db2
            minus_dP2, minus_dG2, minus_dC2, d_gamma_terms, pairs, along_dW = through_output(
                dO, G2_rows, X2_bar_X2, outer, own_rates, minus_scale, s_last, gamma, eps, tile
            )
            C2, dP2_G2 = pairs
            d_gamma += d_gamma_terms
            d_beta += dO
            expanded_dP2 = expanded(minus_dP2, tile)

            # Through the hidden layer's outputs and steps.
            dP1_G1, dP1_W1, G1_dW1, E_W2 = no_pairs, no_rows, no_rows, no_rows
            for chunk in tl.range(0, tile.chunks, num_stages=1):
                if tile.chunks > 1:
                    Z1 = load_hidden(Z1_here + hidden_offsets(chunk, H, tile), rows, chunk, tile)
                    W1, b1, W2 = load_hidden_copy(states, before, head, H, chunk, tile)
                    dW1, db1, dW2 = load_state(d_state, contiguous, place, chunk, tile)
                through = dP1_G1, dP1_W1, G1_dW1, E_W2, along_dW
                dW1, db1, dW2, minus_dZ1, through = through_outputs(
                    Z1, (W1, b1, W2), (dW1, db1, dW2), mini_batch, expanded_dP2, minus_dC2, through, tile
                )
                dP1_G1, dP1_W1, G1_dW1, E_W2, along_dW = through
                if tile.chunks > 1:
                    store_state(d_state, contiguous, (dW1, db1, dW2), place, chunk, tile)
                    store_part(scratch, minus_dZ1, place, chunk, tile)
            wait_for_stores(tile)
            d_scale += A1 * dP1_G1 + C2 * lr_columns * dP2_G2
            d_last_scale -= committed * own_rates * along_dW
            minus_dlr = tl.sum(minus_scale * (C1 * dP1_G1 + C2 * dP2_G2), 0)
            tl.store(d_lr + at + row_offsets(H, tile), -minus_dlr - s_last * along_dW, mask=rows)
            minus_dC1 = tl.where(causal(tile), minus_scale * lr_columns * dP1_G1, 0.0)
            d_q = dO - dot(minus_dC1, k_rows, tile) - own(dP1_W1, tile)
            tl.store(dq + here, rounded(d_q, tile), mask=mask)

            # Through the inner gradient.
            x_hat, r = recentred(own(X2_W2, tile) + b2, eps, tile)
            v_rows = tl.load(v + here, mask=mask, other=0.0)
            error = gamma * x_hat + beta - (v_rows.to(tl.float32) - k_rows.to(tl.float32))
            minus_dG2 += own(E_W2, tile)
            along_G2 = tl.sum(minus_dG2 * G2_rows.to(tl.float32), 1)[:, None]
            minus_dZ2, minus_de, minus_d_gamma = inner_gradient_backward(
                minus_dG2, along_G2, G2_rows.to(tl.float32), error, x_hat, r, gamma, tile
            )
            d_gamma -= minus_d_gamma
            d_beta -= minus_de
            tl.store(dv + here, rounded(minus_de, tile), mask=mask)
            db2 -= token_sums(minus_dP2, tile) + token_sums(minus_dZ2, tile)
            d_k = -dot(tl.trans(minus_dC1), q_rows, tile, minus_de + s_last * lr * own(G1_dW1, tile))
            expanded_dZ2 = expanded(minus_dZ2, tile)
            dZ1_W1 = no_rows
            for chunk in tl.range(0, tile.chunks, num_stages=1):
                if tile.chunks > 1:
                    Z1 = load_hidden(Z1_here + hidden_offsets(chunk, H, tile), rows, chunk, tile)
                    W1, b1, W2 = load_hidden_copy(states, before, head, H, chunk, tile)
                    dW1, db1, dW2 = load_state(d_state, contiguous, place, chunk, tile)
                    minus_dZ1 = load_part(scratch, place, chunk, tile)
                dW1, db1, dW2, dZ1_W1 = through_inputs(
                    Z1, minus_dZ1, (W1, b1, W2), (dW1, db1, dW2), K, expanded_dZ2, dZ1_W1, tile
                )
                if tile.chunks > 1:
                    store_state(d_state, contiguous, (dW1, db1, dW2), place, chunk, tile)
            wait_for_stores(tile)
            # Subtracted, as in the forward: a sum would move the product behind the state's.
            tl.store(dk + here, rounded(d_k - own(dZ1_W1, tile), tile), mask=mask)

    if tile.chunks == 1:
        store_state(d_state, contiguous, (dW1, db1, dW2), place, 0, tile)
    once = b_mask & first_rows(tile)
    tl.store(d_weights[3] + parameter_offsets((H * D, D, 1), sequence, head, tile), db2, mask=once)
    store_head_sums(partial_sums[0], d_gamma, sequence, head, H, tile)
    store_head_sums(partial_sums[1], d_beta, sequence, head, H, tile)
    store_token_sums(partial_sums[2], tl.sum(d_scale, 1), sequence, head, H, tile)
    store_token_sums(partial_sums[3], d_last_scale, sequence, head, H, tile)


@launch.on_its_device
def mlp_scan_backward(scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, lr, s, the weights per sequence, γ and β, from those of o and the outgoing weights.

    Z1, G2 and the checkpoints are kept. Errors as in ``linear_scan``. Sums over sequences are taken in a fixed order:
    two runs give the same bits.
    """
    launch.check_compiler("mlp_backward", scan.q.shape[-1], scan.token_scale.numel())
    results, sums, prepared = prepare_mlp_scan_backward(scan, kept, grads)
    prepared.run()
    return launch.with_sums(results, sums)


def prepare_mlp_scan_backward(
    scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], launch.Launch]:
    """Allocate the results and the sums per sequence, and make the launch that fills them."""
    q, weights, (Z1, G2, checkpoints), (grad_o, *grad_weights) = scan.q, scan.weights, kept, grads
    (L, H), hidden = q.shape[1:3], Z1.shape[-1]
    choice, tile = launch.plan("mlp_backward", q, scan.token_scale.numel(), hidden)
    d_tokens, d_weights, sums = launch.new_gradients(scan)
    given, given_strides = launch.strided(*grad_weights)
    weights, strides = launch.strided(*weights)
    scratch = None
    if tile.chunks > 1:
        shape = (weights[0].shape[0], H, tile.rows, hidden)
        scratch = torch.empty(shape, dtype=torch.float32, device=q.device)
    arguments = (
        (grad_o.contiguous(), *given),
        launch.contiguous(*scan[:3], G2, Z1),
        launch.contiguous(scan.inner_lr, scan.token_scale),
        weights,
        (checkpoints, *copies.new_states(scan)),
        launch.contiguous(scan.ln_weight, scan.ln_bias),
        launch.contiguous(scan.starts, scan.lengths),
        d_tokens,
        d_weights,
        sums,
        scratch,
        (*strides, *given_strides),
        L,
        H,
        scan.segment,
        scan.eps,
        tile,
    )
    grid = (weights[0].shape[0] * triton.cdiv(H, choice.heads),)
    return (*d_tokens, *d_weights), sums, launch.Launch(mlp_backward_kernel, grid, arguments, choice)
