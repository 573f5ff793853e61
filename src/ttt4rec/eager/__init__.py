"""The inner loops for machines without a GPU: the algorithm of the fused kernels in eager PyTorch.

Like the kernels, a forward keeps the inner gradients (and, for TTT-MLP, the hidden pre-activations), and the weights
before every segment of mini-batches. The backward walks from the last segment to the first and replays each from its
weights. No graph is recorded. The specification these follow is ``ttt4rec.reference``.
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
