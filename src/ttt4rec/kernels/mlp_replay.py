# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-MLP's forward once more, from what it kept: the updates of a segment, and a mini-batch's values.

An update is made of the kept Z1 and G2: G1 follows from them and W2. So a chunk of the hidden features needs nothing of
another one, and is replayed by itself.
"""

import triton
import triton.language as tl

from .copies import checkpoint_number, load_steps
from .forgetting import load_of_heads
from .hidden_forgetting import forget_b2, forget_chunk, take_initial
from .hidden_layer import (
    gelu,
    load_b2,
    load_copied_b2,
    load_hidden,
    load_hidden_copy,
    load_state,
    store_hidden_copy,
    take_chunk,
    updated_state,
)
from .primitives import (
    causal,
    centred_weights,
    dot,
    expanded,
    mini_batch_place,
    product,
    subtracted,
    tile_offsets,
    token_sums,
)


@triton.jit
def first_weights(weights, strides, checkpoints, place, begin, segment, chunk, tile: tl.constexpr):
    """A chunk of W1, b1, W2, and b2, before the segment that begins at mini-batch begin of a sequence."""
    _, head, first, _, H = place
    if begin == 0:
        W1, b1, W2 = load_state(weights, strides, place, chunk, tile, centre=True)
        b2 = centred_weights(load_b2(weights, strides, place, tile), tile)
    else:
        number = checkpoint_number(first + begin * tile.mini_batch, segment, tile)
        W1, b1, W2 = load_hidden_copy(checkpoints, number, head, H, chunk, tile)
        b2 = load_copied_b2(checkpoints, number, head, H, tile)
    return (W1, b1, W2), b2


@triton.jit
def replayed(state, b2, initial, shares, tokens, rates, last_scale, place, m, chunk, tile: tl.constexpr):
    """A chunk and b2 after the complete mini-batch m, from those before it, made as the forward made them.

    Where it forgets, a chunk of the initial weights and b̄2 are given, and 1 - A.
    """
    _, k, _, G2_kept, Z1_kept = tokens
    inner_lr, _ = rates
    _, _, _, _, H = place
    _, _, W2 = state
    mini_batch = mini_batch_place(m * tile.mini_batch, place, tile_offsets(H, tile), tile)
    k_rows, G2_rows, own_rates = load_steps(k, G2_kept, inner_lr, mini_batch, H, tile)
    Z1 = load_hidden(Z1_kept, mini_batch, chunk, H, tile)
    X2, slope, _curve = gelu(Z1)
    G1 = product(dot(expanded(G2_rows, tile), W2, tile), slope)
    lr = own_rates[:, None]
    U2 = product(lr, G2_rows)
    if len(initial) > 0:
        initial_chunk, initial_b2 = initial
        b2 = forget_b2(b2, initial_b2, shares, tile)
        state = forget_chunk(state, initial_chunk, shares, tile)
    b2 = subtracted(b2, last_scale, token_sums(U2, tile))
    K, U2 = expanded(k_rows, tile), expanded(U2, tile)
    return updated_state(state, K, lr, G1, U2, X2, last_scale, tile), b2


@triton.jit
def replay(state, b2, tokens, rates, decays, initial, states, number, place, begin, end, chunk, tile: tl.constexpr):
    """Copy a chunk before each of mini-batches begin to end - 1, and b2, to the states from that number on.

    Given are those before the first, and the initial weights. Updates are made as the forward made them; only complete
    mini-batches have one.
    """
    _, token_scale = rates
    _, head, _, _, H = place
    last_scale = tl.load(token_scale + tile.mini_batch - 1)
    store_hidden_copy(states, number, state, b2, head, H, chunk, tile)
    of_chunk, shares = (), ()
    if decays is not None:  # shares are always one mini-batch ahead, so that no update waits for them
        held, initial_b2 = initial
        of_chunk = take_initial(held, decays, place, chunk, tile), initial_b2  # type: ignore[assignment]
        shares = load_of_heads(decays[0], begin * tile.mini_batch, place, tile)
    for m in tl.range(begin, end - 1):
        state, b2 = replayed(state, b2, of_chunk, shares, tokens, rates, last_scale, place, m, chunk, tile)
        if decays is not None:
            shares = load_of_heads(decays[0], (m + 1) * tile.mini_batch, place, tile)
        store_hidden_copy(states, number + (m + 1 - begin), state, b2, head, H, chunk, tile)


@triton.jit
def take_before(held, memory, chunk, tile: tl.constexpr):
    """Of a chunk: Z1, and the weights before the mini-batch. Registers hold them, if there is one chunk."""
    if tile.chunks > 1:
        Z1, states, number, mini_batch, place = memory
        _, head, _, _, H = place
        held = load_hidden(Z1, mini_batch, chunk, H, tile), load_hidden_copy(states, number, head, H, chunk, tile)
    return held


@triton.jit
def hold_before(memory, tile: tl.constexpr):
    """What registers hold of them for the mini-batch: the only chunk, or nothing."""
    held = ()
    if tile.chunks == 1:
        Z1, states, number, mini_batch, place = memory
        _, head, _, _, H = place
        state = load_hidden_copy(states, number, head, H, 0, tile)
        held = load_hidden(Z1, mini_batch, 0, H, tile), state  # type: ignore[assignment]
    return held


@triton.jit
def mini_batch_values(q_rows, k_rows, G2_rows, own_rates, minus_scale, s_last, tile: tl.constexpr):
    """C1, and what every pass over the hidden features needs: K, Q, G2, U2, A1, lr, -s and s_last."""
    lr, lr_columns = own_rates[:, None], own_rates[None, :]
    K, Q, G2 = expanded(k_rows, tile), expanded(q_rows, tile), expanded(G2_rows, tile)
    U2 = lr * G2_rows.to(tl.float32)
    C1 = tl.where(causal(tile), dot(q_rows, tl.trans(k_rows), tile) + 1.0, 0.0)
    A1 = C1 * lr_columns
    return C1, (K, Q, G2, expanded(U2, tile), A1, lr, minus_scale, s_last)


@triton.jit
def forward_values(Z1, state, values, tile: tl.constexpr):
    """Of a chunk, at the weights before the mini-batch: G2 W2ᵀ; G1; X̄2 and gelu' at P1."""
    W1, b1, W2 = state
    _, Q, G2, _, A1, _, minus_scale, _ = values
    G2_W2 = dot(G2, W2, tile)
    _, slope, _ = gelu(Z1)
    G1 = G2_W2 * slope
    X2_bar, bar_slope, _ = gelu(dot(Q, W1, tile, b1) + minus_scale * dot(A1, G1, tile))
    return G2_W2, G1, X2_bar, bar_slope


