"""Files that are replaced in one step: whatever happens while one is written, the old one stays whole."""

import glob
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

_SAVED_WITH = "saved_with"  # in a safetensors header: sha256 of the files that were written together with it


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to instead; it takes the place of ``path``, on disk too, when the block ends without an error.

    Raises:
        OSError: the disk is full, or the folder cannot be written; ``path`` is as it was before.
    """
    with replacing_all([path]) as (partial,):
        yield partial


@contextmanager
def replacing_all(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """As ``replacing``, for several files of one folder, of which none is replaced before all are on disk."""
    partials = [path.with_name(f"{path.name}.{secrets.token_hex(8)}.part") for path in paths]  # nobody else's
    try:
        yield partials
        for partial in partials:
            _flush(partial)
        for partial, path in zip(partials, paths, strict=True):
            os.replace(partial, path)
        _flush(paths[0].parent)
    except BaseException:
        for partial in partials:
            partial.unlink(missing_ok=True)
        raise


def remove_partials(folder: Path, name: str = "*") -> None:
    """Remove what killed writers of a folder's files left; for one who knows that nobody writes them now."""
    for partial in folder.glob(f"{name if name == '*' else glob.escape(name)}.{'[0-9a-f]' * 16}.part"):
        partial.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock a folder, and tell whether nobody else had.

    The system releases the lock of a process that dies. Where it or the file system has no locks, none is taken.
    """
    if fcntl is None:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # some network file systems lock no folders
        yield free
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file."""
    with replacing(path) as partial:
        _put_json(partial, content)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace a safetensors file (needs the package ``safetensors``); OSError when it cannot be written."""
    with replacing(path) as partial:
        _put_tensors(partial, tensors, metadata)


def write_together(folder: Path, weights: str, tensors: dict[str, Tensor], others: dict[str, Any]) -> None:
    """Replace a safetensors file and others of a folder; ``check_together`` tells whether files are of one call.

    Args:
        folder: created if missing.
        weights: the file's name; it keeps the sha256 of the others.
        tensors: its content.
        others: contents by name: tensors for a ``.safetensors``, otherwise what JSON can hold.

    Raises:
        OSError: one cannot be written; if the disk is full, all are as they were before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_all([folder / name for name in (weights, *others)]) as (first, *partials):
        digests = {}
        for (name, content), partial in zip(others.items(), partials, strict=True):
            put = _put_tensors if name.endswith(".safetensors") else _put_json
            put(partial, content)
            digests[name] = file_digest(partial)
        _put_tensors(first, tensors, {_SAVED_WITH: json.dumps(digests)})


def check_together(folder: Path, weights: str, others: Sequence[str]) -> None:
    """Compare files with what their weights file knows of them; a file that it knows nothing of may be any.

    Raises:
        ValueError: one of them was not written together with the weights.
    """
    from safetensors import safe_open

    with safe_open(folder / weights, "pt") as file:
        digests = json.loads((file.metadata() or {}).get(_SAVED_WITH, "{}"))
    for name in others:
        if name in digests and file_digest(folder / name) != digests[name]:
            raise ValueError(
                f"{weights} and {name} in {folder} do not belong together: saving was interrupted, or one was changed; "
                "expected files of one save"
            )


def file_digest(path: Path, kind: str = "sha256") -> str:
    """A file's digest in hexadecimal."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def checksum(tensors: dict[str, Tensor]) -> str:
    """A digest of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _put_json(path: Path, content: Any) -> None:
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)  # ids of users are nobody else's business
    with open(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def _put_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    try:
        save_file(contiguous, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}, and what it was to replace is as before: {error}") from error


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
