# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""The small kernel before a scan that forgets: how much of every mini-batch is lost, and the initial weights, centred.

Numbers in brackets are equations of docs/mathematics.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Scan
from . import launch
from .copies import store_copy
from .forgetting import load_initial, only_copy, share_lost
from .hidden_forgetting import initial_strides
from .hidden_layer import load_b2, load_state, store_hidden_copy
from .primitives import centred_weights


@triton.jit
def store_shares(log_decay, shares, kept, spans, L, H, heads: tl.constexpr, each: tl.constexpr, tile: tl.constexpr):
    """1 - A and A of a sequence's mini-batches, at the first token of each; ``each`` of them at once.

    A short mini-batch loses nothing.
    """
    starts, lengths = spans
    n = tl.program_id(0)
    if starts is None:
        first = n.to(tl.int64) * L
        length = L
    else:
        first = tl.load(starts + n).to(tl.int64)
        length = tl.load(lengths + n).to(tl.int32)
    head = tl.arange(0, heads)[None, :]
    for begin in tl.range(0, length, each * tile.mini_batch):
        start = begin + (tl.arange(0, each) * tile.mini_batch)[:, None]
        at, mask = (first + start) * H + head, (start < length) & (head < H)
        complete = (start + tile.mini_batch <= length) & (head < H)
        log_kept = tl.zeros((each, heads), tl.float32)
        for j in tl.range(0, tile.mini_batch):
            log_kept += tl.load(log_decay + at + j * H, mask=complete, other=0.0)
        tl.store(shares + at, share_lost(log_kept), mask=mask)
        tl.store(kept + at, tl.exp(log_kept), mask=mask)


@triton.jit
def store_centred(initial, copy, head, H, tile: tl.constexpr):
    """Copy the initial weights of P heads, centred."""
    place = tl.program_id(0), head, 0, 0, H
    decays = None, None, initial, copy
    if tile.hidden > 0:
        b2 = centred_weights(load_b2(initial, initial_strides(tile), place, tile), tile)
        for chunk in tl.range(0, tile.chunks, num_stages=1):
            state = load_state(initial, initial_strides(tile), place, chunk, tile, centre=True)
            store_hidden_copy(copy, only_copy(), state, b2, head, H, chunk, tile)
    else:
        W, b = load_initial(decays, place, tile)
        store_copy(copy, only_copy(), centred_weights(W, tile), centred_weights(b, tile), head, H, tile)


@triton.jit(do_not_specialize=["L", "H", "num_sequences"])
def decays_kernel(
    log_decay,  # [B, L, H]
    shares,  # [B, L, H]: 1 - A of every mini-batch at its first token
    kept,  # [B, L, H]: A
    initial,  # the initial weights [H, ...]
    copy,  # of them [1, H, numbers]
    spans,  # starts, lengths [N], or None twice
    L,
    H,
    num_sequences,
    heads: tl.constexpr,
    each: tl.constexpr,
    tile: tl.constexpr,
):
    """One program makes the shares of a sequence, and another one the copy of P heads."""
    if tl.program_id(0) < num_sequences:
        store_shares(log_decay, shares, kept, spans, L, H, heads, each, tile)
    else:
        store_centred(initial, copy, (tl.program_id(0) - num_sequences) * tile.heads, H, tile)


Decays = tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor]
"""1 - A and A of every mini-batch at its first token [B, L, H]; the initial weights, and their copy."""


def prepared_decays(scan: Scan, op: str) -> tuple[Decays | None, launch.Launch | None]:
    """What a kernel is given, and the launch before it, that fills it; None of a scan that forgets nothing."""
    if scan.log_decay is None:
        return None, None
    N, H = scan.weights[0].shape[:2]
    choice, tile = launch.plan(op, scan.q, scan.token_scale.numel(), scan.hidden)
    log_decay = scan.log_decay.contiguous()
    shares, kept = torch.empty_like(log_decay), torch.empty_like(log_decay)
    initial = tuple(w.contiguous() for w in scan.initial)
    copy = log_decay.new_empty(1, H, sum(w[0].numel() for w in initial))
    heads = triton.next_power_of_2(H)
    spans = launch.contiguous(scan.starts, scan.lengths)
    cut = heads, max(1, 32 // heads), tile
    arguments = (log_decay, shares, kept, initial, copy, spans, *scan.q.shape[1:3], N, *cut)
    first = launch.Launch(decays_kernel, (N + triton.cdiv(H, choice.heads),), arguments, choice)
    return (shares, kept, initial, copy), first