@triton.jit
def forward_sums(held, d_state, values, memory, waiting, tile: tl.constexpr):
    """The forward once more, chunk by chunk: X̄2 X2ᵀ, X2 W2, X̄2 W2 and X2 dW2.

    The last product decides how all tiles of a loop are spread over the warps: it must not be a square of tokens.
    """
    d_weights, contiguous, _scratch = waiting
    _, _, _, _, place = memory
    R: tl.constexpr = tile.rows
    PF: tl.constexpr = tile.heads * tile.features
    X2_bar_X2, X2_W2 = tl.zeros((R, R), tl.float32), tl.zeros((R, PF), tl.float32)
    X2_bar_W2, X2_dW2 = X2_W2, X2_W2
    for chunk in tl.range(0, tile.chunks, num_stages=1):
        Z1, state = take_before(held, memory, chunk, tile)
        _W1, _b1, W2 = state
        _dW1, _db1, dW2 = take_chunk(d_state, d_weights, contiguous, place, chunk, tile)
        X2, _slope, _curve = gelu(Z1)
        _G2_W2, _G1, X2_bar, _bar_slope = forward_values(Z1, state, values, tile)
        X2_bar_X2 = dot(X2_bar, tl.trans(X2), tile, X2_bar_X2)
        X2_W2 = dot(X2, tl.trans(W2), tile, X2_W2)
        X2_bar_W2 = dot(X2_bar, tl.trans(W2), tile, X2_bar_W2)
        X2_dW2 = dot(X2, tl.trans(dW2), tile, X2_dW2)
    return X2_bar_X2, X2_W2, X2_bar_W2, X2_dW2
