# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-MLP backward: one launch that walks the mini-batches from the last to the first, segment by segment.

The updates of a segment are replayed first, which leaves the forward's weights before each mini-batch in memory, that
is in the cache. On the walk back the hidden features are passed over three times. Every pass computes the forward's
values again; where there is only one chunk the compiler sees that they are the same.

Numbers in brackets are equations of docs/mathematics.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Scan
from . import copies, launch, limits
from .copies import first_state, load_steps
from .decays import prepared_decays
from .forgetting import (
    by_head,
    load_of_heads,
    no_sums,
    plus_sums,
    store_decay_gradient,
    through_means,
)
from .hidden_forgetting import b2_sums, chunk_kept, chunk_to_initial, hold_initial, no_hidden_gradients, sums_of_means
from .hidden_layer import (
    contiguous_strides,
    first_chunks,
    gelu,
    hidden_columns,
    hidden_mask,
    load_b2,
    load_copied_b2,
    put_chunk,
    store_b2,
    store_state,
    take_chunk,
    wait_for_stores,
)
from .mlp_replay import first_weights, forward_sums, forward_values, hold_before, mini_batch_values, replay, take_before
from .primitives import (
    causal,
    dot,
    expanded,
    inner_gradient_backward,
    layer_norm_backward,
    load_layer_norm,
    load_rows,
    load_scale,
    mini_batch_place,
    own,
    parameter_head,
    program_place,
    recentred,
    store_rates,
    store_rows,
    store_sums,
    tile_offsets,
    token_sums,
    total,
)


@triton.jit
def part_places(place, chunk, tile: tl.constexpr):
    """Offsets and mask of a chunk of a program's rows in ``[N, H, R, hidden]``."""
    sequence, head, _, _, H = place
    columns, tokens = hidden_columns(chunk, tile), tl.arange(0, tile.rows)
    rows = (sequence.to(tl.int64) * H + head) * tile.rows + tokens
    return rows[:, None] * tile.hidden + columns[None, :], hidden_mask(tokens >= 0, columns, tile)


@triton.jit
def store_part(pointer, x, place, chunk, tile: tl.constexpr):
    """Store x [R, C], if there are several chunks."""
    if tile.chunks > 1:
        offsets, mask = part_places(place, chunk, tile)
        tl.store(pointer + offsets, x, mask=mask)


@triton.jit
def take_part(x, pointer, place, chunk, tile: tl.constexpr):
    """What ``store_part`` was given: x itself, if there is one chunk."""
    if tile.chunks > 1:
        offsets, mask = part_places(place, chunk, tile)
        x = tl.load(pointer + offsets, mask=mask, other=0.0)
    return x


@triton.jit
def through_output(dO, G2_rows, X2_bar_X2, outer, own_rates, minus_scale, s_last, norm, tile: tl.constexpr):
    """Through the output (15) and the outer layer's steps (16), (18); outer is X̄2 W2 + b2 and X2 dW2 + db2.

    Returns -dP2; what of -dG2 does not pass through G1; -dC2; what the tokens add to dγ; C2 and -dP2 G2ᵀ; and
    Σ G2 ∘ (X2 dW2 + db2).
    """
    X2_bar_W2, X2_dW2 = outer
    gamma, _, eps = norm
    lr, lr_columns = own_rates[:, None], own_rates[None, :]
    C2 = tl.where(causal(tile), X2_bar_X2 + 1.0, 0.0)
    A2 = C2 * lr_columns
    p_hat, p_r = recentred(X2_bar_W2 + minus_scale * dot(A2, G2_rows, tile), eps, tile)
    minus_dP2 = layer_norm_backward(gamma * dO, p_hat, -p_r, tile)
    dP2_G2 = dot(minus_dP2, tl.trans(G2_rows), tile)
    minus_dC2 = tl.where(causal(tile), minus_scale * lr_columns * dP2_G2, 0.0)
    minus_dG2 = dot(tl.trans(A2), minus_scale * minus_dP2, tile, s_last * lr * X2_dW2)
    along_dW = tl.sum(G2_rows.to(tl.float32) * X2_dW2, 1)
    return minus_dP2, minus_dG2, minus_dC2, dO * p_hat, C2, dP2_G2, along_dW


