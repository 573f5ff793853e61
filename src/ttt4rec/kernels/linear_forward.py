# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-Linear forward: the whole inner loop of every sequence and head in one launch.

The way back replays the updates, so the kept G is the rounded one that U is made of. A product is subtracted from W as
a whole. Accumulated inside a tensor core, which rounds towards zero, errors of one sign would add up; ``W += dot(...)``
compiles to just that, ``W -= s * dot(...)`` does not.

Numbers in brackets are equations of docs/mathematics.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Scan
from . import launch, limits
from .copies import checkpoint_number, store_copy
from .decays import prepared_decays
from .forgetting import (
    all_kept,
    forget,
    load_centred,
    load_initial,
    load_of_heads,
    mean_forgotten,
    stacked_heads,
    times,
)
from .primitives import (
    causal,
    centred_weights,
    dot,
    expanded,
    inner_gradient,
    load_layer_norm,
    load_rates,
    load_rows,
    load_scale,
    load_weights,
    loads_ahead,
    mini_batch_place,
    normalised,
    parameter_head,
    product,
    program_place,
    rounded,
    store_rows,
    store_weights,
    tile_offsets,
    updated,
)


@triton.jit(do_not_specialize=["L", "H", "segment"])
def linear_forward_kernel(
    tokens,  # q, k, v [B, L, H, D]
    rates,  # inner_lr [B, L, H], token_scale [K]
    decays,  # ``decays.Decays``; None: nothing is forgotten
    weights,  # W1 [N, H, D, D], b1 [N, H, D]
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    o,  # [B, L, H, D]
    G_kept,  # [B, L, H, D]
    outgoing,  # W1 and b1 after the last complete mini-batch
    checkpoints,  # [B L // (segment K) + 2, H, D² + D]
    strides,  # of weights; all others are contiguous
    L,
    H,
    segment,  # mini-batches
    eps,
    tile: tl.constexpr,
):
    """One program: P heads of one sequence, mini-batch after mini-batch, (10) and (9), W and b in registers."""
    q, k, v = tokens
    inner_lr, token_scale = rates
    place = program_place(spans, L, H, tile)
    _, head, first, length, _ = place

    offsets = tile_offsets(H, tile)
    gamma, beta = load_layer_norm(layer_norm, head, H, tile)
    scale = load_scale(token_scale, tile)
    last_scale = tl.load(token_scale + tile.mini_batch - 1)
    W, b = load_weights(weights, strides, place, tile)
    W, b = centred_weights(W, tile), centred_weights(b, tile)
    if decays is not None:
        initial, kept = load_centred(decays, place, tile), all_kept(tile)

    if loads_ahead(tile):
        k_ahead = load_rows(k, mini_batch_place(0, place, offsets, tile), tile)
    for begin in tl.range(0, length, segment * tile.mini_batch, num_stages=1):
        if begin > 0:
            store_copy(checkpoints, checkpoint_number(first + begin, segment, tile), W, b, head, H, tile)
        for start in tl.range(begin, min(begin + segment * tile.mini_batch, length), tile.mini_batch):
            mini_batch = mini_batch_place(start, place, offsets, tile)
            if decays is not None:  # early, since nothing waits for it before the end
                shares = load_of_heads(decays[0], start, place, tile)
                kept = times(kept, load_of_heads(decays[1], start, place, tile), tile)
            if loads_ahead(tile):
                k_rows = k_ahead
                k_ahead = load_rows(k, mini_batch_place(start + tile.mini_batch, place, offsets, tile), tile)
            else:
                k_rows = load_rows(k, mini_batch, tile)
            v_rows = load_rows(v, mini_batch, tile)
            lr = load_rates(inner_lr, mini_batch, H, tile)
            K = expanded(k_rows, tile)
            x_hat, r = normalised(dot(K, W, tile, b), eps, tile)
            y = gamma * (gamma * x_hat + beta - (v_rows.to(tl.float32) - k_rows.to(tl.float32)))
            G = rounded(inner_gradient(y, x_hat, r, tile), tile)
            store_rows(G_kept, G, mini_batch, tile)
            U = product(lr[:, None], G)

            q_rows = load_rows(q, mini_batch, tile)
            Q = expanded(q_rows, tile)
            C = tl.where(causal(tile), dot(q_rows, tl.trans(k_rows), tile) + 1.0, 0.0)
            p_hat, _r = normalised(dot(Q, W, tile, b) - scale * dot(C, U, tile), eps, tile)
            store_rows(o, q_rows.to(tl.float32) + gamma * p_hat + beta, mini_batch, tile)

            # A last, short mini-batch is not committed.
            committed_scale = tl.where(start + tile.mini_batch <= length, last_scale, 0.0)
            if decays is not None:
                W, b = forget(W, b, initial, shares, tile)
            W, b = updated(W, b, K, U, committed_scale, tile)

    # Give the rows' means back; without an update, give back exactly what came.
    changed = length >= tile.mini_batch
    incoming_W, incoming_b = load_weights(weights, strides, place, tile)
    W_mean = incoming_W - centred_weights(incoming_W, tile)
    if decays is not None:
        initial_W, initial_b = load_initial(decays, place, tile)
        initial_mean = initial_W - centred_weights(initial_W, tile)
        W_mean = mean_forgotten(W_mean, initial_mean, kept, stacked_heads(tile), tile)
    W = tl.where(changed, W + W_mean, incoming_W)
    b_mean = incoming_b - centred_weights(incoming_b, tile)
    if decays is not None:
        initial_mean = initial_b - centred_weights(initial_b, tile)
        b_mean = mean_forgotten(b_mean, initial_mean, kept, parameter_head(tile), tile)
    b = tl.where(changed, b + b_mean, incoming_b)
    store_weights(outgoing, (W, b), place, tile)


@launch.on_its_device
def linear_scan(scan: Scan) -> tuple[Tensor, ...]:
    """The inner loop of TTT-Linear. Tokens outside every sequence get zero outputs.

    Returns:
        o ``[B, L, H, D]`` in q's dtype; W1 and b1 after each sequence's last complete mini-batch, float32; and what the
        backward needs: the inner gradients G ``[B, L, H, D]`` in q's dtype, and the checkpoints (see ``copies``).

    Raises:
        ValueError: if the kernels do not run that dtype, head dimension or mini-batch size.
    """
    limits.check("linear_forward", scan.q, scan.token_scale.numel())
    results, prepared = prepare_linear_scan(scan)
    prepared.run()
    return results


def prepare_linear_scan(scan: Scan) -> tuple[tuple[Tensor, ...], launch.Launch]:
    """Allocate the results and make the launch that fills them."""
    q, weights, starts, (L, H) = scan.q, scan.weights, scan.starts, scan.q.shape[1:3]
    op = launch.kernel_of(scan, "forward")
    choice, tile = launch.plan(op, q, scan.token_scale.numel())
    o, G = launch.new_tokens(q, starts), launch.new_tokens(q, starts)
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
        G,
        outgoing,
        checkpoints,
        strides,
        L,
        H,
        scan.segment,
        scan.eps,
        tile,
    )
    grid = (weights[0].shape[0] * triton.cdiv(H, choice.heads),)
    return (o, *outgoing, G, checkpoints), launch.Launch(linear_forward_kernel, grid, arguments, choice, first)
