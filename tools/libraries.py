"""Compile the libraries that a wheel brings.

    python -m tools.libraries FOLDER
    CXX=aarch64-linux-gnu-g++ python -m tools.libraries FOLDER --machine aarch64

``scripts/wheel.sh`` calls it. A library is one shape's, for one class of processors (``ttt4rec.native.packaged``); all
are in float32. Other shapes, and other types, are compiled at their first use, where there is a compiler.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from ttt4rec.native import build, packaged

HEAD_DIMS = (16, 32, 64)
"""Of TTT4Rec, and of the layer as it is mostly made."""
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
"""What a system of the tag manylinux_2_28 has, which is that of PyTorch's own wheels."""

MACHINES = {"x86_64": 62, "aarch64": 183}
"""What wheels are made for, and how ELF files number it."""

Shape = tuple[str, int, int, str, build.Sources]


def shapes(head_dims: Sequence[int] = HEAD_DIMS) -> Iterator[Shape]:
    """All that a wheel brings, as ``build.library`` takes them."""
    for head_dim in head_dims:
        for inner, hidden in (("linear", 0), ("mlp", 4 * head_dim)):
            for sources in (build.INNER_LOOP, build.STEP):
                yield inner, head_dim, hidden, "float", sources
        yield "linear", head_dim, 0, "float", build.PASS
    yield "linear", 16, 0, "float", build.SOFTMAX


def needed(library: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of each of the system's libraries that a library asks for."""
    found: dict[str, tuple[int, ...]] = {}
    text = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    for name, version in re.findall(r"\(?\b(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\b", text):
        found[name] = max(found.get(name, ()), tuple(map(int, version.split("."))))
    return found


def compile_all(folder: Path, every: Sequence[Shape], machine: str = "x86_64") -> None:
    """Compile for each level of a machine, with ``$CXX`` if that is another one than this.

    Raises:
        BuildError: one cannot be compiled. ValueError: one would not run on a system of the wheel's tag.
    """
    for level in packaged.LEVELS:
        for shape in every if level.machine == machine else ():
            if level.name != "avx512-vnni" or build.SOFTMAX in shape:  # nothing else takes products of bytes
                build.compile_for(level, folder, *shape)
    for path in sorted(folder.glob("*/*.so")):
        made_for = int.from_bytes(path.read_bytes()[18:20], "little")  # e_machine
        if made_for != MACHINES[machine]:
            raise ValueError(f"{path} must be for {machine}, {MACHINES[machine]}; given {made_for}")
        for name, version in needed(path).items():
            if version > NEWEST[name]:
                raise ValueError(f"{path} must need {name} {NEWEST[name]} at most; given {version}")


def main() -> None:
    """Compile what a wheel brings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machine", choices=tuple(MACHINES), default="x86_64")
    args = parser.parse_args()
    folder: Path = args.folder
    compile_all(folder, list(shapes()), args.machine)
    sizes = [path.stat().st_size for path in folder.glob("*/*.so")]
    print(f"{len(sizes)} libraries, {sum(sizes) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
