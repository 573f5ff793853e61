"""Fused Triton kernels."""

from .linear_forward import linear_forward

__all__ = ["linear_forward"]
