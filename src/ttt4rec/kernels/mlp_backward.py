# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-MLP backward: one launch that walks the mini-batches from the last to the first and rebuilds the state on the way.

From the kept Z1 and G2 all four weights are rebuilt: X2 = gelu(Z1) gives W2 back, W2 gives G1 and G1 gives W1 back.
The hidden features are passed over three times. Every pass computes the forward's values again; where there is only one
chunk the compiler sees that they are the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import (
    causal,
    centred,
    centred_columns,
    dot,
    expanded,
    first_rows,
    gelu,
    hidden_columns,
    hidden_mask,
    hidden_offsets,
    hidden_state_strides,
    inner_gradient_backward,
    layer_norm_backward,
    load_hidden_state,
    load_layer_norm,
    normalised,
    own,
    parameter_mask,
    parameter_offsets,
    program_place,
    row_head,
    row_offsets,
    row_token,
    store_head_sums,
    store_hidden_state,
    store_token_sums,
    tile_offsets,
    token_sums,
)


@triton.jit
def load_hidden(pointer, rows, chunk, tile: tl.constexpr):
    """Z1 of a chunk, float32 [R, C].

    As a product with the identity, which leaves 16-bit numbers as they are: so it is laid out as products are, and the
    compiler does not compute its GELU over again for every operand that it becomes.
    """
    Z1 = tl.load(pointer, mask=hidden_mask(rows, hidden_columns(chunk, tile), tile), other=0.0)
    if tile.operand != tl.float32:
        tokens = tl.arange(0, tile.rows)
        Z1 = dot(tl.where(tokens[:, None] == tokens[None, :], 1.0, 0.0), Z1, tile)
    return Z1.to(tl.float32)


