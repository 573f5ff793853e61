"""Causal depthwise convolutions over the tokens of each sequence, in one call or as a stream."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spans import Spans, last_tokens


class CausalConv(nn.Module):
    """Depthwise causal convolution over the tokens of each sequence, ``y_t = b + Σ_j w_j x_{t - (kernel - 1) + j}``."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, kernel).uniform_(-(kernel**-0.5), kernel**-0.5))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, kernel - 1 + L, width]``, context first, to ``[B, L, width]``."""
        taps = self.weight.shape[1]
        L = x.shape[1] - taps + 1
        y = self.bias.to(x.dtype) + x[:, :L] * self.weight[:, 0].to(x.dtype)
        for j in range(1, taps):
            y = torch.addcmul(y, x[:, j : j + L], self.weight[:, j].to(x.dtype))
        return y


def convolve(
    convs: Sequence[CausalConv], x: Tensor, spans: Spans | None, context: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Run several convolutions of one kernel size over the same tokens.

    Args:
        convs: the convolutions.
        x: ``[B, L, width]``.
        spans: where the N sequences are; None: one a row.
        context: the inputs before the first ones, ``[N, kernel - 1, width]``; None: zeros.

    Returns:
        The outputs ``[B, L, width]`` and the outgoing context, float32 at least.
    """
    size = convs[0].weight.shape[1] - 1
    N = x.shape[0] if spans is None else spans.starts.numel()
    context = x.new_zeros(N, size, x.shape[-1]) if context is None else context.to(x.dtype)
    float_dtype = torch.promote_types(x.dtype, torch.float32)
    if spans is None:
        joined = torch.cat((context, x), dim=1)
        return [conv(joined) for conv in convs], joined[:, x.shape[1] :].to(float_dtype)
    extended = spans.with_context(size)
    joined = extended.join(context, x)
    padded = F.pad(joined, (0, 0, size, 0))
    outputs = [extended.part(conv(padded)) for conv in convs]
    count = torch.full_like(extended.lengths, size)
    return outputs, last_tokens(joined, extended.first, extended.lengths, size, count).to(float_dtype)
