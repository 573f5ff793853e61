"""Where a kernel's loads find their data, told by the lines of source that they stem from.

Tokens come from memory. What was read earlier in the same mini-batch is near. Copies of the weights, and what the
replay of a segment has read before the walk back, come from the cache if the copies of all programs fit into it.
"""

import ast
import functools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ttt4rec import kernels

from ..sass import Instruction
from ..sass import Place as Line
from .steps import Place

COPIES = {
    *("load_copy", "store_copy", "load_hidden_copy", "store_hidden_copy", "load_copied_b2"),
    *("load_state", "store_state"),
    *("load_W1_of_slot", "load_W2_of_slot", "load_b2_of_slot", "store_weights_in_slot"),
}
WAITING = {"take_chunk", "put_chunk", "take_part", "store_part"}
REPLAYED = {"load_steps", "take_before", "hold_before", "load_chunk"}
MADE_BEFORE = {"load_of_heads", "hold_initial", "take_initial"}
REPLAYS = {"replay", "replayed"}
KERNELS = Path(kernels.__file__).parent
GLOBAL = ("LDG", "LDGSTS", "STG", "LD", "ST")


def places(trip: Sequence[Instruction], copies: Place) -> list[Place]:
    """Of every instruction of a trip through a loop of ours; copies is where those of the weights are."""
    read: dict[tuple[Line, ...], tuple[Line, ...]] = {}
    return [_place(x, copies, read) if x.name in GLOBAL else Place.NEAR for x in trip]


def _place(x: Instruction, copies: Place, read: dict[tuple[Line, ...], tuple[Line, ...]]) -> Place:
    called = functions(x.source)
    if called & WAITING:
        return Place.CACHE
    load = not x.name.startswith("ST")
    if load and called & MADE_BEFORE:  # by the kernel before
        return Place.CACHE
    # The same line of a function that loads, reached by another way: the same data once more.
    if load and called & REPLAYED and read.setdefault(x.source[:2], x.source) != x.source:
        return Place.NEAR
    if load and "load_ending" in called and called & {"load_hidden", "load_W2_of_slot"}:  # read when that began
        return Place.CACHE
    if called & COPIES or (called & REPLAYED and not called & REPLAYS):
        return copies
    if load and "load_hidden" in called and "at_queries" in called:  # stored earlier in the mini-batch
        return Place.CACHE
    return Place.MEMORY


def functions(source: Sequence[Line]) -> set[str]:
    """Names of the functions in which the lines are, and of those that they call."""
    return {name for file, line in source for name in _names(file).get(line, ())}


@functools.cache
def _names(file: str) -> dict[int, set[str]]:
    """Of every line of one of the kernels' files: what it is part of, and what it calls; nothing of other files.

    Triton may have compiled the same kernel, and kept it, in another folder.
    """
    path = KERNELS / Path(file).name
    if not path.is_file():
        return {}
    names: defaultdict[int, set[str]] = defaultdict(set)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                names[line].add(node.name)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names[node.lineno].add(node.func.id)
    return names
