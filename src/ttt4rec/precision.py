"""Autocast: what it makes of a dtype, and doing without it; whether denormal numbers are zero.

On the meta device, for which PyTorch has no autocast, there is nothing to do.
"""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch

_SMALLEST_NORMAL = sys.float_info.min


def autocast_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype | None:
    """What autocast makes of inputs of this dtype; None where it is off, and for float64, which stays."""
    if dtype != torch.float64 and device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Within it, operations keep the dtype of their inputs."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def flushes_denormals() -> bool:
    """Whether this thread takes numbers too small to be normal for zero: see ``torch.set_flush_denormal``."""
    return _SMALLEST_NORMAL * 0.5 == 0.0
