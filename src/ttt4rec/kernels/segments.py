"""TTT-MLP's backward of wide heads: three launches a segment, from the last to the first.

Two of them work on all mini-batches of a segment at once. What must go from mini-batch to mini-batch is left to the
third, the gradient of the weights. docs/kernels.md counts what each moves.
"""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ..arguments import Scan
from . import launch, limits, mlp_backward
from .segment_outputs import segment_outputs_kernel
from .segment_places import new_slots
from .segment_replay import segment_replay_kernel
from .segment_walk import segment_walk_kernel

OPS = ("segment_replay", "segment_outputs", "segment_walk")


@launch.on_its_device
def takes(scan: Scan) -> bool:
    """Whether a backward goes by segments: the launch table has cuts for that, and a sequence fills a row at most.

    The host does not read lengths. Of sequences packed in one row each may be as long as all of it, and most of that
    many launches would find nothing to do.
    """
    packed = scan.starts is not None and scan.q.shape[0] == 1
    short = launch.has_cut(OPS[0], scan.q, scan.token_scale.numel())
    return short and not packed and scan.log_decay is None


def mlp_scan_backward(scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As ``mlp_backward.mlp_scan_backward``, which it leaves to that where it does not go by segments."""
    go = by_segments if takes(scan) else mlp_backward.mlp_scan_backward
    return go(scan, kept, grads)


@launch.on_its_device
def by_segments(scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same where it goes by segments."""
    limits.check("mlp_backward", scan.q, scan.token_scale.numel())
    (d_tokens, d_weights, of_slots, of_sequences), launches = prepare(scan, kept, grads)
    for each in launches:
        each.run()
    (*slot_sums, scale), (*sequence_sums, last_scale) = of_slots, of_sequences
    gamma, beta = map(torch.cat, zip(slot_sums, sequence_sums, strict=True))
    return launch.all_gradients(d_tokens, d_weights, (gamma, beta, scale, last_scale), ())


def prepare(
    scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[tuple[tuple[Tensor, ...], ...], Iterator[launch.Launch]]:
    """Allocate the results and what the kernels leave for each other, and make the launches.

    Results are gradients of tokens and rates; of the weights; of γ, β and s, sums of each slot and segment; and of γ, β
    and s_last, of each sequence and segment.
    """
    q, (Z1, G2, checkpoints), (grad_o, *grad_weights) = scan.q, kept, grads
    (L, H, D), K, N = q.shape[1:], scan.token_scale.numel(), scan.weights[0].shape[0]
    cuts = [(launch.fenced(cut), tile) for cut, tile in (launch.plan(op, q, K, scan.hidden) for op in OPS)]
    tile = cuts[-1][1]
    mini_batches = triton.cdiv(L, K)
    rounds = triton.cdiv(mini_batches, scan.segment)
    slots, first = new_slots(scan, tile)
    n = slots.weights.shape[0]
    d_tokens, d_weights, *_ = launch.new_gradients(scan)
    for d, grad in zip(d_weights, grad_weights, strict=True):
        d.copy_(grad)
    of_slots, of_sequences = (
        tuple(q.new_zeros(rounds * m, H, size, dtype=torch.float32) for size in (D, D, K)) for m in (n, N)
    )
    # Zeros, since a walk's first pass reads what no mini-batch has left there.
    scratch = q.new_zeros(N, H, tile.rows, scan.hidden, dtype=torch.float32) if tile.chunks > 1 else None
    weights, strides = launch.strided(*scan.weights)
    tokens = launch.contiguous(q, scan.k, scan.v, G2, Z1)
    rates = launch.contiguous(scan.inner_lr, scan.token_scale)
    layer_norm = launch.contiguous(scan.ln_weight, scan.ln_bias)
    spans = launch.contiguous(scan.starts, scan.lengths)
    dq, dk, dv, d_lr = d_tokens
    lr_part = torch.empty_like(d_lr)
    of_replay = tokens, rates, weights, checkpoints, first, spans, tuple(slots), strides
    of_outputs = (
        *(grad_o.contiguous(), tokens, rates, first, layer_norm, spans, tuple(slots)),
        *((dq, lr_part), of_slots),
    )
    of_walk = (
        *(tokens, rates, first, layer_norm, spans, tuple(slots), lr_part, (dk, dv, d_lr)),
        *(d_weights, of_sequences, scratch),
    )
    sizes = L, H, scan.segment

    def launches() -> Iterator[launch.Launch]:
        (replay, replay_tile), (outputs, outputs_tile), (walk, walk_tile) = cuts
        for back in range(rounds):
            yield launch.Launch(
                segment_replay_kernel, (N * H, replay_tile.chunks), (*of_replay, *sizes, back, replay_tile), replay
            )
            yield launch.Launch(
                segment_outputs_kernel,
                (N * H, min(mini_batches, scan.segment)),
                (*of_outputs, *sizes, back, n, scan.eps, outputs_tile),
                outputs,
            )
            yield launch.Launch(segment_walk_kernel, (N * H,), (*of_walk, *sizes, back, N, scan.eps, walk_tile), walk)

    return (d_tokens, d_weights, of_slots, of_sequences), launches()
