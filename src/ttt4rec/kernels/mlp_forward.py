# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-MLP forward: the whole inner loop of every sequence and head in one launch.

The state has 8D² numbers a head. Where registers hold them, they stay there from the first mini-batch to the last. Else
the hidden features are worked on in chunks, whose weights wait in the memory of the results, that is in the cache.

The kept Z1 and G2 are the rounded ones that everything else is made of, and products are subtracted from the state as a
whole, for the reasons that TTT-Linear's forward gives.

Numbers in brackets are equations of docs/mathematics.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Scan
from . import launch, limits
from .copies import checkpoint_number
from .decays import prepared_decays
from .forgetting import all_kept, load_of_heads, times
from .hidden_forgetting import (
    W2_mean_forgotten,
    b2_mean_forgotten,
    forget_b2,
    forget_chunk,
    hold_initial,
    take_initial,
)
from .hidden_layer import (
    centred_columns,
    contiguous_strides,
    first_chunks,
    gelu,
    load_b2,
    load_hidden,
    load_state,
    put_chunk,
    store_b2,
    store_hidden,
    store_hidden_copy,
    store_state,
    take_chunk,
    updated_state,
    wait_for_stores,
)
from .primitives import (
    causal,
    centred_weights,
    dot,
    expanded,
    layer_norm_backward,
    load_layer_norm,
    load_rates,
    load_rows,
    load_scale,
    mini_batch_place,
    own,
    product,
    program_place,
    recentred,
    rounded,
    store_rows,
    subtracted,
    tile_offsets,
    token_sums,
)


@triton.jit
def at_keys(K, Q, state, outgoing, contiguous, Z1_kept, mini_batch, place, tile: tl.constexpr):
    """The inner model at the keys, chunk by chunk; Z1 is kept.

    Returns X2 W2, and of the last chunk the rounded Z1 and Q W1 + b1.
    """
    _, _, _, _, H = place
    R: tl.constexpr = tile.rows
    C: tl.constexpr = tile.chunk
    PF: tl.constexpr = tile.heads * tile.features
    Z1 = tl.zeros((R, C), tl.float32)
    Q_W1 = Z1
    X2_W2 = tl.zeros((R, PF), tl.float32)
    for chunk in tl.range(0, tile.chunks, num_stages=1):
        W1, b1, W2 = take_chunk(state, outgoing, contiguous, place, chunk, tile)
        kept_Z1 = rounded(dot(K, W1, tile, b1), tile)
        store_hidden(Z1_kept, kept_Z1, mini_batch, chunk, H, tile)
        Z1, Q_W1 = kept_Z1.to(tl.float32), dot(Q, W1, tile, b1)
        X2, _slope, _curve = gelu(Z1)
        X2_W2 = dot(X2, tl.trans(W2), tile, X2_W2)
    wait_for_stores(tile)
    return X2_W2, Z1, Q_W1


@triton.jit
def at_queries(
    Z1, Q_W1, values, scales, state, outgoing, contiguous, Z1_kept, forgetting, mini_batch, place, tile: tl.constexpr
):
    """The inner model at the queries, after the steps up to each, and the update, chunk by chunk.

    Given are the last chunk's Z1 and Q W1 + b1; and, where it forgets, what registers hold of the initial weights, the
    decays and 1 - A. Returns X̄2 W2, A2 G2 and the state after the mini-batch.
    """
    K, Q, G2_rows, U2, A1, own_rates = values
    scale, committed_scale = scales
    _, _, _, _, H = place
    lr, lr_columns = own_rates[:, None], own_rates[None, :]
    G2 = expanded(G2_rows, tile)
    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    PF: tl.constexpr = tile.heads * tile.features
    X2_bar_W2 = tl.zeros((R, PF), tl.float32)
    A2_G2 = tl.zeros((R, F), tl.float32)
    for chunk in tl.range(0, tile.chunks, num_stages=1):
        W1, b1, W2 = take_chunk(state, outgoing, contiguous, place, chunk, tile)
        if tile.chunks > 1:
            Z1 = load_hidden(Z1_kept, mini_batch, chunk, H, tile)
            Q_W1 = dot(Q, W1, tile, b1)
        X2, slope, _curve = gelu(Z1)
        G1 = product(dot(G2, W2, tile), slope)
        X2_bar, _slope, _curve = gelu(Q_W1 - scale * dot(A1, G1, tile))
        A2 = dot(X2_bar, tl.trans(X2), tile) + tl.where(chunk == 0, 1.0, 0.0)
        A2_G2 = dot(tl.where(causal(tile), A2, 0.0) * lr_columns, G2_rows, tile, A2_G2)
        X2_bar_W2 = dot(X2_bar, tl.trans(W2), tile, X2_bar_W2)
        if len(forgetting) > 0:
            held, decays, shares = forgetting
            W1, b1, W2 = forget_chunk((W1, b1, W2), take_initial(held, decays, place, chunk, tile), shares, tile)
        new_state = updated_state((W1, b1, W2), K, lr, G1, U2, X2, committed_scale, tile)
        state = put_chunk(new_state, outgoing, contiguous, place, chunk, tile)
    wait_for_stores(tile)
    return X2_bar_W2, A2_G2, state


