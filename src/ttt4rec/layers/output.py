"""Behind the inner loop: norm, gate and output projection."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import operators
from ..arguments import Output
from .projection import plain


def finish(
    o: Tensor,
    gate: Tensor | None,
    mask: Tensor | None,
    norm: nn.Module,
    output: nn.Module,
    backend: str,
) -> Tensor:
    """Layer norm over the width, gate and output projection; zeros at padding.

    The product is taken in o's dtype, or in autocast's where that is enabled; what comes before is float32 at
    least. Modules that something was done to (replaced by an adapter or a quantised one, hooked, parametrised) are
    called one by one.

    Args:
        o: the inner loop's outputs ``[B, L, H, D]``.
        gate: ``[B, L, C]``; None: no gate.
        mask: bool ``[B, L]``, True for tokens; None: all are.
        norm: ``nn.LayerNorm`` over C, or what stands in its place.
        output: ``nn.Linear`` without bias, or what stands in its place.
        backend: see ``ttt4rec.ttt_linear``.

    Returns:
        The layer's outputs ``[B, L, C]``.
    """
    result: Tensor
    if backend != "reference" and isinstance(norm, nn.LayerNorm) and plain(norm) and plain(output):
        weight: Tensor = output.weight  # type: ignore[assignment]
        given = Output(o, gate, mask, norm.weight, norm.bias, weight, norm.eps)
        (result,) = operators.output(given, backend)
        return result
    of_norm = next(norm.parameters(), None)  # what stands in its place may have none
    h = norm(rearrange(o, "b l h d -> b l (h d)").to(o.dtype if of_norm is None else of_norm.dtype))
    if gate is not None:
        h = F.gelu(gate, approximate="tanh") * h
    result = output(h.to(o.dtype))
    return result if mask is None else result.masked_fill(~mask.unsqueeze(-1), 0)
