"""Kernels of which others have published speeds, and how long a trip of their loops took there.

``python -m tests.cycles.published`` compiles them and writes their loops into ``loops/``, or into the folder that it is
given, in the form of ``listing``.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from tests.cycles.listing import instructions
from tools.aot import OfflineDriver, registers_of
from tools.cycles.machines import MACHINES
from tools.cycles.simulator import simulated
from tools.cycles.steps import Place, steps
from tools.cycles.walk import longest_loop
from tools.resources import programs
from tools.sass import Instruction, decoded, disassembly

LOOPS = Path(__file__).parent / "loops"


@triton.jit
def summing(x_pointer, y_pointer, out_pointer, BLOCK: tl.constexpr):
    """The sum over a block, a hundred times."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_pointer + at), tl.load(y_pointer + at)
    for _ in range(100):
        x = tl.sum(x, axis=0) + y
    tl.store(out_pointer + at, x)


@triton.jit
def multiplying(
    a_pointer, b_pointer, out_pointer, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    """A matrix product, contiguous."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    a, b = a_pointer + rows[:, None] * K + depth[None, :], b_pointer + depth[:, None] * N + columns[None, :]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, K, DEPTH):
        product = tl.dot(tl.load(a), tl.load(b), product)
        a += DEPTH
        b += DEPTH * N
    tl.store(out_pointer + rows[:, None] * N + columns[None, :], product.to(tl.float16))


@triton.jit
def attending(
    q_pointer, k_pointer, v_pointer, o_pointer, scale, N, D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """Attention without a mask, the softmax in one pass."""
    features, base = tl.arange(0, D)[None, :], tl.program_id(1) * N * D
    at = base + (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None] * D + features
    q = tl.load(q_pointer + at)
    o, total = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS,), tl.float32)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, N, KEYS):
        keys = base + (start + tl.arange(0, KEYS))[:, None] * D + features
        scores = tl.dot(q, tl.trans(tl.load(k_pointer + keys)))
        new = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights, shrunk = tl.exp2(scores * scale - new[:, None]), tl.exp2(largest - new)
        o = tl.dot(weights.to(tl.float16), tl.load(v_pointer + keys), o * shrunk[:, None])
        total, largest = total * shrunk + tl.sum(weights, 1), new
    tl.store(o_pointer + at, (o / total[:, None]).to(tl.float16))


@dataclass(frozen=True)
class Published:
    """A kernel, how it is cut, and the cycles that a multiprocessor took for a trip of one program."""

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    sizes: dict[str, int]
    machine: str
    num_warps: int
    num_stages: int
    programs: int  # that fit a multiprocessor
    cycles: float

    def compiled(self) -> Any:
        """What the installed Triton makes of it."""
        architecture = MACHINES[self.machine].architecture
        driver.set_active(OfflineDriver(architecture))
        tensors = [torch.empty(16, dtype=x, device="meta") if isinstance(x, torch.dtype) else x for x in self.arguments]
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return self.kernel.warmup(*tensors, **self.sizes, grid=(1,), **options)

    def trip(self, folder: Path = LOOPS) -> list[Instruction]:
        """The loop that is kept."""
        return instructions((folder / f"{self.name}.txt").read_text())

    def predicted(self, trip: list[Instruction]) -> float:
        """Cycles a trip, all that is loaded coming from the cache: several programs load the same."""
        machine = MACHINES[self.machine]
        found = steps(trip, machine, len(trip) * [Place.CACHE])
        return simulated(found, machine, self.num_warps, self.programs).processor


def _cycles(flops: int, share: float, flops_per_cycle: int) -> float:
    return flops / (share * flops_per_cycle)


HALF, SINGLE = torch.float16, torch.float32
A100_HALF, A100_SINGLE = 2048, 1024  # FLOPs of the tensor cores per cycle, the latter in TF32
H100_SPEED = 1.755e9 * 132 / 1e12  # cycles of all multiprocessors in a second, per teraflop
_ATTENTION = (HALF, HALF, HALF, HALF, 0.5, 4096)
POINTS = (
    # Shares of the tensor cores' peak on an A100: triton-lang/triton, python/test/regression/test_performance.py.
    # Of attention that counts half of the FLOPs.
    Published(
        "attention_a100", attending, _ATTENTION, {"D": 64, "ROWS": 128, "KEYS": 64},
        "A100", 4, 3, 2, _cycles(4 * 128 * 64 * 64, 2 * 0.306, A100_HALF),
    ),
    Published(
        "product_a100", multiplying, (HALF, HALF, HALF, 8192, 8192), {"ROWS": 128, "COLUMNS": 128, "DEPTH": 32},
        "A100", 4, 4, 2, _cycles(2 * 128 * 128 * 32, 0.839, A100_HALF),
    ),
    Published(
        "sum_half_a100", summing, (HALF, HALF, HALF), {"BLOCK": 1024},
        "A100", 4, 2, 16, _cycles(2048, 0.016, A100_HALF),
    ),
    Published(
        "sum_a100", summing, (SINGLE, SINGLE, SINGLE), {"BLOCK": 1024},
        "A100", 4, 2, 16, _cycles(2048, 0.031, A100_SINGLE),
    ),
    # 470.7 TFLOP/s on an H100 at (2, 16, 8192, 128): pytorch/benchmark, pull request 2391. Its clock is not told.
    Published(
        "attention_h100", attending, _ATTENTION, {"D": 128, "ROWS": 128, "KEYS": 128},
        "H100", 8, 3, 1, 4 * 128 * 128 * 128 * H100_SPEED / 470.7,
    ),
)  # fmt: skip


def loop_of(compiled: Any) -> list[Instruction]:
    """A trip through the longest loop."""
    return longest_loop(decoded(disassembly(compiled.asm["cubin"])))


def fitting(point: Published, compiled: Any) -> int:
    """Programs that fit a multiprocessor, of which each takes 1 KB more shared memory than it asks for."""
    registers, shared = registers_of(compiled.asm["cubin"]), compiled.metadata.shared + 1024
    return programs(MACHINES[point.machine].architecture, registers, shared, point.num_warps)


def line(x: Instruction) -> str:
    """An instruction as ``listing`` reads it; operands only where they count."""
    counters = {"written": x.written, "read": x.read, "wait": ",".join(map(str, x.wait)) or None}
    told = [f"{name}={value}" for name, value in counters.items() if value is not None]
    operands = [f"({x.operands})"] if re.match("(WARPGROUP.)?DEPBAR", x.opcode) else []
    return " ".join([x.opcode, *operands, f"stall={x.stall}", *told])


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else LOOPS
    for point in POINTS:
        compiled = point.compiled()
        assert fitting(point, compiled) == point.programs, (point.name, fitting(point, compiled))
        trip = loop_of(compiled)
        (folder / f"{point.name}.txt").write_text("".join(f"{line(x)}\n" for x in trip))
        print(f"{point.name:16} predicted {point.predicted(trip):7.1f}, published {point.cycles:7.1f} cycles a trip")
