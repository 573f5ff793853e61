"""The core, compiled with the system's C++ compiler at its first use and kept.

Under ``$PTX_EMULATOR_CACHE``, by default ``~/.cache/ptx-emulator``, by a key of sources and compiler.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

_SOURCES = Path(__file__).parent / "core"
_FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC")


class Operation(NamedTuple):
    """What the core can do: its number, and the bytes of result and operands, where these are registers alone."""

    number: int
    sizes: tuple[int, ...]


@functools.cache
def core() -> ctypes.CDLL:
    """The compiled core.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    machine = ("-march=x86-64-v3",) if platform.machine() in ("x86_64", "AMD64") else ()
    command = [*shlex.split(os.environ.get("CXX", "c++")), *_FLAGS, *machine, str(_SOURCES / "core.cpp")]
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted(_SOURCES.iterdir()))
    key = hashlib.sha256(f"{command}{sources}{platform.node()}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("PTX_EMULATOR_CACHE", Path.home() / ".cache" / "ptx-emulator"))
    path = folder / f"core-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = Path(place) / path.name
            try:
                run = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
            except OSError as error:
                raise RuntimeError(f"the emulator needs a C++ compiler, c++ or $CXX: {error}") from error
            if run.returncode:
                raise RuntimeError(f"the emulator's core did not compile: {shlex.join(command)}\n{run.stderr[-2000:]}")
            os.replace(made, path)
    library = ctypes.CDLL(str(path))
    library.operations.restype = ctypes.c_char_p
    return library


@functools.cache
def operations() -> dict[str, Operation]:
    """Every operation by each of its names."""
    table: dict[str, Operation] = {}
    for i, line in enumerate(core().operations().decode().splitlines()):
        names, signature = line.rsplit(":", 1)
        sizes = tuple(0 if size == "p" else int(size) for size in signature)
        table |= {name: Operation(i, sizes) for name in names.split()}
    return table
