"""What an instruction takes of a machine: a unit for so long, results after so many cycles, and what it waits for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from ..sass import Instruction
from .machines import Machine


class Unit(Enum):
    """A part of a sub-partition that takes one instruction of a warp at a time."""

    FMA = "float arithmetic"
    INTEGER_FMA = "integer multiplication"  # the first of the pipes for floats
    ALU = "integer and logic"
    SPECIAL = "special functions"
    TENSOR = "tensor cores"
    MEMORY = "shared memory and loads"  # in a queue, from which one load-store unit serves all sub-partitions
    UNIFORM = "uniform"
    CONTROL = "control"
    NONE = "none"


class Kind(Enum):
    """What an instruction is for; a wait is named after what it waits for."""

    MATH = "fixed latencies"
    SPECIAL = "special functions"
    TENSOR = "tensor cores"
    SHARED = "shared memory"
    SHUFFLE = "shuffles"
    LOAD = "loads"
    STORE = "stores"
    SPILL = "spills"
    BARRIER = "barriers"
    CONSTANT = "constants"
    OTHER = "others"


class Place(Enum):
    """Where a load finds its data, or where a store leaves it."""

    NEAR = "near"  # in the multiprocessor
    CACHE = "cache"  # the second level
    MEMORY = "memory"


class Action(Enum):
    """What an instruction does beside its arithmetic."""

    NONE = 0
    BARRIER = 1  # all warps of the program meet
    ASYNC_COPY = 2  # a load that fills shared memory while the warp goes on
    ASYNC_GROUP = 3  # a counter is up until the copies so far are there
    ASYNC_WAIT = 4  # until so many groups at most are under way
    WARP_GROUP = 5  # a product that four warps make together while they go on
    WARP_GROUP_WAIT = 6  # until so many of these at most are under way


class Access(NamedTuple):
    """An access to global memory."""

    place: Place
    bytes: float


@dataclass(frozen=True, slots=True)
class Step:
    """An instruction, as the simulation executes it."""

    kind: Kind
    stall: int
    written: int | None
    read: int | None
    wait: tuple[int, ...]
    unit: Unit = Unit.NONE
    interval: int = 0  # cycles that the unit takes no other instruction
    latency: int = 0  # cycles until the result is written
    operands: int = 0  # cycles until the operands are read
    waves: int = 0  # cycles of the load-store unit
    action: Action = Action.NONE
    counter: int = 0  # of groups to wait for
    under_way: int = 0
    access: Access | None = None


_UNITS = {
    Unit.FMA: "FFMA FMUL FADD FSWZADD FFMA2 HFMA2 HADD2 HMUL2",
    Unit.INTEGER_FMA: "IMAD IMUL IDP",
    Unit.SPECIAL: "MUFU F2F F2I I2F FRND POPC FLO BREV",
    Unit.CONTROL: "BRA EXIT BSSY BSYNC WARPSYNC RET CALL BREAK NOP MEMBAR FENCE ERRBAR CCTL R2UR WARPGROUP DEPBAR "
    "LDGDEPBAR YIELD ELECT SYNCS",
}
_UNIT = {name: unit for unit, names in _UNITS.items() for name in names.split()}
_KINDS = {
    Kind.SHARED: "LDS LDSM STS STSM ATOMS MOVM",
    Kind.SHUFFLE: "SHFL REDUX",
    Kind.SPILL: "LDL STL",
    Kind.LOAD: "LDG LDGSTS LD ATOMG ATOM",
    Kind.STORE: "STG ST RED",
    Kind.CONSTANT: "LDC LDCU ULDC",
    Kind.TENSOR: "HMMA IMMA HGMMA",
    Kind.BARRIER: "BAR",
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_STORES = ("STG", "ST", "STS", "STSM", "STL", "RED")
_SPECIAL_INTERVAL = 8  # four lanes of a warp a cycle
_INTERVAL = 2  # sixteen


def steps(instructions: Sequence[Instruction], machine: Machine, places: Sequence[Place]) -> list[Step]:
    """What a walk's instructions take of a machine, with the place of each one's data, if it has any."""
    return [_step(x, machine, place) for x, place in zip(instructions, places, strict=True)]


def _step(x: Instruction, machine: Machine, place: Place) -> Step:
    latencies = machine.latencies
    kind = _KIND.get(x.name, Kind.MATH)
    plain = Step(kind, x.stall, x.written, x.read, x.wait, interval=_INTERVAL)
    if kind is Kind.TENSOR:
        return _product(x, plain, machine)
    if kind in (Kind.SHARED, Kind.SHUFFLE, Kind.SPILL):
        return _in_queue(x, plain, _near_latency(x, machine), latencies.operands)
    if kind in (Kind.LOAD, Kind.STORE):
        return _global(x, plain, machine, place)
    if kind is Kind.CONSTANT:
        return replace(plain, unit=Unit.CONTROL, latency=latencies.constant, operands=latencies.operands)
    if kind is Kind.BARRIER:
        return replace(plain, unit=Unit.CONTROL, action=Action.BARRIER)
    if (found := re.match(r"(?:gsb|SB)(\d), 0x([0-9a-f]+)", x.operands)) and "DEPBAR" in x.opcode:
        kind, action = Kind.LOAD, Action.ASYNC_WAIT
        if x.name == "WARPGROUP":
            kind, action = Kind.TENSOR, Action.WARP_GROUP_WAIT
        number, under_way = int(found[1]), int(found[2], 16)
        return replace(plain, kind=kind, unit=Unit.CONTROL, action=action, counter=number, under_way=under_way)
    if x.name == "LDGDEPBAR":
        return replace(plain, kind=Kind.LOAD, unit=Unit.CONTROL, action=Action.ASYNC_GROUP)
    return _arithmetic(x, plain, machine)


def _product(x: Instruction, plain: Step, machine: Machine) -> Step:
    latency = machine.latencies.tensor
    if x.name == "HGMMA":  # 64 rows by so many columns by 16, on the tensor cores of four warps
        busy = max(int(re.findall(r"64x(\d+)x", x.opcode)[0]) // 2, 4)
        return replace(plain, unit=Unit.TENSOR, interval=busy, latency=latency + busy, action=Action.WARP_GROUP)
    interval = machine.product if "16816" in x.opcode else machine.product // 2
    return replace(plain, unit=Unit.TENSOR, interval=interval, latency=latency)


def _arithmetic(x: Instruction, plain: Step, machine: Machine) -> Step:
    """What has a fixed latency, which the assembler's pauses cover, or raises a counter as special functions do."""
    unit = _UNIT.get(x.name, Unit.UNIFORM if x.name.startswith("U") else Unit.ALU)
    latencies = machine.latencies
    step = replace(plain, unit=unit, latency=latencies.other, operands=latencies.operands // 2)
    if unit is Unit.SPECIAL:
        return replace(step, kind=Kind.SPECIAL, interval=_SPECIAL_INTERVAL, latency=latencies.special)
    return step if step.written is None else replace(step, kind=Kind.OTHER)


def _in_queue(x: Instruction, plain: Step, latency: int, operands: int) -> Step:
    """Of the load-store unit, which takes 128 bytes a cycle."""
    waves = _waves(x)
    latency, operands = latency + waves - 1, operands + (waves if x.name in _STORES else 0)
    return replace(plain, unit=Unit.MEMORY, latency=latency, operands=operands, waves=waves)


def _global(x: Instruction, plain: Step, machine: Machine, place: Place) -> Step:
    latencies, store = machine.latencies, x.name in _STORES
    latency = {Place.NEAR: latencies.near, Place.CACHE: latencies.cache, Place.MEMORY: latencies.memory}[place]
    operands = latencies.operands if store else latencies.address
    step = _in_queue(x, plain, latencies.operands if store else latency, operands)
    access = None if place is Place.NEAR else Access(place, 128.0 * step.waves)
    return replace(step, action=Action.ASYNC_COPY if x.name == "LDGSTS" else Action.NONE, access=access)


def _near_latency(x: Instruction, machine: Machine) -> int:
    latencies = machine.latencies
    if x.name in _STORES:
        return latencies.operands
    named = {"LDSM": latencies.matrix_from_shared, "MOVM": latencies.matrix_from_shared, "LDL": latencies.near}
    return named.get(x.name, latencies.shuffle if _KIND[x.name] is Kind.SHUFFLE else latencies.shared)


def _waves(x: Instruction) -> int:
    """Of a warp's data, in 128 bytes."""
    if x.name in ("LDSM", "STSM"):
        return 4 if x.opcode.endswith(".4") else 2 if x.opcode.endswith(".2") else 1
    return 4 if ".128" in x.opcode else 2 if ".64" in x.opcode else 1
