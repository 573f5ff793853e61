# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""The third kernel of TTT-MLP's backward by segments: the walk back, with what needs the gradient of the weights.

A mini-batch begins with what reaches its steps from the weights behind it. It ends when all chunks' share of its inner
gradient has been summed. A chunk's gradient of the weights comes from the cache once for both: a pass over the chunks
ends one mini-batch and begins the one before it.

Numbers in brackets are equations of docs/mathematics.md.
"""

import triton
import triton.language as tl

from .copies import first_state, load_steps
from .hidden_layer import (
    contiguous_strides,
    gelu,
    load_b2,
    load_hidden,
    load_state,
    put_chunk,
    store_b2,
    store_state,
    take_chunk,
    wait_for_stores,
)
from .mlp_backward import store_part, take_part, through_chunk_inputs, through_inner_gradient
from .mlp_replay import mini_batch_values
from .primitives import (
    dot,
    load_layer_norm,
    load_rates,
    load_rows,
    load_scale,
    mini_batch_place,
    program_place,
    store_head_sums,
    store_rates,
    store_rows,
    store_token_sums,
    tile_offsets,
    token_sums,
)
from .segment_places import (
    hidden_places,
    load_W1_of_slot,
    load_W2_of_slot,
    pair_places,
    row_places,
    segment_bounds,
    sum_places,
)


@triton.jit
def load_ending(ending, Z1_kept, slots, chunk, place, tile: tl.constexpr):
    """A chunk of the mini-batch that ends: Z1, W1 and W2."""
    mini_batch, slot, _, _ = ending
    _, head, _, _, H = place
    W1, _b1 = load_W1_of_slot(slots, slot, head, H, chunk, tile)
    W2 = load_W2_of_slot(slots, slot, head, H, chunk, tile)
    return load_hidden(Z1_kept, mini_batch, chunk, H, tile), W1, W2


@triton.jit
def load_beginning(beginning, Z1_kept, slots, chunk, place, tile: tl.constexpr):
    """A chunk of the mini-batch that begins: Z1, W2, -dP1 and X̄2."""
    mini_batch, slot, _, _ = beginning
    _, head, _, _, H = place
    _, _, hidden, _, _, _ = slots
    W2 = load_W2_of_slot(slots, slot, head, H, chunk, tile)
    minus_dP1 = tl.load(hidden + hidden_places(slot, head, H, 0, chunk, tile))
    X2_bar = tl.load(hidden + hidden_places(slot, head, H, 1, chunk, tile))
    return load_hidden(Z1_kept, mini_batch, chunk, H, tile), W2, minus_dP1, X2_bar


@triton.jit
def begun(taken, values, beginning, loaded, along, sums, tile: tl.constexpr):
    """Through a chunk's steps and G1 of the mini-batch that begins: (17), (18), (20) and (26).

    Returns dW1, db1 and dW2 without what passes through Z1. Then that part of -dZ1 which does not pass through Z2.
    Then the sums Σ G1 ∘ (K dW1 + db1), X2 dW2, -E W2 and G1 dW1ᵀ with the chunk's.
    """
    _, _, minus_dP2, minus_dC2 = beginning
    Z1, W2, minus_dP1, X2_bar = loaded
    K, Q, G2, U2, A1, lr, minus_scale, s_last = values
    X2_dW2, E_W2, G1_dW1 = sums
    dW1, db1, dW2 = taken
    X2, slope, curve = gelu(Z1)
    G2_W2 = dot(G2, W2, tile)
    G1 = G2_W2 * slope
    X2_dW2 = dot(X2, tl.trans(dW2), tile, X2_dW2)
    K_dW1 = dot(K, dW1, tile, db1)
    along += tl.sum(G1 * K_dW1, 1)
    minus_dG1 = dot(tl.trans(minus_scale * A1), minus_dP1, tile, s_last * lr * K_dW1)
    minus_E = minus_dG1 * slope
    E_W2 = dot(minus_E, tl.trans(W2), tile, E_W2)
    G1_dW1 = dot(G1, tl.trans(dW1), tile, G1_dW1)
    minus_dX2 = dot(tl.trans(minus_dC2), X2_bar, tile, s_last * dot(U2, dW2, tile))
    part = minus_dX2 * slope + minus_dG1 * G2_W2 * curve
    db1 -= token_sums(minus_dP1, tile)
    dW1 -= dot(tl.trans(Q), minus_dP1, tile)
    dW2 -= dot(tl.trans(minus_dP2), X2_bar, tile, dot(tl.trans(G2), minus_E, tile))
    return (dW1, db1, dW2), part, along, (X2_dW2, E_W2, G1_dW1)


@triton.jit
def walk_chunks(d_state, part, ending, ending_is, beginning, values, memory, place, tile: tl.constexpr):
    """A pass over the chunks that ends one mini-batch, if there is one, and begins another."""
    Z1_kept, slots, d_weights, contiguous, scratch = memory
    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    dZ1_W1 = tl.zeros((R, F), tl.float32)
    sums = dZ1_W1, dZ1_W1, dZ1_W1
    along = tl.zeros((R,), tl.float32)
    for chunk in tl.range(0, tile.chunks):
        # All loads come first: the compiler moves none over a barrier, and they wait together.
        before = load_ending(ending, Z1_kept, slots, chunk, place, tile)
        loaded = load_beginning(beginning, Z1_kept, slots, chunk, place, tile)
        taken = take_chunk(d_state, d_weights, contiguous, place, chunk, tile)
        part = take_part(part, scratch, place, chunk, tile)
        if tile.chunks > 1:
            part = tl.where(ending_is, part, 0.0)
        _, _, K, minus_dZ2 = ending
        taken, dZ1_W1 = through_chunk_inputs(taken, part, before, K, minus_dZ2, dZ1_W1, tile)
        taken, part, along, sums = begun(taken, values, beginning, loaded, along, sums, tile)
        d_state = put_chunk(taken, d_weights, contiguous, place, chunk, tile)
        store_part(scratch, part, place, chunk, tile)
    wait_for_stores(tile)
    return d_state, part, dZ1_W1, along, sums


@triton.jit
def end_chunks(d_state, part, ending, memory, place, tile: tl.constexpr):
    """A pass over the chunks that ends a segment's first mini-batch."""
    Z1_kept, slots, d_weights, contiguous, scratch = memory
    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    dZ1_W1 = tl.zeros((R, F), tl.float32)
    for chunk in tl.range(0, tile.chunks):
        taken = take_chunk(d_state, d_weights, contiguous, place, chunk, tile)
        part = take_part(part, scratch, place, chunk, tile)
        before = load_ending(ending, Z1_kept, slots, chunk, place, tile)
        _, _, K, minus_dZ2 = ending
        taken, dZ1_W1 = through_chunk_inputs(taken, part, before, K, minus_dZ2, dZ1_W1, tile)
        d_state = put_chunk(taken, d_weights, contiguous, place, chunk, tile)
    return d_state, dZ1_W1


