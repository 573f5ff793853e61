"""Loops of machine code, found by where it jumps.

Addresses do not tell. Compilers lay seldom-taken paths behind a program's end. Each jumps back from there, over all
code in between, and is no loop.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Code(NamedTuple):
    """A program's instructions in the order of memory, and how it goes on after each."""

    instructions: list[str]
    jumps: Mapping[int, int]  # from the index of an instruction to that of another one
    final: set[int]  # instructions that the next one does not follow


def loops(code: Code) -> list[set[int]]:
    """Indices of the instructions of every loop, of those inside it too, the longest first.

    A loop begins where the program comes back to on a path from its start. To it belongs whatever leads back there
    without passing its beginning.
    """
    blocks = _blocks(code)
    number = {block.start: i for i, block in enumerate(blocks)}
    ways: list[list[int]] = []
    for block in blocks:
        jump = code.jumps.get(block[-1])
        following = None if block[-1] in code.final else block.stop
        ways.append([number[place] for place in (jump, following) if place in number])
    back = _ways_back(ways)
    origins: list[list[int]] = [[] for _ in blocks]
    for i, following_blocks in enumerate(ways):
        for following_block in following_blocks:
            origins[following_block].append(i)
    bodies: dict[int, set[int]] = {}
    for end, beginning in back:
        body, waiting = bodies.setdefault(beginning, {beginning}), [end]
        while waiting:
            if (i := waiting.pop()) not in body:
                body.add(i)
                waiting += origins[i]
    found = [{index for i in body for index in blocks[i]} for body in bodies.values()]
    return sorted(found, key=len, reverse=True)


def _blocks(code: Code) -> list[range]:
    """Runs of instructions that nothing jumps into or out of."""
    count = len(code.instructions)
    starts = {0, count, *code.jumps.values(), *(i + 1 for i in (*code.jumps, *code.final))}
    return [range(start, stop) for start, stop in itertools.pairwise(sorted(starts))]


def _ways_back(ways: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Ways from a block to one that a path from the first to it passes."""
    entered, open_blocks = {0}, {0}
    path = [(0, iter(ways[0]))]
    while path:
        block, left = path[-1]
        following = next(left, None)
        if following is None:
            open_blocks.remove(block)
            path.pop()
        elif following in open_blocks:
            yield block, following
        elif following not in entered:
            entered.add(following)
            open_blocks.add(following)
            path.append((following, iter(ways[following])))
