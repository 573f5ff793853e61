"""Checkpoints: one safetensors file, its progress as JSON in the header, replaced in one step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt4rec.atomic_files import header_checksum, write_tensors

_KIND = "ttt4rec training checkpoint, version 3"


def save_checkpoint(path: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Put a checkpoint in the place of the old one; OSError, and the old one stays, when it cannot be written."""
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
    return tensors, json.loads(text)
