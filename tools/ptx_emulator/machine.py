"""A launch of a decoded program on memory of this process, in several orders, and what the checks found."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .build import core
from .program import SHARED_BASE, SPECIALS, Program

ORDERS = (0, 1)  # of programs, warps and lanes: as they are numbered, and backwards
POISON = 0x7FFD  # each half of a word of memory that nobody wrote; also in core/machine.h
_MOST = 200  # findings of a launch


class Region(NamedTuple):
    """Memory of an argument, or of several that share it."""

    first: int
    size: int
    element: int
    name: str


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("first", "size", "element")]


class _Finding(ctypes.Structure):
    _fields_ = [
        ("what", ctypes.c_char_p),
        *((name, ctypes.c_int32) for name in ("instruction", "other", "program", "thread", "other_program")),
        ("other_thread", ctypes.c_int32),
        ("address", ctypes.c_uint64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("image", ctypes.c_void_p),
        ("words", ctypes.c_uint64),
        ("threads", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("grid", ctypes.c_int32 * 3),
        ("specials", ctypes.c_int32 * len(SPECIALS)),
        ("granules", ctypes.c_int32 * 2),
        ("order", ctypes.c_int32),
        ("regions", ctypes.POINTER(_Region)),
        ("num_regions", ctypes.c_int32),
        ("watched", ctypes.c_uint64),
        ("findings", ctypes.POINTER(_Finding)),
        ("max_findings", ctypes.c_int32),
        ("num_findings", ctypes.c_int32),
        ("writer", ctypes.c_int32),
        ("instructions", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Access:
    """An instruction and who executed it; -1: not known, or several."""

    text: str
    source: str
    program: int
    thread: int

    def __str__(self) -> str:
        who = f" by thread {self.thread} of program {self.program}" if self.thread >= 0 else ""
        return f"{self.text}{who}\n      {self.source or 'of no known line'}"


@dataclass(frozen=True)
class Finding:
    """Something a kernel must not do."""

    kernel: str
    what: str
    place: str
    accesses: tuple[Access, ...]

    def key(self) -> tuple[str, ...]:
        """The same for the same fault at other addresses and in other threads."""
        return self.kernel, self.what, *(access.text + access.source for access in self.accesses)

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.what}, {self.place}", *(str(access) for access in self.accesses)]
        return "\n    ".join(lines)


@dataclass
class Report:
    """What a launch did."""

    kernel: str
    findings: list[Finding] = field(default_factory=list)
    instructions: int = 0  # of warps, in the first order


@dataclass
class Launch:
    """A program with its arguments."""

    program: Program = field(repr=False)
    shared: int  # bytes
    grid: tuple[int, int, int]
    parameters: list[int]  # bits of each
    regions: Sequence[Region]

    def run(self, order: int = 0, watched: int = 0) -> tuple[list[Finding], int, int]:
        """Execute it once: findings, instructions of warps, and which instruction wrote the watched byte."""
        image = self.program.registers(self.parameters)
        regions = (_Region * max(1, len(self.regions)))(*(_Region(*region[:3]) for region in self.regions))
        found = (_Finding * _MOST)()
        state = _Launch(
            self.program.code.ctypes.data,
            self.program.offsets.ctypes.data,
            image.ctypes.data,
            len(image),
            self.program.threads,
            self.shared,
            self.grid,
            tuple(self.program.specials),
            self.program.granules,
            order,
            regions,
            len(self.regions),
            watched,
            found,
            _MOST,
            0,
            -1,
        )
        core().launch(ctypes.byref(state))
        return [self.finding(raw) for raw in found[: state.num_findings]], state.instructions, state.writer

    def check(self, orders: Sequence[int] = ORDERS) -> Report:
        """Execute it in every order from the same memory, which holds the results of the first afterwards."""
        before = self.memory()
        findings, instructions, _ = self.run(orders[0])
        first = self.memory()
        for order in orders[1:]:
            self.restore(before)
            findings += self.run(order)[0]
            if differing := self.difference(first, self.memory()):
                address, place = differing
                self.restore(before)
                writer = self.run(orders[0], watched=address)[2]
                findings.append(
                    Finding(
                        self.program.name,
                        f"results that depend on the order of programs, warps and lanes ({orders[0]} and {order})",
                        place,
                        (self.access(writer),) if writer >= 0 else (),
                    )
                )
        self.restore(first)
        unlike = {finding.key(): finding for finding in reversed(findings)}
        return Report(self.program.name, list(reversed(unlike.values())), instructions)

    def memory(self) -> list[np.ndarray]:
        """A copy of what all arguments hold."""
        return [_bytes(region).copy() for region in self.regions]

    def restore(self, contents: list[np.ndarray]) -> None:
        """Put back what ``memory`` gave."""
        for region, content in zip(self.regions, contents, strict=True):
            _bytes(region)[:] = content

    def difference(self, one: list[np.ndarray], other: list[np.ndarray]) -> tuple[int, str] | None:
        """Address and description of the first byte that differs."""
        for region, a, b in zip(self.regions, one, other, strict=True):
            if len(at := np.flatnonzero(a != b)):
                elements = len(np.unique(at // region.element))
                return region.first + int(at[0]), f"{elements} elements of {self.place(region.first + int(at[0]))}"
        return None

    def finding(self, raw: _Finding) -> Finding:
        """What the core found, in words."""
        accesses = [self.access(raw.instruction, raw.program, raw.thread)]
        if raw.other >= 0:
            accesses.append(self.access(raw.other, raw.other_program, raw.other_thread))
        return Finding(self.program.name, raw.what.decode(), self.place(raw.address), tuple(accesses))

    def access(self, instruction: int, program: int = -1, thread: int = -1) -> Access:
        """An instruction with its line of source."""
        own = self.program.instructions[instruction]
        source = ", inlined into ".join(f"{Path(file).name}:{line}" for file, line in own.source)
        return Access(own.text[:120], source, program, thread)

    def place(self, address: int) -> str:
        """An address as one reads it."""
        for region in self.regions:
            if region.first <= address < region.first + region.size:
                return f"{region.name}, element {(address - region.first) // region.element}"
        if SHARED_BASE <= address < SHARED_BASE + self.shared:
            return f"shared memory, byte {address - SHARED_BASE}"
        return f"address {address:#x}"


def _bytes(region: Region) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * region.size).from_address(region.first))


def poison(first: int, size: int) -> None:
    """Mark memory as written by nobody."""
    pattern = np.resize(np.array([POISON], np.uint16).view(np.uint8), size)
    ctypes.memmove(first, pattern.ctypes.data, size)


def merged(regions: Sequence[Region]) -> list[Region]:
    """Arguments that share memory as one region."""
    result: list[Region] = []
    for region in sorted(regions):
        last = result[-1] if result else None
        if last is None or region.first >= last.first + last.size:
            result.append(region)
            continue
        end = max(last.first + last.size, region.first + region.size)
        names = last.name if region.name in last.name.split(" and ") else f"{last.name} and {region.name}"
        result[-1] = Region(last.first, end - last.first, min(last.element, region.element), names)
    return result
