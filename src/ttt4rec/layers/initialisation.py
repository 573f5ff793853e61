"""How weights are drawn: N(0, 0.02), by each module for itself, also when asked by its ``reset_parameters``."""

import weakref
from typing import TypeAlias

import torch
from torch import nn

STD = 0.02
Device: TypeAlias = torch.device | str | int | None


def draw(module: nn.Module) -> None:
    """Weights of a linear map or an embedding from N(0, 0.02); its bias, and its row of padding, zero.

    Other modules stay as they are. From now on ``reset_parameters`` of the module does the same.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        module.reset_parameters = DrawNormal(module)  # type: ignore[method-assign]
        module.reset_parameters()


class DrawNormal:
    """``reset_parameters`` of one linear map or embedding.

    It is an attribute and no method of a subclass, since tools that adapt or quantise models look for ``nn.Linear``
    itself. It does not own its module, which is freed as soon as nobody else does.
    """

    def __init__(self, module: nn.Linear | nn.Embedding) -> None:
        self._module = weakref.ref(module)

    def __call__(self) -> None:
        """Draw the module's weights again."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module whose weights were to be drawn is gone; call its own reset_parameters")
        nn.init.normal_(module.weight, std=STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():  # a row of a table that is split among processes is a copy, which to fill is no use
                rows = torch.ones_like(module.weight[:, :1], dtype=torch.int64).cumsum(0) - 1
                module.weight.masked_fill_(rows == module.padding_idx, 0)

    def __reduce__(self) -> tuple[type, tuple[nn.Module | None]]:
        return DrawNormal, (self._module(),)  # a copy of a module gets one of its own
