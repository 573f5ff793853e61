"""One token of many streams, in place; there is no gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import TokenStep
from ..inner_models import INNER_MODELS
from . import backends
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


def _forgetting_sample(sizes: Sizes, draw: Draw, **options: Any) -> TokenStep:
    step = _sample(sizes, draw, **options)
    initial = draw.wide.weight(sizes.H, step.record.weights_at[-1], fan=sizes.D)
    return step._replace(log_decay=-draw.wide.rate(*step.inner_lr.shape), initial=initial)


def _fake(step: TokenStep, _: str) -> tuple[Tensor]:
    return (step.q.new_empty(step.q.shape),)


token_step = Operator(
    "token_step",
    TokenStep,
    ("o",),
    _fake,
    _sample,
    constants={"log_decay": None, "initial": None},
    mutates=("records",),
)
forgetting_token_step = Operator(
    "forgetting_token_step", TokenStep, ("o",), _fake, _forgetting_sample, mutates=("records",)
)


def write_rows(
    inner: str,
    rows: Tensor,
    tokens: tuple[Tensor, Tensor, Tensor],
    layer_norm: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    eps: float,
) -> None:
    """Fill the rows of records ``[R, n, width]`` for n tokens that were read at weights ``[W; b]`` of an inner model.

    Args:
        inner: its name.
        rows: in which to write.
        tokens: k and v ``[R, n, D]`` and lr ``[R, n, 1]``.
        layer_norm: γ and β ``[R, 1, D]``.
        weights: of every layer ``[R, in + 1, out]``.
        eps: added to the variance.
    """
    backends.function("write_rows", "eager", None)(inner, rows, tokens, layer_norm, weights, eps)
