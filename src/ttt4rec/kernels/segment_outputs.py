# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""The second kernel of TTT-MLP's backward by segments: all that needs no gradient of the weights, of all mini-batches.

Given the weights before a mini-batch, its values and what reaches it through its outputs need nothing of another
mini-batch. So each has a program of its own.

Numbers in brackets are equations of docs/mathematics.md.
"""

import triton
import triton.language as tl

from .copies import first_state, load_steps
from .hidden_layer import gelu, load_hidden
from .mlp_backward import through_output
from .mlp_replay import forward_values, mini_batch_values
from .primitives import (
    causal,
    dot,
    load_layer_norm,
    load_rows,
    load_scale,
    mini_batch_place,
    program_place,
    rounded,
    store_head_sums,
    store_rates,
    store_rows,
    store_token_sums,
    tile_offsets,
    total,
)
from .segment_places import (
    hidden_places,
    load_b2_of_slot,
    load_W1_of_slot,
    load_W2_of_slot,
    pair_places,
    row_places,
    segment_bounds,
    sum_places,
)


@triton.jit
def load_chunk(slots, slot, Z1_kept, mini_batch, head, H, chunk, tile: tl.constexpr):
    """A chunk of a mini-batch: Z1, and the weights before it."""
    Z1 = load_hidden(Z1_kept, mini_batch, chunk, H, tile)
    W1, b1 = load_W1_of_slot(slots, slot, head, H, chunk, tile)
    return Z1, (W1, b1, load_W2_of_slot(slots, slot, head, H, chunk, tile))


@triton.jit
def output_sums(held, values, memory, tile: tl.constexpr):
    """The forward once more, chunk by chunk: X̄2 X2ᵀ, X2 W2 and X̄2 W2. Its last product is no square of tokens."""
    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    X2_bar_X2, X2_W2 = tl.zeros((R, R), tl.float32), tl.zeros((R, F), tl.float32)
    X2_bar_W2 = X2_W2
    for chunk in tl.range(0, tile.chunks):
        Z1, state = take(held, memory, chunk, tile)
        _, _, W2 = state
        X2, _slope, _curve = gelu(Z1)
        _G2_W2, _G1, X2_bar, _bar_slope = forward_values(Z1, state, values, tile)
        X2_bar_X2 = dot(X2_bar, tl.trans(X2), tile, X2_bar_X2)
        X2_W2 = dot(X2, tl.trans(W2), tile, X2_W2)
        X2_bar_W2 = dot(X2_bar, tl.trans(W2), tile, X2_bar_W2)
    return X2_bar_X2, X2_W2, X2_bar_W2


@triton.jit
def take(held, memory, chunk, tile: tl.constexpr):
    """What ``load_chunk`` loads; registers hold it, if there is one chunk."""
    if tile.chunks > 1:
        slots, slot, Z1_kept, mini_batch, head, H = memory
        held = load_chunk(slots, slot, Z1_kept, mini_batch, head, H, chunk, tile)
    return held


@triton.jit
def hold(memory, tile: tl.constexpr):
    """What ``take`` is given: the only chunk, or nothing."""
    held = ()
    if tile.chunks == 1:
        slots, slot, Z1_kept, mini_batch, head, H = memory
        held = load_chunk(slots, slot, Z1_kept, mini_batch, head, H, 0, tile)
    return held


@triton.jit
def through_hidden_outputs(held, values, memory, minus_dP2, minus_dC2, tile: tl.constexpr):
    """Through the hidden layer's outputs, chunk by chunk, (25): the sums -dP1 G1ᵀ and -dP1 W1ᵀ. Keeps -dP1 and X̄2."""
    slots, slot, _, _, head, H = memory
    _, _, hidden, _, _, _ = slots
    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    dP1_G1, dP1_W1 = tl.zeros((R, R), tl.float32), tl.zeros((R, F), tl.float32)
    for chunk in tl.range(0, tile.chunks):
        Z1, state = take(held, memory, chunk, tile)
        W1, _b1, W2 = state
        X2, _slope, _curve = gelu(Z1)
        _G2_W2, G1, X2_bar, bar_slope = forward_values(Z1, state, values, tile)
        minus_dP1 = dot(minus_dC2, X2, tile, dot(minus_dP2, W2, tile)) * bar_slope
        tl.store(hidden + hidden_places(slot, head, H, 0, chunk, tile), rounded(minus_dP1, tile))
        tl.store(hidden + hidden_places(slot, head, H, 1, chunk, tile), rounded(X2_bar, tile))
        dP1_G1 = dot(minus_dP1, tl.trans(G1), tile, dP1_G1)
        dP1_W1 = dot(minus_dP1, tl.trans(W1), tile, dP1_W1)
    return dP1_G1, dP1_W1


