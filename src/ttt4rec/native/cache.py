"""The folder of compiled libraries: which of its files may be loaded.

What is loaded runs with all rights of the user. So a library is loaded only if nobody else, root excepted, can have put
it there or can change it: the file and its folder are the user's own or root's, nobody else can write to them, and
nobody else can put another folder in this one's place. The end of a file's name is the digest of its bytes, so that a
damaged file is noticed.
"""

import ctypes
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

_UNSAFE = "other users can put code into the cache of compiled libraries"
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class BuildError(RuntimeError):
    """There is no library that can be loaded, and none can be made.

    Args:
        reason: why; the same for every shape.
        details: what belongs to one shape alone.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason + details)
        self.reason, self.details = reason, details


class UntrustedError(BuildError):
    """Others could have put their code into the cache."""


def folder() -> Path:
    """Where libraries are kept: ``$TTT4REC_CACHE``, else ``~/.cache/ttt4rec/native``. Made if missing and possible.

    Raises:
        BuildError: nobody knows the home folder. UntrustedError: others can write there.
        OSError: the folder cannot be looked at.
    """
    chosen = os.environ.get("TTT4REC_CACHE")
    try:
        place = Path(chosen) if chosen else Path.home() / ".cache" / "ttt4rec" / "native"
    except RuntimeError as error:
        raise BuildError(
            "there is no place for compiled libraries: $HOME is not set and the system knows no home folder; "
            "set $TTT4REC_CACHE to a folder of your own"
        ) from error
    try:
        place = place.resolve()
    except RuntimeError as error:  # of older Pythons; newer ones leave it to what follows
        raise BuildError(f"the cache of compiled libraries cannot be used: {error}") from error
    if place.exists():
        _check_owner(place)
        _check_parents(place)
    return place


def load(place: Path, name: str, functions: Sequence[str], *, own: bool = True) -> tuple[ctypes.CDLL | None, str]:
    """A library of the folder whose name begins so, if there is one that is whole; else what is wrong with the others.

    Args:
        place: the folder.
        name: all of the libraries' names before the digest, or a beginning of it.
        functions: what the library must have.
        own: whether the folder is the cache, and not a part of the package, which is trusted as its modules are.

    Raises:
        UntrustedError: the library is somebody else's, or others can write to it.
    """
    wrong = ""
    for path in sorted(place.glob(f"{name}-*.so")):
        if own:
            _check_owner(path)
        try:
            if digest(path.read_bytes()) != path.stem.rpartition("-")[2]:
                raise OSError("its bytes are not those that were written")
            found = ctypes.CDLL(str(path))
            for function in functions:
                getattr(found, function)
            return found, ""
        except (OSError, AttributeError) as error:
            wrong = f"; {path} cannot be loaded: {error}"
    return None, wrong


def keep(made: Path, place: Path, name: str) -> None:
    """Move a library, made on the same disk, to its place at once, so that nobody loads half of one."""
    made.chmod(made.stat().st_mode & ~_OTHERS)
    os.replace(made, place / f"{name}-{digest(made.read_bytes())}.so")


def digest(content: bytes) -> str:
    """A digest short enough for a file's name."""
    return hashlib.sha256(content).hexdigest()[:16]


def _check_owner(path: Path) -> None:
    """UntrustedError if a file or folder is not the user's or root's, or others can write to it."""
    found = path.stat()
    if not _is_trusted(found.st_uid):
        raise UntrustedError(
            _UNSAFE,
            f": {path} must belong to you or root; given the user number {found.st_uid}; delete it or set "
            "$TTT4REC_CACHE to a folder of your own",
        )
    if os.name == "posix" and found.st_mode & _OTHERS:
        mode = stat.S_IMODE(found.st_mode)
        raise UntrustedError(
            _UNSAFE,
            f": {path} must have the mode {mode & ~_OTHERS:o}; given {mode:o}; delete it, or take the right away "
            "(chmod go-w) if what is there is your own",
        )


def _check_parents(place: Path) -> None:
    """UntrustedError if others can move the folder away and put one in its place.

    In a folder with the sticky bit, such as /tmp, they cannot. On many systems the group has the user alone, and
    folders are made writable for it.
    """
    for parent in place.parents:
        found = parent.stat()
        others = stat.S_IWOTH if os.name == "posix" and found.st_gid == os.getegid() else _OTHERS
        if not _is_trusted(found.st_uid) or (
            os.name == "posix" and found.st_mode & others and not found.st_mode & stat.S_ISVTX
        ):
            raise UntrustedError(
                _UNSAFE, f", since they can exchange what is in {parent}; set $TTT4REC_CACHE to a folder of your own"
            )


def _is_trusted(user: int) -> bool:
    return os.name != "posix" or user in (0, os.geteuid())
