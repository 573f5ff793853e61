"""Timing several sides in turn, so that whatever else the machine does disturbs them alike."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
MIN_ROUNDS, MAX_ROUNDS = 3, 15
SHORTEST_SAMPLE = 2e-3
"""Seconds; quicker calls are repeated within a round."""


class NotMeasurableError(Exception):
    """Raised by what makes a call, with the reason why this side has none."""


@dataclass
class Outcome:
    """What was measured of one side, or why nothing was.

    Attributes:
        seconds: per call, one number a round; round i of all sides of a contest ran next to each other.
        peak_bytes: most memory a call held at once beyond what was there before it; None: unknown.
        why_not: the reason for not having been measured.
        error: what a call raised, other than running out of memory.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    why_not: str = ""
    error: Exception | None = None


@dataclass
class _Runner:
    call: Call
    outcome: Outcome
    once: float
    iterations: int


def take_turns(sides: Mapping[str, Callable[[], Call]], device: str, seconds: float) -> dict[str, Outcome]:
    """Warm all sides up, then time one call, or a few short ones, of each in turn, round after round.

    The order is turned by one place every round, so that no side always follows the same other. The slowest
    sides are left out until ``MIN_ROUNDS`` calls of all others fit into the time left.

    Args:
        sides: by label, what makes the call to be timed.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: for everything, but on a GPU for the warming up; a call once begun is not broken off.

    Returns:
        What came of each side.
    """
    deadline = time.monotonic() + seconds
    outcomes = {label: Outcome() for label in sides}
    runners = []
    for label, make in sides.items():
        begin = time.monotonic()
        if begin > deadline:
            outcomes[label].why_not = "out of time"
            continue
        if runner := _warmed_up(make, outcomes[label], device, seconds / 4):
            runners.append(runner)
        if device != "cpu":  # what the compiler takes, much of it once for many contests, is nobody's time
            deadline += time.monotonic() - begin
    runners.sort(key=lambda r: r.once)
    left = max(deadline - time.monotonic(), seconds / 3)
    while MIN_ROUNDS * sum(r.once * r.iterations for r in runners) > left:
        slowest = runners.pop()
        slowest.outcome.why_not = out_of_time(slowest.once)
    for turn in range(MAX_ROUNDS if runners else 0):
        if turn >= MIN_ROUNDS and time.monotonic() > deadline:
            break
        first = turn % len(runners)
        for runner in runners[first:] + runners[:first]:
            runner.outcome.seconds.append(timed(runner.call, device, runner.iterations))
    for runner in runners:
        runner.outcome.peak_bytes = peak_memory(runner.call, device)
    return outcomes


def out_of_time(once: float) -> str:
    """Why a side was not timed whose call takes so many seconds."""
    return f"out of time, {once:.2g} s a call"


def _warmed_up(make: Callable[[], Call], outcome: Outcome, device: str, longest: float) -> _Runner | None:
    """The call, run once and then timed; None, with the reason in the outcome, if it cannot run, or is too slow."""
    try:
        call = make()
        begin = time.monotonic()
        call()
        first = time.monotonic() - begin
        if device == "cpu" and first > longest:  # on a GPU this was mostly the compiler
            outcome.why_not = out_of_time(first)
            return None
        once = timed(call, device)
    except NotMeasurableError as reason:
        outcome.why_not = str(reason)
        return None
    except (torch.OutOfMemoryError, MemoryError):
        outcome.why_not = "out of memory"
        return None
    except Exception as error:  # one side's failure must not take the others' measurements with it; its test raises it
        outcome.why_not, outcome.error = f"failed: {type(error).__name__}: {str(error)[:200]}", error
        return None
    return _Runner(call, outcome, once, max(1, int(SHORTEST_SAMPLE / max(once, 1e-9))))


def timed(call: Call, device: str, iterations: int = 1) -> float:
    """Seconds per call: between two events on a GPU's stream, the device idle before, or by the clock on a CPU."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(iterations):
            call()
        return (time.perf_counter() - begin) / iterations
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(iterations):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / iterations


class Replay:
    """A clock that shows pytest-benchmark, which runs one test at a time, what was timed before."""

    __name__ = "taking turns"  # as saved with each result

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, seconds: list[float]) -> None:
        """Let the next pairs of readings lie so many seconds apart."""
        self._readings = chain.from_iterable((0.0, duration) for duration in seconds)

    def __call__(self) -> float:
        """The next reading, in seconds."""
        return next(self._readings)


REPLAY = Replay()


def peak_memory(call: Call, device: str) -> int:
    """Most bytes that a call holds at once: by the allocator's count on a GPU, by the profiler's on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def resident(field: str = "VmRSS") -> int:
    """Bytes that this process holds, or with ``"VmHWM"`` the most that it has held.

    Of ``/proc``, since ``ru_maxrss`` of a new process begins with what its parent used.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def roofs(device: str, dtype_name: str) -> dict[str, float]:
    """The most the device reached: ``copy``, bytes per second read and written; ``matmul``, FLOPs per second."""
    dtype = getattr(torch, dtype_name)
    n, numbers = (8192, 1 << 28) if device == "cuda" else (1024, 1 << 25)
    source = torch.ones(numbers, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a = torch.ones(n, n, dtype=dtype, device=device)
    work = {
        "copy": (lambda: target.copy_(source), 2 * source.nbytes),
        "matmul": (lambda: a @ a, 2 * n**3),
    }
    rates = {}
    for name, (call, amount) in work.items():
        timed(call, device, 3)
        rates[name] = amount / min(timed(call, device) for _ in range(20))
    return rates


def tensor_bytes(holder: Any) -> int:
    """Bytes of an object's tensors: as it says itself, or in its attributes, lists and dictionaries."""
    seen: dict[int, int] = {}
    waiting = [holder]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = getattr(item, "nbytes", 0)
        if seen[id(item)]:
            continue
        if isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            waiting += vars(item).values()
    return sum(seen.values())