@triton.jit
def through_outputs(
    held, d_state, values, memory, waiting, minus_dP2, minus_dC2, along_dW, forgetting, d_initial, tile: tl.constexpr
):
    """Through the hidden layer's outputs, steps and G1, chunk by chunk: (17), (18), (20), (25), (26); and (41).

    Returns what registers hold of the initial weights' gradients, and Σ dW ∘ (W - W̄), where it forgets. Then dW1, db1
    and dW2 without what passes through Z1. Then that part of the last chunk's -dZ1 which does not pass through Z2. Then
    the sums -dP1 G1ᵀ, -dP1 W1ᵀ, G1 dW1ᵀ, -E W2, and along_dW with Σ G1 ∘ (K dW1 + db1).
    """
    K, Q, G2, U2, A1, lr, minus_scale, s_last = values
    d_weights, contiguous, scratch = waiting
    _, _, _, _, place = memory
    R: tl.constexpr = tile.rows
    C: tl.constexpr = tile.chunk
    PF: tl.constexpr = tile.heads * tile.features
    dP1_G1, dP1_W1 = tl.zeros((R, R), tl.float32), tl.zeros((R, PF), tl.float32)
    G1_dW1, E_W2 = dP1_W1, dP1_W1
    minus_dZ1 = tl.zeros((R, C), tl.float32)
    sums = ()
    if len(forgetting) > 0:
        sums = no_sums(tile)
    for chunk in tl.range(0, tile.chunks, num_stages=1):
        Z1, state = take_before(held, memory, chunk, tile)
        W1, _b1, W2 = state
        dW1, db1, dW2 = take_chunk(d_state, d_weights, contiguous, place, chunk, tile)
        if len(forgetting) > 0:
            sums, d_initial = chunk_to_initial(sums, state, (dW1, db1, dW2), chunk, d_initial, forgetting, tile)
        X2, slope, curve = gelu(Z1)
        G2_W2, G1, X2_bar, bar_slope = forward_values(Z1, state, values, tile)
        minus_dP1 = dot(minus_dC2, X2, tile, dot(minus_dP2, W2, tile)) * bar_slope
        dP1_G1 = dot(minus_dP1, tl.trans(G1), tile, dP1_G1)
        dP1_W1 = dot(minus_dP1, tl.trans(W1), tile, dP1_W1)
        K_dW1 = dot(K, dW1, tile, db1)
        along_dW += tl.sum(G1 * K_dW1, 1)
        minus_dG1 = dot(tl.trans(A1), minus_scale * minus_dP1, tile, s_last * lr * K_dW1)
        minus_E = minus_dG1 * slope
        E_W2 = dot(minus_E, tl.trans(W2), tile, E_W2)
        G1_dW1 = dot(G1, tl.trans(dW1), tile, G1_dW1)
        minus_dX2 = dot(tl.trans(minus_dC2), X2_bar, tile, s_last * dot(U2, dW2, tile))
        minus_dZ1 = minus_dX2 * slope + minus_dG1 * G2_W2 * curve
        if len(forgetting) > 0:
            dW1, db1, dW2 = chunk_kept((dW1, db1, dW2), forgetting, tile)
        db1 -= token_sums(minus_dP1, tile)
        dW1 -= dot(tl.trans(Q), minus_dP1, tile)
        dW2 -= dot(tl.trans(minus_dP2), X2_bar, tile, dot(tl.trans(G2), minus_E, tile))
        d_state = put_chunk((dW1, db1, dW2), d_weights, contiguous, place, chunk, tile)
        store_part(scratch, minus_dZ1, place, chunk, tile)
    wait_for_stores(tile)
    return d_initial, sums, d_state, minus_dZ1, (dP1_G1, dP1_W1, G1_dW1, E_W2, along_dW)


@triton.jit
def through_inner_gradient(minus_dG2, E_W2, G2_rows, Z2, k_rows, v, mini_batch, norm, tile: tl.constexpr):
    """Through G2 at Z2, (21) to (23): -dZ2, -de and what the tokens add to -dγ; a norm is γ, β and ε.

    Given are what of -dG2 does not pass through G1, and -E W2.
    """
    gamma, beta, eps = norm
    x_hat, r = recentred(Z2, eps, tile)
    v_rows = load_rows(v, mini_batch, tile)
    error = gamma * x_hat + beta - (v_rows.to(tl.float32) - k_rows.to(tl.float32))
    G2 = G2_rows.to(tl.float32)
    minus_dG2 += own(E_W2, tile)
    along_G2 = tl.sum(minus_dG2 * G2, 1)[:, None]
    return inner_gradient_backward(minus_dG2, along_G2, G2, error, x_hat, r, gamma, tile)


