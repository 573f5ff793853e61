"""Files that are replaced in one step: whatever happens while one is written, the old one stays whole.

And files that know their checksum: what is read is what was written, or an error.
"""

import glob
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .extras import require

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

_DIGESTS = "digests"  # sha256 of the files that were written together with this one
_CHECKSUM = "checksum"  # of the content and of these digests
_SEAL = "seal"  # of a safetensors header: both of them; one entry, since the order of several differs by chance
_SAVED_WITH = "saved_with"  # in its place before there were checksums: the digests

_log = logging.getLogger(__name__)


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


def write_json(path: Path, content: dict[str, Any], others: Sequence[str] = ()) -> None:
    """Replace a JSON file, which ``read_json`` checks.

    Args:
        path: the file.
        content: what JSON can hold, by name.
        others: files of the same folder that belong to it; ``check_digest`` tells whether they are still the same.
    """
    marked = content | {_DIGESTS: {name: file_digest(path.parent / name) for name in others}}
    with replacing(path) as partial:
        _put_json(partial, marked | {_CHECKSUM: json_checksum(marked)})


def read_json(path: Path) -> dict[str, Any]:
    """Read what ``write_json`` wrote. A file without a checksum, of an older version, is read with a warning.

    Raises:
        ValueError: the file is damaged. FileNotFoundError: it is missing.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must hold an object; given {type(content).__name__}")
    rest = {name: value for name, value in content.items() if name != _CHECKSUM}
    _check_seal(path, content, lambda: json_checksum(rest))
    return content


def check_digest(path: Path, content: dict[str, Any]) -> None:
    """Compare a file with what the content of a JSON file knows of it, if it does.

    Raises:
        ValueError: it is another one.
    """
    if path.name in content.get(_DIGESTS, {}) and file_digest(path) != content[_DIGESTS][path.name]:
        raise ValueError(f"{path} is damaged, or of another run than the other files of its folder")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Replace a safetensors file (needs the package ``safetensors``); OSError when it cannot be written."""
    with replacing(path) as partial:
        _put_tensors(partial, tensors, metadata)


def write_sealed(path: Path, tensors: dict[str, Tensor]) -> None:
    """As ``write_tensors``, with a checksum in the header, which ``read_sealed`` checks."""
    require("saving", "numpy", "safetensors")
    with replacing(path) as partial:
        _put_sealed(partial, tensors, {})


def read_sealed(path: Path) -> dict[str, Tensor]:
    """Read what ``write_sealed`` wrote, or the weights of ``write_together``.

    A file without a checksum, of an older version or another program, is read with a warning.

    Raises:
        ValueError: the file is damaged. FileNotFoundError: it is missing.
    """
    require("loading", "numpy", "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            seal = _seal_of(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {str(error).splitlines()[0]}") from error
    _check_seal(path, seal, lambda: header_checksum(tensors, json.dumps(seal.get(_DIGESTS))))
    return tensors


def write_together(folder: Path, weights: str, tensors: dict[str, Tensor], others: dict[str, Any]) -> None:
    """Replace a safetensors file and others of a folder; ``check_together`` tells whether files are of one call.

    Args:
        folder: created if missing.
        weights: the file's name; it keeps its own checksum and the sha256 of the others.
        tensors: its content.
        others: contents by name: tensors for a ``.safetensors``, otherwise what JSON can hold.

    Raises:
        OSError: one cannot be written; if the disk is full, all are as they were before.
    """
    require("saving", "numpy", "safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_all([folder / name for name in (weights, *others)]) as (first, *partials):
        digests = {}
        for (name, content), partial in zip(others.items(), partials, strict=True):
            if name.endswith(".safetensors"):
                _put_tensors(partial, content, None)
            else:
                _put_json(partial, content)
            digests[name] = file_digest(partial)
        _put_sealed(first, tensors, digests)


def check_together(folder: Path, weights: str, others: Sequence[str]) -> None:
    """Compare files with what their weights file knows of them; a file that it knows nothing of may be any.

    Raises:
        ValueError: one of them was not written together with the weights.
    """
    from safetensors import safe_open

    with safe_open(folder / weights, "pt") as file:
        marks = file.metadata() or {}
    digests = _seal_of(marks).get(_DIGESTS) or json.loads(marks.get(_SAVED_WITH, "{}"))
    for name in others:
        if name in digests and file_digest(folder / name) != digests[name]:
            raise ValueError(
                f"{weights} and {name} in {folder} must be files of one save; given some that do not belong together: "
                "saving was interrupted, or one was changed"
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


def header_checksum(tensors: dict[str, Tensor], text: str) -> str:
    """A digest of tensors and of a text that stands with them in a file's header."""
    return hashlib.sha256(f"{checksum(tensors)} {text}".encode()).hexdigest()


def json_checksum(content: dict[str, Any]) -> str:
    """A digest of what a JSON file holds, in whatever order and layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _seal_of(marks: dict[str, str]) -> dict[str, Any]:
    """The seal in a safetensors header, empty if there is none; it fits nothing if its name is damaged."""
    if _SEAL in marks:
        seal: dict[str, Any] = json.loads(marks[_SEAL])
        return seal
    lost = any(value.startswith(f'{{"{_DIGESTS}"') for value in marks.values())
    return {_CHECKSUM: None} if lost else {}


def _check_seal(path: Path, seal: dict[str, Any], expected: Callable[[], str]) -> None:
    """ValueError if a file has a wrong checksum; it has lost it if there are digests without one."""
    if not seal.keys() & {_DIGESTS, _CHECKSUM}:
        _log.warning("%s has no checksum: damage to it cannot be noticed until it is saved again", path)
    elif seal.get(_CHECKSUM) != expected():
        raise ValueError(f"{path} is damaged: its checksum is wrong; restore the file as it was saved")


def _put_json(path: Path, content: Any) -> None:
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)  # ids of users are nobody else's business
    with open(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")


def _put_sealed(path: Path, tensors: dict[str, Tensor], digests: dict[str, str]) -> None:
    seal = {_DIGESTS: digests, _CHECKSUM: header_checksum(tensors, json.dumps(digests))}
    _put_tensors(path, tensors, {_SEAL: json.dumps(seal)})


def _put_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
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
