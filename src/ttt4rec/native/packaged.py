"""Libraries that a wheel brings, so that no compiler is needed: one for each shape and for each class of processors.

They are called by pointers alone and know nothing of PyTorch or Python, so they serve any version of both. What is
loaded is the best that the processor can run. A source tree has no folder of libraries.
"""

import ctypes
import functools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import cache

FOLDER = Path(__file__).with_name("libraries")


class Level(NamedTuple):
    """A class of processors.

    Attributes:
        machine: as ``platform.machine`` calls them.
        name: of its folder.
        flags: for the compiler.
        needs: what the system must say that the processor has.
    """

    machine: str
    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]


_AVX2 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_AVX512 = _AVX2 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
LEVELS = (
    Level("x86_64", "avx512-vnni", ("-march=x86-64-v4", "-mavx512vnni"), _AVX512 | {"avx512_vnni"}),
    Level("x86_64", "avx512", ("-march=x86-64-v4",), _AVX512),
    Level("x86_64", "avx2", ("-march=x86-64-v3",), _AVX2),
    Level("x86_64", "baseline", ("-march=x86-64",), frozenset()),
    Level("aarch64", "neon", ("-march=armv8-a",), frozenset()),
)
"""Of a machine the best first. A level need not have a library that would be the next one's, byte for byte."""


def load(name: str, functions: Sequence[str]) -> ctypes.CDLL | None:
    """The package's library of a name for this processor; None if it brings none that is whole.

    Args:
        name: all of it before the digest of the bytes.
        functions: what the library must have.
    """
    for level in LEVELS:
        if runs(level):
            found, _ = cache.load(FOLDER / level.name, name, functions, own=False)
            if found is not None:
                return found
    return None


def runs(level: Level) -> bool:
    """Whether this processor has what a level needs."""
    return platform.machine() == level.machine and level.needs <= _features()


@functools.cache
def _features() -> frozenset[str]:
    """What all of the processor's cores have, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = [frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return frozenset.intersection(*found) if found else frozenset()
