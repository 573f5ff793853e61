# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""Jit helpers for what TTT-MLP's weights lose: ``forgetting`` for chunks of the hidden features.

The initial weights are held where the state is: in registers, or, in chunks, in the cache.

Numbers in brackets are equations of docs/mathematics.md.
"""

import triton
import triton.language as tl

from .forgetting import (
    by_head,
    forgotten,
    mean_forgotten,
    only_copy,
    plus_sums,
    stacked_heads,
    sums_of_heads,
    sums_of_weights,
)
from .hidden_layer import (
    centred_columns,
    load_b2,
    load_copied_b2,
    load_hidden_copy,
    load_state,
    put_chunk,
    take_chunk,
    wait_for_stores,
)
from .primitives import centred_weights, parameter_head, parameter_rows


@triton.jit
def take_initial(held, decays, place, chunk, tile: tl.constexpr):
    """A chunk of the initial weights, as kernels hold weights. Registers hold it, if there is one."""
    if tile.chunks > 1:
        _, _, _, copy = decays
        _, head, _, _, H = place
        held = load_hidden_copy(copy, only_copy(), head, H, chunk, tile)
    return held


@triton.jit
def hold_initial(decays, place, tile: tl.constexpr):
    """What registers hold of the initial weights: the only chunk, or nothing; and b̄2."""
    _, _, _, copy = decays
    _, head, _, _, H = place
    held = ()
    if tile.chunks == 1:
        held = load_hidden_copy(copy, only_copy(), head, H, 0, tile)
    return held, load_copied_b2(copy, only_copy(), head, H, tile)


@triton.jit
def forget_chunk(state, initial, shares, tile: tl.constexpr):
    """A chunk of W1, b1 and W2 less what is lost of it."""
    W1, b1, W2 = state
    initial_W1, initial_b1, initial_W2 = initial
    of_weights, of_parameters = by_head(shares, stacked_heads(tile), tile), by_head(shares, parameter_head(tile), tile)
    W1, b1 = forgotten(W1, initial_W1, of_weights), forgotten(b1, initial_b1, of_parameters)
    return W1, b1, forgotten(W2, initial_W2, of_weights)


@triton.jit
def forget_b2(b2, initial_b2, shares, tile: tl.constexpr):
    """B2 less what is lost of it."""
    return forgotten(b2, initial_b2, by_head(shares, parameter_head(tile), tile))


@triton.jit
def initial_strides(tile: tl.constexpr):
    """Strides of the contiguous initial weights, that all sequences share."""
    n: tl.constexpr = tile.hidden
    D: tl.constexpr = tile.head_dim
    return (0, D * n, n, 1), (0, n, 1), (0, n * D, D, 1), (0, D, 1)


@triton.jit
def initial_W2_mean(decays, place, chunk, tile: tl.constexpr):
    """What centring takes off a chunk of W̄2."""
    _, _, initial, _ = decays
    _, _, W2 = load_state(initial, initial_strides(tile), place, chunk, tile)
    return W2 - centred_columns(W2, tile)


@triton.jit
def initial_b2_mean(decays, place, tile: tl.constexpr):
    """What centring takes off b̄2."""
    _, _, initial, _ = decays
    b2 = load_b2(initial, initial_strides(tile), place, tile)
    return b2 - centred_weights(b2, tile)


@triton.jit
def W2_mean_forgotten(mean, decays, kept, place, chunk, tile: tl.constexpr):
    """Of what centring takes off a chunk of W2, what is left where A of a whole sequence is kept."""
    return mean_forgotten(mean, initial_W2_mean(decays, place, chunk, tile), kept, stacked_heads(tile), tile)


@triton.jit
def b2_mean_forgotten(mean, decays, kept, place, tile: tl.constexpr):
    """The same of b2."""
    return mean_forgotten(mean, initial_b2_mean(decays, place, tile), kept, parameter_head(tile), tile)


@triton.jit
def no_hidden_gradients(tile: tl.constexpr):
    """Zeros for gradients of the initial weights: of the only chunk, or nothing; and of b̄2."""
    PF: tl.constexpr = tile.heads * tile.features
    C: tl.constexpr = tile.chunk
    F: tl.constexpr = tile.features
    rows: tl.constexpr = parameter_rows(tile).shape[0]
    held = ()
    if tile.chunks == 1:
        held = tl.zeros((PF, C), tl.float32), tl.zeros((rows, C), tl.float32), tl.zeros((PF, C), tl.float32)  # type: ignore[assignment]
    return held, tl.zeros((rows, F), tl.float32)


@triton.jit
def chunk_to_initial(sums, state, d_state, chunk, held, forgetting, tile: tl.constexpr):
    """Gradients of a chunk of the initial weights, with a mini-batch's; sums with Σ dW ∘ (W - W̄), (41).

    Given are the weights before it, the gradients behind it, and what registers hold of W̄ and of its gradients.
    """
    initial, decays, shares, _, memory, contiguous, place = forgetting
    W1, b1, W2 = state
    dW1, db1, dW2 = d_state
    initial_W1, initial_b1, initial_W2 = take_initial(initial, decays, place, chunk, tile)
    W_terms = dW1 * (W1 - initial_W1) + dW2 * (W2 - initial_W2)
    b_terms = db1 * (b1 - initial_b1)
    sums = plus_sums(sums, sums_of_weights(W_terms, b_terms, tile), tile)
    d_W1, d_b1, d_W2 = take_chunk(held, memory, contiguous, place, chunk, tile)
    of_weights, of_parameters = by_head(shares, stacked_heads(tile), tile), by_head(shares, parameter_head(tile), tile)
    added = d_W1 + of_weights * dW1, d_b1 + of_parameters * db1, d_W2 + of_weights * dW2
    wait_for_stores(tile)  # until all threads have read
    return sums, put_chunk(added, memory, contiguous, place, chunk, tile)


@triton.jit
def chunk_kept(d_state, forgetting, tile: tl.constexpr):
    """A times a chunk of the gradients."""
    dW1, db1, dW2 = d_state
    _, _, _, kept, _, _, _ = forgetting
    of_weights, of_parameters = by_head(kept, stacked_heads(tile), tile), by_head(kept, parameter_head(tile), tile)
    return of_weights * dW1, of_parameters * db1, of_weights * dW2


@triton.jit
def b2_sums(db2, distance, tile: tl.constexpr):
    """Σ db2 ∘ (b2 - b̄2) of every head: a tuple of P numbers."""
    terms = db2 * distance  # of which every row of a head has the same
    rows: tl.constexpr = terms.shape[0] // tile.heads
    return sums_of_heads(terms * (1.0 / rows), parameter_head(tile), tile)


@triton.jit
def sums_of_means(d_weights, grad_strides, weights, strides, decays, place, tile: tl.constexpr):
    """Σ dW ∘ (W - W̄) of the means that centring took off W2 and b2, at a sequence's two ends; P numbers."""
    db2, b2 = load_b2(d_weights, grad_strides, place, tile), load_b2(weights, strides, place, tile)
    b2_mean = (b2 - centred_weights(b2, tile)) - initial_b2_mean(decays, place, tile)
    sums = b2_sums(db2, b2_mean, tile)
    for chunk in tl.range(0, tile.chunks, num_stages=1):
        _, _, dW2 = load_state(d_weights, grad_strides, place, chunk, tile)
        _, _, W2 = load_state(weights, strides, place, chunk, tile)
        terms = dW2 * ((W2 - centred_columns(W2, tile)) - initial_W2_mean(decays, place, chunk, tile))
        sums = plus_sums(sums, sums_of_heads(terms, stacked_heads(tile), tile), tile)
    return sums