@triton.jit
def through_chunk_inputs(taken, part, before, K, minus_dZ2, dZ1_W1, tile: tl.constexpr):
    """Through a chunk of Z2 and Z1, (27) and (28): dW1, db1 and dW2 before the mini-batch, and -dZ1 W1ᵀ with it.

    Before the mini-batch are Z1, W1 and W2; the part of -dZ1 is what does not pass through Z2.
    """
    dW1, db1, dW2 = taken
    Z1, W1, W2 = before
    X2, slope, _curve = gelu(Z1)
    part += dot(minus_dZ2, W2, tile) * slope
    dZ1_W1 = dot(part, tl.trans(W1), tile, dZ1_W1)
    db1 -= token_sums(part, tile)
    dW1 -= dot(tl.trans(K), part, tile)
    dW2 -= dot(tl.trans(minus_dZ2), X2, tile)
    return (dW1, db1, dW2), dZ1_W1


@triton.jit
def through_inputs(held, minus_dZ1, d_state, K, minus_dZ2, memory, waiting, tile: tl.constexpr):
    """Through Z2 and Z1, chunk by chunk, (27) and (28): dW1, db1 and dW2 before the mini-batch, and -dZ1 W1ᵀ."""
    d_weights, contiguous, scratch = waiting
    _, _, _, _, place = memory
    R: tl.constexpr = tile.rows
    PF: tl.constexpr = tile.heads * tile.features
    dZ1_W1 = tl.zeros((R, PF), tl.float32)
    for chunk in tl.range(0, tile.chunks, num_stages=1):
        Z1, state = take_before(held, memory, chunk, tile)
        W1, _b1, W2 = state
        taken = take_chunk(d_state, d_weights, contiguous, place, chunk, tile)
        part = take_part(minus_dZ1, scratch, place, chunk, tile)
        taken, dZ1_W1 = through_chunk_inputs(taken, part, (Z1, W1, W2), K, minus_dZ2, dZ1_W1, tile)
        d_state = put_chunk(taken, d_weights, contiguous, place, chunk, tile)
    wait_for_stores(tile)
    return d_state, dZ1_W1


@triton.jit
def through_mini_batch(
    m,  # which one of the sequence
    copy,  # number of the state with the weights before it
    tokens,
    rates,
    decays,
    initial,  # what registers hold of the initial weights, and b̄2; or nothing
    states,
    grad_o,
    d_tokens,
    d_decays,
    waiting,  # where dW1, db1 and dW2 wait, if there are several chunks, and their strides; where -dZ1 does
    d_state,  # dW1, db1 and dW2 behind it, if there is one chunk
    db2,
    d_initial,  # gradients of the initial weights so far, as those are held; or nothing
    sums,  # gradients of γ and β, s and s_last so far
    norm,  # γ, β, ε
    scales,  # -s of every row, s_last
    place,
    tile: tl.constexpr,
):
    """Store the gradients of a mini-batch's tokens; returns dW1, db1 and dW2, db2 before it, d_initial and the sums."""
    q, k, v, G2_kept, Z1_kept = tokens
    dq, dk, dv, d_lr = d_tokens
    inner_lr, _ = rates
    d_gamma, d_beta, d_scale, d_last_scale = sums
    minus_scale, last_scale = scales
    _, head, _, length, H = place
    start = m * tile.mini_batch
    mini_batch = mini_batch_place(start, place, tile_offsets(H, tile), tile)
    q_rows = load_rows(q, mini_batch, tile)
    k_rows, G2_rows, own_rates = load_steps(k, G2_kept, inner_lr, mini_batch, H, tile)
    lr, lr_columns = own_rates[:, None], own_rates[None, :]
    committed = tl.where(start + tile.mini_batch <= length, 1.0, 0.0)
    s_last = committed * last_scale
    C1, values = mini_batch_values(q_rows, k_rows, G2_rows, own_rates, minus_scale, s_last, tile)
    K, _, _, _, A1, _, _, _ = values

    forgetting, d_held = (), ()
    if decays is not None:
        shares, kept = load_of_heads(decays[0], start, place, tile), load_of_heads(decays[1], start, place, tile)
        forgetting = initial[0], decays, shares, kept, d_decays[1:], waiting[1], place  # type: ignore[assignment]
        d_held, d_b2 = d_initial
    b2 = load_copied_b2(states, copy, head, H, tile)
    memory = Z1_kept, states, copy, mini_batch, place
    held = hold_before(memory, tile)
    X2_bar_X2, X2_W2, X2_bar_W2, X2_dW2 = forward_sums(held, d_state, values, memory, waiting, tile)

    dO = load_rows(grad_o, mini_batch, tile).to(tl.float32)
    outer = own(X2_bar_W2, tile) + b2, own(X2_dW2, tile) + db2
    minus_dP2, minus_dG2, minus_dC2, gamma_terms, C2, dP2_G2, along_dW = through_output(
        dO, G2_rows, X2_bar_X2, outer, own_rates, minus_scale, s_last, norm, tile
    )
    d_gamma += gamma_terms
    d_beta += dO

    d_held, along_state, d_state, minus_dZ1, products = through_outputs(
        held, d_state, values, memory, waiting, expanded(minus_dP2, tile), minus_dC2, along_dW, forgetting, d_held, tile
    )
    if decays is not None:
        along_state = plus_sums(along_state, b2_sums(db2, b2 - initial[1], tile), tile)
        store_decay_gradient(d_decays[0], along_state, kept, committed, mini_batch, H, tile)
        d_initial = d_held, d_b2 + by_head(shares, parameter_head(tile), tile) * db2
        db2 = by_head(kept, parameter_head(tile), tile) * db2
    dP1_G1, dP1_W1, G1_dW1, E_W2, along_dW = products
    d_scale += A1 * dP1_G1 + C2 * lr_columns * dP2_G2
    d_last_scale -= committed * own_rates * along_dW
    minus_dlr = total(minus_scale * (C1 * dP1_G1 + C2 * dP2_G2), 0)
    store_rates(d_lr, -minus_dlr - s_last * along_dW, mini_batch, H, tile)
    minus_dC1 = tl.where(causal(tile), minus_scale * lr_columns * dP1_G1, 0.0)
    store_rows(dq, dO - dot(minus_dC1, k_rows, tile) - own(dP1_W1, tile), mini_batch, tile)

    minus_dZ2, minus_de, minus_gamma_terms = through_inner_gradient(
        minus_dG2, E_W2, G2_rows, own(X2_W2, tile) + b2, k_rows, v, mini_batch, norm, tile
    )
    d_gamma -= minus_gamma_terms
    d_beta -= minus_de
    store_rows(dv, minus_de, mini_batch, tile)

    db2 -= token_sums(minus_dP2, tile) + token_sums(minus_dZ2, tile)
    d_k = -dot(tl.trans(minus_dC1), q_rows, tile, minus_de + s_last * lr * own(G1_dW1, tile))
    expanded_dZ2 = expanded(minus_dZ2, tile)
    d_state, dZ1_W1 = through_inputs(held, minus_dZ1, d_state, K, expanded_dZ2, memory, waiting, tile)
    # Subtracted, as in the forward: a sum would move the product behind the state's.
    store_rows(dk, d_k - own(dZ1_W1, tile), mini_batch, tile)
    return d_state, db2, d_initial, (d_gamma, d_beta, d_scale, d_last_scale)


