"""What a compiled kernel of the inner loops is predicted to take, with few programs and with as many as fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ttt4rec.kernels import launch, segments
from ttt4rec.operators.samples import Sizes

from ..aot import INNER_LOOPS, compiled, registers_of
from ..resources import programs
from ..sass import Instruction, decoded, disassembly
from ..sass import Place as Line
from .machines import DEFAULT, MACHINES, Latencies, Machine
from .places import places
from .simulator import ISSUE, Outcome, simulated
from .steps import Action, Kind, Place, Step, Unit, steps
from .walk import Loop, longest_loop, mini_batch_loops, one_trip

MOVED = {
    "linear_forward": (10, 4),
    "linear_backward": (16, 8),
    "mlp_forward": (18, 4),
    "mlp_backward": (24, 8),
    "segment_replay": (12, 4),
    "segment_outputs": (18, 8),
    "segment_walk": (20, 8),
}
"""Bytes per token and head through memory at least: for each feature, in half precision, and for the rates."""

SHARED = ("primitives.py", "standard.py", "core.py")
"""Files with what all kernels call: ours, and Triton's."""


class Kernel(NamedTuple):
    """A compiled kernel, as far as its speed depends on it."""

    op: str
    sizes: Sizes
    dtype: torch.dtype
    blocks: launch.Blocks
    heads: float  # of a program; less than one if it has a chunk of a head
    registers: int
    shared_memory: int
    loops: list[Loop]

    @property
    def tokens(self) -> float:
        """Tokens of a mini-batch, times heads of a program."""
        return self.sizes.K * self.heads

    @property
    def spills(self) -> float:
        """Spilled registers that a warp stores or loads in a mini-batch and head."""
        return sum(loop.times * sum(x.name in ("LDL", "STL") for x in loop.trip) for loop in self.loops) / self.heads


