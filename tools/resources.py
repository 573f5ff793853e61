"""What every kernel of the launch table costs: ``python -m tools.resources``.

Compiles all configurations for all architectures with the installed Triton and rewrites that Triton's rows of
``docs/resources.csv``; rows of other versions stay. It takes some minutes on two cores, with progress, and no GPU.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from ttt4rec.arguments import MAX_MINI_BATCH_SIZE
from ttt4rec.kernels import launch, limits

from .aot import DTYPES, TARGETS
from .documents import ROOT

FILE = ROOT / "docs" / "resources.csv"


class Machine(NamedTuple):
    """What one multiprocessor has."""

    registers: int  # of 32 bits
    register_unit: int  # registers are given to a warp in multiples of so many
    shared_memory: int  # bytes for one program at most, about all there is
    warps: int
    programs: int
    lanes: int  # threads in a warp


MACHINES = {
    "sm_80": Machine(65536, 256, 163 * 1024, 64, 32, 32),
    "sm_90": Machine(65536, 256, 227 * 1024, 64, 32, 32),
    "sm_100": Machine(65536, 256, 227 * 1024, 64, 32, 32),
    "gfx942": Machine(4 * 512 * 64, 8 * 64, 64 * 1024, 32, 32, 64),
}


class Row(NamedTuple):
    """One line of the table."""

    op: str
    head_dim: int
    mini_batch_size: int
    dtype: str
    num_warps: int
    num_stages: int
    heads: int
    chunks: int
    registers: int
    loop_spills: int
    spills: int
    shared_memory: int
    programs: int
    loop_instructions: int
    tensor_core: int


HEADER = ("triton", "architecture", *Row._fields)
Tables = dict[tuple[str, str], list[Row]]
"""Rows by Triton version and architecture."""


def configurations(architecture: str) -> Iterator[str]:
    """Every configuration the launch table can choose, as ``op:head_dim:mini_batch_size:dtype``.

    Not what ``launch.compiler_refusal`` refuses under any Triton. Of float32 only those of at most 16 tokens and 64
    features (TTT-MLP: 16): the compiler takes minutes over larger ones, which spill by the thousand.
    """
    for op, head_dim in launch.HALF | launch.HALF_BY_ARCHITECTURE.get(architecture, {}):
        longest = 32 if (op, architecture) == ("mlp_backward", "sm_100") else MAX_MINI_BATCH_SIZE
        if op.startswith("mlp_forgetting"):
            longest = limits.FORGETTING_MLP
        sizes = launch.choices(op, head_dim, torch.bfloat16, architecture)
        yield from (f"{op}:{head_dim}:{size}:bf16" for size in sizes if size <= longest)
    for op, head_dim in launch.SINGLE:
        if head_dim <= (16 if op.startswith("mlp") else 64):
            short = sorted({min(size, 16) for size in launch.choices(op, head_dim, torch.float32, architecture)})
            yield from (f"{op}:{head_dim}:{size}:fp32" for size in short)


def programs(architecture: str, registers: int, shared_memory: int, num_warps: int) -> int:
    """How many programs fit a multiprocessor at once."""
    machine = MACHINES[architecture]
    per_warp = -(-registers * machine.lanes // machine.register_unit) * machine.register_unit
    by_registers = machine.registers // (per_warp * num_warps)
    by_memory = machine.shared_memory // max(1, shared_memory)
    return min(by_registers, by_memory, machine.warps // num_warps, machine.programs)


def measured(architecture: str, configuration: str) -> Row:
    """Compile one configuration, in a process of its own."""
    op, head_dim, mini_batch_size, dtype = configuration.split(":")
    kernel = f"{op}:{architecture}:{head_dim}:{mini_batch_size}:{dtype}"
    command = [sys.executable, "-m", "tools.aot", "--json", kernel]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{kernel} does not compile: {run.stderr[-1000:]}")
    return row(architecture, json.loads(run.stdout))


def row(architecture: str, cost: dict[str, Any]) -> Row:
    """The line of one of ``aot``'s objects."""
    op, _, head_dim, mini_batch_size, dtype = cost["kernel"].split(":")
    cut = launch.blocks(op, int(head_dim), int(mini_batch_size), DTYPES[dtype], architecture, 4)
    return Row(
        op,
        int(head_dim),
        int(mini_batch_size),
        dtype,
        *cut,
        cost["registers"],
        cost["loop_spills"],
        cost["spills"],
        cost["shared_memory"],
        programs(architecture, cost["registers"], cost["shared_memory"], cut.num_warps),
        cost["loop_instructions"],
        cost["tensor_core"],
    )


def read(text: str) -> Tables:
    """The tables of a file."""
    tables: Tables = {}
    for line in csv.DictReader(io.StringIO(text)):
        values = {name: line[name] if name in ("op", "dtype") else int(line[name]) for name in Row._fields}
        tables.setdefault((line["triton"], line["architecture"]), []).append(Row(**values))  # type: ignore[arg-type]
    return tables


def written(tables: Tables) -> str:
    """The file of some tables."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(HEADER)
    for key, rows in sorted(tables.items(), reverse=True):
        lines.writerows((*key, *row) for row in rows)
    return text.getvalue()


def main() -> None:
    """Measure everything and rewrite the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    parser.add_argument("--workers", type=int, default=2, help="configurations compiled at once")
    parser.add_argument("--kernels", nargs="+", metavar="OP", help="rows of these alone; the others stay")
    given = parser.parse_args()
    tables = read(given.file.read_text()) if given.file.exists() else {}
    every = [
        (architecture, configuration) for architecture in TARGETS for configuration in configurations(architecture)
    ]
    jobs = [job for job in every if given.kernels is None or job[1].split(":")[0] in given.kernels]
    lines = {
        (architecture, ":".join(map(str, line[:4]))): line
        for (version, architecture), rows in tables.items()
        for line in rows
        if version == triton.__version__
    }
    with ThreadPoolExecutor(given.workers) as pool:
        for done, (job, line) in enumerate(zip(jobs, pool.map(lambda job: measured(*job), jobs), strict=True), 1):
            lines[job] = line
            print(f"{done}/{len(jobs)} {job[0]}", *line, file=sys.stderr, flush=True)
    for architecture in TARGETS:
        tables[triton.__version__, architecture] = [lines[job] for job in every if job[0] == architecture]
    given.file.write_text(written(tables))


if __name__ == "__main__":
    main()