@triton.jit
def one_mini_batch(numbers, m, grad_o, tokens, rates, norm, slots, d_tokens, slot_sums, place, tile: tl.constexpr):
    """(15) to (18) and (25) of a mini-batch, and of (29) what stands in pairs.

    In the code all but dO, dq and the parameters' gradients carry the opposite sign.
    """
    slot, own_sums = numbers  # of the slot, and of its sums
    q, k, _, G2_kept, Z1_kept = tokens
    inner_lr, token_scale = rates
    _, _, _, rows, pairs, sums = slots
    dq, d_lr = d_tokens
    gamma_sums, beta_sums, scale_sums = slot_sums
    _, head, first, length, H = place
    minus_scale = -load_scale(token_scale, tile)
    mini_batch = mini_batch_place(m * tile.mini_batch, place, tile_offsets(H, tile), tile)
    q_rows = load_rows(q, mini_batch, tile)
    k_rows, G2_rows, own_rates = load_steps(k, G2_kept, inner_lr, mini_batch, H, tile)
    dO = load_rows(grad_o, mini_batch, tile).to(tl.float32)
    lr_columns = own_rates[None, :]
    C1, values = mini_batch_values(q_rows, k_rows, G2_rows, own_rates, minus_scale, 0.0, tile)
    _, _, _, _, A1, _, _, _ = values
    memory = slots, slot, Z1_kept, mini_batch, head, H
    held = hold(memory, tile)
    X2_bar_X2, X2_W2, X2_bar_W2 = output_sums(held, values, memory, tile)

    b2 = load_b2_of_slot(slots, slot, head, H, tile)
    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    outer = X2_bar_W2 + b2, tl.zeros((R, F), tl.float32)
    minus_dP2, minus_dG2, minus_dC2, gamma_terms, C2, dP2_G2, _along_dW = through_output(
        dO, G2_rows, X2_bar_X2, outer, own_rates, minus_scale, 0.0, norm, tile
    )
    tl.store(rows + row_places(slot, head, H, tile), rounded(minus_dP2, tile))
    tl.store(pairs + pair_places(slot, head, H, 1, tile), rounded(minus_dC2, tile))
    tl.store(sums + sum_places(slot, head, H, 0, tile), minus_dG2)
    tl.store(sums + sum_places(slot, head, H, 1, tile), X2_W2 + b2)

    dP1_G1, dP1_W1 = through_hidden_outputs(held, values, memory, minus_dP2, minus_dC2, tile)
    minus_dC1 = tl.where(causal(tile), minus_scale * lr_columns * dP1_G1, 0.0)
    tl.store(pairs + pair_places(slot, head, H, 0, tile), rounded(minus_dC1, tile))
    store_rates(d_lr, -total(minus_scale * (C1 * dP1_G1 + C2 * dP2_G2), 0), mini_batch, H, tile)
    store_rows(dq, dO - dot(minus_dC1, k_rows, tile) - dP1_W1, mini_batch, tile)

    sums_place = own_sums, head, first, length, H
    store_head_sums(gamma_sums, gamma_terms, sums_place, tile)
    store_head_sums(beta_sums, dO, sums_place, tile)
    store_token_sums(scale_sums, tl.sum(A1 * dP1_G1 + C2 * lr_columns * dP2_G2, 1), sums_place, tile)


@triton.jit(do_not_specialize=["L", "H", "segment", "back", "numbers"])
def segment_outputs_kernel(
    grad_o,  # [B, L, H, D]
    tokens,  # q, k, v and the forward's G2 [B, L, H, D], Z1 [B, L, H, hidden]
    rates,  # inner_lr [B, L, H], token_scale [K]
    first_states,  # each sequence's first slot [N], or None
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    slots,  # see ``Slots``
    d_tokens,  # of q [B, L, H, D], and of inner_lr [B, L, H] the part that needs no gradient of the weights
    slot_sums,  # of every slot and segment behind: of γ and β's gradients [S n, H, D] and of s's [S n, H, K]
    L,
    H,
    segment,  # mini-batches
    back,  # segments behind this one
    numbers,  # of slots, n
    eps,
    tile: tl.constexpr,
):
    """One program: a head of one mini-batch."""
    place = program_place(spans, L, H, tile)
    sequence, head, _, length, _ = place
    begin, end = segment_bounds(length, back, segment, tile)
    m = begin + tl.program_id(1)
    if m < end:
        slot = first_state(first_states, sequence, L, segment, tile) + (m - begin)
        gamma, beta = load_layer_norm(layer_norm, head, H, tile)
        norm = gamma, beta, eps
        own_sums = back.to(tl.int64) * numbers + slot
        one_mini_batch((slot, own_sums), m, grad_o, tokens, rates, norm, slots, d_tokens, slot_sums, place, tile)
