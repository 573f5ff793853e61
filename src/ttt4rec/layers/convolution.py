"""Causal depthwise convolutions over the tokens of each sequence, in one call or as a stream."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initialisation import Device
from .projection import Rope, causal_convolutions
from .spans import Spans, last_tokens


class CausalConv(nn.Module):
    """The parameters of a depthwise causal convolution, ``y_t = b + Σ_j w_j x_{t - (kernel - 1) + j}``."""

    def __init__(self, width: int, kernel: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, kernel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from U(-1/√kernel, 1/√kernel); the bias zero."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)


def convolve(
    convs: Sequence[CausalConv],
    x: Tensor,
    spans: Spans | None,
    context: Tensor | None,
    rope: Rope | None = None,
    *,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    """Run several convolutions of one kernel size over the same tokens.

    Args:
        convs: the convolutions.
        x: ``[B, L, width]``.
        spans: where the N sequences are; None: one a row.
        context: the inputs before the first ones, ``[N, kernel - 1, width]``; None: zeros.
        rope: how to rotate the outputs; None: not at all.
        backend: ``"reference"`` is the plain computation under autograd.

    Returns:
        The outputs ``[B, L, width]`` and the outgoing context, float32 at least.
    """
    weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs]
    size = weights[0].shape[1] - 1
    float_dtype = torch.promote_types(x.dtype, torch.float32)
    if spans is None:
        L = x.shape[1]
        if context is None:
            outputs = causal_convolutions(x, weights, biases, rope, None, 0, backend)
            return outputs, F.pad(x, (0, 0, size - L, 0)).to(float_dtype)
        joined = torch.cat((context.to(x.dtype), x), dim=1)
        return causal_convolutions(joined, weights, biases, rope, None, size, backend), joined[:, L:].to(float_dtype)
    if context is None:
        if spans.valid is not None:  # rows of their own: zeros in place of padding are the context
            x = x.masked_fill(~spans.valid.unsqueeze(-1), 0)
        offsets = spans.offset if spans.valid is None else None
        count = spans.lengths.clamp_max(size)
        outputs = causal_convolutions(x, weights, biases, rope, offsets, 0, backend)
        return outputs, last_tokens(x, spans.starts, spans.lengths, size, count).to(float_dtype)
    extended = spans.with_context(size)
    joined = extended.join(context.to(x.dtype), x)
    if rope is not None:
        slots, positions = extended.slots.flatten(), rope.positions.expand(*x.shape[:2]).flatten()
        rope = rope._replace(positions=positions.new_zeros(1, joined.shape[1]).index_copy(1, slots, positions[None]))
    outputs = [extended.part(y) for y in causal_convolutions(joined, weights, biases, rope, None, 0, backend)]
    count = torch.full_like(extended.lengths, size)
    return outputs, last_tokens(joined, extended.first, extended.lengths, size, count).to(float_dtype)
