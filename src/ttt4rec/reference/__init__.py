"""The specification in PyTorch, written to be read with the mathematics.

Notation (Sun et al. 2024, arXiv 2407.04620): B sequences, L tokens, H heads, D head dimension, K tokens in a
mini-batch. ``W1, b1`` (and ``W2, b2``) are the weights of the inner model, the layer's state. ``s_i`` is the token
scale, ``lr_j`` the inner learning rate of token j, and ``η[i, j] = s_i · lr_j`` for i >= j.

Everything here takes any float dtype and computes in it; nothing is cast, cached or changed in place.
"""

from .dual import dual_form
from .inner_models import inner_loss, layer_norm, linear_model, mlp_model
from .primal import primal_form
from .views import causal_convolution, inner_learning_rate, rotate, rotation, token_scale

MODELS = {"linear": linear_model, "mlp": mlp_model}
"""The inner models by name."""

__all__ = [
    "MODELS",
    "causal_convolution",
    "dual_form",
    "inner_learning_rate",
    "inner_loss",
    "layer_norm",
    "linear_model",
    "mlp_model",
    "primal_form",
    "rotate",
    "rotation",
    "token_scale",
]