@triton.jit(do_not_specialize=["L", "H"])
def mlp_backward_kernel(
    grads,  # of o [B, L, H, D]; of W1, b1, W2, b2
    tokens,  # q, k, v and the forward's G2 [B, L, H, D], Z1 [B, L, H, hidden]
    rates,  # inner_lr [B, L, H], token_scale [K]
    weights,  # the outgoing W1 [N, H, D, hidden], b1 [N, H, hidden], W2 [N, H, hidden, D], b2 [N, H, D]
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    d_tokens,  # of q, k, v [B, L, H, D] and inner_lr [B, L, H]
    d_weights,  # of the incoming W1, b1, W2, b2
    partial_sums,  # per sequence: γ and β's gradients [N, H, D], s's and the updates' share of s_last's [N, H, K]
    scratch,  # of more than one chunk: W1, b1, W2 as they are walked back; a part of a mini-batch's dZ1 [N, H, R, hidden]
    strides,  # of W1, b1, W2, b2 and of their gradients; all others are contiguous
    L,
    H,
    eps,
    tile: tl.constexpr,
):
    """One program: P heads of one sequence, from the last mini-batch to the first.

    X2, G1, U1, U2, P1, X̄2, P2 and C1 = tril(Q Kᵀ + 1), C2 = tril(X̄2 X2ᵀ + 1) as in the forward, at the rebuilt
    W2 ← W2 + s_last X2ᵀ U2,  W1 ← W1 + s_last Kᵀ U1
    dP2 = layer norm's backward of γ ∘ dO            dC2 = tril(-s ∘ dP2 U2ᵀ)
    dP1 = (dP2 W2ᵀ + dC2 X2) ∘ gelu'(P1)             dC1 = tril(-s ∘ dP1 U1ᵀ)
    dU2 = C2ᵀ (-s ∘ dP2) - s_last (X2 dW2 + db2)     dU1 = C1ᵀ (-s ∘ dP1) - s_last (K dW1 + db1)
    dG1 = lr ∘ dU1                                   E = dG1 ∘ gelu'(Z1), the gradient of G2 W2ᵀ
    dG2 = lr ∘ dU2 + E W2                            dlr = Σ G1 ∘ dU1 + Σ G2 ∘ dU2
    dZ2, de, dγ from dG2                             dV = -de
    dX2 = dC2ᵀ X̄2 - s_last U2 dW2ᵀ + dZ2 W2ᵀ         dZ1 = dX2 ∘ gelu'(Z1) + dG1 ∘ (G2 W2ᵀ) ∘ gelu''(Z1)
    dQ = dO + dP1 W1ᵀ + dC1 K                        dK = de + dZ1 W1ᵀ + dC1ᵀ Q - s_last U1 dW1ᵀ
    dW1 ← dW1 + Qᵀ dP1 + Kᵀ dZ1                      dW2 ← dW2 + X̄2ᵀ dP2 + X2ᵀ dZ2 + Eᵀ G2
    ds = -Σ dP1 ∘ C1 U1 - Σ dP2 ∘ C2 U2              ds_last -= Σ U1 ∘ (K dW1 + db1) + Σ U2 ∘ (X2 dW2 + db2)

    As in TTT-Linear's, all but dO, dq and the parameters' gradients carry the opposite sign. A sum into which products
    go in the last pass is subtracted from at the end, so that the compiler does not move a product behind the state's:
    the last product of the loop decides how all tiles are spread over the warps.
    """
    q, k, v, G2_kept, Z1_kept = tokens
    inner_lr, token_scale = rates
    dq, dk, dv, d_lr = d_tokens
    W_strides, dW_strides = (strides[0], strides[1], strides[2]), (strides[4], strides[5], strides[6])
    state, d_state = (scratch[0], scratch[1], scratch[2]), (d_weights[0], d_weights[1], d_weights[2])
    outgoing, d_outgoing = (weights[0], weights[1], weights[2]), (grads[1], grads[2], grads[3])
    contiguous = hidden_state_strides(H, tile)
    sequence, head, first, length = program_place(spans, L, H, tile)

    R: tl.constexpr = tile.rows
    PF: tl.constexpr = tile.heads * tile.features
    D: tl.constexpr = tile.head_dim
    positions = row_token(tile)
    head_exists = head + row_head(tile) < H
    columns = tl.arange(0, tile.features)[None, :] < tile.head_dim
    elements = tile_offsets(H, tile)
    gamma, beta = load_layer_norm(layer_norm, head, H, tile)
    minus_scale = -tl.load(token_scale + positions, mask=positions < tile.mini_batch, other=0.0)[:, None]
    last_scale = tl.load(token_scale + tile.mini_batch - 1)
    b_mask = parameter_mask(head, H, tile)
    b2 = tl.load(weights[3] + parameter_offsets(strides[3], sequence, head, tile), mask=b_mask, other=0.0)
    b2 = centred(b2, tile)
    db2 = tl.load(grads[4] + parameter_offsets(strides[7], sequence, head, tile), mask=b_mask, other=0.0)
    if tile.chunks == 1:
        W1, b1, W2 = load_hidden_state(outgoing, W_strides, sequence, head, 0, H, tile)
        W2 = centred_columns(W2, tile)
        dW1, db1, dW2 = load_hidden_state(d_outgoing, dW_strides, sequence, head, 0, H, tile)
    else:
        for chunk in tl.range(0, tile.chunks, num_stages=1):
            W1, b1, W2 = load_hidden_state(outgoing, W_strides, sequence, head, chunk, H, tile)
            store_hidden_state(state, (W1, b1, centred_columns(W2, tile)), sequence, head, chunk, H, tile)
            dW = load_hidden_state(d_outgoing, dW_strides, sequence, head, chunk, H, tile)
            store_hidden_state(d_state, dW, sequence, head, chunk, H, tile)
        tl.debug_barrier()

    d_gamma, d_beta = tl.zeros((R, tile.features), tl.float32), tl.zeros((R, tile.features), tl.float32)
    d_scale, d_last_scale = tl.zeros((R, R), tl.float32), tl.zeros((R,), tl.float32)
    Z1 = tl.zeros((R, tile.chunk), tl.float32)
    minus_dZ1 = tl.zeros((R, tile.chunk), tl.float32)
    num_mini_batches = tl.cdiv(length, tile.mini_batch)
    for t in tl.range(0, num_mini_batches):
        start = (num_mini_batches - 1 - t) * tile.mini_batch
        rows = head_exists & (positions < min(tile.mini_batch, length - start))
        mask = rows[:, None] & columns
        at = (first + start) * H + head
        here = at * D + elements
        k_rows = tl.load(k + here, mask=mask, other=0.0)
        q_rows = tl.load(q + here, mask=mask, other=0.0)
        G2_rows = tl.load(G2_kept + here, mask=mask, other=0.0)
        rates_here = tl.where(rows, tl.load(inner_lr + at + row_offsets(H, tile), mask=rows, other=0.0), 0.0)
        lr, lr_columns = rates_here[:, None], rates_here[None, :]
        K, Q, G2 = expanded(k_rows, tile), expanded(q_rows, tile), expanded(G2_rows, tile)
        committed = tl.where(start + tile.mini_batch <= length, 1.0, 0.0)
        s_last = committed * last_scale
        U2 = lr * G2_rows.to(tl.float32)
        C1 = tl.where(causal(tile), dot(q_rows, tl.trans(k_rows), tile) + 1.0, 0.0)
        A1 = C1 * lr_columns

        # Rebuild the weights before the mini-batch, and the forward's values.
        b2 -= -s_last * token_sums(U2, tile)
        U2 = expanded(U2, tile)
        X2_W2, X2_bar_W2, X2_dW2 = (tl.zeros((R, PF), tl.float32),) * 3
        X2_bar_X2 = tl.zeros((R, R), tl.float32)
        for chunk in tl.range(0, tile.chunks, num_stages=1):
            Z1 = load_hidden(Z1_kept + at * tile.hidden + hidden_offsets(chunk, H, tile), rows, chunk, tile)
            if tile.chunks > 1:
                W1, b1, W2 = load_hidden_state(state, contiguous, sequence, head, chunk, H, tile)
                _, _, dW2 = load_hidden_state(d_state, contiguous, sequence, head, chunk, H, tile)
            X2, slope, _ = gelu(Z1)
            W2 -= -s_last * dot(tl.trans(U2), X2, tile)
            G1 = dot(G2, W2, tile) * slope
            W1 -= -s_last * dot(tl.trans(lr * K), G1, tile)
            b1 -= -s_last * token_sums(lr * G1, tile)
            if tile.chunks > 1:
                store_hidden_state(state, (W1, b1, W2), sequence, head, chunk, H, tile)
            X2_bar, _, _ = gelu(dot(Q, W1, tile, b1) + minus_scale * dot(A1, G1, tile))
            X2_bar_X2 = dot(X2_bar, tl.trans(X2), tile, X2_bar_X2)
            X2_W2 = dot(X2, tl.trans(W2), tile, X2_W2)
            X2_bar_W2 = dot(X2_bar, tl.trans(W2), tile, X2_bar_W2)
            X2_dW2 = dot(X2, tl.trans(dW2), tile, X2_dW2)
        if tile.chunks > 1:
            tl.debug_barrier()

        # Through the output and the outer layer's steps.
        C2 = tl.where(causal(tile), X2_bar_X2 + 1.0, 0.0)
        A2 = C2 * lr_columns
        p_hat, p_r = normalised(own(X2_bar_W2, tile) + b2 + minus_scale * dot(A2, G2_rows, tile), eps, tile)
        dO = tl.load(grads[0] + here, mask=mask, other=0.0).to(tl.float32)
        d_gamma += dO * p_hat
        d_beta += dO
        minus_dP2_rows = layer_norm_backward(gamma * dO, p_hat, -p_r, tile)
        minus_dP2 = expanded(minus_dP2_rows, tile)
        dP2_G2 = dot(minus_dP2_rows, tl.trans(G2_rows), tile)
        minus_dC2 = tl.where(causal(tile), minus_scale * lr_columns * dP2_G2, 0.0)
        X2_dW2_rows = own(X2_dW2, tile) + db2
        minus_dG2 = dot(tl.trans(A2), minus_scale * minus_dP2_rows, tile, s_last * lr * X2_dW2_rows)
        along_dW = tl.sum(G2_rows.to(tl.float32) * X2_dW2_rows, 1)

        # Through the hidden layer's outputs and steps.
        dP1_G1 = tl.zeros((R, R), tl.float32)
        through_P1, through_G1, through_E = (tl.zeros((R, PF), tl.float32),) * 3
        for chunk in tl.range(0, tile.chunks, num_stages=1):
            if tile.chunks > 1:
                W1, b1, W2 = load_hidden_state(state, contiguous, sequence, head, chunk, H, tile)
                dW1, db1, dW2 = load_hidden_state(d_state, contiguous, sequence, head, chunk, H, tile)
                Z1 = load_hidden(Z1_kept + at * tile.hidden + hidden_offsets(chunk, H, tile), rows, chunk, tile)
            X2, slope, curve = gelu(Z1)
            G2_W2 = dot(G2, W2, tile)
            G1 = G2_W2 * slope
            X2_bar, bar_slope, _ = gelu(dot(Q, W1, tile, b1) + minus_scale * dot(A1, G1, tile))
            minus_dP1 = dot(minus_dC2, X2, tile, dot(minus_dP2, W2, tile)) * bar_slope
            dP1_G1 = dot(minus_dP1, tl.trans(G1), tile, dP1_G1)
            through_P1 = dot(minus_dP1, tl.trans(W1), tile, through_P1)
            K_dW1 = dot(K, dW1, tile, db1)
            along_dW += tl.sum(G1 * K_dW1, 1)
            minus_dG1 = dot(tl.trans(A1), minus_scale * minus_dP1, tile, s_last * lr * K_dW1)
            minus_E = minus_dG1 * slope
            through_E = dot(minus_E, tl.trans(W2), tile, through_E)
            through_G1 = dot(G1, tl.trans(dW1), tile, through_G1)
            minus_dX2 = dot(tl.trans(minus_dC2), X2_bar, tile, s_last * dot(U2, dW2, tile))
            minus_dZ1 = minus_dX2 * slope + minus_dG1 * G2_W2 * curve
            db1 -= token_sums(minus_dP1, tile)
            dW1 -= dot(tl.trans(Q), minus_dP1, tile)
            dW2 -= dot(tl.trans(minus_dP2), X2_bar, tile, dot(tl.trans(G2), minus_E, tile))
            if tile.chunks > 1:
                store_hidden_state(d_state, (dW1, db1, dW2), sequence, head, chunk, H, tile)
                part = scratch[3] + (sequence.to(tl.int64) * H + head) * R * tile.hidden
                part += tl.arange(0, R)[:, None] * tile.hidden + hidden_columns(chunk, tile)[None, :]
                tl.store(part, minus_dZ1, mask=hidden_mask(rows, hidden_columns(chunk, tile), tile))
        if tile.chunks > 1:
            tl.debug_barrier()
        d_scale += A1 * dP1_G1 + A2 * dP2_G2
        d_last_scale -= committed * rates_here * along_dW
        minus_dlr = tl.sum(minus_scale * (C1 * dP1_G1 + C2 * dP2_G2), 0)
        tl.store(d_lr + at + row_offsets(H, tile), -minus_dlr - s_last * along_dW, mask=rows)
        minus_dC1 = tl.where(causal(tile), minus_scale * lr_columns * dP1_G1, 0.0)
        d_q = dO - dot(minus_dC1, k_rows, tile) - own(through_P1, tile)
        tl.store(dq + here, d_q.to(tile.operand), mask=mask)

        # Through the inner gradient.
        x_hat, r = normalised(own(X2_W2, tile) + b2, eps, tile)
        v_rows = tl.load(v + here, mask=mask, other=0.0)
        error = gamma * x_hat + beta - (v_rows.to(tl.float32) - k_rows.to(tl.float32))
        minus_dG2 += own(through_E, tile)
        G2_float = G2_rows.to(tl.float32)
        along_G2 = tl.sum(minus_dG2 * G2_float, 1)[:, None]
        minus_dZ2_rows, minus_de, minus_d_gamma = inner_gradient_backward(
            minus_dG2, along_G2, G2_float, error, x_hat, r, gamma, tile
        )
        d_gamma -= minus_d_gamma
        d_beta -= minus_de
        tl.store(dv + here, minus_de.to(tile.operand), mask=mask)
        db2 -= token_sums(minus_dP2_rows, tile) + token_sums(minus_dZ2_rows, tile)
        d_k = -dot(tl.trans(minus_dC1), q_rows, tile, minus_de + s_last * lr * own(through_G1, tile))
        minus_dZ2 = expanded(minus_dZ2_rows, tile)
        through_Z1 = tl.zeros((R, PF), tl.float32)
        for chunk in tl.range(0, tile.chunks, num_stages=1):
            if tile.chunks > 1:
                W1, b1, W2 = load_hidden_state(state, contiguous, sequence, head, chunk, H, tile)
                dW1, db1, dW2 = load_hidden_state(d_state, contiguous, sequence, head, chunk, H, tile)
                Z1 = load_hidden(Z1_kept + at * tile.hidden + hidden_offsets(chunk, H, tile), rows, chunk, tile)
                part = scratch[3] + (sequence.to(tl.int64) * H + head) * R * tile.hidden
                part += tl.arange(0, R)[:, None] * tile.hidden + hidden_columns(chunk, tile)[None, :]
                minus_dZ1 = tl.load(part, mask=hidden_mask(rows, hidden_columns(chunk, tile), tile), other=0.0)
            X2, slope, _ = gelu(Z1)
            minus_dZ1 += dot(minus_dZ2, W2, tile) * slope
            through_Z1 = dot(minus_dZ1, tl.trans(W1), tile, through_Z1)
            db1 -= token_sums(minus_dZ1, tile)
            dW1 -= dot(tl.trans(K), minus_dZ1, tile)
            dW2 -= dot(tl.trans(minus_dZ2), X2, tile)
            if tile.chunks > 1:
                store_hidden_state(d_state, (dW1, db1, dW2), sequence, head, chunk, H, tile)
        if tile.chunks > 1:
            tl.debug_barrier()
        tl.store(dk + here, (d_k - own(through_Z1, tile)).to(tile.operand), mask=mask)

    if tile.chunks == 1:
        store_hidden_state(d_state, (dW1, db1, dW2), sequence, head, 0, H, tile)
    once = b_mask & first_rows(tile)
    tl.store(d_weights[3] + parameter_offsets((H * D, D, 1), sequence, head, tile), db2, mask=once)
    store_head_sums(partial_sums[0], d_gamma, sequence, head, H, tile)
    store_head_sums(partial_sums[1], d_beta, sequence, head, H, tile)
    store_token_sums(partial_sums[2], tl.sum(d_scale, 1), sequence, head, H, tile)
    store_token_sums(partial_sums[3], d_last_scale, sequence, head, H, tile)


