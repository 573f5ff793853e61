# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""TTT-Linear backward: one launch that walks the mini-batches from the last to the first.

It goes segment by segment. The updates of a segment are replayed from the weights before it, which leaves the forward's
weights before each mini-batch in memory, that is in the cache; then the segment is walked back.

Numbers in brackets are equations of docs/mathematics.md.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Scan
from . import copies, launch, limits
from .copies import checkpoint_number, first_state, load_copy, load_state, load_steps, store_state
from .decays import prepared_decays
from .forgetting import (
    forget,
    load_centred,
    load_of_heads,
    no_gradients,
    store_decay_gradient,
    sums_of_means,
    through_means,
    to_initial,
    what_is_kept,
)
from .primitives import (
    causal,
    centred_weights,
    dot,
    expanded,
    inner_gradient_backward,
    layer_norm_backward,
    load_layer_norm,
    load_rows,
    load_scale,
    load_weights,
    loads_ahead,
    mini_batch_place,
    normalised,
    own,
    product,
    program_place,
    store_rates,
    store_rows,
    store_sums,
    store_weights,
    tile_offsets,
    token_sums,
    updated,
)


@triton.jit
def first_weights(weights, strides, checkpoints, place, begin, segment, tile: tl.constexpr):
    """W and b before the segment that begins at mini-batch begin of a sequence."""
    _, head, first, _, H = place
    if begin == 0:
        W, b = load_weights(weights, strides, place, tile)
        W, b = centred_weights(W, tile), centred_weights(b, tile)
    else:
        number = checkpoint_number(first + begin * tile.mini_batch, segment, tile)
        W, b = load_copy(checkpoints, number, head, H, tile)
    return W, b


@triton.jit
def place_of(m, place, tile: tl.constexpr):
    """``mini_batch_place`` of mini-batch m."""
    _, _, _, _, H = place
    return mini_batch_place(m * tile.mini_batch, place, tile_offsets(H, tile), tile)


@triton.jit
def replay(W, b, tokens, rates, decays, initial, states, number, place, begin, end, tile: tl.constexpr):
    """Copy the weights before each of mini-batches begin to end - 1 to the states from that number on.

    Given are those before the first. Updates are made as the forward made them; only complete mini-batches have one.
    """
    _, k, _, G_kept = tokens
    inner_lr, token_scale = rates
    _, head, _, _, H = place
    last_scale = tl.load(token_scale + tile.mini_batch - 1)
    store_state(states, number, W, b, head, H, tile)
    if decays is not None:  # always one mini-batch ahead, so that no update waits for it
        shares = load_of_heads(decays[0], begin * tile.mini_batch, place, tile)
    if loads_ahead(tile):
        steps_ahead = load_steps(k, G_kept, inner_lr, place_of(begin, place, tile), H, tile)
    for m in tl.range(begin, end - 1):
        if loads_ahead(tile):
            k_rows, G, lr = steps_ahead
            steps_ahead = load_steps(k, G_kept, inner_lr, place_of(m + 1, place, tile), H, tile)
        else:
            k_rows, G, lr = load_steps(k, G_kept, inner_lr, place_of(m, place, tile), H, tile)
        U = product(lr[:, None], G)
        if decays is not None:
            W, b = forget(W, b, initial, shares, tile)
            shares = load_of_heads(decays[0], (m + 1) * tile.mini_batch, place, tile)
        W, b = updated(W, b, expanded(k_rows, tile), U, last_scale, tile)
        store_state(states, number + (m + 1 - begin), W, b, head, H, tile)


@triton.jit
def through_output(dO, q_rows, k_rows, U, W, b, minus_scale, norm, tile: tl.constexpr):
    """Through the output, (15) to (17) and (19): dQ, C, -dout and -dC, and what the tokens add to dγ and ds."""
    gamma, _, eps = norm
    C = tl.where(causal(tile), dot(q_rows, tl.trans(k_rows), tile) + 1.0, 0.0)
    CU = dot(C, U, tile)
    p_hat, p_r = normalised(dot(expanded(q_rows, tile), W, tile, b) + minus_scale * CU, eps, tile)
    minus_dout = layer_norm_backward(gamma * dO, p_hat, -p_r, tile)
    minus_dC = tl.where(causal(tile), dot(minus_scale * minus_dout, tl.trans(U), tile), 0.0)
    d_q = dO - dot(minus_dC, k_rows, tile, own(dot(minus_dout, tl.trans(W), tile), tile))
    return d_q, C, minus_dout, minus_dC, dO * p_hat, tl.sum(minus_dout * CU, 1)


