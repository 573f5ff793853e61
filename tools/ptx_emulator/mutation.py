"""What happens when a kernel loses a barrier, a wait, a fence or a mask: is the loss found?

Each is taken out alone. The loss is found if a check complains in one of the orders, or if a result differs. If not, it
was harmless in this launch: the same bits came out in every order, and no two accesses were unordered.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .build import operations
from .machine import ORDERS, Launch
from .parser import Instruction

NOP_KINDS = {
    "bar.sync": "barrier",
    "bar.warp.sync": "barrier of a warp",
    "cp.async.wait_group": "wait",
    "cp.async.wait_all": "wait",
    "wgmma.wait_group": "wait",
    "tcgen05.wait::ld": "wait",
    "tcgen05.wait::st": "wait",
    "mbarrier.try_wait.parity": "wait",
    "fence.proxy.async": "fence",
}
MASKED = ("ld.global", "ld.shared", "st.global", "st.shared", "cp.async")
_LIVE = 3 + 5  # where cp.async has how many bytes it copies


class Outcome(NamedTuple):
    """What became of one loss."""

    kind: str  # of what was lost
    instruction: Instruction
    result: str  # "found", "other results", "harmless" or "not executed"
    finding: str  # what a check said


def mutate(launch: Launch, orders: Sequence[int] = ORDERS) -> list[Outcome]:
    """Take everything out in turn; the memory of the launch is as before at the end."""
    before = launch.memory()
    known = {finding.key() for finding in launch.check(orders).findings}  # without any loss
    expected = launch.memory()
    outcomes = []
    for kind, number, code in _mutants(launch):
        mutant = dataclasses.replace(launch, program=dataclasses.replace(launch.program, code=code))
        found, results = _tried(mutant, before, known, orders)
        if found:
            result = "found"
        elif launch.difference(expected, results) is not None:
            result = "other results"
        else:
            launch.restore(before)
            result = "harmless" if _executed(launch, number) else "not executed"
        outcomes.append(Outcome(kind, launch.program.instructions[number], result, found))
    launch.restore(before)
    return outcomes


def _tried(
    mutant: Launch, before: list[np.ndarray], known: set[tuple[str, ...]], orders: Sequence[int]
) -> tuple[str, list[np.ndarray]]:
    """What a check says in the first order in which one does, or else nothing, and the results."""
    results: list[list[np.ndarray]] = []
    for order in orders:
        mutant.restore(before)
        for finding in mutant.run(order)[0]:
            if finding.key() not in known:
                return finding.what, []
        results.append(mutant.memory())
        if mutant.difference(results[0], results[-1]) is not None:
            return "results that depend on the order", []
    return "", results[0]


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each kind of loss, and one for each that was not found."""
    counts = Counter((outcome.kind, outcome.result) for outcome in outcomes)
    lines = []
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        parts = [
            f"{counts[kind, result]} {result}"
            for result in ("found", "other results", "harmless", "not executed")
            if counts[kind, result]
        ]
        lines.append(f"{kind}: {', '.join(parts)}")
    for outcome in outcomes:
        if outcome.result == "harmless":
            place = outcome.instruction.source[0] if outcome.instruction.source else ("", 0)
            lines.append(f"  harmless: {outcome.kind} {outcome.instruction.text[:60]} ({place[0]}:{place[1]})")
    return lines


def _mutants(launch: Launch) -> Iterator[tuple[str, int, np.ndarray]]:
    """What is lost, the number of its operation, and the code without it."""
    program = launch.program
    table = operations()
    nop, idle = table["nop"].number, {table[name].number: kind for name, kind in NOP_KINDS.items()}
    masked = {table[name].number for name in MASKED}
    copy, poll = table["cp.async"].number, table["mbarrier.try_wait.parity"].number
    for number, at in enumerate(program.offsets):
        code = program.code.copy()
        operation = int(code[at])
        if operation in idle:
            code[at] = nop
            if operation == poll:
                code[program.offsets[number + 1]] = nop  # the jump back
            yield idle[operation], number, code
        elif operation in masked and code[at + 1] >= 0:
            code[at + 1] = -1
            yield "mask", number, code
        if operation == copy and program.code[at + _LIVE] >= 0:
            code = program.code.copy()
            code[at + _LIVE] = -1
            yield "mask", number, code


def _executed(launch: Launch, number: int) -> bool:
    """Whether it was reached by any warp."""
    program = launch.program
    code = program.code.copy()
    code[program.offsets[number]] = operations()["trap"].number
    code[program.offsets[number] + 1] = -1
    mutant = dataclasses.replace(launch, program=dataclasses.replace(program, code=code))
    return any(finding.what == "trap" for finding in mutant.run()[0])
