# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-Linear backward: one launch that walks the mini-batches from the last to the first and rebuilds W on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .primitives import (
    causal,
    centred,
    dot,
    expanded,
    first_rows,
    inner_gradient_backward,
    layer_norm_backward,
    load_layer_norm,
    normalised,
    own,
    parameter_mask,
    parameter_offsets,
    program_place,
    rounded,
    row_head,
    row_offsets,
    row_token,
    store_head_sums,
    store_token_sums,
    tile_offsets,
    token_sums,
    weight_mask,
    weight_offsets,
)


@triton.jit(do_not_specialize=["L", "H"])
def linear_backward_kernel(
    grads,  # of o [B, L, H, D], of W1 [N, H, D, D] and b1 [N, H, D]
    tokens,  # q, k, v and the forward's G [B, L, H, D]
    rates,  # inner_lr [B, L, H], token_scale [K]
    weights,  # the outgoing W1 [N, H, D, D], b1 [N, H, D]
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    d_tokens,  # of q, k, v [B, L, H, D] and inner_lr [B, L, H]
    d_weights,  # of the incoming W1, b1
    partial_sums,  # per sequence: γ and β's gradients [N, H, D], s's and the updates' share of s_last's [N, H, K]
    strides,  # of W1's and b1's gradients and of weights; all others are contiguous
    L,
    H,
    eps,
    tile: tl.constexpr,
):
    """One program: P heads of one sequence, from the last mini-batch to the first; W, b, dW and db in registers.

    x̂, y, out and C = tril(Q Kᵀ + 1) as in the forward, at the weights rebuilt by
    W ← W + s_last Kᵀ U                              b ← b + s_last Σ_j U_j,   U = lr ∘ G
    dout = layer norm's backward of γ ∘ dO           d(CU) = -s ∘ dout,  dC = tril(d(CU) Uᵀ)
    dU = Cᵀ d(CU) - s_last X,  X = K dW + db         dG = lr ∘ dU,  dlr = Σ_d G ∘ dU
    ds = -Σ_d dout ∘ (C U),  ds_last -= Σ U ∘ X
    dZ, de, dγ from dG                               dV = -de
    dQ = dO + dout Wᵀ + dC K                         dK = de + dZ Wᵀ + dCᵀ Q - s_last U dWᵀ
    dW ← dW + Qᵀ dout + Kᵀ dZ                        db ← db + Σ_i dout_i + Σ_j dZ_j

    In the code all but dO, dq and the parameters' gradients carry the opposite sign, with which they enter nearly
    everywhere.
    """
    grad_o, grad_W, grad_b = grads
    q, k, v, G_kept = tokens
    inner_lr, token_scale = rates
    dq, dk, dv, d_lr = d_tokens
    grad_W_strides, grad_b_strides, W_strides, b_strides = strides
    sequence, head, first, length = program_place(spans, L, H, tile)

    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    D: tl.constexpr = tile.head_dim
    positions, features = row_token(tile), tl.arange(0, tile.features)
    head_exists = head + row_head(tile) < H
    columns = features[None, :] < tile.head_dim
    b_mask = parameter_mask(head, H, tile)
    elements = tile_offsets(H, tile)
    gamma, beta = load_layer_norm(layer_norm, head, H, tile)
    minus_scale = -tl.load(token_scale + positions, mask=positions < tile.mini_batch, other=0.0)[:, None]
    last_scale = tl.load(token_scale + tile.mini_batch - 1)
    W_mask = weight_mask(head, H, tile)
    W = tl.load(weights[0] + weight_offsets(W_strides, sequence, head, tile), mask=W_mask, other=0.0)
    b = tl.load(weights[1] + parameter_offsets(b_strides, sequence, head, tile), mask=b_mask, other=0.0)
    W, b = centred(W, tile), centred(b, tile)
    dW = tl.load(grad_W + weight_offsets(grad_W_strides, sequence, head, tile), mask=W_mask, other=0.0)
    db = tl.load(grad_b + parameter_offsets(grad_b_strides, sequence, head, tile), mask=b_mask, other=0.0)

    d_gamma = tl.zeros((R, F), tl.float32)
    d_beta = tl.zeros((R, F), tl.float32)
    d_scale = tl.zeros((R,), tl.float32)
    d_last_scale = tl.zeros((R,), tl.float32)
    num_mini_batches = tl.cdiv(length, tile.mini_batch)
    for t in tl.range(0, num_mini_batches):
        start = (num_mini_batches - 1 - t) * tile.mini_batch
        rows = head_exists & (positions < min(tile.mini_batch, length - start))
        mask = rows[:, None] & columns
        at = (first + start) * H + head
        here = at * D + elements
        # Rebuild the weights before the mini-batch.
        k_rows = tl.load(k + here, mask=mask, other=0.0)
        G = tl.load(G_kept + here, mask=mask, other=0.0)
        lr = tl.load(inner_lr + at + row_offsets(H, tile), mask=rows, other=0.0)
        lr = tl.where(rows, lr, 0.0)
        K = expanded(k_rows, tile)
        committed = tl.where(start + tile.mini_batch <= length, 1.0, 0.0)
        s_last = committed * last_scale
        U = lr[:, None] * G.to(tl.float32)
        W -= -s_last * dot(tl.trans(K), U, tile)
        b -= -s_last * token_sums(U, tile)

        # Through the output.
        q_rows = tl.load(q + here, mask=mask, other=0.0)
        Q = expanded(q_rows, tile)
        C = tl.where(causal(tile), dot(q_rows, tl.trans(k_rows), tile) + 1.0, 0.0)
        CU = dot(C, U, tile)
        p_hat, p_r = normalised(dot(Q, W, tile, b) + minus_scale * CU, eps, tile)
        dO = tl.load(grad_o + here, mask=mask, other=0.0).to(tl.float32)
        d_gamma += dO * p_hat
        d_beta += dO
        minus_dout = layer_norm_backward(gamma * dO, p_hat, -p_r, tile)
        d_scale += tl.sum(minus_dout * CU, 1)
        minus_dCU = minus_scale * minus_dout
        minus_dC = tl.where(causal(tile), dot(minus_dCU, tl.trans(U), tile), 0.0)
        d_q = dO - dot(minus_dC, k_rows, tile, own(dot(minus_dout, tl.trans(W), tile), tile))
        tl.store(dq + here, rounded(d_q, tile), mask=mask)

        # Through the steps.
        X = dot(K, dW, tile, db)
        minus_dU = dot(tl.trans(C), minus_dCU, tile, s_last * X)
        d_last_scale -= committed * tl.sum(U * X, 1)
        # G, lr and k are read again, from the cache, as there are no registers to keep them in.
        G = tl.load(G_kept + here, mask=mask, other=0.0)
        lr = tl.where(rows, tl.load(inner_lr + at + row_offsets(H, tile), mask=rows, other=0.0), 0.0)
        minus_dlr = tl.sum(G.to(tl.float32) * minus_dU, 1)
        tl.store(d_lr + at + row_offsets(H, tile), -minus_dlr, mask=rows)

        # Through the inner gradient.
        k_rows = tl.load(k + here, mask=mask, other=0.0)
        K = expanded(k_rows, tile)
        x_hat, r = normalised(dot(K, W, tile, b), eps, tile)
        v_rows = tl.load(v + here, mask=mask, other=0.0)
        error = gamma * x_hat + beta - (v_rows.to(tl.float32) - k_rows.to(tl.float32))
        minus_dZ, minus_de, minus_d_gamma = inner_gradient_backward(
            lr[:, None] * minus_dU, (lr * minus_dlr)[:, None], G.to(tl.float32), error, x_hat, r, gamma, tile
        )
        d_gamma -= minus_d_gamma
        d_beta -= minus_de
        tl.store(dv + here, rounded(minus_de, tile), mask=mask)
        through_W = own(dot(minus_dZ, tl.trans(W), tile) + s_last * dot(U, tl.trans(dW), tile), tile)

        dW -= dot(tl.trans(Q), minus_dout, tile) + dot(tl.trans(K), minus_dZ, tile)
        db -= token_sums(minus_dout, tile) + token_sums(minus_dZ, tile)

        # The last product: Triton splits all tiles among the warps as suits its shape, and [R, F] repeats least.
        minus_dk = dot(tl.trans(minus_dC), q_rows, tile, minus_de + through_W)
        tl.store(dk + here, rounded(-minus_dk, tile), mask=mask)

    tl.store(d_weights[0] + weight_offsets((H * D * D, D * D, D, 1), sequence, head, tile), dW, mask=W_mask)
    once = b_mask & first_rows(tile)
    tl.store(d_weights[1] + parameter_offsets((H * D, D, 1), sequence, head, tile), db, mask=once)
    store_head_sums(partial_sums[0], d_gamma, sequence, head, H, tile)
    store_head_sums(partial_sums[1], d_beta, sequence, head, H, tile)
    store_token_sums(partial_sums[2], d_scale, sequence, head, H, tile)
    store_token_sums(partial_sums[3], d_last_scale, sequence, head, H, tile)


