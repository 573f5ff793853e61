"""The best items for hidden states: of the whole catalogue, or of what may be offered."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttt4rec.checks import is_number
from ttt4rec.models.item_index import ItemIndex
from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.recsys.data import DataError, Histories, Id, IntArray

Name = TypeVar("Name", bound=Id)
Scores: TypeAlias = NDArray[np.float64]

Rerank: TypeAlias = Callable[[IntArray, Scores, int], Sequence[int] | IntArray]
"""Chooses among a user's candidates: from their item codes [n], scores [n], best first, and k, at most k places."""

_CANDIDATES = 5  # times k, of which a re-ranking chooses k


@dataclass(frozen=True)
class Wanted:
    """Which items may be offered, and how many.

    Attributes:
        k: how many.
        exclude_seen: leave out the items of the history.
        allow: nothing but these; None: all.
        deny: none of these.
        min_score: none of a lower score.
        popular: offer who has no history with a known item what is popular of late.
        rerank: chooses k of five times as many.
    """

    k: int = 10
    exclude_seen: bool = True
    allow: Collection[Id] | None = None
    deny: Collection[Id] = ()
    min_score: float | None = None
    popular: bool = False
    rerank: Rerank | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: one is out of range.
        """
        if self.k < 1:
            raise ValueError(f"k must be at least 1; given {self.k}")
        if self.min_score is not None and (not is_number(self.min_score) or math.isnan(self.min_score)):
            raise ValueError(f"min_score must be a number; given {self.min_score!r}")
        for name in ("allow", "deny"):
            if isinstance(getattr(self, name), str | bytes):
                raise DataError(f"{name} must be a collection of item ids; given {getattr(self, name)!r}")

    def allowed(self, histories: Histories) -> IntArray | None:
        """Codes of the items that may be offered, ascending; None if all may.

        Raises:
            DataError: none may.
        """
        if self.allow is None and not len(self.deny):
            return None
        may = np.full(histories.num_items + 1, self.allow is None)
        if self.allow is not None:
            may[histories.item_codes(list(self.allow))[0]] = True
        may[histories.item_codes(list(self.deny))[0]] = False
        may[0] = False
        if not may.any():
            raise DataError("allow and deny must leave at least one item that the model knows; given none")
        return np.flatnonzero(may)

    def first_of(self, codes: IntArray, counts: IntArray, histories: Histories) -> tuple[IntArray, Scores]:
        """Of items by popularity, and their counts, the first k that may be offered; DataError if no item may."""
        allowed = self.allowed(histories)
        if allowed is not None:
            may = np.isin(codes, allowed)
            codes, counts = codes[may], counts[may]
        return codes[: self.k], counts[: self.k].astype(np.float64)


class Chooser:
    """Best items for many hidden states, by one choice of what may be offered.

    Args:
        model: gives the scores.
        index: of its items.
        histories: whose ids the choice names.
        wanted: the choice.
    """

    def __init__(self, model: TTT4Rec, index: ItemIndex, histories: Histories, wanted: Wanted) -> None:
        self._wanted = wanted
        self._allowed = wanted.allowed(histories)
        self._table, self._index = model.served_items().detach(), index
        if self._allowed is not None:
            rows = torch.from_numpy(np.concatenate([[0], self._allowed])).to(self._table.device)
            self._table, self._index = self._table[rows], ItemIndex()
            self._places = np.zeros(
                histories.num_items + 1, dtype=np.int64
            )  # of items in the smaller table; 0: not there
            self._places[self._allowed] = np.arange(1, len(self._allowed) + 1)

    def best(self, hidden: Tensor, histories: Sequence[IntArray]) -> list[tuple[IntArray, Scores]]:
        """Item codes and scores, best first, for hidden states ``[N, width]`` after N histories of item codes.

        Raises:
            ValueError: a score is NaN.
        """
        wanted = self._wanted
        seen = None
        if wanted.exclude_seen:
            seen = list(histories)
            if self._allowed is not None:
                seen = [places[places > 0] for places in (self._places[codes] for codes in histories)]
        k = wanted.k * (1 if wanted.rerank is None else _CANDIDATES)
        found = self._index.top_k(hidden, self._table, k, seen_pairs(seen, hidden.device))
        scores, items = found[0].double().cpu().numpy(), found[1].cpu().numpy()
        return [self._chosen(*row) for row in zip(items, scores, strict=True)]

    def _chosen(self, items: IntArray, scores: Scores) -> tuple[IntArray, Scores]:
        kept = scores > -np.inf
        if self._wanted.min_score is not None:
            kept &= scores >= self._wanted.min_score
        items, scores = items[kept], scores[kept]
        if self._allowed is not None:
            items = self._allowed[items - 1]
        if self._wanted.rerank is not None:
            places = _places(self._wanted.rerank(items, scores, self._wanted.k), len(items))[: self._wanted.k]
            items, scores = items[places], scores[places]
        return items, scores


def _places(given: Any, count: int) -> IntArray:
    """What a hook has chosen, checked: what it returns may be the items themselves, by mistake."""
    try:
        places = np.asarray(given)
    except (TypeError, ValueError):  # lists of different lengths, or a tensor that is not on the CPU
        places = np.array(None)
    if places.size == 0:
        return np.empty(0, dtype=np.int64)
    whole = places.ndim == 1 and places.dtype.kind in "iu"
    if not whole or places.min() < 0 or places.max() >= count or len(np.unique(places)) < len(places):
        raise ValueError(
            f"rerank must return places of its {count} candidates, whole numbers from 0, each once; given "
            f"{str(given)[:80]}"
        )
    return places.astype(np.int64)


def seen_pairs(seen: Sequence[IntArray] | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Rows and item codes of what is to be left out, as ``top_k`` takes them."""
    if seen is None:
        return None
    rows = np.repeat(np.arange(len(seen)), [len(codes) for codes in seen])
    return torch.from_numpy(rows).to(device), torch.from_numpy(np.concatenate([[], *seen]).astype(np.int64)).to(device)


def best_items(
    model: TTT4Rec,
    index: ItemIndex,
    item_ids: Sequence[Name],
    hidden: Tensor,
    k: int,
    seen: Sequence[IntArray] | None = None,
) -> list[list[tuple[Name, float]]]:
    """The k best items, by their original ids, and their scores, for each of N hidden states.

    Args:
        model: gives the scores.
        index: of its items.
        item_ids: original id of item code j + 1.
        hidden: ``[N, width]``.
        k: how many; fewer come back when the catalogue holds fewer.
        seen: codes of the items to leave out, of each of the N.

    Raises:
        ValueError: k is below 1, or a score is NaN.
    """
    pairs = seen_pairs(seen, hidden.device)
    best = []
    for scores, items in zip(*(x.tolist() for x in model.top_k(hidden, k, pairs, index=index)), strict=True):
        named = [(item_ids[j - 1], score) for j, score in zip(items, scores, strict=True)]
        best.append([pair for pair in named if pair[1] > -math.inf])
    return best
