"""Ahead-of-time compilation without a GPU: what a kernel costs on an architecture, read from its machine code.

``python -m ttt4rec.kernels.aot`` prints a table. Kernels are compiled exactly as they would be launched: their launches
are prepared on ``meta`` tensors, behind a driver that only says which architecture it is. Not under the interpreter.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import launch
from .linear_backward import prepare_linear_backward
from .linear_forward import prepare_linear_forward

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cost:
    """What one compiled kernel needs; loop is the longest backward branch, the walk over the mini-batches."""

    registers: int  # per thread
    spills: int  # instructions that store or load spilled registers
    loop_spills: int  # of them in the loop
    shared_memory: int  # bytes per program
    loop_instructions: int  # per warp and mini-batch
    ttgir: str  # Triton's GPU intermediate form

    def __str__(self) -> str:
        return (
            f"{self.registers:4d} registers  {self.spills:5d}/{self.loop_spills:<5d} spills  "
            f"{self.shared_memory:6d} B  {self.loop_instructions:5d} loop"
        )


class OfflineDriver:
    """Stands where Triton looks for a GPU and names an architecture instead."""

    def __init__(self, architecture: str) -> None:
        self.target = TARGETS[architecture]
        self.device = list(TARGETS).index(architecture)  # Triton keeps its compiled kernels per device

    def get_current_device(self) -> int:
        """The device kernels are compiled for."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """No stream: nothing is launched."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The architecture kernels are compiled for."""
        return self.target


def prepare(op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype, heads: int = 4) -> launch.Launch:
    """A launch of an op on ``meta`` tensors: 2 sequences of 50 tokens, not packed."""
    q = torch.empty(2, 50, heads, head_dim, dtype=dtype, device="meta")

    def parameter(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    rates = (parameter(2, 50, heads), parameter(mini_batch_size))
    weights = (parameter(2, heads, head_dim, head_dim), parameter(2, heads, head_dim))
    layer_norm = (parameter(heads, head_dim), parameter(heads, head_dim))
    if op == "linear_forward":
        return prepare_linear_forward(q, q, q, *rates, *weights, *layer_norm, None, None, 1e-6)[-1]
    return prepare_linear_backward(
        q, *weights, q, q, q, *rates, *weights, q, *layer_norm, None, None, 1e-6
    )[-1]


def compile_for(architecture: str, prepared: launch.Launch) -> Cost:
    """Compile a prepared launch for an architecture."""
    driver.set_active(OfflineDriver(architecture))
    options = prepared.options()
    compiled = prepared.kernel.warmup(*prepared.arguments, grid=prepared.grid, **options)
    read = _amd_cost if architecture.startswith("gfx") else _nvidia_cost
    return read(compiled)


def _nvidia_cost(compiled: Any) -> Cost:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run([tool, flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?\w+ )?[A-Z].*?);", code)
    instructions = {int(address, 16): text for address, text in lines}
    start, stop = 0, -1
    for address, text in instructions.items():
        target = re.search(r"BRA.*? `?\(?(?:\.L_x_\d+|0x([0-9a-f]+))", text)
        if target and target[1] and address - int(target[1], 16) > stop - start:
            start, stop = int(target[1], 16), address
    return _cost(compiled, registers, instructions, start, stop, r"\b(LDL|STL)\b")


def _amd_cost(compiled: Any) -> Cost:
    code = compiled.asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", code)[0])
    instructions: dict[int, str] = {}
    labels: dict[str, int] = {}
    for line in code.split("s_endpgm")[0].splitlines():
        text = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", text):
            labels[label[1]] = len(instructions)
        elif re.match(r"[a-z]\w+", text):
            instructions[len(instructions)] = text
    start, stop = 0, -1
    for address, text in instructions.items():
        branch = re.match(r"s_c?branch\w* (\.LBB\w+)", text)
        if branch and branch[1] in labels and address - labels[branch[1]] > stop - start:
            start, stop = labels[branch[1]], address
    return _cost(compiled, registers, instructions, start, stop, r"scratch_(load|store)|buffer_(load|store)\S* .*\bs32\b")


def _cost(
    compiled: Any, registers: int, instructions: dict[int, str], start: int, stop: int, spill: str
) -> Cost:
    spills = [address for address, text in instructions.items() if re.search(spill, text)]
    return Cost(
        registers=registers,
        spills=len(spills),
        loop_spills=sum(start <= address <= stop for address in spills),
        shared_memory=compiled.metadata.shared,
        loop_instructions=sum(start <= address <= stop for address in instructions),
        ttgir=compiled.asm["ttgir"],
    )


def main() -> None:
    """Print what kernels cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", nargs="+", default=["linear_forward", "linear_backward"])
    parser.add_argument("--architecture", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--mini-batch", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--blocks", nargs=3, type=int, metavar=("WARPS", "STAGES", "HEADS"))
    given = parser.parse_args()
    if given.blocks:
        launch.blocks = lambda *_: launch.Blocks(*given.blocks)
    for op in given.op:
        for architecture in given.architecture:
            for D in given.head_dim:
                for K in given.mini_batch:
                    for dtype in given.dtype:
                        prepared = prepare(op, D, K, DTYPES[dtype])
                        print(op, architecture, f"D={D} K={K} {dtype}", prepared.blocks, flush=True)
                        print("   ", compile_for(architecture, prepared), flush=True)


if __name__ == "__main__":
    main()
