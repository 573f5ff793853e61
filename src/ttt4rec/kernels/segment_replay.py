# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""The first kernel of TTT-MLP's backward by segments: the weights before each mini-batch, chunk by chunk at once.

The forward's updates once more, as ``mlp_replay`` makes them. A program has a chunk of the hidden features, since an
update of it needs nothing of another one.

Numbers in brackets are equations of docs/mathematics.md.
"""

import triton
import triton.language as tl

from .copies import first_state
from .mlp_replay import first_weights, replayed
from .primitives import program_place
from .segment_places import segment_bounds, store_weights_in_slot


@triton.jit(do_not_specialize=["L", "H", "segment", "back"])
def segment_replay_kernel(
    tokens,  # q, k, v and the forward's G2 [B, L, H, D], Z1 [B, L, H, hidden]
    rates,  # inner_lr [B, L, H], token_scale [K]
    weights,  # the incoming W1 [N, H, D, hidden], b1 [N, H, hidden], W2 [N, H, hidden, D], b2 [N, H, D]
    checkpoints,  # [number, H, 2 D hidden + hidden + D]
    first_states,  # each sequence's first slot [N], or None
    spans,  # starts, lengths [N], or None twice
    slots,  # see ``Slots``
    strides,  # of weights; all others are contiguous
    L,
    H,
    segment,  # mini-batches
    back,  # segments behind this one
    tile: tl.constexpr,
):
    """One program: a chunk of a head of one sequence, through the mini-batches of one segment, (9)."""
    _, token_scale = rates
    place = program_place(spans, L, H, tile)
    sequence, head, _, length, _ = place
    chunk = tl.program_id(1)
    begin, end = segment_bounds(length, back, segment, tile)
    if begin < end:
        slot = first_state(first_states, sequence, L, segment, tile)
        last_scale = tl.load(token_scale + tile.mini_batch - 1)
        state, b2 = first_weights(weights, strides, checkpoints, place, begin, segment, chunk, tile)
        store_weights_in_slot(slots, slot, state, b2, head, H, chunk, tile)
        for m in tl.range(begin, end - 1):
            state, b2 = replayed(state, b2, (), (), tokens, rates, last_scale, place, m, chunk, tile)
            store_weights_in_slot(slots, slot + (m + 1 - begin), state, b2, head, H, chunk, tile)
