"""What a recommender's folder holds besides the model: histories, and the ids of users and items with their types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ttt4rec.recsys.data import Histories, Id
from ttt4rec.recsys.data.ids import KINDS, kind_of, name_of

IDS_FILE, HISTORIES_FILE = "ids.json", "histories.safetensors"


def as_files(histories: Histories) -> dict[str, Any]:
    """What is to be written, by the names of the files."""
    ids = {"users": histories.user_ids, "items": histories.item_ids}
    plain = {what: list(map(str, some)) if kind_of(some) is UUID else some for what, some in ids.items()}
    return {
        IDS_FILE: plain | {"types": {what: name_of(kind_of(some)) for what, some in ids.items()}},
        HISTORIES_FILE: {name: torch.from_numpy(getattr(histories, name)) for name in ("items", "offsets", "times")},
    }


def read_histories(folder: Path) -> Histories:
    """Read what was written; ValueError if it is damaged."""
    try:
        ids = json.loads((folder / IDS_FILE).read_text(encoding="utf-8"))
        arrays = {name: x.numpy() for name, x in load_file(folder / HISTORIES_FILE).items()}
        return Histories(**arrays, user_ids=_ids(ids, "users"), item_ids=_ids(ids, "items"))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{folder} does not hold a recommender that can be read ({reason})") from error


def _ids(ids: dict[str, Any], what: str) -> tuple[Id, ...]:
    kind = KINDS[ids.get("types", {}).get(what, "str")]
    if not all(type(x) is (int if kind is int else str) for x in ids[what]):
        raise TypeError(f"{what} must be of one type")
    return tuple(map(UUID, ids[what])) if kind is UUID else tuple(ids[what])


def is_consistent(histories: Histories) -> bool:
    """Whether the arrays and ids that were read have the sizes and values of one another."""
    items, offsets = histories.items, histories.offsets
    return (
        items.dtype == offsets.dtype == np.int64
        and items.shape == histories.times.shape == (len(items),)
        and offsets.shape == (histories.num_users + 1,)
        and bool(offsets[0] == 0 and offsets[-1] == len(items) and (np.diff(offsets) >= 0).all())
        and bool(((items >= 1) & (items <= histories.num_items)).all())
    )
