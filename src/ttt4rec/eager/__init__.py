"""The inner loops for machines without a GPU: the algorithm of the fused kernels in eager PyTorch.

Like the kernels, a forward keeps only the inner gradients (and, for TTT-MLP, the hidden pre-activations); the backward
walks from the last mini-batch to the first and rebuilds the weights before each one by adding its update back.
Nothing is stored per mini-batch and no graph is recorded. The specification these follow is ``ttt4rec.reference``.
"""

from .convolution import convolution_backward, convolution_forward
from .epilogue import epilogue_backward, epilogue_forward
from .linear import linear_backward, linear_forward
from .mlp import mlp_backward, mlp_forward
from .projection import projection_backward, projection_forward
from .step import record_parts, record_size, row_parts, token_step, write_rows

__all__ = [
    "convolution_backward",
    "convolution_forward",
    "epilogue_backward",
    "epilogue_forward",
    "linear_backward",
    "linear_forward",
    "mlp_backward",
    "mlp_forward",
    "projection_backward",
    "projection_forward",
    "record_parts",
    "record_size",
    "row_parts",
    "token_step",
    "write_rows",
]
