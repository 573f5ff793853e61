"""Causal depthwise convolutions of one input, rotated where asked: one pass over the tokens a tap, in place."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .projection import rotation_table, turn, turned


def convolution_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    offsets: Tensor | None,
    lead: int,
) -> list[Tensor]:
    """``y_t = b + Σ_j w_j x_{t - (taps - 1) + j}`` for each weight and bias, zeros before x; then RoPE on every y.

    Args:
        x: ``[B, lead + L, C]``; the first ``lead`` tokens are context and have no output.
        weights: each ``[C, taps]``.
        biases: each ``[C]``.
        cos: of the angles at every place in a mini-batch ``[K, D/2]``; None: no rotation.
        sin: the same.
        positions: every output's place in its mini-batch, ``[L]`` or ``[B, L]``.
        offsets: how far back an output may read, ``[B, L]``; None: to the beginning of x.
        lead: number of context tokens.

    Returns:
        For each weight ``[B, L, C]`` in x's dtype. The arithmetic is float32 at least.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    table = _table(x, cos, sin, positions)
    outputs = []
    for weight, bias in zip(weights, biases, strict=True):
        taps = weight.to(wide.dtype).t().contiguous()
        y = torch.addcmul(bias.to(wide.dtype), wide[:, lead:], taps[-1])
        for tap, source, target, kept in _shifts(taps, wide, y, offsets, lead):
            target.addcmul_(_only(source, kept), tap)
        outputs.append((y if table is None else turn(y, table)).to(x.dtype))
    return outputs


def convolution_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    offsets: Tensor | None,
    lead: int,
) -> list[Tensor]:
    """Gradients of x, of every weight and of every bias."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    table = _table(x, cos, None if sin is None else -sin, positions)
    dx, d_weights, d_biases = torch.zeros_like(wide), [], []
    for grad, weight, bias in zip(grads, weights, biases, strict=True):
        g = grad.to(wide.dtype) if table is None else turned(grad.to(wide.dtype), table)
        taps = weight.to(wide.dtype).t().contiguous()
        dx[:, lead:].addcmul_(g, taps[-1])
        d_taps = torch.zeros_like(taps)
        d_taps[-1] = (g * wide[:, lead:]).sum((0, 1))
        for tap, d_source, part, kept in _shifts(taps, dx, g, offsets, lead):
            d_source.addcmul_(_only(part, kept), tap)
        for d_tap, source, part, kept in _shifts(d_taps, wide, g, offsets, lead):
            d_tap.copy_(_only(part * source, kept).sum((0, 1)))
        d_weights.append(d_taps.t().to(weight.dtype).contiguous())
        d_biases.append(g.sum((0, 1)).to(bias.dtype))
    return [dx.to(x.dtype), *d_weights, *d_biases]


def _shifts(
    taps: Tensor, x: Tensor, y: Tensor, offsets: Tensor | None, lead: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Every tap but the last, the part of x ``[B, lead + L, C]`` it reads, and that of y ``[B, L, C]`` it goes to.

    Last which tokens of these parts it does read, ``[B, n, 1]``; None: all.
    """
    for back in range(1, taps.shape[0]):
        first = max(0, back - lead)  # before it there is nothing to read
        if first < y.shape[1]:
            kept = None if offsets is None else (offsets[:, first:] >= back).unsqueeze(-1)
            yield taps[-1 - back], x[:, lead + first - back : x.shape[1] - back], y[:, first:], kept


def _only(x: Tensor, kept: Tensor | None) -> Tensor:
    """x where it is kept, zeros elsewhere: also in place of another sequence's infinities and NaN."""
    return x if kept is None else torch.where(kept, x, 0)


def _table(x: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None) -> Tensor | None:
    if cos is None or sin is None or positions is None:
        return None
    return rotation_table(cos, sin, positions, x.shape[-1] // (2 * cos.shape[1]))