def mlp_backward(
    grad_o: Tensor,
    grad_W1: Tensor,
    grad_b1: Tensor,
    grad_W2: Tensor,
    grad_b2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    b2: Tensor,
    Z1: Tensor,
    G2: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of ``mlp_forward``'s first eleven arguments, in their order; those of the four weights per sequence.

    Args:
        grad_o: gradient of the outputs ``[B, L, H, D]``.
        grad_W1: of the outgoing W1 ``[N, H, D, hidden]``, float32; the next three alike.
        W1: the outgoing weights of the forward, from which the walk back starts, as the next three.
        Z1: what the forward kept, as G2.

    The others are the forward's arguments, and the same errors are raised. Sums over sequences are taken in a fixed
    order: two runs give the same bits.
    """
    results, sums, prepared = prepare_mlp_backward(
        grad_o, (grad_W1, grad_b1, grad_W2, grad_b2), q, k, v, inner_lr, token_scale, (W1, b1, W2, b2), Z1, G2,
        ln_weight, ln_bias, starts, lengths, eps,
    )  # fmt: skip
    prepared.run()
    d_gamma, d_beta, d_scale, d_last_scale = (x.sum(0) for x in sums)
    d_scale = d_scale.sum(0)
    d_scale[-1] += d_last_scale.sum()
    dq, dk, dv, d_lr, *d_weights = results
    return dq, dk, dv, d_lr, d_scale, *d_weights, d_gamma, d_beta


def prepare_mlp_backward(
    grad_o: Tensor,
    grad_weights: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    weights: tuple[Tensor, ...],
    Z1: Tensor,
    G2: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], launch.Launch]:
    """Allocate the results and the sums per sequence, and make the launch that fills them."""
    L, H, D = q.shape[1:]
    N, K, hidden = launch.num_sequences(q, starts), token_scale.numel(), Z1.shape[-1]
    choice, tile = launch.plan("mlp_backward", q, K, hidden)
    d_tokens = [launch.new_tokens(x, starts) for x in (q, k, v, inner_lr)]

    def new(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes)

    weight_shapes = tuple(tuple(w.shape) for w in weights)
    d_weights, sums = new(*weight_shapes), new((N, H, D), (N, H, D), (N, H, K), (N, H, K))
    scratch = new(*weight_shapes[:3], (N, H, tile.rows, hidden)) if tile.chunks > 1 else (None,) * 4
    arguments = (
        (grad_o.contiguous(), *grad_weights),
        launch.contiguous(q, k, v, G2, Z1),
        launch.contiguous(inner_lr, token_scale),
        weights,
        launch.contiguous(ln_weight, ln_bias),
        launch.contiguous(starts, lengths),
        tuple(d_tokens),
        d_weights,
        sums,
        scratch,
        tuple(w.stride() for w in (*weights, *grad_weights)),
        L,
        H,
        eps,
        tile,
    )
    grid = (N * triton.cdiv(H, choice.heads),)
    return (*d_tokens, *d_weights), sums, launch.Launch(mlp_backward_kernel, grid, arguments, choice)