@launch.on_its_device
def linear_backward(
    grad_o: Tensor,
    grad_W1: Tensor,
    grad_b1: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    G: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of ``linear_forward``'s first nine arguments, in their order; those of W1 and b1 per sequence.

    Args:
        grad_o: gradient of the outputs ``[B, L, H, D]``.
        grad_W1: of the outgoing W1 ``[N, H, D, D]``, float32.
        grad_b1: of the outgoing b1 ``[N, H, D]``, float32.
        W1: the outgoing weights of the forward, from which the walk back starts, as b1.
        G: the inner gradients the forward returned.

    The others are the forward's arguments, and the same errors are raised. Sums over sequences are
    taken in a fixed order: two runs give the same bits.
    """
    launch.check_compiler("linear_backward", q.shape[-1], token_scale.numel())
    results, sums, prepared = prepare_linear_backward(
        grad_o, grad_W1, grad_b1, q, k, v, inner_lr, token_scale, W1, b1, G, ln_weight, ln_bias, starts, lengths,
        eps,
    )  # fmt: skip
    prepared.run()
    d_gamma, d_beta, d_scale, d_last_scale = (x.sum(0) for x in sums)
    d_scale = d_scale.sum(0)
    d_scale[-1] += d_last_scale.sum()
    dq, dk, dv, d_lr, dW, db = results
    return dq, dk, dv, d_lr, d_scale, dW, db, d_gamma, d_beta


def prepare_linear_backward(
    grad_o: Tensor,
    grad_W1: Tensor,
    grad_b1: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    G: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], launch.Launch]:
    """Allocate the results and the sums per sequence, and make the launch that fills them."""
    L, H, D = q.shape[1:]
    N, K = launch.num_sequences(q, starts), token_scale.numel()
    choice, tile = launch.plan("linear_backward", q, K)
    d_tokens = [launch.new_tokens(x, starts) for x in (q, k, v, inner_lr)]
    d_weights, sums = [
        [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes]
        for shapes in (((N, H, D, D), (N, H, D)), ((N, H, D), (N, H, D), (N, H, K), (N, H, K)))
    ]
    arguments = (
        (grad_o.contiguous(), grad_W1, grad_b1),
        launch.contiguous(q, k, v, G),
        launch.contiguous(inner_lr, token_scale),
        (W1, b1),
        launch.contiguous(ln_weight, ln_bias),
        launch.contiguous(starts, lengths),
        tuple(d_tokens),
        tuple(d_weights),
        tuple(sums),
        tuple(x.stride() for x in (grad_W1, grad_b1, W1, b1)),
        L,
        H,
        eps,
        tile,
    )
    grid = (N * triton.cdiv(H, choice.heads),)
    prepared = launch.Launch(linear_backward_kernel, grid, arguments, choice)
    return (*d_tokens, *d_weights), tuple(sums), prepared
