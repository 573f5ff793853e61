# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-MLP's replay: the updates of a segment once more, from what the forward kept.

An update is made of the kept Z1 and G2: G1 follows from them and W2. So a chunk of the hidden features needs nothing of
another one, and is replayed by itself.
"""

import triton
import triton.language as tl

from .copies import checkpoint_number, load_steps
from .hidden_layer import (
    gelu,
    load_b2,
    load_centred_state,
    load_copied_b2,
    load_hidden,
    load_hidden_copy,
    store_hidden_copy,
    updated_state,
)
from .primitives import centred, dot, expanded, mini_batch_place, token_sums


@triton.jit
def first_weights(weights, strides, checkpoints, place, begin, segment, chunk, tile: tl.constexpr):
    """A chunk of W1, b1, W2, and b2, before the segment that begins at mini-batch begin of a sequence."""
    _, first, _, head, H = place
    if begin == 0:
        W1, b1, W2 = load_centred_state(weights, strides, place, chunk, tile)
        b2 = centred(load_b2(weights, strides, place, tile), tile)
    else:
        number = checkpoint_number(first + begin * tile.mini_batch, segment, tile)
        W1, b1, W2 = load_hidden_copy(checkpoints, number, head, H, chunk, tile)
        b2 = load_copied_b2(checkpoints, number, head, H, tile)
    return (W1, b1, W2), b2


@triton.jit
def replay(state, b2, tokens, rates, states, number, place, begin, end, chunk, tile: tl.constexpr):
    """Copy a chunk before each of mini-batches begin to end - 1, and b2, to the states from that number on.

    Given are those before the first. Updates are made as the forward made them; only complete mini-batches have one.
    """
    _, k, _, G2_kept, Z1_kept = tokens
    inner_lr, token_scale = rates
    _, _, _, head, H = place
    W1, b1, W2 = state
    last_scale = tl.load(token_scale + tile.mini_batch - 1)
    store_hidden_copy(states, number, (W1, b1, W2), b2, head, H, chunk, tile)
    for m in tl.range(begin, end - 1):
        mini_batch = mini_batch_place(m * tile.mini_batch, place, tile)
        k_rows, G2_rows, own_rates = load_steps(k, G2_kept, inner_lr, mini_batch, H, tile)
        Z1 = load_hidden(Z1_kept, mini_batch, chunk, H, tile)
        X2, slope, _curve = gelu(Z1)
        G1 = dot(expanded(G2_rows, tile), W2, tile) * slope
        lr = own_rates[:, None]
        U2 = lr * G2_rows.to(tl.float32)
        b2 -= last_scale * token_sums(U2, tile)
        K, U2 = expanded(k_rows, tile), expanded(U2, tile)
        W1, b1, W2 = updated_state((W1, b1, W2), K, lr, G1, U2, X2, last_scale, tile)
        store_hidden_copy(states, number + (m + 1 - begin), (W1, b1, W2), b2, head, H, chunk, tile)
