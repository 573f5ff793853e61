"""One token of many streams, in place; there is no gradient."""

import torch

from ..arguments import TokenStep
from ..inner_models import INNER_MODELS
from .operator import Operator
from .samples import Draw, Sizes


def _sample(sizes: Sizes, draw: Draw, *, inner: str = "linear", expansion: int = 0) -> TokenStep:
    """Streams at the first token of a mini-batch, at the last, and between, in reverse order in a larger pool."""
    B, _, H, D, K = sizes
    wide, model = draw.wide, INNER_MODELS[inner]
    hidden = (expansion or model.expansion) * D
    size = model.record(D, hidden, K).size
    q, k, v = (draw.normal(B, H, D) for _ in range(3))
    norm, records = (wide.normal(H, D), wide.normal(H, D)), wide.weight(B + 2, H, size, fan=D)
    places = torch.arange(B, device=draw.device)
    offset = places * (K - 1) // max(1, B - 1)
    where = places.flip(0), offset, records
    return TokenStep(q, k, v, wide.rate(B, H) / D, wide.rate(K), *norm, *where, inner, hidden, 1e-6)


token_step = Operator(
    "token_step", TokenStep, ("o",), lambda step, _: (step.q.new_empty(step.q.shape),), _sample, mutates=("records",)
)
