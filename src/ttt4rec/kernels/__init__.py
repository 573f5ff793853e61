"""Fused Triton kernels; the only part of the package that imports triton."""

from .convolution import convolution, convolution_backward
from .launch import compiler_refusal
from .linear_backward import linear_backward
from .linear_forward import linear_forward
from .mlp_backward import mlp_backward
from .mlp_forward import mlp_forward
from .output import output, output_backward
from .projection_backward import projection_backward
from .projection_forward import projection
from .step import token_step

__all__ = [
    "compiler_refusal",
    "convolution",
    "convolution_backward",
    "linear_backward",
    "linear_forward",
    "mlp_backward",
    "mlp_forward",
    "output",
    "output_backward",
    "projection",
    "projection_backward",
    "token_step",
]