@triton.jit(do_not_specialize=["L", "H", "segment"])
def mlp_backward_kernel(
    grad_o,  # [B, L, H, D]
    grad_weights,  # of W1, b1, W2, b2
    tokens,  # q, k, v and the forward's G2 [B, L, H, D], Z1 [B, L, H, hidden]
    rates,  # inner_lr [B, L, H], token_scale [K]
    decays,  # ``decays.Decays``; None: nothing is forgotten
    weights,  # the incoming W1 [N, H, D, hidden], b1 [N, H, hidden], W2 [N, H, hidden, D], b2 [N, H, D]
    checkpoints,  # [number, H, 2 D hidden + hidden + D]
    states,  # [number, H, 2 D hidden + hidden + D]
    first_states,  # each sequence's first state [N], or None
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    d_tokens,  # of q, k, v [B, L, H, D] and inner_lr [B, L, H]
    d_weights,  # of W1, b1, W2, b2
    partial_sums,  # per sequence: γ and β's gradients [N, H, D], s's and the updates' share of s_last's [N, H, K]
    d_decays,  # of ln a [B, L, H], and per sequence of the initial weights; nothing is forgotten: none
    scratch,  # for chunks: a part of a mini-batch's -dZ1 [N, H, R, hidden]
    strides,  # of weights
    grad_strides,  # of grad_weights; all others are contiguous
    L,
    H,
    segment,  # mini-batches
    eps,
    tile: tl.constexpr,
):
    """One program: P heads of one sequence, from the last mini-batch to the first.

    With the forward's values at its weights: (15) to (20) for the outer layer and then for the hidden one, (21) to (23)
    and (25) to (29).

    In the code, as in TTT-Linear's, all but dO, dq and the parameters' gradients carry the opposite sign.
    """
    _, token_scale = rates
    place = program_place(spans, L, H, tile)
    sequence, head, _, length, _ = place
    contiguous = contiguous_strides(H, tile)
    waiting = d_weights, contiguous, scratch
    gamma, beta = load_layer_norm(layer_norm, head, H, tile)
    norm = gamma, beta, eps
    scales = -load_scale(token_scale, tile), tl.load(token_scale + tile.mini_batch - 1)
    db2 = load_b2(grad_weights, grad_strides, place, tile)
    d_state = first_chunks(grad_weights, grad_strides, d_weights, contiguous, place, tile)
    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    no_rows = tl.zeros((R, F), tl.float32)
    sums = no_rows, no_rows, tl.zeros((R, R), tl.float32), tl.zeros((R,), tl.float32)

    initial, d_initial = (), ()
    if decays is not None:
        initial, d_initial = hold_initial(decays, place, tile), no_hidden_gradients(tile)

    state = first_state(first_states, sequence, L, segment, tile)
    num_mini_batches = tl.cdiv(length, tile.mini_batch)
    num_segments = tl.cdiv(num_mini_batches, segment)
    for s in tl.range(0, num_segments, num_stages=1):
        begin = (num_segments - 1 - s) * segment
        end = min(begin + segment, num_mini_batches)
        tl.debug_barrier()  # until all threads have read the states of the segment behind
        for chunk in tl.range(0, tile.chunks, num_stages=1):
            chunk_state, b2 = first_weights(weights, strides, checkpoints, place, begin, segment, chunk, tile)
            replay(chunk_state, b2, tokens, rates, decays, initial, states, state, place, begin, end, chunk, tile)
        tl.debug_barrier()
        for t in tl.range(0, end - begin):
            m = end - 1 - t
            copy = state + (m - begin)
            d_state, db2, d_initial, sums = through_mini_batch(
                m, copy, tokens, rates, decays, initial, states, grad_o, d_tokens, d_decays, waiting, d_state, db2,
                d_initial, sums, norm, scales, place, tile,
            )  # fmt: skip

    if tile.chunks == 1:
        store_state(d_weights, contiguous, d_state, place, 0, tile)
    store_b2(d_weights, contiguous, db2, place, tile)
    store_sums(partial_sums, sums, place, tile)
    if decays is not None:
        d_held, d_b2 = d_initial  # type: ignore[misc]
        if tile.chunks == 1:
            store_state(d_decays[1:], contiguous, d_held, place, 0, tile)
        store_b2(d_decays[1:], contiguous, d_b2, place, tile)
        at_ends = sums_of_means(grad_weights, grad_strides, weights, strides, decays, place, tile)
        through_means(d_decays[0], at_ends, decays, place, tile)


