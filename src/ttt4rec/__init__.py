"""Test-time-training layers for PyTorch, and the sequential recommender built on them."""

from .layers.functional import ttt_linear, ttt_mlp
from .layers.pool import StatePool
from .layers.state import TTTState
from .layers.ttt import TTTLayer
from .models.config import TTT4RecConfig
from .models.mixers import Mixer
from .models.ttt4rec import TTT4Rec, register_mixer
from .operators import flops

flops.register()

__version__ = "0.2.0"

__all__ = [
    "Mixer",
    "StatePool",
    "TTT4Rec",
    "TTT4RecConfig",
    "TTTLayer",
    "TTTState",
    "register_mixer",
    "ttt_linear",
    "ttt_mlp",
]
