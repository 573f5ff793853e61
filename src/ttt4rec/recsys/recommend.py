"""Recommending: a trained model together with the ids and histories it was trained on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ttt4rec.atomic_files import check_together, write_together
from ttt4rec.models.item_index import ItemIndex
from ttt4rec.models.ttt4rec import CONFIG_FILE, WEIGHTS_FILE, TTT4Rec
from ttt4rec.recsys.data import DataError, Histories, Id, IntArray
from ttt4rec.recsys.data.ids import KINDS, kind_of, name_of

_HISTORIES_AT_ONCE = 512

Name = TypeVar("Name", bound=Id)

IDS_FILE, HISTORIES_FILE = "ids.json", "histories.safetensors"


@dataclass(frozen=True)
class Recommendations:
    """What to offer a user.

    Attributes:
        items: original item ids and scores, best first; equal scores in the order of the catalogue. None for a history
            without any known item.
        unknown: ids of the given history that the catalogue does not know; they were left out.
    """

    items: list[tuple[Id, float]]
    unknown: tuple[Id, ...] = ()


@dataclass(frozen=True)
class Recommender:
    """A trained model, and the histories that give its items and users their names.

    Raises:
        ValueError: the model was made for another number of items.
    """

    model: TTT4Rec
    histories: Histories
    _index: ItemIndex = field(default_factory=ItemIndex, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that the two belong together."""
        if self.model.config.num_items != self.histories.num_items:
            raise ValueError(
                f"the model knows {self.model.config.num_items} items and the histories {self.histories.num_items}; "
                "they must come from the same data"
            )

    def recommend(
        self,
        user_id: Id | None = None,
        history: Sequence[Id] | None = None,
        *,
        k: int = 10,
        exclude_seen: bool = False,
    ) -> Recommendations:
        """The k best items for a known user, or for anybody with a history of known items.

        Args:
            user_id: a user of the data.
            history: original item ids, oldest first; the last ``max_len`` known ones are read.
            k: how many; fewer come back when the catalogue holds fewer.
            exclude_seen: leave out every item of the history.

        Raises:
            ValueError: not exactly one of user_id and history is given, the user is unknown, the history holds no
                known item, k is below 1, or the model's scores are NaN.
        """
        if (user_id is None) == (history is None):
            raise ValueError(
                "either a user id or a history must be given; given " + ("neither" if history is None else "both")
            )
        if history is not None:
            found = self._find(history)
            if not len(found[0]):
                raise DataError(f"history must have at least one known item; given {list(history)[:5]}")
            return self._best([found], k, exclude_seen)[0]
        codes = self.histories.history(self.histories.user_code("" if user_id is None else user_id))
        if not len(codes):
            raise DataError(f"the history of user {user_id!r} must have at least one item to go on from; given none")
        return self._best([(codes, ())], k, exclude_seen)[0]

    def recommend_batch(
        self, histories: Sequence[Sequence[Id]], *, k: int = 10, exclude_seen: bool = False
    ) -> list[Recommendations]:
        """The k best items for each of several histories of original item ids, in their order.

        A history without any known item gets no items.

        Raises:
            ValueError: a history is a string, k is below 1, or the model's scores are NaN.
        """
        found = [self._find(history) for history in histories]
        best = iter(self._best([(codes, unknown) for codes, unknown in found if len(codes)], k, exclude_seen))
        return [next(best) if len(codes) else Recommendations([], unknown) for codes, unknown in found]

    def _find(self, history: Sequence[Id]) -> tuple[IntArray, tuple[Id, ...]]:
        if isinstance(history, str):
            raise DataError(f"history must be a sequence of item ids; given the string {history!r}")
        return self.histories.item_codes(history)

    def _best(
        self, found: Sequence[tuple[IntArray, tuple[Id, ...]]], k: int, exclude_seen: bool
    ) -> list[Recommendations]:
        """Recommendations for item codes, each with the unknown ids that stood among them."""
        if k < 1:
            raise ValueError(f"k must be at least 1; given {k}")
        results = []
        for start in range(0, len(found), _HISTORIES_AT_ONCE):
            part = found[start : start + _HISTORIES_AT_ONCE]
            codes = [codes for codes, _ in part]
            hidden, seen = self._hidden(codes), codes if exclude_seen else None
            best = best_items(self.model, self._index, self.histories.item_ids, hidden, k, seen)
            results += [Recommendations(items, unknown) for items, (_, unknown) in zip(best, part, strict=True)]
        return results

    @torch.no_grad()
    def _hidden(self, histories: Sequence[IntArray]) -> Tensor:
        """Hidden states ``[N, width]`` after the last ``max_len`` items of each history."""
        recent = [torch.from_numpy(codes[-self.model.config.max_len :].copy()) for codes in histories]
        ids = torch.cat(recent)
        ends = torch.tensor([len(codes) for codes in recent]).cumsum(0)
        wanted = torch.zeros_like(ids).index_fill(0, ends - 1, 1)  # any item: what comes next is not known
        device = self.model.embedding.weight.device
        training = self.model.training
        self.model.eval()
        try:
            cu_seqlens = torch.cat((ends.new_zeros(1), ends))
            hidden, _ = self.model.predict(ids[None].to(device), wanted.to(device), cu_seqlens.to(device))
        finally:
            self.model.train(training)
        return hidden

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model, ``ids.json`` and ``histories.safetensors``.

        A full disk leaves the folder as it was. A kill while the files take their places may leave some of an older
        save, which ``load`` refuses.
        """
        arrays = {name: getattr(self.histories, name) for name in ("items", "offsets", "times")}
        others = {
            CONFIG_FILE: asdict(self.model.config),
            IDS_FILE: _ids_as_json(self.histories),
            HISTORIES_FILE: {name: torch.from_numpy(array) for name, array in arrays.items()},
        }
        write_together(Path(folder), WEIGHTS_FILE, self.model.state_dict(), others)

    @staticmethod
    def load(folder: str | os.PathLike[str], device: str = "cpu") -> Recommender:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: the folder holds no saved recommender.
            ValueError: its files are damaged or do not belong together.
        """
        folder = Path(folder)
        model = TTT4Rec.load(folder, device)
        for name in (IDS_FILE, HISTORIES_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no saved recommender: {name} is missing")
        check_together(folder, WEIGHTS_FILE, [IDS_FILE, HISTORIES_FILE])
        try:
            ids = json.loads((folder / IDS_FILE).read_text(encoding="utf-8"))
            arrays = {name: x.numpy() for name, x in load_file(folder / HISTORIES_FILE).items()}
            histories = Histories(
                **arrays, user_ids=_ids_from_json(ids, "users"), item_ids=_ids_from_json(ids, "items")
            )
            consistent = _is_consistent(histories)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{folder} does not hold a recommender that can be read ({reason})") from error
        recommender = Recommender(model, histories)
        if not consistent:
            raise ValueError(f"{folder / HISTORIES_FILE} and {IDS_FILE} do not belong together")
        return recommender


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
    pairs = None
    if seen is not None:
        rows = np.repeat(np.arange(len(seen)), [len(codes) for codes in seen])
        pairs = torch.from_numpy(rows).to(hidden.device), torch.from_numpy(np.concatenate(seen)).to(hidden.device)
    best = []
    for scores, items in zip(*(x.tolist() for x in model.top_k(hidden, k, pairs, index=index)), strict=True):
        named = [(item_ids[j - 1], score) for j, score in zip(items, scores, strict=True)]
        best.append([pair for pair in named if pair[1] > -math.inf])
    return best


def _ids_as_json(histories: Histories) -> dict[str, Any]:
    """What ``ids.json`` holds: the ids, and of which types they are."""
    ids = {"users": histories.user_ids, "items": histories.item_ids}
    plain = {what: list(map(str, some)) if kind_of(some) is UUID else some for what, some in ids.items()}
    return plain | {"types": {what: name_of(kind_of(some)) for what, some in ids.items()}}


def _ids_from_json(ids: dict[str, Any], what: str) -> tuple[Id, ...]:
    kind = KINDS[ids.get("types", {}).get(what, "str")]
    if not all(type(x) is (int if kind is int else str) for x in ids[what]):
        raise TypeError(f"{what} must be of one type")
    return tuple(map(UUID, ids[what])) if kind is UUID else tuple(ids[what])


def _is_consistent(histories: Histories) -> bool:
    """Whether the arrays and ids that were read have the sizes and values of one another."""
    items, offsets = histories.items, histories.offsets
    return (
        items.dtype == offsets.dtype == np.int64
        and items.shape == histories.times.shape == (len(items),)
        and offsets.shape == (histories.num_users + 1,)
        and bool(offsets[0] == 0 and offsets[-1] == len(items) and (np.diff(offsets) >= 0).all())
        and bool(((items >= 1) & (items <= histories.num_items)).all())
    )