@dataclass(frozen=True)
class Filling:
    """So many programs on every multiprocessor, in steady state; one outcome for each loop of a mini-batch."""

    machine: Machine
    programs: int
    tokens: float
    times: tuple[int, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def cycles(self) -> float:
        """From one mini-batch of a program to its next."""
        return sum(n * outcome.trip for n, outcome in zip(self.times, self.outcomes, strict=True))

    @property
    def picoseconds(self) -> float:
        """Per token and head, of the whole GPU."""
        return self.machine.picoseconds(self.cycles / self.programs) / self.tokens

    def waits(self) -> dict[str, float]:
        """Share of a warp's time by what it waits for; the rest it issues."""
        total: dict[str, float] = {}
        for n, outcome in zip(self.times, self.outcomes, strict=True):
            for name, cycles in outcome.waits.items():
                total[name] = total.get(name, 0.0) + n * cycles / self.cycles
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def busy(self) -> dict[str, float]:
        """Share of the time that each resource is busy."""
        total: dict[str, float] = {}
        for n, outcome in zip(self.times, self.outcomes, strict=True):
            for name, share in outcome.busy.items():
                total[name] = total.get(name, 0.0) + n * share * outcome.trip / self.cycles
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def kernel(architecture: str, op: str, sizes: Sizes, dtype: torch.dtype) -> Kernel:
    """Compile a kernel, and find the loops that a mini-batch goes through.

    Of a kernel around the inner loops that is one trip through its longest loop, or through all of it if it has none.
    """
    binary, prepared = compiled(architecture, op, sizes, dtype)
    cubin = binary.asm["cubin"]
    instructions, heads = decoded(disassembly(cubin)), 1.0
    if op in segments.OPS:
        chunks = prepared.arguments[-1].chunks
        heads = 1 / chunks if op == "segment_replay" else 1
        loops = [Loop(one_trip(instructions, chunks, whole=op == "segment_outputs"), 1)]
    elif op in INNER_LOOPS:
        tile = prepared.arguments[-1]
        heads, chunks = tile.heads, max(1, tile.chunks)
        loops = mini_batch_loops(
            instructions, chunks, replays=launch.without_decay(op) == "mlp_backward" and chunks > 1
        )
    else:
        loops = [Loop(longest_loop(instructions), 1)]
    registers, shared_memory = registers_of(cubin), binary.metadata.shared
    return Kernel(op, sizes, dtype, prepared.blocks, heads, registers, shared_memory, loops)


def fitting(of: Kernel, machine: Machine) -> int:
    """Programs that fit a multiprocessor."""
    return programs(machine.architecture, of.registers, of.shared_memory, of.blocks.num_warps)


Change = Callable[[Step], Step | None]
"""What a step would be without some cost; None where it would not be at all."""


def filled(of: Kernel, machine: Machine, count: int, without: str = "") -> Filling:
    """The kernel with so many programs on each multiprocessor, as it is or without one of its costs."""
    outcomes = []
    for loop in of.loops:
        found = steps(loop.trip, machine, places(loop.trip, _place_of_copies(of, machine, count)))
        if without:
            found = [step for step in map(WITHOUT[without], found) if step is not None]
        unlimited = without == ISSUE
        outcomes.append(simulated(found, machine, of.blocks.num_warps, count, unlimited=unlimited))
    times = tuple(loop.times for loop in of.loops)
    return Filling(machine, count, of.tokens, times, tuple(outcomes))


def _place_of_copies(of: Kernel, machine: Machine, count: int) -> Place:
    """The second-level cache, if it holds a segment's copies of the weights of all programs."""
    D, K = of.sizes.D, of.sizes.K
    numbers, kept = (8 * D * D + 5 * D, 8 * D) if not of.op.startswith("linear") else (D * D + D, 4 * D)
    segment = max(16, -(-8 * numbers // (K * kept)))
    rounded = of.op in segments.OPS or of.op == "linear_backward"
    bytes = of.dtype.itemsize if rounded else 4
    size = bytes * numbers * segment * of.heads * count * machine.processors
    return Place.CACHE if size <= machine.cache_size else Place.MEMORY


def _dropped(kind: Kind) -> Change:
    return lambda step: None if step.kind is kind else step


def _loaded(step: Step) -> Step | None:
    """As if whatever is loaded had been near."""
    if step.action in (Action.ASYNC_WAIT, Action.ASYNC_GROUP):
        return None
    return replace(step, latency=Latencies.near, access=None) if step.kind is Kind.LOAD else step


def _unpaused(step: Step) -> Step:
    return replace(step, stall=1)


def _instant(step: Step) -> Step:
    """Arithmetic that takes no unit."""
    arithmetic = step.unit in (Unit.FMA, Unit.INTEGER_FMA, Unit.ALU, Unit.UNIFORM, Unit.CONTROL, Unit.SPECIAL)
    return replace(step, unit=Unit.NONE) if arithmetic else step


WITHOUT: dict[str, Change] = {
    ISSUE: _instant,
    Kind.MATH.value: _unpaused,
    Kind.LOAD.value: _loaded,
    Kind.BARRIER.value: _dropped(Kind.BARRIER),
    Kind.SHARED.value: _dropped(Kind.SHARED),
    Kind.SHUFFLE.value: _dropped(Kind.SHUFFLE),
    Kind.SPILL.value: _dropped(Kind.SPILL),
    Kind.TENSOR.value: _dropped(Kind.TENSOR),
    Kind.STORE.value: _dropped(Kind.STORE),
}
"""What a kernel could do without: issue slots and units of arithmetic, pauses, or all that is of a kind."""


def binding(of: Kernel, machine: Machine, filling: Filling) -> dict[str, float]:
    """Share of the predicted time that the kernel would save without each of its costs, the largest first."""
    saved = {
        name: 1 - filled(of, machine, filling.programs, name).cycles / filling.cycles
        for name in WITHOUT
        if name != Kind.SPILL.value or of.spills
    }
    return dict(sorted(saved.items(), key=lambda item: -item[1]))


def floors(of: Kernel, machine: Machine) -> dict[str, float]:
    """Picoseconds per token and head that an inner loop cannot be faster than: memory, issue slots, tensor cores."""
    size = 2 if of.dtype != torch.float32 else 4
    per_feature, rest = MOVED[launch.without_decay(of.op)]
    trips: list[tuple[int, Sequence[Instruction]]] = [(loop.times, loop.trip) for loop in of.loops]
    issued = sum(n * len(trip) for n, trip in trips) * of.blocks.num_warps / 4
    products = [step for n, trip in trips for step in n * steps(trip, machine, len(trip) * [Place.NEAR])]
    multiplying = sum(step.interval for step in products if step.unit is Unit.TENSOR) * of.blocks.num_warps / 4
    return {
        "memory": 1000 * (per_feature * of.sizes.D * size / 2 + rest) / machine.memory_bytes,
        ISSUE: machine.picoseconds(issued / of.tokens),
        "tensor cores": machine.picoseconds(multiplying / of.tokens),
    }


def machine_for(architecture: str, name: str | None = None) -> Machine:
    """The machine of a name, or the one that stands for an architecture."""
    if name is None and architecture not in DEFAULT:
        known = ", ".join(DEFAULT)
        raise ValueError(f"the architecture must be one whose machine code is known, {known}; given {architecture}")
    return MACHINES[name or DEFAULT[architecture]]


def slowest_lines(of: Kernel, filling: Filling) -> dict[Line, float]:
    """Share of a warp's time that instructions of each line of the kernel take, the largest first.

    A line is that of a kernel's own file which an instruction stems from, by way of the functions that all share.
    """
    shares: dict[Line, float] = {}
    for loop, outcome in zip(of.loops, filling.outcomes, strict=True):
        for x, cycles in zip(loop.trip, outcome.spent, strict=True):
            own = next((line for line in x.source if Path(line[0]).name not in SHARED), None)
            if own is not None:
                shares[own] = shares.get(own, 0.0) + loop.times * cycles / filling.cycles
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


class Summary(NamedTuple):
    """The figures that cuts are compared by."""

    chain: float  # cycles of one program's mini-batch while few run
    full: float  # picoseconds a token and head while as many run as fit
    programs: int
    registers: int
    spills: float


def summary(of: Kernel, machine: Machine) -> Summary | None:
    """Predict both fillings; None if no program fits."""
    if not (count := fitting(of, machine)):
        return None
    few, full = filled(of, machine, 1), filled(of, machine, count)
    return Summary(few.cycles, full.picoseconds, count, of.registers, of.spills)
