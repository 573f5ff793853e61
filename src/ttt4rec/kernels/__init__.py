"""Fused Triton kernels; the only part of the package that imports triton."""

from .convolution import convolution_backward, convolution_forward
from .epilogue import epilogue_backward, epilogue_forward
from .linear_backward import linear_backward
from .linear_forward import linear_forward
from .mlp_backward import mlp_backward
from .mlp_forward import mlp_forward
from .projection_backward import projection_backward
from .projection_forward import projection_forward
from .step import token_step

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
    "token_step",
]
