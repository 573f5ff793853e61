"""How fast the libraries that a wheel brings are beside those compiled for this very processor.

    python -m benchmarks.levels

compiles both, and times each in a process of its own, in turns; printed are the least seconds of each, and
the ratios of these to what was compiled here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tools import libraries
from ttt4rec import TTTLayer
from ttt4rec.models.item_index import ItemIndex
from ttt4rec.native import packaged

ROUNDS, SECONDS = 5, 0.3
OWN = "compiled here"
SHAPES = [
    shape for shape in libraries.shapes((16, 64)) if shape[1] == 16 or shape[0] == "mlp" or "around" in shape[4][0]
]


def layer(head_dim: int, inner: str, tokens: int, *, backward: bool) -> Callable[[], object]:
    """A call of a layer on one sequence, forwards or there and back."""
    made = TTTLayer(4 * head_dim, num_heads=4, inner=inner, backend="native")
    x = torch.randn(1, tokens, 4 * head_dim, requires_grad=backward)

    def call() -> None:
        with torch.set_grad_enabled(backward):
            y = made(x)
        if backward:
            y.sum().backward()

    return call


def search(items: int) -> Callable[[], object]:
    """The ten best of many items for eight hidden states."""
    table, h, index = torch.randn(items + 1, 64), torch.randn(8, 64), ItemIndex()
    return lambda: index.top_k(h, table, 10)


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "layer, MLP, D 16, 50 tokens, forward": lambda: layer(16, "mlp", 50, backward=False),
    "layer, MLP, D 16, 50 tokens, forward and backward": lambda: layer(16, "mlp", 50, backward=True),
    "layer, MLP, D 64, 512 tokens, forward and backward": lambda: layer(64, "mlp", 512, backward=True),
    "layer, linear, D 16, 512 tokens, forward and backward": lambda: layer(16, "linear", 512, backward=True),
    "ten best of 100,000 items": lambda: search(100_000),
}


def least(call: Callable[[], object]) -> float:
    """Seconds of the fastest call."""
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    """Time every level that this processor has, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", help="time this one only, and print it as JSON")
    parser.add_argument("--folder", type=Path, help="of its libraries")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if given.level:
        packaged.FOLDER = given.folder
        names = [level.name for level in packaged.LEVELS]
        packaged.LEVELS = () if given.level == OWN else packaged.LEVELS[names.index(given.level) :]
        print(json.dumps({name: least(make()) for name, make in CASES.items()}))
        return
    with tempfile.TemporaryDirectory() as place:
        libraries.compile_all(Path(place), SHAPES)
        names = [OWN, *(level.name for level in packaged.LEVELS if packaged.runs(level))]
        found = compare(names, Path(place))
    print("| call | " + " | ".join(names) + " |")
    for case in CASES:
        row = [f"{found[name][case] / found[OWN][case]:.2f}" for name in names[1:]]
        print(f"| {case} | {1e6 * found[OWN][case]:,.0f} µs | " + " | ".join(row) + " |")


def compare(names: list[str], place: Path) -> dict[str, dict[str, float]]:
    """The least seconds of every case by level, in turns."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for _ in range(ROUNDS):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.levels", "--level", name, "--folder", str(place)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            for case, seconds in json.loads(output).items():
                found[name][case] = min(seconds, found[name].get(case, seconds))
    return found


if __name__ == "__main__":
    main()
