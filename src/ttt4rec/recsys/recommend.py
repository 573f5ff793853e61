"""Recommending: a trained model together with the ids and histories it was trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ttt4rec.model import TTT4Rec
from ttt4rec.recsys.data import DataError, Histories, IntArray

IDS_FILE, HISTORIES_FILE = "ids.json", "histories.safetensors"


@dataclass(frozen=True)
class Recommendations:
    """What to offer a user.

    Attributes:
        items: original item ids and scores, best first; equal scores in the order of the catalogue.
        unknown: ids of the given history that the catalogue does not know; they were left out.
    """

    items: list[tuple[str, float]]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recommender:
    """A trained model, and the histories that give its items and users their names.

    Raises:
        ValueError: the model was made for another number of items.
    """

    model: TTT4Rec
    histories: Histories

    def __post_init__(self) -> None:
        """Check that the two belong together."""
        if self.model.config.num_items != self.histories.num_items:
            raise ValueError(
                f"the model knows {self.model.config.num_items} items and the histories {self.histories.num_items}; "
                "they must come from the same data"
            )

    @torch.no_grad()
    def recommend(
        self,
        user_id: str | None = None,
        history: Sequence[str] | None = None,
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
                known item, or k is below 1.
        """
        if (user_id is None) == (history is None):
            raise ValueError(
                "expected either a user id or a history, given " + ("neither" if history is None else "both")
            )
        if k < 1:
            raise ValueError(f"expected k of at least 1, given {k}")
        codes, unknown = self._codes(user_id, history)
        config, device = self.model.config, self.model.embedding.weight.device
        self.model.eval()
        ids = torch.from_numpy(codes[-config.max_len :].copy())[None].to(device)
        scores = self.model.scores(self.model(ids)[0, -1]).float()
        if exclude_seen:
            scores[torch.from_numpy(codes).to(device) - 1] = -torch.inf
        best = torch.argsort(scores, descending=True, stable=True)[:k].tolist()
        items = [(self.histories.item_ids[j], float(scores[j])) for j in best if scores[j] > -torch.inf]
        return Recommendations(items, unknown)

    def _codes(self, user_id: str | None, history: Sequence[str] | None) -> tuple[IntArray, tuple[str, ...]]:
        if user_id is not None:
            return self.histories.history(self.histories.user_code(user_id)), ()
        codes, unknown = self.histories.item_codes(history or ())
        if not len(codes):
            raise DataError(f"expected a history with at least one known item, given {list(history or ())[:5]}")
        return codes, unknown

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model, ``ids.json`` and ``histories.safetensors``, each file replaced atomically."""
        folder = Path(folder)
        self.model.save(folder)
        ids = {"users": self.histories.user_ids, "items": self.histories.item_ids}
        partial = folder / f"{IDS_FILE}.part"
        partial.write_text(json.dumps(ids))
        os.replace(partial, folder / IDS_FILE)
        partial = folder / f"{HISTORIES_FILE}.part"
        arrays = {name: getattr(self.histories, name) for name in ("items", "offsets", "times")}
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, partial)
        os.replace(partial, folder / HISTORIES_FILE)

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
        try:
            ids = json.loads((folder / IDS_FILE).read_text())
            arrays = {name: x.numpy() for name, x in load_file(folder / HISTORIES_FILE).items()}
            histories = Histories(**arrays, user_ids=tuple(ids["users"]), item_ids=tuple(ids["items"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not hold a recommender that can be read: {error}") from error
        if len(histories.offsets) != histories.num_users + 1 or histories.offsets[-1] != len(histories.items):
            raise ValueError(f"{folder / HISTORIES_FILE} and {IDS_FILE} do not belong together")
        return Recommender(model, histories)
