"""How far a stream's weights have gone, and how well they know what comes: for people who watch streams.

Numbers in brackets are equations of docs/mathematics.md.
"""

from typing import Any

import torch
from torch import Tensor

from ..inner_models import INNER_MODELS
from ..precision import without_autocast
from ..reference import MODELS, layer_norm, token_scale
from ..reference.inner_models import InnerModel
from .forgetting import log_decay
from .functional import Rates, inner_loop
from .state import TTTState


@torch.no_grad()
def moved(layer: Any, state: TTTState) -> Tensor:
    """See ``TTTLayer.moved``."""
    initial, _ = layer.initial_state()
    pairs = [(w.double(), start.double()) for w, start in zip(state.weights, initial, strict=True)]
    squares = [((w - start).square().flatten(2).sum(-1), start.square().flatten(1).sum(-1)) for w, start in pairs]
    gone, size = (sum(parts) for parts in zip(*squares, strict=True))
    return (torch.as_tensor(gone) / torch.as_tensor(size).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


@torch.no_grad()
def inner_losses(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of every token of x ``[B, L, width]``, by the weights with which its mini-batch begins and by the initial ones.

    Returns:
        Sums over the heads ``[B, L]``, float32 at least.
    """
    if layer.inner not in MODELS:
        raise ValueError(f"inner must be one of {', '.join(MODELS)}; given {layer.inner!r}")
    with without_autocast(x.device.type):
        q, k, v, lr, _, _ = layer._views(x, None, None, None, "eager")
        wide = torch.promote_types(x.dtype, torch.float32)
        initial, norm = layer.initial_state()
        first = tuple(w.to(wide).expand(x.shape[0], *w.shape) for w in initial)
        scale, K = token_scale(layer.token_offset.to(wide)), layer.mini_batch_size
        decays = log_decay(layer, x)
        state, own, model = None, [], MODELS[layer.inner]
        for start in range(0, x.shape[1], K):
            part = slice(start, start + K)
            tokens = q[:, part], k[:, part], v[:, part]
            own.append(_losses(model, norm, first if state is None else state.weights, *tokens[1:]))
            rates = Rates(lr[:, part], scale, None if decays is None else decays[:, part])
            _, state = inner_loop(
                INNER_MODELS[layer.inner], tokens, rates, initial, norm, K, state, None, None, 1e-6, "auto"
            )
        return torch.cat(own, 1), _losses(model, norm, first, k, v)


def _losses(
    model: InnerModel, norm: tuple[Tensor, Tensor], weights: tuple[Tensor, ...], k: Tensor, v: Tensor
) -> Tensor:
    """The inner loss (2) of every token at weights, summed over the heads, ``[B, L]``."""
    k, v = (x.transpose(1, 2).to(weights[0].dtype) for x in (k, v))
    gamma, beta = (p.to(k.dtype) for p in norm)
    error = layer_norm(model(k, weights), gamma, beta, 1e-6) - (v - k)
    return 0.5 * error.square().sum((1, 3))
