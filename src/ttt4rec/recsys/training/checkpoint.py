"""Checkpoints: one safetensors file, its progress as JSON in the header, replaced in one step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt4rec.atomic_files import header_checksum, write_tensors
from ttt4rec.checks import printable
from ttt4rec.models.config import TTT4RecConfig
from ttt4rec.options import TrainOptions

_KIND = "ttt4rec training checkpoint, version 3"

UNTOLD = ("epochs", "patience")
"""Options that do not tell runs apart."""
_PARTS = {"options": dict, "config": dict, "features": dict, "data": list}
_OF_DATA = ("other data, or another filter or split of them", "other validation data, or another split of them")


def as_of_today(run: Any) -> Any:
    """What tells a checkpoint's run apart, with today's fields: later ones had their defaults."""
    if not isinstance(run, dict):
        return run
    completed = dict(run)
    for part, kind in (("options", TrainOptions), ("config", TTT4RecConfig)):
        known = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
        if isinstance(run.get(part), dict):
            completed[part] = {name: x for name, x in known.items() if name not in UNTOLD} | run[part]
    return completed


def differences(saved: Any, own: dict[str, Any]) -> list[str]:
    """What differs between the run that a checkpoint is of and another one, in words.

    Args:
        saved: of the checkpoint: ``options``, ``config``, ``data``, ``initial`` and, of a model with features,
            ``features`` as ``own`` has them.
        own: of the other run.
    """
    if not isinstance(saved, dict) or any(
        not isinstance(saved.get(part, kind()), kind) for part, kind in _PARTS.items()
    ):
        return ["it does not say of which run it is"]
    found = []
    for part in ("options", "config"):
        before, now = saved.get(part, {}), own[part]
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                found.append(f"{name} was {before.get(name)!r} and is {now.get(name)!r}")
    before, now = saved.get("features", {}), own.get("features", {})
    others = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    found += [f"it has other features of items: {', '.join(map(printable, others))}"] if others else []
    of_data = zip(_OF_DATA, saved.get("data", []), own["data"], strict=False)
    changed = [what for what, before, now in of_data if before != now]
    if changed and saved.get("config", {}).get("max_len") == own["config"]["max_len"]:  # or it is why they differ
        found.append(f"it has {changed[0]}")
    if not found:  # other sizes have other weights, so they say nothing more then
        found.append(
            "the model's initial weights differ: make it after the same torch.manual_seed, or from the same model"
        )
    return found


def save_checkpoint(path: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Replace a checkpoint by a new one; OSError, and the old one stays, when it cannot be written."""
    text = json.dumps(progress)
    write_tensors(path, tensors, {"kind": _KIND, "progress": text, "checksum": header_checksum(tensors, text)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != _KIND:
                raise ValueError(f"{path} is not a training checkpoint of this version")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text, expected = metadata["progress"], metadata["checksum"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if header_checksum(tensors, text) != expected:
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    progress = json.loads(text)
    if not isinstance(progress, dict):
        raise ValueError(f"{path} is damaged: its progress is {text[:80]}")
    return tensors, progress
