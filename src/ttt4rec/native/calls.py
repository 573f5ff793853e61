"""What calls of the compiled functions share: their structures' fields, and the way from rows to threads."""

import ctypes
from collections.abc import Callable
from typing import Any

from . import threads
from .threads import check

POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
TOKENS, NORM = ("q", "k", "v", "lr", "scale"), ("gamma", "beta")


def fields(kind: Any, *names: str) -> tuple[tuple[str, Any], ...]:
    """Fields of a structure that have one kind."""
    return tuple((name, kind) for name in names)


def run(compiled: Callable[..., int], call: ctypes.Structure, rows: int, numbers: int | None = None) -> None:
    """Call a compiled function for all rows; by all threads, unless they have few numbers.

    Raises:
        MemoryError: it found no memory.
    """
    if numbers is not None and numbers <= threads.ALONE:
        check(compiled(ctypes.byref(call), INTEGER(0), INTEGER(rows)))
        return
    threads.share(lambda begin, end: compiled(ctypes.byref(call), INTEGER(begin), INTEGER(end)), rows, numbers)
