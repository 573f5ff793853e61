"""Layers for the tests of what is computed at once, and a note of when it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ttt4rec import TTTLayer
from ttt4rec.layers import ttt

WIDTH = 32


def make_layer(
    inner: str = "mlp", backbone: str = "mamba", dtype: torch.dtype = torch.float64, **options: Any
) -> TTTLayer:
    """Parameters are moved from where they begin, so that every one matters."""
    layer = TTTLayer(WIDTH, 2, inner=inner, backbone=backbone, mini_batch_size=5, **options).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


def note(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Tensor]:
    """What comes out at once from now on, by the function of that name which layers ask first."""
    found: list[Tensor] = []
    at_once: Callable[..., Tensor | None] = getattr(ttt, name)

    def noted(*given: Any) -> Tensor | None:
        y = at_once(*given)
        if y is not None:
            found.append(y)
        return y

    monkeypatch.setattr(ttt, name, noted)
    return found
