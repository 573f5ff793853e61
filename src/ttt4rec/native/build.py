"""Compiling the C++ sources at their first use, and keeping the result.

A library is made for one shape (head dimension, inner model, scalar type), for the very processor it runs on, with the
system's compiler: ``$CXX``, ``c++``, ``g++`` or ``clang++``. It is kept under ``$TTT4REC_CACHE``, by default
``~/.cache/ttt4rec``, by a key of sources, compiler and processor, so that only the first process ever waits.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SCALARS = {torch.float32: "float", torch.float64: "double"}
INNER_LOOP, SOFTMAX = ("inner_loop.cpp", "step.cpp"), ("softmax.cpp",)
_SOURCES = Path(__file__).parent
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-fvisibility=hidden",  # or libraries of different shapes share what has the same name in both
)  # fmt: skip
_log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """There is no compiler, or it failed, or its result cannot be kept."""


@functools.cache
def library(head_dim: int, hidden: int, scalar: str, sources: tuple[str, ...] = INNER_LOOP) -> ctypes.CDLL:
    """What was compiled of some sources for a shape; compiled now, which takes a few seconds, if it never was.

    Args:
        head_dim: D, a multiple of 8.
        hidden: F of TTT-MLP, a multiple of 8; 0 for TTT-Linear.
        scalar: ``"float"`` or ``"double"``.
        sources: ``INNER_LOOP`` or ``SOFTMAX``.

    Raises:
        BuildError: it cannot be compiled here.
    """
    command = (
        *compiler(), *_FLAGS, "-shared", "-fPIC", f"-DTTT_HEAD_DIM={head_dim}", f"-DTTT_HIDDEN={hidden}",
        f"-DTTT_SCALAR={scalar}", *(str(_SOURCES / source) for source in sources),
    )  # fmt: skip
    key = hashlib.sha256("\n".join([*command, _sources(), _version(command[0]), _processor()]).encode()).hexdigest()
    path = _cache() / f"{Path(sources[0]).stem}-d{head_dim}-f{hidden}-{scalar}-{key[:16]}.so"
    if not path.exists():
        _compile(command, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled library {path} cannot be loaded: {error}") from error


def compiler() -> list[str]:
    """The C++ compiler's command.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX")
    if chosen is not None:
        command = shlex.split(chosen)
        if command and shutil.which(command[0]):
            return command
        raise BuildError(f"$CXX names the C++ compiler {chosen!r}, which is not there")
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        raise BuildError("there is no C++ compiler: none of c++, g++ and clang++ is on the path and $CXX is not set")
    return [found]


def _compile(command: tuple[str, ...], path: Path) -> None:
    """Make the library beside its place and move it there at once, so that nobody loads half of one."""
    _log.info("compiling %s", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
            if result.returncode:
                raise BuildError(f"the compiler failed: {shlex.join(command)}\n{result.stderr.strip()[-2000:]}")
            os.replace(made, path)
    except OSError as error:
        raise BuildError(f"the library cannot be compiled to {path}: {error}") from error


def _cache() -> Path:
    chosen = os.environ.get("TTT4REC_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "ttt4rec"


@functools.cache
def _sources() -> str:
    return "\n".join(
        path.read_text(encoding="utf-8") for path in sorted(_SOURCES.glob("*.h")) + sorted(_SOURCES.glob("*.cpp"))
    )


@functools.cache
def _version(command: str) -> str:
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return result.stdout


@functools.cache
def _processor() -> str:
    """What ``-march=native`` depends on: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kinds)])