@triton.jit
def through_steps(C, minus_dout, minus_scale, U, K, dW, db, s_last, tile: tl.constexpr):
    """Through the steps U, (18): -dU, and what the tokens add to -ds_last."""
    X = dot(K, dW, tile, db)
    minus_dU = dot(tl.trans(C), minus_scale * minus_dout, tile, s_last * X)
    return minus_dU, tl.sum(U * X, 1)


@triton.jit
def through_inner_gradient(minus_dU, minus_dlr, lr, G, k_rows, v, mini_batch, W, b, norm, tile: tl.constexpr):
    """Through G at Z, (21) to (23): -dZ, -de and what the tokens add to -dγ; a norm is γ, β and ε."""
    gamma, beta, eps = norm
    x_hat, r = normalised(dot(expanded(k_rows, tile), W, tile, b), eps, tile)
    v_rows = load_rows(v, mini_batch, tile)
    error = gamma * x_hat + beta - (v_rows.to(tl.float32) - k_rows.to(tl.float32))
    return inner_gradient_backward(lr[:, None] * minus_dU, (lr * minus_dlr)[:, None], G, error, x_hat, r, gamma, tile)


@triton.jit
def through_inputs(
    q_rows, k_rows, U, W, d_state, minus_dout, minus_dC, minus_dZ, minus_de, s_last, kept, tile: tl.constexpr
):
    """Through Q W, K W and Q Kᵀ, (17), (20) and (24): -dk, and dW and db before the mini-batch.

    With A, of which P numbers are given or nothing, where it forgets.
    """
    dW, db = d_state
    K, Q = expanded(k_rows, tile), expanded(q_rows, tile)
    through_W = own(dot(minus_dZ, tl.trans(W), tile) + s_last * dot(U, tl.trans(dW), tile), tile)
    if len(kept) > 0:
        dW, db = what_is_kept(d_state, kept, tile)
    dW -= dot(tl.trans(Q), minus_dout, tile) + dot(tl.trans(K), minus_dZ, tile)
    db -= token_sums(minus_dout, tile) + token_sums(minus_dZ, tile)
    # The last product: Triton splits all tiles among the warps as suits its shape, and [R, F] repeats least.
    return dot(tl.trans(minus_dC), q_rows, tile, minus_de + through_W), (dW, db)


