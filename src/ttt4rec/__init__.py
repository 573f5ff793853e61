"""Test-time-training layers for PyTorch, and the sequential recommender built on them."""

from . import flops
from .functional import ttt_linear, ttt_mlp
from .layer import TTTLayer
from .model import TTT4Rec, TTT4RecConfig
from .pool import StatePool
from .state import TTTState

flops.register()

__version__ = "0.1.0"

__all__ = ["StatePool", "TTT4Rec", "TTT4RecConfig", "TTTLayer", "TTTState", "ttt_linear", "ttt_mlp"]
