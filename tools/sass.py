"""NVIDIA's machine code, read from a compiled kernel: instructions, and what each says of when the next may follow.

An instruction has 128 bits. Bits 105 to 121, which disassemblers leave out, control its issue: the assembler writes
there how long the warp pauses after it, which counters it raises until its results are written or its operands read,
and which counters must be down before it starts.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from .loops import Code

COUNTERS = 6
"""A warp's scoreboards."""

Place = tuple[str, int]
"""File and line."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; a counter is its number, or None."""

    predicate: str
    opcode: str  # with modifiers, as in LDG.E.64
    operands: str
    stall: int  # cycles until the warp may issue its next one
    written: int | None  # counter that is up until the result is written
    read: int | None  # counter that is up until the operands are read
    wait: tuple[int, ...]  # counters that must be down
    jump: int | None  # index of the instruction it may jump to
    source: tuple[Place, ...]  # line it stems from, and lines that this one was inlined at

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def final(self) -> bool:
        """Whether the next instruction in memory cannot follow it."""
        conditional = self.predicate or re.match(r"!?U?[PR]\w+,", self.operands)  # an operand it is from sm_100 on
        return not conditional and self.name in ("BRA", "EXIT", "RET", "JMP")

    def __str__(self) -> str:
        return f"{self.predicate} {self.opcode} {self.operands}".strip()


_LABEL = re.compile(r"\s*(\.L\w+|\$\w+|\.text\.\S+):$")
_SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)( inlined at)?')
_FIRST = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*/\* 0x([0-9a-f]{16}) \*/$")
_SECOND = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/$")
_TEXT = re.compile(r"\{?\s*(@!?U?P\w+)?\s*(\S+?)(?:\s+(.*?))?\s*[;}]*$")


def disassembly(cubin: bytes) -> str:
    """Instructions, their bits, and the lines they stem from."""
    return printed("nvdisasm", cubin, "-hex", "-c", "-gi")


def printed(tool: str, cubin: bytes, *options: str) -> str:
    """What one of the tools that Triton brings says of a compiled kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def decoded(text: str) -> list[Instruction]:
    """The instructions of a disassembly, in the order of memory.

    Raises:
        ValueError: there are none.
    """
    labels: dict[str, int] = {}
    found: list[tuple[str, tuple[Place, ...]]] = []
    bits: list[int] = []
    source: list[Place] = []
    fresh = True  # the next line of a source begins another chain
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif place := _SOURCE.match(line):
            source = [] if fresh else source
            source.append((place[1], int(place[2])))
            fresh = False
        elif first := _FIRST.match(line):
            found.append((first[1], tuple(source)))
            fresh = True
        elif (second := _SECOND.match(line)) and len(bits) < len(found):
            bits.append(int(second[1], 16))
    if not found or len(bits) != len(found):
        raise ValueError("a disassembly must have instructions of two words each; given one without: is it nvdisasm's?")
    return [_instruction(words, high, labels, chain) for (words, chain), high in zip(found, bits, strict=True)]


def _instruction(text: str, high: int, labels: dict[str, int], source: tuple[Place, ...]) -> Instruction:
    parts = _TEXT.match(text)
    assert parts is not None
    control = high >> 41
    operands = parts[3] or ""
    label = re.search(r"`\((\S+?)\)", operands)
    is_jump = parts[2].split(".")[0] in ("BRA", "CALL", "JMP")
    return Instruction(
        predicate=parts[1] or "",
        opcode=parts[2],
        operands=operands,
        stall=control & 15,
        written=_counter(control >> 5),
        read=_counter(control >> 8),
        wait=tuple(n for n in range(COUNTERS) if control >> 11 + n & 1),
        jump=labels.get(label[1]) if label and is_jump else None,
        source=source,
    )


def _counter(bits: int) -> int | None:
    number = bits & 7
    return number if number < COUNTERS else None


def code(instructions: Sequence[Instruction]) -> Code:
    """What loops are found in."""
    jumps = {i: x.jump for i, x in enumerate(instructions) if x.jump is not None}
    return Code([str(x) for x in instructions], jumps, {i for i, x in enumerate(instructions) if x.final})
