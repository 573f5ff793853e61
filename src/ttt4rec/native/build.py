"""Compiling the C++ sources at their first use, and keeping the result.

A library is made for one shape (head dimension, inner model, scalar type). Wheels bring libraries of usual shapes, see
``packaged``. Any other is made for the very processor it runs on, with the system's compiler: ``$CXX``, ``c++``,
``g++`` or ``clang++``. It is kept in the folder of ``cache``, so that only the first process ever waits. Its name has a
key of shape, sources and processor, and behind it a mark of the compiler: where there is no compiler, or where it
fails, a library that any other one made serves.
"""

import ctypes
import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from ..inner_models import LINEAR, MLP
from . import cache, packaged
from .cache import BuildError, UntrustedError

INNER_MODELS = {model.name: model for model in (LINEAR, MLP)}  # of which there are sources
SCALARS = {torch.float32: "float", torch.float64: "double"}
Sources = tuple[str, ...]
INNER_LOOP: Sources = ("inner_loop.cpp",)
STEP: Sources = ("step.cpp", "whole_step.cpp")
PASS: Sources = ("pass.cpp",)
SOFTMAX: Sources = ("full_softmax.cpp", "item_index.cpp")
_FUNCTIONS = {
    INNER_LOOP: ("ttt_forward", "ttt_backward"),
    STEP: ("ttt_step", "ttt_layer_step", "ttt_model_step", "ttt_are_within", "ttt_are_different"),
    PASS: ("ttt_pass", "ttt_pass_phase", "ttt_pass_units", "ttt_pass_memory", "ttt_product"),
    SOFTMAX: (
        *("softmax_forward", "softmax_backward", "softmax_turn", "softmax_exponentials", "softmax_log_of_sums"),
        *("softmax_gradients", "softmax_hidden", "index_items", "index_search", "index_seen", "index_bounds"),
    ),
}
_SOURCES = Path(__file__).parent
_FLAGS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-fvisibility=hidden",  # or libraries of different shapes share what has the same name in both
)  # fmt: skip
_log = logging.getLogger(__name__)
_warned = set[str]()


def refusal(error: BuildError) -> str:
    """What one is told who insists on compiled code; all others are warned in the log, once for each reason."""
    if error.reason not in _warned:
        _warned.add(error.reason)
        _log.warning("the slower eager path runs instead of the compiled one: %s", error)
    return f"cannot be compiled: {error}"


@functools.cache
def library(inner: str, head_dim: int, hidden: int, scalar: str, sources: Sources = INNER_LOOP) -> ctypes.CDLL:
    """What was compiled of some sources for a shape; compiled now, which takes a few seconds, if it never was.

    Args:
        inner: the inner model's name.
        head_dim: D, a multiple of 8.
        hidden: F, a multiple of 8; 0 if there are no hidden features.
        scalar: ``"float"`` or ``"double"``.
        sources: one of the above.

    Raises:
        BuildError: there is none and it cannot be compiled here, or others could have put one into the cache.
    """
    options = _options(inner, head_dim, hidden, scalar)
    shape = f"{Path(sources[0]).stem}-d{head_dim}-f{hidden}-{scalar}"
    brought = packaged.load(f"{shape}-{_key(options, sources)}", _FUNCTIONS[sources])
    if brought is not None:
        return brought
    options = ("-march=native", *options)
    try:
        return _library(f"{shape}-{_key(options, sources, _processor())}", options, sources)
    except OSError as error:
        raise BuildError(f"the cache of compiled libraries cannot be used: {error}") from error


def compile_for(
    level: packaged.Level, folder: Path, inner: str, head_dim: int, hidden: int, scalar: str, sources: Sources
) -> None:
    """Make a library that the package is to bring; the other arguments are as for ``library``.

    Raises:
        BuildError: it cannot be compiled here.
    """
    options = _options(inner, head_dim, hidden, scalar)
    name = f"{Path(sources[0]).stem}-d{head_dim}-f{hidden}-{scalar}-{_key(options, sources)}"
    command = (*compiler(), *level.flags, *options, *(str(_SOURCES / source) for source in sources))
    _compile(command, folder / level.name, name)


