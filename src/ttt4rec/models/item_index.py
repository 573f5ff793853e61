"""The best items of a catalogue, asked for again and again: the table is prepared once, and little of it read."""

import functools
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..arguments import BestItems, IndexedItems, ItemTable
from ..item_blocks import check_range
from ..layers.step_at_once import unobserved
from ..operators.backends import shortcut
from . import full_softmax

WIDEST = 1 << 16
"""The compiled code takes tables up to this width."""


@dataclass(frozen=True)
class _Made:
    """A table that was looked at, when, and the index of it, if there can be one here."""

    table: Tensor  # detached; while it is held, no other can be in its place
    version: int
    items: IndexedItems | None

    def is_of(self, table: Tensor) -> bool:
        own = self.table
        same = own.data_ptr() == table.data_ptr() and own.shape == table.shape and own.stride() == table.stride()
        return same and own.dtype == table.dtype and own.device == table.device and self.version == table._version


class ItemIndex:
    """``full_softmax.top_k`` for a table that seldom changes.

    In float32 on a CPU, with a compiler, the table is read once and a byte for each of its numbers kept, and 12
    bytes an item. A call reads these bytes, finds by a proven bound which items may be among the best, and scores
    those. The result is exact: a score is one dot product in float32, taken in the same order whoever else is asked
    about. Where this cannot run, ``full_softmax.top_k`` does.

    The index is made at the first call, and again when the table is another one or has changed in place. The latter
    PyTorch counts: steps of its optimizers, ``load_state_dict`` and operations under ``torch.no_grad`` are seen.
    Writing through ``table.data`` or NumPy is not; call ``clear`` then.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None

    def __reduce__(self) -> tuple[type["ItemIndex"], tuple[()]]:
        """A copy is made again: what is kept belongs to a table in this process."""
        return ItemIndex, ()

    def clear(self) -> None:
        """Forget the table, which the next call reads again."""
        self._made = None

    def prepare(self, table: Tensor) -> None:
        """Make the index now, so that the first call need not.

        Raises:
            ValueError: the table has a number that is NaN or infinite.
        """
        self._items(table)

    def top_k(
        self, h: Tensor, table: Tensor, k: int, seen: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``full_softmax.top_k``.

        Raises:
            ValueError: as there; or the table has a number that is NaN or infinite, at the first call with it.
        """
        full_softmax.check_top_k(h, table, k)
        items = self._items(table) if unobserved() and h.dtype != torch.float64 else None
        if items is None or not len(h):
            return full_softmax.top_k(h, table, k, seen)
        if seen is not None:
            rows, left_out = (x.long().contiguous() for x in seen)
            if rows.dim() != 1 or rows.shape != left_out.shape or not rows.is_cpu or not left_out.is_cpu:
                return full_softmax.top_k(h, table, k, seen)
            seen = rows, left_out
        given = BestItems(items, h.detach().float().contiguous(), min(k, table.shape[0] - 1), seen)
        compute = shortcut("best_items", "auto", given)
        if compute is None:
            return full_softmax.top_k(h, table, k, seen)
        best: tuple[Tensor, Tensor] | None = compute(given)
        if best is None:
            assert seen is not None
            _refuse(seen, h, table)
        if bool(best[0][:, 0].isnan().any()):
            raise full_softmax.nan_among_scores()
        return best

    def _items(self, table: Tensor) -> IndexedItems | None:
        """The index of a table as it is now; None if there can be none."""
        if table.shape[0] < 2 or not 1 <= table.shape[1] <= WIDEST or table.is_inference():
            return None
        if type(table) not in (Tensor, nn.Parameter):
            return None
        made = self._made
        if made is None or not made.is_of(table):
            count_fused_steps()
            version, own = table._version, table.detach()
            made = self._made = _Made(own, version, _index(own))
        return made.items


@functools.cache
def count_fused_steps() -> None:
    """From now on have fused optimizers count as writes what they write, as PyTorch's other optimizers do."""

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                increment_version(group["params"])

    register_optimizer_step_post_hook(count)


@torch.no_grad()
def _index(table: Tensor) -> IndexedItems | None:
    low, high = (float(x) for x in table[1:].aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(
            f"the item table must have finite numbers; given some from {low} to {high}: has the model diverged in "
            "training?"
        )
    given = ItemTable(table, max(-low, high))
    make = shortcut("index_items", "auto", given) if table.is_contiguous() else None
    return None if make is None else make(given)


def _refuse(seen: tuple[Tensor, Tensor], h: Tensor, table: Tensor) -> NoReturn:
    rows, items = seen
    check_range(items, table)
    raise IndexError(f"rows must be from 0 to {len(h) - 1}; given {int(rows.min())} to {int(rows.max())}")
