"""A multiprocessor that executes one loop: when each warp issues each instruction, and what it waited for till then.

Four sub-partitions issue one instruction a cycle each, of the warp that issued last if it can, else of the youngest
that can. A warp's next instruction can when its pause is over, its counters are down and its unit takes another one.
The simulation jumps from one issue to the next: the warps lie in a heap by the cycle at which their own state lets
them go on, and one whose unit or issue slot is taken then goes back into it.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ..sass import COUNTERS
from .machines import Machine
from .steps import Action, Kind, Place, Step, Unit

SUB_PARTITIONS = 4
QUEUE = 16
"""Cycles of work before the load-store unit at which it takes no more."""
ISSUE = "issue"
"""Named as what a warp waits for while others issue."""


@dataclass(frozen=True)
class Outcome:
    """A loop in its steady state."""

    trip: float  # cycles between two trips of one program
    processor: float  # cycles of the multiprocessor for one trip of one program
    waits: dict[str, float]  # cycles of a warp in one trip by what it waits for
    busy: dict[str, float]  # share of the time that a resource is
    spent: tuple[float, ...]  # cycles of a warp from the issue before each step to its own


class _Warp:
    """What one warp is up to."""

    __slots__ = ("copied", "counters", "kinds", "multiplied", "number", "pending", "place", "program", "since")

    def __init__(self, number: int, program: int) -> None:
        self.number = number
        self.program = program
        self.place = 0  # of the next step
        self.since = 0  # cycle after the last issue
        self.counters = [0] * COUNTERS  # cycles at which they are down
        self.kinds = [Kind.OTHER] * COUNTERS
        self.pending: list[list[int]] = [[] for _ in range(COUNTERS)]  # cycles at which groups of copies are there
        self.copied = 0  # cycle at which the last copy is there
        self.multiplied: list[int] = []  # cycles at which products of warp groups are done


class _Processor:
    """One multiprocessor with the warps of some programs, all in the same loop."""

    def __init__(self, steps: Sequence[Step], machine: Machine, warps: int, programs: int, slot: int) -> None:
        self.steps = steps
        self.machine = machine
        self.warps = [_Warp(i, i // warps) for i in range(warps * programs)]
        self.per_program = warps
        self.slot = slot  # cycles that an issue takes of its sub-partition
        self.arrived = [0] * programs
        self.slots = [0] * SUB_PARTITIONS  # first cycle at which each can issue again
        self.last: list[_Warp | None] = [None] * SUB_PARTITIONS
        self.units = [dict.fromkeys(Unit, 0) for _ in range(SUB_PARTITIONS)]
        self.second_fma = [0] * SUB_PARTITIONS
        self.load_store = 0  # first cycle at which it is idle
        self.ports = {Place.CACHE: 0.0, Place.MEMORY: 0.0}
        self.rates = {Place.CACHE: machine.cache_bytes, Place.MEMORY: machine.memory_rate}
        self.waits: defaultdict[str, float] = defaultdict(float)
        self.busy: defaultdict[str, float] = defaultdict(float)
        self.spent = [0] * len(steps)
        self.heap: list[tuple[int, int, int]] = []

    def start(self, spread: int) -> None:
        """All programs begin, at cycles spread over so many."""
        programs = len(self.arrived)
        for warp in self.warps:
            warp.since = spread * warp.program // programs
            heapq.heappush(self.heap, (warp.since, -warp.number, warp.number))

    def run(self, issues: int) -> int:
        """Issue so many more instructions; returns the cycle of the last one."""
        heap, warps, steps, slots = self.heap, self.warps, self.steps, self.slots
        cycle = 0
        while issues:
            if not heap:
                raise RuntimeError("a loop must let its warps go on; given one in which all wait at barriers")
            cycle, _, number = heapq.heappop(heap)
            warp, part = warps[number], number % SUB_PARTITIONS
            step = steps[warp.place]
            unit_free = self._unit_free(step, part)
            if (free := max(slots[part], unit_free)) > cycle:
                self.waits[step.unit.value if unit_free > slots[part] else ISSUE] += free - cycle
                self.spent[warp.place] += free - cycle
                heapq.heappush(heap, (free, self._turn(warp), number))
                continue
            self._issue(step, warp, part, cycle)
            issues -= 1
        return cycle

    def _unit_free(self, step: Step, part: int) -> int:
        unit = step.unit
        if unit is Unit.NONE:
            return 0
        units = self.units[part]
        if unit is Unit.FMA:
            first = units[Unit.INTEGER_FMA]
            return first if self.machine.fma_pipes == 1 else min(first, self.second_fma[part])
        if unit is Unit.MEMORY:
            return max(units[unit], self.load_store - QUEUE)
        if step.action is Action.WARP_GROUP:
            return units[unit] - 2 * step.interval  # a few are accepted ahead
        return units[unit]

    def _issue(self, step: Step, warp: _Warp, part: int, cycle: int) -> None:
        self.slots[part] = cycle + self.slot
        self.last[part] = warp
        self.busy[ISSUE] += 1
        begin = self._occupy(step, part, cycle)
        done, read = begin + step.latency, begin + step.operands
        if step.access is not None:
            done = self._transfer(step, done)
        if step.action is Action.ASYNC_COPY:
            warp.copied = max(warp.copied, done)
        elif step.action is Action.ASYNC_GROUP:
            done = max(warp.copied, cycle + 2)
            if step.written is not None:
                groups = warp.pending[step.written]
                groups[:] = [time for time in groups if time > cycle] + [done]
        elif step.action is Action.WARP_GROUP:
            warp.multiplied.append(done)
        if step.written is not None:
            self._raise(warp, step.written, done, step.kind)
        if step.read is not None:
            self._raise(warp, step.read, read, step.kind)
        warp.place = (warp.place + 1) % len(self.steps)
        ready = cycle + max(1, step.stall)
        warp.since = cycle + 1
        if step.action is Action.BARRIER:
            self._arrive(warp, cycle)
        else:
            self._continue(warp, ready)

    def _occupy(self, step: Step, part: int, cycle: int) -> int:
        """Take the unit; returns the cycle at which it begins."""
        unit, units = step.unit, self.units[part]
        if unit is Unit.FMA:
            self.busy[unit.value] += step.interval / self.machine.fma_pipes
            if self.machine.fma_pipes > 1 and self.second_fma[part] <= cycle:
                self.second_fma[part] = cycle + step.interval
            else:
                units[Unit.INTEGER_FMA] = cycle + step.interval
            return cycle
        self.busy[unit.value] += step.interval
        if unit is Unit.MEMORY:
            units[unit] = cycle + step.interval
            self.load_store = max(self.load_store, cycle + 2) + step.waves
            self.busy["load-store unit"] += step.waves
            return self.load_store - step.waves - 2
        first = max(units[unit], cycle)
        units[unit] = first + step.interval
        return first

    def _transfer(self, step: Step, done: int) -> int:
        """Take the ways to cache and memory; returns when the data is there."""
        assert step.access is not None
        place, size = step.access
        for port in (Place.CACHE, Place.MEMORY) if place is Place.MEMORY else (Place.CACHE,):
            time = size / self.rates[port]
            self.ports[port] = max(self.ports[port], done - step.latency) + time
            self.busy[port.value] += time
            done = max(done, math.ceil(self.ports[port]) + step.latency)
        return done

    def _continue(self, warp: _Warp, pause: int, reason: Kind = Kind.MATH, other: int = 0) -> None:
        """Find the cycle at which a warp's own state lets its next step begin: after a pause, or another cycle."""
        step = self.steps[warp.place]
        ready, why = (other, reason) if other > pause else (pause, Kind.MATH)
        for number in step.wait:
            if warp.counters[number] > ready:
                ready, why = warp.counters[number], warp.kinds[number]
        if step.action is Action.ASYNC_WAIT:
            under_way = sorted(time for time in warp.pending[step.counter] if time > ready)
            if len(under_way) > step.under_way:
                ready, why = under_way[-1 - step.under_way], Kind.LOAD
        elif step.action is Action.WARP_GROUP_WAIT:
            done = warp.multiplied[: len(warp.multiplied) - step.under_way]
            warp.multiplied = warp.multiplied[len(done) :]
            if done and done[-1] > ready:
                ready, why = done[-1], Kind.TENSOR
        self.waits[Kind.MATH.value] += pause - warp.since
        self.waits[why.value] += ready - pause
        self.spent[warp.place] += ready - warp.since + 1
        heapq.heappush(self.heap, (ready, self._turn(warp), warp.number))

    def _turn(self, warp: _Warp) -> int:
        """The least goes first: who issued last, then the youngest."""
        own = self.last[warp.number % SUB_PARTITIONS] is warp
        return -len(self.warps) if own else -warp.number

    def _arrive(self, warp: _Warp, cycle: int) -> None:
        """At a barrier: the last one to come sets all free."""
        program = warp.program
        warp.since = cycle + 1
        self.arrived[program] += 1
        if self.arrived[program] < self.per_program:
            return
        self.arrived[program] = 0
        free = cycle + self.machine.latencies.barrier + self.per_program
        first = program * self.per_program
        for other in self.warps[first : first + self.per_program]:
            self._continue(other, other.since, Kind.BARRIER, free)

    def _raise(self, warp: _Warp, counter: int, until: int, kind: Kind) -> None:
        if until > warp.counters[counter]:
            warp.counters[counter], warp.kinds[counter] = until, kind


