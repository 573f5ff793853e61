"""How what transformers does not know is drawn, when it draws weights that a file lacks."""

from torch import nn

from ..layers.convolution import CausalConv
from ..layers.ttt import TTTLayer


def draw_own(module: nn.Module) -> None:
    """Draw the parameters that are a module's own, of a TTT layer or a convolution; others stay as they are."""
    if isinstance(module, TTTLayer):
        module.reset_own_parameters()
    elif isinstance(module, CausalConv):
        module.reset_parameters()