@triton.jit
def store_outgoing(state, b2, changed, weights, strides, outgoing, contiguous, decays, kept, place, tile: tl.constexpr):
    """Give the means of W2 and b2 back, what is left of them; without an update, give back exactly what came."""
    for chunk in tl.range(0, tile.chunks, num_stages=1):
        W1, b1, W2 = take_chunk(state, outgoing, contiguous, place, chunk, tile)
        _, _, incoming_W2 = load_state(weights, strides, place, chunk, tile)
        W2_mean = incoming_W2 - centred_columns(incoming_W2, tile)
        if decays is not None:
            W2_mean = W2_mean_forgotten(W2_mean, decays, kept, place, chunk, tile)
        W2 = tl.where(changed, W2 + W2_mean, incoming_W2)
        store_state(outgoing, contiguous, (W1, b1, W2), place, chunk, tile)
    incoming_b2 = load_b2(weights, strides, place, tile)
    b2_mean = incoming_b2 - centred_weights(incoming_b2, tile)
    if decays is not None:
        b2_mean = b2_mean_forgotten(b2_mean, decays, kept, place, tile)
    b2 = tl.where(changed, b2 + b2_mean, incoming_b2)
    store_b2(outgoing, contiguous, b2, place, tile)


@triton.jit(do_not_specialize=["L", "H", "segment"])
def mlp_forward_kernel(
    tokens,  # q, k, v [B, L, H, D]
    rates,  # inner_lr [B, L, H], token_scale [K]
    decays,  # ``decays.Decays``; None: nothing is forgotten
    weights,  # W1 [N, H, D, hidden], b1 [N, H, hidden], W2 [N, H, hidden, D], b2 [N, H, D]
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    o,  # [B, L, H, D]
    outgoing,  # W1, b1, W2, b2 after the last complete mini-batch
    kept,  # Z1 [B, L, H, hidden], G2 [B, L, H, D] and checkpoints [B L // (segment K) + 2, H, 2 D hidden + hidden + D]
    strides,  # of weights; all others are contiguous
    L,
    H,
    segment,  # mini-batches
    eps,
    tile: tl.constexpr,
):
    """One program: P heads of one sequence, mini-batch after mini-batch, (11) to (13) and (9).

    The pairs carry the rates: A1 and A2 are (7)'s C with column j times lr_j, so that U1 is no tile.
    """
    q, k, v = tokens
    inner_lr, token_scale = rates
    Z1_kept, G2_kept, checkpoints = kept
    place = program_place(spans, L, H, tile)
    _, head, first, length, _ = place
    contiguous = contiguous_strides(H, tile)
    offsets = tile_offsets(H, tile)
    gamma, beta = load_layer_norm(layer_norm, head, H, tile)
    scale = load_scale(token_scale, tile)
    last_scale = tl.load(token_scale + tile.mini_batch - 1)
    b2 = centred_weights(load_b2(weights, strides, place, tile), tile)
    state = first_chunks(weights, strides, outgoing, contiguous, place, tile, centre=True)
    kept = ()
    if decays is not None:
        kept = all_kept(tile)
        initial, initial_b2 = hold_initial(decays, place, tile)

    for begin in tl.range(0, length, segment * tile.mini_batch, num_stages=1):
        if begin > 0:
            number = checkpoint_number(first + begin, segment, tile)
            for chunk in tl.range(0, tile.chunks, num_stages=1):
                taken = take_chunk(state, outgoing, contiguous, place, chunk, tile)
                store_hidden_copy(checkpoints, number, taken, b2, head, H, chunk, tile)
        for start in tl.range(begin, min(begin + segment * tile.mini_batch, length), tile.mini_batch):
            mini_batch = mini_batch_place(start, place, offsets, tile)
            forgetting = ()
            if decays is not None:  # early, since nothing waits for it before the end
                shares = load_of_heads(decays[0], start, place, tile)
                kept = times(kept, load_of_heads(decays[1], start, place, tile), tile)
                forgetting = initial, decays, shares  # type: ignore[assignment]
            k_rows = load_rows(k, mini_batch, tile)
            v_rows = load_rows(v, mini_batch, tile)
            q_rows = load_rows(q, mini_batch, tile)
            own_rates = load_rates(inner_lr, mini_batch, H, tile)
            K, Q = expanded(k_rows, tile), expanded(q_rows, tile)
            X2_W2, Z1, Q_W1 = at_keys(K, Q, state, outgoing, contiguous, Z1_kept, mini_batch, place, tile)
            x_hat, r = recentred(own(X2_W2, tile) + b2, eps, tile)
            y = gamma * (gamma * x_hat + beta - (v_rows.to(tl.float32) - k_rows.to(tl.float32)))
            G2_rows = rounded(layer_norm_backward(y, x_hat, r, tile), tile)
            store_rows(G2_kept, G2_rows, mini_batch, tile)
            U2 = product(own_rates[:, None], G2_rows)
            U2_sums = token_sums(U2, tile)

            A1 = tl.where(causal(tile), dot(q_rows, tl.trans(k_rows), tile) + 1.0, 0.0) * own_rates[None, :]
            # A last, short mini-batch is not committed.
            committed_scale = tl.where(start + tile.mini_batch <= length, last_scale, 0.0)
            values, scales = (K, Q, G2_rows, expanded(U2, tile), A1, own_rates), (scale, committed_scale)
            X2_bar_W2, A2_G2, state = at_queries(
                Z1, Q_W1, values, scales, state, outgoing, contiguous, Z1_kept, forgetting, mini_batch, place, tile
            )
            # Subtracted, since a product that something is added to moves to the sum, here behind that of the state:
            # the last product of the loop decides how all tiles are spread over the warps.
            p_hat, _r = recentred(own(X2_bar_W2, tile) - (scale * A2_G2 - b2), eps, tile)
            store_rows(o, q_rows.to(tl.float32) + gamma * p_hat + beta, mini_batch, tile)
            if decays is not None:
                b2 = forget_b2(b2, initial_b2, shares, tile)
            b2 = subtracted(b2, committed_scale, U2_sums)

    changed = length >= tile.mini_batch
    store_outgoing(state, b2, changed, weights, strides, outgoing, contiguous, decays, kept, place, tile)