@launch.on_its_device
def mlp_scan_backward(scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, lr, s, the weights per sequence, γ and β, from the gradients of o and the outgoing weights.

    Z1, G2 and the checkpoints are kept. Errors as in ``linear_scan``. Sums over sequences are taken in a fixed order:
    two runs give the same bits.
    """
    limits.check("mlp_backward", scan.q, scan.token_scale.numel())
    gradients, prepared = prepare_mlp_scan_backward(scan, kept, grads)
    prepared.run()
    return launch.all_gradients(*gradients)


def prepare_mlp_scan_backward(
    scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[launch.Gradients, launch.Launch]:
    """Allocate the results and the sums per sequence, and make the launch that fills them."""
    q, weights, (Z1, G2, checkpoints), (grad_o, *grad_weights) = scan.q, scan.weights, kept, grads
    (L, H), hidden = q.shape[1:3], scan.hidden
    op = launch.kernel_of(scan, "backward")
    choice, tile = launch.plan(op, q, scan.token_scale.numel(), hidden)
    gradients = launch.new_gradients(scan)
    if tile.chunks > 1:
        for x in gradients[3][1:]:
            x.zero_()  # each mini-batch adds to them
    decays, first = prepared_decays(scan, op)
    given, given_strides = launch.strided(*grad_weights)
    weights, strides = launch.strided(*weights)
    scratch = None
    if tile.chunks > 1:
        shape = (weights[0].shape[0], H, tile.rows, hidden)
        scratch = torch.empty(shape, dtype=torch.float32, device=q.device)
    arguments = (
        grad_o.contiguous(),
        given,
        launch.contiguous(scan.q, scan.k, scan.v, G2, Z1),
        launch.contiguous(scan.inner_lr, scan.token_scale),
        decays,
        weights,
        checkpoints,
        *copies.new_states(scan),
        launch.contiguous(scan.ln_weight, scan.ln_bias),
        launch.contiguous(scan.starts, scan.lengths),
        *gradients,
        scratch,
        strides,
        given_strides,
        L,
        H,
        scan.segment,
        scan.eps,
        tile,
    )
    grid = (weights[0].shape[0] * triton.cdiv(H, choice.heads),)
    return gradients, launch.Launch(mlp_backward_kernel, grid, arguments, choice, first)
