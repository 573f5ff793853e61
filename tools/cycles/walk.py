"""One trip through a loop of machine code: which instructions a warp issues, one after the other.

A mini-batch has no way of its own through a kernel: conditions in its loop skip what only the last, short one skips. So
the walk goes on in memory where it can, follows jumps that it must, and repeats loops inside the loop so often as told.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..loops import Code, loops
from ..sass import Instruction, code


class Loop(NamedTuple):
    """A loop that goes from mini-batch to mini-batch."""

    trip: list[Instruction]  # as issued
    times: int  # trips in a mini-batch: several where each is over a chunk of the hidden features


class _Body(NamedTuple):
    head: int
    inside: set[int]


def mini_batch_loops(instructions: Sequence[Instruction], chunks: int, *, replays: bool) -> list[Loop]:
    """The loops that a mini-batch goes through, of a kernel whose outermost loop with products is over segments.

    Args:
        instructions: the kernel's.
        chunks: trips of the loops inside the walk over mini-batches.
        replays: whether the first loop of a segment goes over chunks, and over mini-batches inside it.
    """
    bodies = [body for body in _bodies(code(instructions)) if _multiplies(instructions, body)]
    if not bodies:
        raise ValueError("a kernel must have a loop with matrix products; given none: did it compile to a trap?")
    segments = bodies[0]
    walks = sorted(_directly_inside(segments, bodies), key=lambda body: min(body.inside)) or [segments]
    found = []
    for number, body in enumerate(walks):
        times = 1
        if replays and number == 0 and (mini_batches := _directly_inside(body, bodies)):
            body, times = mini_batches[0], chunks
        found.append(Loop(_walked(instructions, body, chunks), times))
    return found


def one_trip(instructions: Sequence[Instruction], chunks: int, *, whole: bool) -> list[Instruction]:
    """A mini-batch's way through a kernel whose outermost loop is over them, or through one that is for one as a whole.

    Loops inside it are over chunks.
    """
    everything = _Body(0, set(range(len(instructions))))
    bodies = [body for body in _bodies(code(instructions)) if _multiplies(instructions, body)]
    return _walked(instructions, everything if whole else bodies[0], chunks)


def longest_loop(instructions: Sequence[Instruction]) -> list[Instruction]:
    """One trip through the longest loop, or through the kernel if it has none."""
    bodies = _bodies(code(instructions))
    body = bodies[0] if bodies else _Body(0, set(range(len(instructions))))
    return _walked(instructions, body, 1)


def _bodies(program: Code) -> list[_Body]:
    """The loops, the longest first, each with the instruction at which it is entered."""
    found = []
    for inside in loops(program):
        entries = {jump for i, jump in program.jumps.items() if i not in inside and jump in inside}
        entries |= {i for i in inside if i - 1 not in inside and i - 1 not in program.final}
        found.append(_Body(min(entries, default=min(inside)), inside))
    return found


def _multiplies(instructions: Sequence[Instruction], body: _Body) -> bool:
    return any("MMA" in instructions[i].name and instructions[i].name != "HFMA2" for i in body.inside)


def _directly_inside(outer: _Body, bodies: Sequence[_Body]) -> list[_Body]:
    within = [body for body in bodies if body.inside < outer.inside]
    return [body for body in within if not any(body.inside < other.inside for other in within)]


def _walked(instructions: Sequence[Instruction], body: _Body, chunks: int) -> list[Instruction]:
    program = code(instructions)
    inner = [other for other in _bodies(program) if other.inside < body.inside]
    trips = {other.head: chunks if _multiplies(instructions, other) else 1 for other in inner}
    return [instructions[i] for i in _path(program, body, sorted(inner, key=lambda b: len(b.inside)), trips)]


def _path(program: Code, body: _Body, inner: Sequence[_Body], trips: Mapping[int, int]) -> Iterator[int]:
    """Indices from the beginning of a loop until it begins again; inner loops are the smallest first."""
    left: dict[int, int] = {}
    i = body.head
    for _ in range(10 * len(program.instructions) * max(trips.values(), default=1)):
        yield i
        loop = next((other for other in inner if i in other.inside), body)
        i = _following(program, i, loop, repeat=loop is body or left.get(loop.head, 0) > 0)
        if i == body.head or i not in body.inside:
            return
        if i in trips:
            left[i] = left.get(i) or trips[i]
            left[i] -= 1
    raise ValueError("a walk through a loop must come to its beginning; given code that leads in circles")


def _following(program: Code, i: int, loop: _Body, *, repeat: bool) -> int:
    """Where to go on: rather in memory, but so as to stay in the loop, or to leave it in its last trip."""
    ways = [] if i in program.final else [i + 1]
    if i in program.jumps:
        ways.append(program.jumps[i])
    if not ways:
        return loop.head
    staying = [way for way in ways if way in loop.inside and way != loop.head]
    leaving = [way for way in ways if way not in loop.inside]
    back = [way for way in ways if way == loop.head]
    order = staying + back + leaving if repeat else leaving + staying + back
    return order[0]
