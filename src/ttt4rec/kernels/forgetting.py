# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""What weights lose at the end of a mini-batch, towards the learned initial ones, and the gradients of that.

A small kernel comes before a scan (see ``decays``). It makes 1 - A and A of every mini-batch, and a copy of the initial
weights, since kernels hold weights whose means over the outputs are taken off. These means decay too, and no layer norm
sees them: they are reckoned with at the end of a sequence.

Numbers in brackets are equations of docs/mathematics.md.
"""

import triton
import triton.language as tl

from .copies import load_copy
from .primitives import (
    centred_weights,
    load_rates,
    load_weights,
    mini_batch_place,
    parameter_head,
    parameter_rows,
    product,
    row_head,
    store_rates,
    subtracted,
    tile_offsets,
)


@triton.jit
def share_lost(log_kept):
    """1 - A, (40), of ln A: a series where 1 - exp would cancel."""
    series = tl.fma(log_kept, 1 / 3628800, 1 / 362880)
    series = tl.fma(log_kept, series, 1 / 40320)
    series = tl.fma(log_kept, series, 1 / 5040)
    series = tl.fma(log_kept, series, 1 / 720)
    series = tl.fma(log_kept, series, 1 / 120)
    series = tl.fma(log_kept, series, 1 / 24)
    series = tl.fma(log_kept, series, 1 / 6)
    series = tl.fma(log_kept, series, 0.5)
    series = tl.fma(log_kept, series, 1.0)
    return tl.where(log_kept > -1.0, product(-log_kept, series), 1.0 - tl.exp(log_kept))


@triton.jit
def forgotten(W, initial, share):
    """W, or another tile of weights, less what is lost of it, with the same bits in every kernel."""
    return subtracted(W, share, W - initial)


@triton.jit
def stacked_heads(tile: tl.constexpr):
    """The head of every row of stacked weights, [P·F]."""
    return tl.arange(0, tile.heads * tile.features) // tile.features


@triton.jit
def load_of_heads(x, start, place, tile: tl.constexpr):
    """What a mini-batch's first token has in a contiguous ``[B, L, H]``: a tuple of P numbers.

    Of a head that is none it is the last one's, which needs no mask and is multiplied with zeros.
    """
    _, head, first, _, H = place
    x += (first + start) * H
    values = (tl.load(x + head),)
    P: tl.constexpr = tile.heads
    for p in tl.static_range(1, P):
        values = values + (tl.load(x + tl.minimum(head + p, H - 1)),)  # type: ignore[assignment]  # noqa: RUF005
    return values


@triton.jit
def by_head(values, heads, tile: tl.constexpr):
    """Each row's of P numbers, [n, 1], given its head; the number itself, if there is one."""
    x = values[0]
    if tile.heads > 1:
        x = tl.where(heads == 0, x, 0.0)
        P: tl.constexpr = tile.heads
        for p in tl.static_range(1, P):
            x = tl.where(heads == p, values[p], x)
        x = x[:, None]
    return x


@triton.jit
def all_kept(tile: tl.constexpr):
    """A of no mini-batch at all, P numbers."""
    kept = (1.0,)
    P: tl.constexpr = tile.heads
    for _ in tl.static_range(1, P):
        kept = kept + (1.0,)  # type: ignore[assignment]  # noqa: RUF005
    return kept


@triton.jit
def times(a, b, tile: tl.constexpr):
    """Products of P numbers with P others."""
    products = (a[0] * b[0],)
    P: tl.constexpr = tile.heads
    for p in tl.static_range(1, P):
        products = products + (a[p] * b[p],)  # type: ignore[assignment]  # noqa: RUF005
    return products


@triton.jit
def only_copy():
    """The number of the one copy that there is of initial weights; a tensor, as others are."""
    return tl.program_id(0) * 0


@triton.jit
def load_centred(decays, place, tile: tl.constexpr):
    """TTT-Linear's initial weights, as kernels hold weights."""
    _, _, _, copy = decays
    _, head, _, _, H = place
    return load_copy(copy, only_copy(), head, H, tile)


@triton.jit
def forget(W, b, initial, shares, tile: tl.constexpr):
    """TTT-Linear's centred weights less what is lost of them."""
    initial_W, initial_b = initial
    W = forgotten(W, initial_W, by_head(shares, stacked_heads(tile), tile))
    return W, forgotten(b, initial_b, by_head(shares, parameter_head(tile), tile))


@triton.jit
def load_initial(decays, place, tile: tl.constexpr):
    """W̄ and b̄ of a program, as they are."""
    _, _, initial, _ = decays
    D: tl.constexpr = tile.head_dim
    return load_weights(initial, ((0, D * D, D, 1), (0, D, 1)), place, tile)


@triton.jit
def mean_forgotten(mean, initial_mean, kept, heads, tile: tl.constexpr):
    """Of what centring takes off weights, what is left where A of a whole sequence is kept; heads are the rows'."""
    return forgotten(mean, initial_mean, 1.0 - by_head(kept, heads, tile))


@triton.jit
def sum_of_head(x, heads, p: tl.constexpr, tile: tl.constexpr):
    """The sum over the rows of one head, given each row's."""
    if tile.heads > 1:
        x = tl.where((heads == p)[:, None], x, 0.0)
    return tl.sum(x)