def simulated(
    steps: Sequence[Step], machine: Machine, warps: int, programs: int, *, trips: int = 3, unlimited: bool = False
) -> Outcome:
    """So many programs of so many warps in one loop, whose steps are those of a trip, after they have warmed up.

    The programs begin spread over a trip, as they do where sequences have several lengths. Sub-partitions may be
    unlimited in how many warps they let issue at once.
    """
    processor = _Processor(steps, machine, warps, programs, slot=0 if unlimited else 1)
    spread = sum(max(1, step.stall) for step in steps)
    per_trip = len(steps) * warps * programs
    processor.start(spread if programs > 1 else 0)
    begin = processor.run(per_trip)
    processor.waits.clear()
    processor.busy.clear()
    processor.spent = [0] * len(steps)
    cycles = processor.run(per_trip * trips) - begin
    parts = {ISSUE: SUB_PARTITIONS, "load-store unit": 1, Place.CACHE.value: 1, Place.MEMORY.value: 1}
    return Outcome(
        trip=cycles / trips,
        processor=cycles / trips / programs,
        waits={name: time / (trips * warps * programs) for name, time in processor.waits.items()},
        spent=tuple(time / (trips * warps * programs) for time in processor.spent),
        busy={name: time / cycles / parts.get(name, SUB_PARTITIONS) for name, time in processor.busy.items()},
    )
