"""Causal depthwise convolutions of one input, rotated where asked: one pass over the tokens a tap, in place."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..arguments import Convolution
from .projection import rotation_table, turn, turned


def convolution(given: Convolution) -> tuple[Tensor, ...]:
    """For each weight and bias ``[B, L, C]`` in x's dtype. The arithmetic is float32 at least."""
    x, lead = given.x, given.lead
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    table = _table(given, given.sin)
    outputs = []
    for weight, bias in zip(given.weights, given.biases, strict=True):
        taps = weight.to(wide.dtype).t().contiguous()
        y = torch.addcmul(bias.to(wide.dtype), wide[:, lead:], taps[-1])
        for tap, source, target, kept in _shifts(taps, wide, y, given.offsets, lead):
            target.addcmul_(_only(source, kept), tap)
        outputs.append((y if table is None else turn(y, table)).to(x.dtype))
    return tuple(outputs)


def convolution_backward(given: Convolution, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of x, of every weight and of every bias; nothing is kept."""
    x, lead, offsets = given.x, given.lead, given.offsets
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    table = _table(given, None if given.sin is None else -given.sin)
    dx, d_weights, d_biases = torch.zeros_like(wide), [], []
    for grad, weight, bias in zip(grads, given.weights, given.biases, strict=True):
        g = grad.to(wide.dtype) if table is None else turned(grad.to(wide.dtype), table)
        taps = weight.to(wide.dtype).t().contiguous()
        dx[:, lead:].addcmul_(g, taps[-1])
        d_taps = torch.zeros_like(taps)
        d_taps[-1] = (g * wide[:, lead:]).sum((0, 1))
        for tap, d_source, part, there in _shifts(taps, dx, g, offsets, lead):
            d_source.addcmul_(_only(part, there), tap)
        for d_tap, source, part, there in _shifts(d_taps, wide, g, offsets, lead):
            d_tap.copy_(_only(part * source, there).sum((0, 1)))
        d_weights.append(d_taps.t().to(weight.dtype).contiguous())
        d_biases.append(g.sum((0, 1)).to(bias.dtype))
    return dx.to(x.dtype), *d_weights, *d_biases


def _shifts(
    taps: Tensor, x: Tensor, y: Tensor, offsets: Tensor | None, lead: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Every tap but the last, the part of x ``[B, lead + L, C]`` it reads, and the part of y ``[B, L, C]`` it goes to.

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


def _table(given: Convolution, sin: Tensor | None) -> Tensor | None:
    if given.cos is None or sin is None or given.positions is None:
        return None
    return rotation_table(given.cos, sin, given.positions, given.x.shape[-1] // (2 * given.cos.shape[1]))