@triton.jit
def sum_of_weights(W_terms, b_terms, p: tl.constexpr, tile: tl.constexpr):
    """The sum over all weights of one head; every row of a tile of parameters has the same terms."""
    rows: tl.constexpr = b_terms.shape[0] // tile.heads
    of_b = sum_of_head(b_terms, parameter_head(tile), p, tile) * (1.0 / rows)
    return sum_of_head(W_terms, stacked_heads(tile), p, tile) + of_b


@triton.jit
def along(d_weights, distance, tile: tl.constexpr):
    """Σ dW ∘ (W - W̄), and the same of b, of every head: a tuple of P numbers."""
    dW, db = d_weights
    W, b = distance
    return sums_of_weights(dW * W, db * b, tile)


@triton.jit
def sums_of_weights(W_terms, b_terms, tile: tl.constexpr):
    """The sums over all weights of every head: a tuple of P numbers."""
    sums = (sum_of_weights(W_terms, b_terms, 0, tile),)
    P: tl.constexpr = tile.heads
    for p in tl.static_range(1, P):
        sums = sums + (sum_of_weights(W_terms, b_terms, p, tile),)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def sums_of_heads(x, heads, tile: tl.constexpr):
    """The sums over the rows of every head, given each row's: a tuple of P numbers."""
    sums = (sum_of_head(x, heads, 0, tile),)
    P: tl.constexpr = tile.heads
    for p in tl.static_range(1, P):
        sums = sums + (sum_of_head(x, heads, p, tile),)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def no_sums(tile: tl.constexpr):
    """P zeros."""
    sums = (0.0,)
    P: tl.constexpr = tile.heads
    for _ in tl.static_range(1, P):
        sums = sums + (0.0,)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def plus_sums(a, b, tile: tl.constexpr):
    """P sums and P others."""
    sums = (a[0] + b[0],)
    P: tl.constexpr = tile.heads
    for p in tl.static_range(1, P):
        sums = sums + (a[p] + b[p],)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def to_initial(weights, d_weights, initial, d_initial, shares, tile: tl.constexpr):
    """Gradients of the initial weights, with a mini-batch's; and Σ dW ∘ (W - W̄), (41).

    Given are the weights before it and the gradients behind it.
    """
    W, b = weights
    dW, db = d_weights
    initial_W, initial_b = initial
    d_initial_W, d_initial_b = d_initial
    d_initial_W += by_head(shares, stacked_heads(tile), tile) * dW
    d_initial_b += by_head(shares, parameter_head(tile), tile) * db
    return (d_initial_W, d_initial_b), along(d_weights, (W - initial_W, b - initial_b), tile)


@triton.jit
def what_is_kept(d_weights, kept, tile: tl.constexpr):
    """A dW and A db."""
    dW, db = d_weights
    return dW * by_head(kept, stacked_heads(tile), tile), db * by_head(kept, parameter_head(tile), tile)


@triton.jit
def no_gradients(tile: tl.constexpr):
    """Zeros in place of gradients of W and b."""
    PF: tl.constexpr = tile.heads * tile.features
    F: tl.constexpr = tile.features
    rows: tl.constexpr = parameter_rows(tile).shape[0]
    return tl.zeros((PF, F), tl.float32), tl.zeros((rows, F), tl.float32)


@triton.jit
def of_tokens(values, tile: tl.constexpr):
    """P numbers, at every token of a mini-batch, [R]."""
    return tl.reshape(tl.broadcast_to(by_head(values, row_head(tile), tile), (tile.rows, 1)), (tile.rows,))


@triton.jit
def store_decay_gradient(pointer, sums, kept, committed, mini_batch, H, tile: tl.constexpr):
    """d ln a of a mini-batch's tokens, (41)."""
    store_rates(pointer, committed * of_tokens(times(kept, sums, tile), tile), mini_batch, H, tile)


@triton.jit
def sums_of_means(d_weights, weights, decays, place, tile: tl.constexpr):
    """Σ dW ∘ (W - W̄) of the means that centring took off TTT-Linear's weights, at a sequence's two ends; P numbers."""
    W, b = weights
    initial_W, initial_b = load_initial(decays, place, tile)
    W_mean = (W - centred_weights(W, tile)) - (initial_W - centred_weights(initial_W, tile))
    b_mean = (b - centred_weights(b, tile)) - (initial_b - centred_weights(initial_b, tile))
    return along(d_weights, (W_mean, b_mean), tile)


@triton.jit
def through_means(pointer, sums, decays, place, tile: tl.constexpr):
    """Add to d ln a what the means contribute that centring took off: in every complete mini-batch the same.

    For these decay only: dW and W - W̄ have A of the mini-batches behind and before, and (41) has its own. It is
    nothing where a sequence begins with the initial weights.
    """
    if tl.sum(tl.where(of_tokens(sums, tile) != 0.0, 1.0, 0.0)) > 0:
        _, _, _, length, H = place
        kept, offsets = all_kept(tile), tile_offsets(H, tile)
        for start in tl.range(0, length, tile.mini_batch):
            kept = times(kept, load_of_heads(decays[1], start, place, tile), tile)
        tl.debug_barrier()
        for start in tl.range(0, length - tile.mini_batch + 1, tile.mini_batch):
            mini_batch = mini_batch_place(start, place, offsets, tile)
            d_log_decay = load_rates(pointer, mini_batch, H, tile) + of_tokens(times(kept, sums, tile), tile)
            tl.debug_barrier()  # until all threads have read
            store_rates(pointer, d_log_decay, mini_batch, H, tile)
