"""Fused Triton kernels; the only part of the package that imports triton."""

from typing import Any

from ..arguments import TokenStep
from . import step
from .convolution import convolution, convolution_backward
from .limits import scan_refusal
from .linear_backward import linear_scan_backward
from .linear_forward import linear_scan
from .mlp_backward import mlp_scan_backward
from .mlp_forward import mlp_scan
from .output import output, output_backward
from .projection_backward import projection_backward
from .projection_forward import projection
from .step import token_step

__all__ = [
    "convolution",
    "convolution_backward",
    "linear_scan",
    "linear_scan_backward",
    "mlp_scan",
    "mlp_scan_backward",
    "output",
    "output_backward",
    "projection",
    "projection_backward",
    "refusal",
    "scan_refusal",
    "token_step",
]


def refusal(operator: str, arguments: Any) -> str | None:
    """Why this backend cannot compute an operator, or its backward, on such arguments; None if it can."""
    if isinstance(arguments, TokenStep) and arguments.inner not in step.KERNELS:
        return f"steps the inner models {', '.join(step.KERNELS)}; given {arguments.inner}"
    return None
