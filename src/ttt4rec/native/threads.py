"""Sharing rows among threads. The compiled code does not need Python's lock, so Python's own threads serve.

They compute as the caller would: each takes over whether he flushes denormal numbers, which is set for every thread by
itself. And he waits for none that has not begun.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from ..precision import flushes_denormals

PARTS = 8
"""Of the rows for each thread, so that a thread that the machine delays takes fewer of them."""
ALONE = 1 << 14
"""The most numbers that one thread takes alone: another would come too late."""

_executors: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_executors.clear)  # a child has none of its parent's threads


def share(work: Callable[[int, int], int], rows: int, numbers: int | None = None) -> None:
    """Call ``work(begin, end)`` on parts of ``range(rows)``, by as many threads as PyTorch uses.

    Args:
        work: what the threads do.
        rows: how many there are.
        numbers: how many all rows have; None: enough for several threads.

    Raises:
        MemoryError: a call returned other than 0.
    """
    threads = max(1, min(torch.get_num_threads(), rows))
    if threads == 1 or (numbers is not None and numbers <= ALONE):
        check(work(0, rows))
        return
    size = -(-rows // (PARTS * threads))
    flush = flushes_denormals()
    parts = deque((begin, min(begin + size, rows)) for begin in range(0, rows, size))

    def take() -> int:
        failed = 0
        if flushes_denormals() != flush:
            torch.set_flush_denormal(flush)
        while True:
            try:
                part = parts.popleft()  # whichever thread comes first
            except IndexError:
                return failed
            failed |= work(*part)

    others: list[Future[int]] = []
    try:
        for _ in range(threads - 1):
            others.append(_executor(threads).submit(take))
        failed = take() | sum(0 if other.cancel() else other.result() for other in others)
    except BaseException:  # an interruption, or a thread that cannot start: the caller frees what the others work on
        parts.clear()
        wait([other for other in others if not other.cancel()])
        raise
    check(failed)


def check(failed: int) -> None:
    """Raise MemoryError if a call returned other than 0."""
    if failed:
        raise MemoryError("the compiled inner loop found no memory for its tiles")


def _executor(threads: int) -> ThreadPoolExecutor:
    if threads not in _executors:
        _executors[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="ttt4rec")
    return _executors[threads]
