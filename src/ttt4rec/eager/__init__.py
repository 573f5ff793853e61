"""The inner loops for machines without a GPU: the algorithm of the fused kernels in eager PyTorch.

Like the kernels, a forward keeps the inner gradients (and, for TTT-MLP, the hidden pre-activations), and the weights
before every segment of mini-batches. The backward walks from the last segment to the first and replays each from its
weights. No graph is recorded. The specification these follow is ``ttt4rec.reference``.
"""

from .convolution import convolution, convolution_backward
from .full_softmax import (
    full_softmax_nll,
    full_softmax_nll_backward,
    full_softmax_total_nll,
    full_softmax_total_nll_backward,
)
from .linear import linear_scan, linear_scan_backward
from .mlp import mlp_scan, mlp_scan_backward
from .output import output, output_backward
from .projection import projection, projection_backward
from .step import token_step, write_rows

# With decays too.
linear_forgetting_scan, linear_forgetting_scan_backward = linear_scan, linear_scan_backward
mlp_forgetting_scan, mlp_forgetting_scan_backward = mlp_scan, mlp_scan_backward
forgetting_token_step = token_step

__all__ = [
    "convolution",
    "convolution_backward",
    "forgetting_token_step",
    "full_softmax_nll",
    "full_softmax_nll_backward",
    "full_softmax_total_nll",
    "full_softmax_total_nll_backward",
    "linear_forgetting_scan",
    "linear_forgetting_scan_backward",
    "linear_scan",
    "linear_scan_backward",
    "mlp_forgetting_scan",
    "mlp_forgetting_scan_backward",
    "mlp_scan",
    "mlp_scan_backward",
    "output",
    "output_backward",
    "projection",
    "projection_backward",
    "token_step",
    "write_rows",
]
