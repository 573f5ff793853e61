"""Checkpoints: one safetensors file, its progress as JSON in the header, replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_KIND = "ttt4rec training checkpoint, version 1"


def save_checkpoint(path: Path, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
    """Write to a file beside the old checkpoint, then put it in its place."""
    partial = path.with_name(f"{path.name}.part")
    contiguous = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_file(contiguous, partial, metadata={"kind": _KIND, "progress": json.dumps(progress)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_checkpoint`` wrote.

    Raises:
        ValueError: the file is truncated or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != _KIND:
                raise ValueError(f"{path} is not a training checkpoint of this version")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["progress"])  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
