"""The full softmax, with compiled code for the softmax of a block of scores."""

import ctypes
import functools

import torch
from torch import Tensor

from .. import item_blocks
from ..arguments import FullSoftmax
from . import build
from .cache import BuildError
from .calls import INTEGER, POINTER, fields, run
from .threads import share

SHAPE = (
    "linear",
    16,
    0,
    "float",
    build.SOFTMAX,
)  # of an inner model only in name: so many lanes has any vector of float32


class _Call(ctypes.Structure):
    """``Call`` of full_softmax.cpp."""

    _fields_ = (
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("scores", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("column", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
    )


class TotalCall(ctypes.Structure):
    """``TotalCall`` of full_softmax.cpp."""

    _fields_ = (
        *fields(INTEGER, "rows", "items", "width"),
        *fields(POINTER, "h", "table", "column", "turned", "scores", "highest", "total", "parts", "lse", "own"),
        *fields(POINTER, "grad_h", "grad_table"),
    )


LANES = 16
"""The most that a vector has; widths are multiples of it."""
TILE, PANEL, RANGES = 64, 64, 16
"""Of full_softmax.cpp: items, hidden states, and ranges of tiles."""


@functools.cache
def softmax_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why scores like these are not for this path; None if they are. The first call compiles it."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"takes float32 on a CPU; given {dtype} on {device}"
    try:
        build.library(*SHAPE)
    except BuildError as error:
        return build.refusal(error)
    return None


def full_softmax_nll(given: FullSoftmax) -> tuple[Tensor, ...]:
    """As ``eager.full_softmax_nll``."""
    return item_blocks.nll(given, log_sum_exp)


def full_softmax_nll_backward(
    given: FullSoftmax, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of h and table."""
    return item_blocks.nll_backward(given, kept[0], grads[0], to_gradient)


def full_softmax_total_nll(given: FullSoftmax) -> tuple[Tensor, ...]:
    """As ``eager.full_softmax_total_nll``; where widths allow it, products, exponentials and sums in one."""
    h, table, items = given
    at_once = min(item_blocks.rows_at_once(table), h.shape[0])
    if h.shape[1] % LANES or at_once < LANES:
        return item_blocks.total_nll(given, log_sum_exp, to_gradient)
    item_blocks.check_range(items, table)
    h, table, column = h.float().contiguous(), table.float().contiguous(), items - 1
    (num_items, C), panels, tiles = (
        (table.shape[0] - 1, table.shape[1]),
        -(-at_once // PANEL),
        -(-(len(table) - 1) // TILE),
    )
    turned, scores = h.new_empty(panels, C, PANEL), h.new_empty(tiles, panels, TILE, PANEL)
    highest, total = h.new_empty(2, tiles, panels, PANEL)
    memory = turned, scores, highest, total, h.new_empty(RANGES, at_once, C)
    lse, own = torch.empty(2, h.shape[0], dtype=torch.float64)
    grad_h, grad_table = torch.empty_like(h), torch.zeros_like(table)
    for first in range(0, h.shape[0], at_once):
        rows = slice(first, first + at_once)
        tensors = h[rows], table[1:], column[rows], *memory, lse[rows], own[rows], grad_h[rows], grad_table[1:]
        _run_total(TotalCall(len(tensors[0]), num_items, C, *(x.data_ptr() for x in tensors)))
    return (lse - own).sum().to(h.dtype), grad_h, grad_table


def _run_total(call: TotalCall) -> None:
    library, tiles, panels = build.library(*SHAPE), -(-call.items // TILE), -(-call.rows // PANEL)
    run(library.softmax_turn, call, panels)
    run(library.softmax_exponentials, call, tiles)
    run(library.softmax_log_of_sums, call, panels)
    run(library.softmax_gradients, call, RANGES)
    run(library.softmax_hidden, call, panels)


full_softmax_total_nll_backward = item_blocks.total_nll_backward


def log_sum_exp(scores: Tensor) -> Tensor:
    """log Σ exp of every row of a block, as ``item_blocks.LogSumExp``."""
    lse = torch.empty(len(scores), dtype=torch.float64)
    _run("softmax_forward", scores, lse)
    return lse


def to_gradient(scores: Tensor, lse: Tensor, column: Tensor, grad: Tensor) -> None:
    """As ``item_blocks.ToGradient``; columns of scores stand one behind the other."""
    _run("softmax_backward", scores, lse, column.contiguous(), grad.contiguous())


def _run(function: str, scores: Tensor, *others: Tensor) -> None:
    call = _Call(scores.shape[1], scores.stride(0), *(x.data_ptr() for x in (scores, *others)))
    compiled = getattr(build.library(*SHAPE), function)
    share(lambda begin, end: compiled(ctypes.byref(call), ctypes.c_int64(begin), ctypes.c_int64(end)), len(scores))
