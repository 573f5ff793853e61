"""Machine code written by hand: one instruction a line, then its stall, counters and what it waits for.

``LDG.E.64 stall=1 written=0``, ``FFMA stall=4 wait=0,1``, ``DEPBAR.LE (SB0, 0x1)``.
"""

import re

from tools.sass import Instruction


def instructions(listing: str, *, repeat: int = 1) -> list[Instruction]:
    """The instructions of a listing, so many times over."""
    return repeat * [_instruction(line.strip()) for line in listing.strip().splitlines()]


def _instruction(line: str) -> Instruction:
    operands = re.search(r"\((.*)\)", line)
    fields = dict(re.findall(r"(\w+)=([\d,]+)", line))
    return Instruction(
        predicate="",
        opcode=line.split()[0],
        operands=operands[1] if operands else "",
        stall=int(fields.get("stall", 1)),
        written=int(fields["written"]) if "written" in fields else None,
        read=int(fields["read"]) if "read" in fields else None,
        wait=tuple(map(int, fields["wait"].split(","))) if "wait" in fields else (),
        jump=None,
        source=(),
    )