@launch.on_its_device
def mlp_scan(scan: Scan) -> tuple[Tensor, ...]:
    """The inner loop of TTT-MLP. Tokens outside every sequence get zero outputs. Errors as in ``linear_scan``.

    Returns:
        o ``[B, L, H, D]`` in q's dtype; the four weights after each sequence's last complete mini-batch, float32; and,
        what the backward needs: Z1 ``[B, L, H, hidden]`` and G2 ``[B, L, H, D]`` in q's dtype, and the checkpoints (see
        ``copies``).
    """
    limits.check("mlp_forward", scan.q, scan.token_scale.numel())
    results, prepared = prepare_mlp_scan(scan)
    prepared.run()
    return results


def prepare_mlp_scan(scan: Scan) -> tuple[tuple[Tensor, ...], launch.Launch]:
    """Allocate the results and make the launch that fills them."""
    q, weights, starts, (L, H) = scan.q, scan.weights, scan.starts, scan.q.shape[1:3]
    hidden = scan.hidden
    op = launch.kernel_of(scan, "forward")
    choice, tile = launch.plan(op, q, scan.token_scale.numel(), hidden)
    o, G2 = launch.new_tokens(q, starts), launch.new_tokens(q, starts)
    Z1 = launch.new_tokens(q, starts, hidden)
    outgoing = tuple(torch.empty(w.shape, dtype=torch.float32, device=q.device) for w in weights)
    weights, strides = launch.strided(*weights)
    checkpoints = scan.new_checkpoints()
    decays, first = prepared_decays(scan, op)
    arguments = (
        launch.contiguous(scan.q, scan.k, scan.v),
        launch.contiguous(scan.inner_lr, scan.token_scale),
        decays,
        weights,
        launch.contiguous(scan.ln_weight, scan.ln_bias),
        launch.contiguous(starts, scan.lengths),
        o,
        outgoing,
        (Z1, G2, checkpoints),
        strides,
        L,
        H,
        scan.segment,
        scan.eps,
        tile,
    )
    grid = (weights[0].shape[0] * triton.cdiv(H, choice.heads),)
    return (o, *outgoing, Z1, G2, checkpoints), launch.Launch(mlp_forward_kernel, grid, arguments, choice, first)