def _options(inner: str, head_dim: int, hidden: int, scalar: str) -> tuple[str, ...]:
    """What the compiler is told for a shape, whatever the processor."""
    record = INNER_MODELS[inner].record(head_dim, hidden, 1)
    constants = {
        "HEAD_DIM": head_dim,
        "HIDDEN": hidden,
        "SCALAR": scalar,
        "WEIGHTS_AT": ",".join(map(str, record.weights_at)),
        "ROW_AT": ",".join(map(str, record.row_at)),
        "ROW": record.row_size,
    }
    return (*_FLAGS, "-shared", "-fPIC", *(f"-DTTT_{name}={value}" for name, value in constants.items()))


def _key(options: tuple[str, ...], sources: Sources, *more: str) -> str:
    return cache.digest("\n".join([*options, *sources, _sources(), *more]).encode())


def _library(name: str, options: tuple[str, ...], sources: Sources) -> ctypes.CDLL:
    """The library of a name: this compiler's, made if need be, or else another's."""
    place, functions = cache.folder(), _FUNCTIONS[sources]
    try:
        command = compiler()
        ours = f"{name}-{cache.digest(_version(tuple(command)).encode())}"
        found, _ = cache.load(place, ours, functions)
        if found is None:
            _compile((*command, *options, *(str(_SOURCES / source) for source in sources)), place, ours)
            found, _ = cache.load(place, ours, functions)
        if found is None:
            raise BuildError("the compiler made no library that works")
    except UntrustedError:
        raise
    except BuildError as error:
        found, wrong = cache.load(place, name, functions)
        if found is None:
            raise BuildError(error.reason, error.details + wrong) from error
    return found


def compiler() -> list[str]:
    """The C++ compiler's command.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX")
    if chosen is not None:
        try:
            command = shlex.split(chosen)
        except ValueError as error:
            raise BuildError(f"$CXX must be the command of a C++ compiler; given {chosen!r}: {error}") from error
        if command and shutil.which(command[0]):
            return command
        raise BuildError(f"$CXX names the C++ compiler {chosen!r}, which is not there")
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        raise BuildError("there is no C++ compiler: none of c++, g++ and clang++ is on the path and $CXX is not set")
    return [found]


def _compile(command: tuple[str, ...], place: Path, name: str) -> None:
    """Make a library and put it into the cache."""
    _tell_once(place)
    _log.debug("compiling %s", name)
    try:
        place.mkdir(mode=0o755, parents=True, exist_ok=True)
        cache.folder()  # what was just made is ours alone
        with tempfile.TemporaryDirectory(dir=place) as folder:
            made = Path(folder) / "made.so"
            result = _run(*command, "-o", str(made))
            if result.returncode:
                rest = f"{shlex.join(command[1:])}\n{result.stderr.strip()[-2000:]}"
                raise BuildError(f"the compiler failed: {command[0]}", f" {rest}")
            cache.keep(made, place, name)
    except OSError as error:
        raise BuildError(f"a library cannot be compiled to {place}: {error}") from error


@functools.cache
def _tell_once(place: Path) -> None:
    _log.info("compiling C++ for this processor, which takes some seconds and is kept in %s", place)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


@functools.cache
def _sources() -> str:
    return "\n".join(
        path.read_text(encoding="utf-8") for path in sorted(_SOURCES.glob("*.h")) + sorted(_SOURCES.glob("*.cpp"))
    )


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    """The compiler's command and what it says of itself."""
    try:
        return "\n".join([*command, _run(command[0], "--version").stdout])
    except OSError as error:
        raise BuildError(f"the compiler {command[0]} cannot be run: {error}") from error


@functools.cache
def _processor() -> str:
    """What ``-march=native`` depends on: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kinds)])
