"""Files that are replaced in one step: whatever happens while one is written, the old one stays whole."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to instead; it takes the place of ``path``, on disk too, when the block ends without an error.

    Raises:
        OSError: the disk is full, or the folder cannot be written; ``path`` is as it was before.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file (needs the package ``safetensors``); OSError when it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with replacing(path) as partial:
        try:
            save_file(contiguous, partial, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}, which is as it was before: {error}") from error


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
