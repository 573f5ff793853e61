"""Sharing rows among threads. The compiled code does not need Python's lock, so Python's own threads serve."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

PARTS = 8
"""Of the rows for each thread, so that a thread that the machine delays takes fewer of them."""

_executors: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_executors.clear)  # a child has none of its parent's threads


def share(work: Callable[[int, int], int], rows: int) -> None:
    """Call ``work(begin, end)`` on parts of ``range(rows)``, by as many threads as PyTorch uses.

    Raises:
        MemoryError: a call returned other than 0.
    """
    threads = max(1, min(torch.get_num_threads(), rows))
    size = -(-rows // (PARTS * threads if threads > 1 else 1)) or 1
    parts = deque((begin, min(begin + size, rows)) for begin in range(0, rows, size))

    def take() -> int:
        failed = 0
        while True:
            try:
                part = parts.popleft()  # whichever thread comes first
            except IndexError:
                return failed
            failed |= work(*part)

    others = [_executor(threads).submit(take) for _ in range(threads - 1)]
    if take() | sum(other.result() for other in others):
        raise MemoryError("the compiled inner loop found no memory for its tiles")


def _executor(threads: int) -> ThreadPoolExecutor:
    if threads not in _executors:
        _executors[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="ttt4rec")
    return _executors[threads]
