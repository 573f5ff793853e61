"""Test-time-training layers for PyTorch, and the sequential recommender built on them."""

from .functional import ttt_linear, ttt_mlp
from .layer import TTTLayer
from .state import TTTState

__version__ = "0.1.0"

__all__ = ["TTTLayer", "TTTState", "ttt_linear", "ttt_mlp"]