@triton.jit
def through_mini_batch(
    m,  # which one of the sequence
    copy,  # number of the state with the weights before it
    queries,  # its queries in a tuple, if they were loaded ahead
    tokens,
    rates,
    decays,
    initial,  # W̄ and b̄, or nothing
    states,
    grad_o,
    d_tokens,
    d_decays,
    d_state,  # dW, db behind it
    d_initial,  # gradients of W̄ and b̄ so far, or nothing
    sums,  # gradients of γ and β, s and s_last so far
    norm,  # γ, β, ε
    scales,  # -s of every row, s_last
    place,
    tile: tl.constexpr,
):
    """Store the gradients of a mini-batch's tokens; returns dW, db before it, d_initial, and the sums with it."""
    q, k, v, G_kept = tokens
    dq, dk, dv, d_lr = d_tokens
    dW, db = d_state
    inner_lr, _ = rates
    d_gamma, d_beta, d_scale, d_last_scale = sums
    minus_scale, last_scale = scales
    _, head, _, length, H = place
    start = m * tile.mini_batch
    mini_batch = mini_batch_place(start, place, tile_offsets(H, tile), tile)
    kept = ()
    if decays is not None:
        shares, kept = load_of_heads(decays[0], start, place, tile), load_of_heads(decays[1], start, place, tile)
    W, b = load_state(states, copy, head, H, tile)
    k_rows, G, lr = load_steps(k, G_kept, inner_lr, mini_batch, H, tile)
    committed = tl.where(start + tile.mini_batch <= length, 1.0, 0.0)
    s_last = committed * last_scale
    K, U = expanded(k_rows, tile), product(lr[:, None], G)
    if len(queries) > 0:
        q_rows = queries[0]
    else:
        q_rows = load_rows(q, mini_batch, tile)
    dO = load_rows(grad_o, mini_batch, tile).to(tl.float32)
    if decays is not None:  # here, where registers are free
        d_initial, along_dW = to_initial((W, b), d_state, initial, d_initial, shares, tile)
        store_decay_gradient(d_decays[0], along_dW, kept, committed, mini_batch, H, tile)

    d_q, C, minus_dout, minus_dC, gamma_terms, scale_terms = through_output(
        dO, q_rows, k_rows, U, W, b, minus_scale, norm, tile
    )
    d_gamma += gamma_terms
    d_beta += dO
    d_scale += scale_terms
    store_rows(dq, d_q, mini_batch, tile)

    minus_dU, last_scale_terms = through_steps(C, minus_dout, minus_scale, U, K, dW, db, s_last, tile)
    d_last_scale -= committed * last_scale_terms
    # Read again, from the cache, as there are no registers to keep them in.
    k_rows, G, lr = load_steps(k, G_kept, inner_lr, mini_batch, H, tile)
    G = G.to(tl.float32)
    minus_dlr = tl.sum(G * minus_dU, 1)
    store_rates(d_lr, -minus_dlr, mini_batch, H, tile)

    minus_dZ, minus_de, minus_gamma_terms = through_inner_gradient(
        minus_dU, minus_dlr, lr, G, k_rows, v, mini_batch, W, b, norm, tile
    )
    d_gamma -= minus_gamma_terms
    d_beta -= minus_de
    store_rows(dv, minus_de, mini_batch, tile)

    minus_dk, d_state = through_inputs(
        q_rows, k_rows, U, W, d_state, minus_dout, minus_dC, minus_dZ, minus_de, s_last, kept, tile
    )
    store_rows(dk, -minus_dk, mini_batch, tile)
    return d_state, d_initial, (d_gamma, d_beta, d_scale, d_last_scale)


