"""The best items of hidden states by compiled code, which reads a byte a number of the table and scores a few items."""

import ctypes
import math

import torch
from torch import Tensor

from ..arguments import BestItems, IndexedItems, ItemTable
from . import build
from .calls import INTEGER, POINTER, fields, run
from .full_softmax import SHAPE

GROUP, TILE, MOST_ROWS = 64, 6, 240
"""Of item_index.cpp: items in a group, and hidden states in a tile. The most that are taken at once."""


class IndexCall(ctypes.Structure):
    """``Call`` of item_index.cpp."""

    _fields_ = (
        *fields(INTEGER, "num_items", "width", "rows", "rows_at_once", "k"),
        *fields(POINTER, "table", "codes", "scale", "size", "error"),
        ("largest", ctypes.c_double),
        *fields(POINTER, "h", "seen_ends", "seen", "scores", "items"),
    )


def index_items(given: ItemTable) -> IndexedItems:
    """A table with its codes, scales, sizes and errors."""
    table, largest = given
    groups, C = -(-(table.shape[0] - 1) // GROUP), table.shape[1]
    codes = torch.zeros(groups, -(-C // 4), GROUP, dtype=torch.int32)
    scale, size, error = torch.zeros(3, groups, GROUP)
    made = IndexedItems(table, codes, scale, size, error, largest * math.sqrt(C))
    run(build.library(*SHAPE).index_items, _call(made), groups)
    return made


def best_items(given: BestItems) -> tuple[Tensor, Tensor] | None:
    """Scores ``[N, k]``, the first of a row being NaN if one of it is, and items, int64; None if seen are none."""
    N, k = given.h.shape[0], given.k
    scores, items = given.h.new_empty(N, k), torch.empty(N, k, dtype=torch.int64)
    share = -(-N // torch.get_num_threads())
    at_once = 1 if N == 1 else min(MOST_ROWS, -(-share // TILE) * TILE)
    call = _call(given.catalogue)
    call.rows, call.rows_at_once, call.k = N, at_once, k
    call.h, call.scores, call.items = given.h.data_ptr(), scores.data_ptr(), items.data_ptr()
    if given.seen is not None:
        rows, left_out = given.seen
        ends, seen = rows.new_empty(N), torch.empty_like(left_out)
        numbers = (INTEGER(n) for n in (len(rows), N, call.num_items))
        pointers = [POINTER(x.data_ptr()) for x in (rows, left_out, ends, seen)]
        if build.library(*SHAPE).index_seen(*pointers[:2], *numbers, *pointers[2:]):
            return None
        call.seen_ends, call.seen = ends.data_ptr(), seen.data_ptr()
    run(build.library(*SHAPE).index_search, call, -(-N // at_once))
    return scores, items


def bounds(index: IndexedItems, h: Tensor) -> tuple[Tensor, Tensor]:
    """For tests: the scores of all items for one hidden state ``[C]``, and what bounds them."""
    call = _call(index)
    call.h = h.data_ptr()
    scores, most = torch.zeros(2, *index.scale.shape)
    build.library(*SHAPE).index_bounds(ctypes.byref(call), POINTER(scores.data_ptr()), POINTER(most.data_ptr()))
    num_items = index.table.shape[0] - 1
    return scores.flatten()[:num_items], most.flatten()[:num_items]


def _call(index: IndexedItems) -> IndexCall:
    table, *made, largest = index
    pointers = [x.data_ptr() for x in (table, *made)]
    return IndexCall(table.shape[0] - 1, table.shape[1], 0, 0, 0, *pointers, largest)