@triton.jit(do_not_specialize=["L", "H", "segment", "back", "numbers"])
def segment_walk_kernel(
    tokens,  # q, k, v and the forward's G2 [B, L, H, D], Z1 [B, L, H, hidden]
    rates,  # inner_lr [B, L, H], token_scale [K]
    first_states,  # each sequence's first slot [N], or None
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    slots,  # see ``Slots``
    lr_part,  # the part of d_lr that needs no gradient of the weights [B, L, H]
    d_tokens,  # of k, v [B, L, H, D], and of inner_lr [B, L, H]
    d_weights,  # of W1, b1, W2, b2, behind the segment and then before it
    partial_sums,  # of every sequence and segment: γ and β's gradients [S N, H, D], the updates' of s_last [S N, H, K]
    scratch,  # for chunks: a part of a mini-batch's -dZ1 [N, H, R, hidden]
    L,
    H,
    segment,  # mini-batches
    back,  # segments behind this one
    numbers,  # of sequences, N
    eps,
    tile: tl.constexpr,
):
    """One program: a head of one sequence, from the last mini-batch of one segment to the first.

    (17), (18), (20) to (23) and (26) to (29). In the code all but the parameters' gradients carry the opposite sign.
    """
    q, k, v, G2_kept, Z1_kept = tokens
    inner_lr, token_scale = rates
    dk, dv, d_lr = d_tokens
    gamma_sums, beta_sums, last_scale_sums = partial_sums
    _, _, _, rows, pairs, kept_sums = slots
    place = program_place(spans, L, H, tile)
    sequence, head, _, length, _ = place
    begin, end = segment_bounds(length, back, segment, tile)
    contiguous = contiguous_strides(H, tile)
    memory = Z1_kept, slots, d_weights, contiguous, scratch
    R: tl.constexpr = tile.rows
    C: tl.constexpr = tile.chunk
    F: tl.constexpr = tile.features
    if begin < end:
        gamma, beta = load_layer_norm(layer_norm, head, H, tile)
        norm = gamma, beta, eps
        minus_scale, last_scale = -load_scale(token_scale, tile), tl.load(token_scale + tile.mini_batch - 1)
        first = first_state(first_states, sequence, L, segment, tile)
        offsets = tile_offsets(H, tile)
        db2 = load_b2(d_weights, contiguous, place, tile)
        d_state = ()
        if tile.chunks == 1:
            d_state = load_state(d_weights, contiguous, place, 0, tile)
        part, minus_dZ2 = tl.zeros((R, C), tl.float32), tl.zeros((R, F), tl.float32)
        d_k, d_gamma, d_beta, d_last_scale = minus_dZ2, minus_dZ2, minus_dZ2, tl.zeros((R,), tl.float32)
        for t in tl.range(0, end - begin):
            m = end - 1 - t
            before = tl.minimum(m + 1, end - 1)  # what ends; at first nothing: what reaches it is zero
            ending_batch = mini_batch_place(before * tile.mini_batch, place, offsets, tile)
            ending = ending_batch, first + (before - begin), load_rows(k, ending_batch, tile), minus_dZ2

            slot = first + (m - begin)
            start = m * tile.mini_batch
            mini_batch = mini_batch_place(start, place, offsets, tile)
            q_rows = load_rows(q, mini_batch, tile)
            k_rows, G2_rows, own_rates = load_steps(k, G2_kept, inner_lr, mini_batch, H, tile)
            minus_dP2 = tl.load(rows + row_places(slot, head, H, tile))
            minus_dC1 = tl.load(pairs + pair_places(slot, head, H, 0, tile))
            minus_dC2 = tl.load(pairs + pair_places(slot, head, H, 1, tile))
            lr = own_rates[:, None]
            committed = tl.where(start + tile.mini_batch <= length, 1.0, 0.0)
            s_last = committed * last_scale
            _C1, values = mini_batch_values(q_rows, k_rows, G2_rows, own_rates, minus_scale, s_last, tile)
            beginning = mini_batch, slot, minus_dP2, minus_dC2
            d_state, part, dZ1_W1, along, sums = walk_chunks(
                d_state, part, ending, t > 0, beginning, values, memory, place, tile
            )
            # Subtracted, as in the forward: a sum would move the product behind the state's.
            ending_rows, ending_mask, at, elements = ending_batch
            store_rows(dk, d_k - dZ1_W1, (ending_rows, ending_mask & (t > 0), at, elements), tile)

            X2_dW2, E_W2, G1_dW1 = sums
            X2_dW2 += db2
            along += tl.sum(G2_rows.to(tl.float32) * X2_dW2, 1)
            d_last_scale -= committed * own_rates * along
            store_rates(d_lr, load_rates(lr_part, mini_batch, H, tile) - s_last * along, mini_batch, H, tile)
            minus_dG2 = tl.load(kept_sums + sum_places(slot, head, H, 0, tile)) + s_last * lr * X2_dW2
            Z2 = tl.load(kept_sums + sum_places(slot, head, H, 1, tile))
            minus_dZ2, minus_de, minus_gamma_terms = through_inner_gradient(
                minus_dG2, E_W2, G2_rows, Z2, k_rows, v, mini_batch, norm, tile
            )
            d_gamma -= minus_gamma_terms
            d_beta -= minus_de
            store_rows(dv, minus_de, mini_batch, tile)
            db2 -= token_sums(minus_dP2, tile) + token_sums(minus_dZ2, tile)
            d_k = -dot(tl.trans(minus_dC1), q_rows, tile, minus_de + s_last * lr * G1_dW1)

        mini_batch = mini_batch_place(begin * tile.mini_batch, place, offsets, tile)
        ending = mini_batch, first, load_rows(k, mini_batch, tile), minus_dZ2
        d_state, dZ1_W1 = end_chunks(d_state, part, ending, memory, place, tile)
        store_rows(dk, d_k - dZ1_W1, mini_batch, tile)
        if tile.chunks == 1:
            store_state(d_weights, contiguous, d_state, place, 0, tile)
        store_b2(d_weights, contiguous, db2, place, tile)
        sums_place = back.to(tl.int64) * numbers + sequence, head, 0, length, H
        store_head_sums(gamma_sums, d_gamma, sums_place, tile)
        store_head_sums(beta_sums, d_beta, sums_place, tile)
        store_token_sums(last_scale_sums, d_last_scale, sums_place, tile)