@triton.jit(do_not_specialize=["L", "H", "segment"])
def linear_backward_kernel(
    grad_o,  # [B, L, H, D]
    grad_weights,  # of W1 [N, H, D, D], b1 [N, H, D]
    tokens,  # q, k, v and the forward's G [B, L, H, D]
    rates,  # inner_lr [B, L, H], token_scale [K]
    decays,  # ``decays.Decays``; None: nothing is forgotten
    weights,  # the incoming W1 [N, H, D, D], b1 [N, H, D]
    checkpoints,  # [number, H, D² + D]
    states,  # W1 [number, H, D, D], an operand where nothing is forgotten, and b1 [number, H, D]
    first_states,  # each sequence's first state [N], or None
    layer_norm,  # γ, β [H, D]
    spans,  # starts, lengths [N], or None twice
    d_tokens,  # of q, k, v [B, L, H, D] and inner_lr [B, L, H]
    d_weights,  # of W1, b1
    partial_sums,  # per sequence: γ and β's gradients [N, H, D], s's and the updates' share of s_last's [N, H, K]
    d_decays,  # of ln a [B, L, H], and per sequence of W̄ and b̄; nothing is forgotten: none
    grad_strides,  # of grad_weights
    strides,  # of weights; all others are contiguous
    L,
    H,
    segment,  # mini-batches
    eps,
    tile: tl.constexpr,
):
    """One program: P heads of one sequence, from the last mini-batch to the first; dW and db in registers.

    With the forward's values at its weights, (15) to (24), P called out.

    In the code all but dO, dq and the parameters' gradients carry the opposite sign, with which they enter nearly
    everywhere.
    """
    _, token_scale = rates
    place = program_place(spans, L, H, tile)
    sequence, head, _, length, _ = place
    gamma, beta = load_layer_norm(layer_norm, head, H, tile, one_row=True)
    norm = gamma, beta, eps
    scales = -load_scale(token_scale, tile), tl.load(token_scale + tile.mini_batch - 1)
    d_state = load_weights(grad_weights, grad_strides, place, tile)
    R: tl.constexpr = tile.rows
    F: tl.constexpr = tile.features
    no_rows, no_tokens = tl.zeros((R, F), tl.float32), tl.zeros((R,), tl.float32)
    sums = no_rows, no_rows, no_tokens, no_tokens

    initial, d_initial = (), ()
    if decays is not None:
        initial, d_initial = load_centred(decays, place, tile), no_gradients(tile)

    state = first_state(first_states, sequence, L, segment, tile)
    num_mini_batches = tl.cdiv(length, tile.mini_batch)
    num_segments = tl.cdiv(num_mini_batches, segment)
    for s in tl.range(0, num_segments, num_stages=1):
        begin = (num_segments - 1 - s) * segment
        end = min(begin + segment, num_mini_batches)
        W, b = first_weights(weights, strides, checkpoints, place, begin, segment, tile)
        if loads_ahead(tile):
            q_ahead = load_rows(tokens[0], place_of(end - 1, place, tile), tile)
        tl.debug_barrier()  # until all threads have read the states of the segment behind
        replay(W, b, tokens, rates, decays, initial, states, state, place, begin, end, tile)
        tl.debug_barrier()
        for t in tl.range(0, end - begin):
            m = end - 1 - t
            copy = state + (m - begin)
            queries = ()
            if loads_ahead(tile):
                queries = (q_ahead,)  # type: ignore[assignment]
                q_ahead = load_rows(tokens[0], place_of(tl.maximum(m - 1, 0), place, tile), tile)
            d_state, d_initial, sums = through_mini_batch(
                m, copy, queries, tokens, rates, decays, initial, states, grad_o, d_tokens, d_decays, d_state,
                d_initial, sums, norm, scales, place, tile,
            )  # fmt: skip

    store_weights(d_weights, d_state, place, tile)
    store_sums(partial_sums, sums, place, tile)
    if decays is not None:
        store_weights(d_decays[1:], d_initial, place, tile)
        d_outgoing = load_weights(grad_weights, grad_strides, place, tile)
        sums_at_ends = sums_of_means(d_outgoing, load_weights(weights, strides, place, tile), decays, place, tile)
        through_means(d_decays[0], sums_at_ends, decays, place, tile)


@launch.on_its_device
def linear_scan_backward(scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, lr, s, the weights per sequence, γ and β, from the gradients of o and the outgoing weights.

    G and the checkpoints are kept. Errors as in ``linear_scan``. Sums over sequences are taken in a fixed order: two
    runs give the same bits.
    """
    limits.check("linear_backward", scan.q, scan.token_scale.numel())
    gradients, prepared = prepare_linear_scan_backward(scan, kept, grads)
    prepared.run()
    return launch.all_gradients(*gradients)


def prepare_linear_scan_backward(
    scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[launch.Gradients, launch.Launch]:
    """Allocate the results and the sums per sequence, and make the launch that fills them."""
    q, weights, (G, checkpoints), (grad_o, *grad_weights) = scan.q, scan.weights, kept, grads
    L, H = q.shape[1:3]
    op = launch.kernel_of(scan, "backward")
    choice, tile = launch.plan(op, q, scan.token_scale.numel())
    gradients = launch.new_gradients(scan)
    decays, first = prepared_decays(scan, op)
    given, given_strides = launch.strided(*grad_weights)
    weights, strides = launch.strided(*weights)
    arguments = (
        grad_o.contiguous(),
        given,
        launch.contiguous(scan.q, scan.k, scan.v, G),
        launch.contiguous(scan.inner_lr, scan.token_scale),
        decays,
        weights,
        checkpoints,
        *copies.new_linear_states(scan),
        launch.contiguous(scan.ln_weight, scan.ln_bias),
        launch.contiguous(scan.starts, scan.lengths),
        *gradients,
        given_strides,
        strides,
        L,
        H,
        scan.segment,
        scan.eps,
        tile,
    )
    grid = (weights[0].shape[0] * triton.cdiv(H, choice.heads),)
    return gradients, launch.Launch(linear_backward_kernel, grid, arguments, choice, first)
