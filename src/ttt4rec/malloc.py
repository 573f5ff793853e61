"""The C library's ``malloc``, for programs that train on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT = 1 << 30
"""Bytes: larger pieces are still given back."""


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next request instead of giving it back to the system.

    Every step of a training frees its tens of MiB and asks for as much again; pages that come fresh from the system
    cost a fault each. It holds for the whole process, whose memory then stays at its peak, so it is for programs to
    call, once and before training; the command line does.

    Returns:
        Whether the C library could be told; others than glibc are left as they are.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, KEPT) == 1 for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
