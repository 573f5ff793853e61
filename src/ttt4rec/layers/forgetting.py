"""How a layer forgets: gates that say, of each token and head, how much stays of what was learned.

Numbers in brackets are equations of docs/mathematics.md.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import without_autocast

Forget = Literal["none", "constant", "token"]
GATES: dict[str, dict[str, Callable[[int, int], tuple[int, ...]]]] = {
    "none": {},
    "constant": {"forget_bias": lambda H, _: (H,)},
    "token": {"forget_bias": lambda H, _: (H,), "forget_weight": lambda H, width: (H, width)},
}
"""Of every gate its parameters, and their shapes by heads and width."""
FIRST_BIAS = -3.0
"""A new layer keeps ``sigmoid(3)``, 0.953, of what it learned with every token."""


def log_decay(layer: Any, x: Tensor) -> Tensor | None:
    """``ln a`` of (42) for x ``[B, L, width]``, ``[B, L, H]`` in float32 or float64; None if nothing is forgotten."""
    if not layer.forgets:
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not layer.adapt:  # who does not learn does not forget
        return x.new_zeros(*x.shape[:2], layer.num_heads, dtype=dtype)
    logits = layer.forget_bias.to(dtype)
    if layer.forget == "token":
        with without_autocast(x.device.type):
            logits = F.linear(x.to(dtype), layer.forget_weight.to(dtype), logits)
    return F.logsigmoid(-logits).expand(*x.shape[:2], layer.num_heads)
