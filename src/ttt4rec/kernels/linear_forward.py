# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-Linear forward: the whole inner loop of every sequence and head in one launch.

The way back replays the updates, so the kept G is the rounded one that U is made of. A product is subtracted from W as
a whole. Accumulated inside a tensor core, which rounds towards zero, errors of one sign would add up; ``W += dot(...)``
compiles to just that, ``W -= s * dot(...)`` does not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Scan
from . import launch
from .copies import checkpoint_number, store_copy
from .primitives import (
    causal,
    centred,
    dot,
    expanded,
    first_rows,
    inner_gradient,
    load_layer_norm,
    mini_batch_place,
    normalised,
    parameter_mask,
    parameter_offsets,
    program_place,
    rounded,
    row_offsets,
    row_token,
    tile_offsets,
    updated,
    weight_mask,
    weight_offsets,
)


@triton.jit(do_not_specialize=["L", "H", "segment"])
def linear_forward_kernel(
    tokens,  # q, k, v [B, L, H, D]
    rates,  # inner_lr [B, L, H], token_scale [K]
    weights,  # W1 [N, H, D, D], b1 [N, H, D]
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    outputs,  # o and G [B, L, H, D], W1 and b1 after the last complete mini-batch
    checkpoints,  # [B L // (segment K) + 2, H, D² + D]
    strides,  # of weights; all others are contiguous
    L,
    H,
    segment,  # mini-batches
    eps,
    tile: tl.constexpr,
):
    """One program: P heads of one sequence, mini-batch after mini-batch, W and b in registers.

    Z = K W + b                 x̂, r = normalised(Z)
    y = γ ∘ (γ ∘ x̂ + β - (V - K))                   G = r (y - mean(y) - x̂ mean(y ∘ x̂))
    U = lr ∘ G, the steps, so that η G = s ∘ U
    out = Q W + b - s ∘ tril(Q Kᵀ + 1) U             O = Q + LN(out)
    W ← W - s_last Kᵀ U                              b ← b - s_last Σ_j U_j
    """
    q, k, v = tokens
    inner_lr, token_scale = rates
    W1, b1 = weights
    o, G_kept, W1_out, b1_out = outputs
    W_strides, b_strides = strides
    sequence, head, first, length = program_place(spans, L, H, tile)

    positions = row_token(tile)
    b_mask = parameter_mask(head, H, tile)
    elements = tile_offsets(H, tile)
    D: tl.constexpr = tile.head_dim
    gamma, beta = load_layer_norm(layer_norm, head, H, tile)
    scale = tl.load(token_scale + positions, mask=positions < tile.mini_batch, other=0.0)[:, None]
    last_scale = tl.load(token_scale + tile.mini_batch - 1)
    W_mask = weight_mask(head, H, tile)
    W_in = W1 + weight_offsets(W_strides, sequence, head, tile)
    b_in = b1 + parameter_offsets(b_strides, sequence, head, tile)
    W = centred(tl.load(W_in, mask=W_mask, other=0.0), tile)
    b = centred(tl.load(b_in, mask=b_mask, other=0.0), tile)

    for begin in tl.range(0, length, segment * tile.mini_batch, num_stages=1):
        if begin > 0:
            store_copy(checkpoints, checkpoint_number(first + begin, segment, tile), W, b, head, H, tile)
        for start in tl.range(begin, min(begin + segment * tile.mini_batch, length), tile.mini_batch):
            rows, mask = mini_batch_place(start, length, head, H, tile)
            at = (first + start) * H + head
            here = at * D + elements
            k_rows = tl.load(k + here, mask=mask, other=0.0)
            v_rows = tl.load(v + here, mask=mask, other=0.0)
            lr = tl.load(inner_lr + at + row_offsets(H, tile), mask=rows, other=0.0)
            K = expanded(k_rows, tile)
            x_hat, r = normalised(dot(K, W, tile, b), eps, tile)
            y = gamma * (gamma * x_hat + beta - (v_rows.to(tl.float32) - k_rows.to(tl.float32)))
            G = rounded(inner_gradient(y, x_hat, r, tile), tile)
            tl.store(G_kept + here, G, mask=mask)
            U = lr[:, None] * G.to(tl.float32)

            q_rows = tl.load(q + here, mask=mask, other=0.0)
            Q = expanded(q_rows, tile)
            C = tl.where(causal(tile), dot(q_rows, tl.trans(k_rows), tile) + 1.0, 0.0)
            p_hat, _ = normalised(dot(Q, W, tile, b) - scale * dot(C, U, tile), eps, tile)
            out = q_rows.to(tl.float32) + gamma * p_hat + beta
            tl.store(o + here, rounded(out, tile), mask=mask)

            # A last, short mini-batch is not committed.
            committed_scale = tl.where(start + tile.mini_batch <= length, last_scale, 0.0)
            W, b = updated(W, b, K, U, committed_scale, tile)

    # Give the rows' means back; without an update, give back exactly what came.
    changed = length >= tile.mini_batch
    incoming_W = tl.load(W_in, mask=W_mask, other=0.0)
    incoming_b = tl.load(b_in, mask=b_mask, other=0.0)
    W = tl.where(changed, W + (incoming_W - centred(incoming_W, tile)), incoming_W)
    b = tl.where(changed, b + (incoming_b - centred(incoming_b, tile)), incoming_b)
    tl.store(W1_out + weight_offsets((H * D * D, D * D, D, 1), sequence, head, tile), W, mask=W_mask)
    once = b_mask & first_rows(tile)
    tl.store(b1_out + parameter_offsets((H * D, D, 1), sequence, head, tile), b, mask=once)


@launch.on_its_device
def linear_scan(scan: Scan) -> tuple[Tensor, ...]:
    """The inner loop of TTT-Linear. Tokens outside every sequence get zero outputs.

    Returns:
        o ``[B, L, H, D]`` in q's dtype; W1 and b1 after each sequence's last complete mini-batch, float32; and what the
        backward needs: the inner gradients G ``[B, L, H, D]`` in q's dtype, and the checkpoints (see ``copies``).

    Raises:
        ValueError: if the kernels do not run that dtype, head dimension or mini-batch size.
    """
    results, prepared = prepare_linear_scan(scan)
    prepared.run()
    return results


def prepare_linear_scan(scan: Scan) -> tuple[tuple[Tensor, ...], launch.Launch]:
    """Allocate the results and make the launch that fills them."""
    q, weights, starts, (L, H) = scan.q, scan.weights, scan.starts, scan.q.shape[1:3]
    choice, tile = launch.plan("linear_forward", q, scan.token_scale.numel())
    o, G = launch.new_tokens(q, starts), launch.new_tokens(q, starts)
    outgoing = tuple(torch.empty(w.shape, dtype=torch.float32, device=q.device) for w in weights)
    weights, strides = launch.strided(*weights)
    checkpoints = scan.new_checkpoints()
    arguments = (
        launch.contiguous(*scan[:3]),
        launch.contiguous(scan.inner_lr, scan.token_scale),
        weights,
        launch.contiguous(scan.ln_weight, scan.ln_bias),
        launch.contiguous(starts, scan.lengths),
        (o, G, *outgoing),
        checkpoints,
        strides,
        L,
        H,
        scan.segment,
        scan.eps,
        tile,
    )
    grid = (weights[0].shape[0] * triton.cdiv(H, choice.heads),)
    return (o, *outgoing, G, checkpoints), launch.Launch(linear_forward_kernel, grid, arguments, choice)
