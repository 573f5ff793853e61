"""How the launch table is made: ``python -m tools.tune linear_backward:sm_90:16:8:bf16 ...``.

Every sensible cut of a kernel is compiled. Where the architecture's machine code can be simulated (``tools.cycles``)
the best cut has the least predicted time: the geometric mean of what a sequence takes while few programs run and of
what a token and head takes while as many run as fit. Elsewhere it has the fewest issue slots per mini-batch and head,
a spill counted as sixteen. A cut whose code spills with 64 registers or fewer is none: there the assembler gave up.

The oldest and the newest supported Triton may disagree. So ``--json`` writes down what every cut takes under one of
them, and with ``--beside`` such a file the worse of both counts. This needs no GPU; timings on one may overrule it.

The three kernels of a backward by segments are cut one by one, ``segment_walk:sm_90:64:16:bf16`` for example. They are
in the table where all three together take less than the backward in one launch, in both fillings.
"""

import argparse
import contextlib
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton

from ttt4rec.kernels import launch, segments
from ttt4rec.operators.samples import Sizes

from .aot import DTYPES, compile_for, cut_as
from .cycles.machines import DEFAULT
from .cycles.prediction import kernel, machine_for, summary

SPILL = 16  # instructions


class Cut(NamedTuple):
    """A cut of a kernel under one Triton."""

    kernel: str
    triton: str
    blocks: launch.Blocks
    few: float  # predicted ns a token of a sequence, or issue slots
    full: float  # predicted ps a token and head, or issue slots
    programs: int  # that fit a multiprocessor
    registers: int
    spills: float  # that a warp stores or loads, per mini-batch and head

    @property
    def score(self) -> float:
        """Less is better."""
        return math.sqrt(self.few * self.full)

    @property
    def gave_up(self) -> bool:
        """Whether the assembler left most registers unused and spills."""
        return self.registers <= 64 and self.spills > 0

    def __str__(self) -> str:
        cut = "×".join(map(str, self.blocks))
        return (
            f"{self.kernel:32} {cut:10} few {self.few:8.1f}  full {self.full:8.1f}  {self.programs:2d} programs  "
            f"{self.registers:3d} registers  {self.spills:6.0f} spills a head"
        )


def candidates(op: str, head_dim: int, mini_batch_size: int) -> Iterator[launch.Blocks]:
    """The cuts worth compiling.

    With two stages loads are asynchronous, but begin behind the last use of their only buffer; three load ahead.
    """
    rows, mlp = launch.padded(mini_batch_size), not op.startswith("linear")
    held = {"segment_outputs": 0, "segment_replay": 1}.get(op, 1 if op.endswith("forward") else 2)
    if launch.without_decay(op) != op:
        held *= 2  # the initial weights next to the weights, and the same of gradients
    heads = (1, 2) if rows == 16 and head_dim <= 32 and op not in segments.OPS else (1,)
    chunks: tuple[int, ...] = (1,)
    if mlp:
        chunks = (1, 2) if head_dim <= 32 else (1, 2, 4, 8) if head_dim <= 64 else (4, 8, 16)
    for warps in (1, 2, 4, 8):
        numbers = launch.padded(head_dim) ** 2 * (8 if mlp else 1) * held
        for cut in (launch.Blocks(warps, s, h, c) for s in (1, 2, 3) for h in heads for c in chunks):
            if numbers * cut.heads / cut.chunks <= 320 * 32 * warps:  # the state and twice as much of others per thread
                yield cut


def tuned(kernel_name: str) -> Iterator[Cut]:
    """All cuts of a kernel that compile and fit a multiprocessor."""
    op, _, head_dim, mini_batch_size, _ = kernel_name.split(":")
    for blocks in candidates(op, int(head_dim), int(mini_batch_size)):
        try:
            # Triton prints the code of a kernel that does not assemble.
            with cut_as(blocks), contextlib.redirect_stdout(io.StringIO()):
                cut = cut_of(kernel_name, blocks)
        except Exception as error:  # the compiler's own failures, of several kinds, rule a cut out
            print(f"{kernel_name} {blocks}: {type(error).__name__}", file=sys.stderr, flush=True)
            continue
        if cut is not None:
            yield cut


def cut_of(name: str, blocks: launch.Blocks) -> Cut | None:
    """A kernel as it is cut now (``cut_as``); None if none of its programs fits a multiprocessor."""
    op, architecture, head_dim, mini_batch_size, dtype = name.split(":")
    if architecture not in DEFAULT:
        cost = compile_for(architecture, op, int(head_dim), int(mini_batch_size), DTYPES[dtype])
        slots = (cost.loop_instructions + SPILL * cost.loop_spills) * blocks.num_warps / blocks.heads
        spills = cost.loop_spills / blocks.heads
        return Cut(name, triton.__version__, blocks, slots, slots, 1, cost.registers, spills)
    sizes = Sizes(2, 50, 4, int(head_dim), int(mini_batch_size))
    machine = machine_for(architecture)
    found = summary(kernel(architecture, op, sizes, DTYPES[dtype]), machine)
    if found is None:
        return None
    few = found.chain / machine.clock / sizes.K
    return Cut(name, triton.__version__, blocks, few, found.full, found.programs, found.registers, found.spills)


def worse_of(cuts: list[Cut]) -> list[Cut]:
    """The cuts that all Tritons among them can make, each as the worse of them makes it, the best first."""
    versions = {cut.triton for cut in cuts}
    groups: dict[tuple[str, launch.Blocks], list[Cut]] = {}
    for cut in cuts:
        groups.setdefault((cut.kernel, cut.blocks), []).append(cut)
    worst = [
        max(group, key=lambda cut: cut.score)
        for group in groups.values()
        if {cut.triton for cut in group} == versions and not any(cut.gave_up for cut in group)
    ]
    return sorted(worst, key=lambda cut: (cut.kernel, cut.score))


def written(cut: Cut) -> str:
    """A line of JSON."""
    return json.dumps(cut._asdict())


def read(line: str) -> Cut:
    """What ``written`` wrote."""
    values: dict[str, Any] = json.loads(line)
    return Cut(**{**values, "blocks": launch.Blocks(*values["blocks"])})


def main() -> None:
    """Print every kernel's cuts, best first, or as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="*", help="op:architecture:head_dim:mini_batch_size:dtype")
    parser.add_argument("--json", action="store_true", help="one object per cut, as it was found")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="such lines of other Tritons, or kernels")
    given = parser.parse_args()
    known = [read(line) for path in given.beside for line in path.read_text().splitlines()]
    for name in given.kernels:
        for cut in tuned(name):
            known.append(cut)
            if given.json:
                print(written(cut), flush=True)
    if not given.json:
        print("\n".join(map(str, worse_of(known))))


if __name__ == "__main__":
    main()
