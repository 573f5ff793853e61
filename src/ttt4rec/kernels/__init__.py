"""Fused Triton kernels; the only part of the package that imports triton."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import eager
from ..arguments import MAX_MINI_BATCH_SIZE, Scan, TokenStep
from . import blocks, limits, linear_backward, linear_forward, mlp_backward, mlp_forward, segments, step
from .convolution import convolution, convolution_backward
from .limits import scan_refusal
from .output import output, output_backward
from .projection_backward import projection_backward
from .projection_forward import projection

__all__ = [
    "convolution",
    "convolution_backward",
    "forgetting_token_step",
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
    "refusal",
    "scan_refusal",
    "token_step",
]


def _by_length(one_kernel: Callable[..., Any], in_blocks: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """A scan, or its backward: one kernel, or, of mini-batches longer than a program's, products of the library."""

    def run(scan: Scan, *rest: Any) -> tuple[Tensor, ...]:
        short = scan.token_scale.numel() <= MAX_MINI_BATCH_SIZE
        results: tuple[Tensor, ...] = (one_kernel if short else in_blocks)(scan, *rest)
        return results

    run.__name__, run.__doc__ = one_kernel.__name__, one_kernel.__doc__
    return run


def _by_size(one_kernel: Callable[..., Any], in_blocks: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The same where TTT-MLP forgets, whose kernels are for fewer sizes."""

    def run(scan: Scan, *rest: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = (one_kernel if limits.fuses_forgetting(scan) else in_blocks)(scan, *rest)
        return results

    run.__name__, run.__doc__ = one_kernel.__name__, one_kernel.__doc__
    return run


def token_step(given: TokenStep) -> tuple[Tensor]:
    """One token of each stream. Where the rows of a mini-batch do not fit a program, ``eager.token_step``."""
    short = given.token_scale.numel() <= MAX_MINI_BATCH_SIZE
    return (step.token_step if short else eager.token_step)(given)


linear_scan = _by_length(linear_forward.linear_scan, blocks.linear_scan)
linear_scan_backward = _by_length(linear_backward.linear_scan_backward, blocks.linear_scan_backward)
mlp_scan = _by_length(mlp_forward.mlp_scan, blocks.mlp_scan)
mlp_scan_backward = _by_length(segments.mlp_scan_backward, blocks.mlp_scan_backward)
linear_forgetting_scan, linear_forgetting_scan_backward = linear_scan, linear_scan_backward
mlp_forgetting_scan = _by_size(mlp_forward.mlp_scan, blocks.mlp_scan)
mlp_forgetting_scan_backward = _by_size(mlp_backward.mlp_scan_backward, blocks.mlp_scan_backward)
forgetting_token_step = token_step


def refusal(operator: str, arguments: Any) -> str | None:
    """Why this backend cannot compute an operator, or its backward, on these arguments; None if it can."""
    if isinstance(arguments, TokenStep) and arguments.inner not in step.KERNELS:
        return f"steps the inner models {', '.join(step.KERNELS)}; given {arguments.inner}"
    return None
