"""Ahead-of-time compilation without a GPU: what a kernel costs on an architecture, read from its machine code.

``python -m ttt4rec.kernels.aot linear_forward:sm_90:16:8:bf16 ...`` prints a table. Kernels are compiled exactly as
they would be launched: launches are prepared on ``meta`` tensors, behind a driver that only names an architecture.
Not under the interpreter.
"""

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import launch
from .convolution import prepare_convolution_backward, prepare_convolution_forward
from .epilogue import prepare_epilogue_backward, prepare_epilogue_forward
from .linear_backward import prepare_linear_backward
from .linear_forward import prepare_linear_forward
from .mlp_backward import prepare_mlp_backward
from .mlp_forward import prepare_mlp_forward
from .projection_backward import prepare_projection_backward
from .projection_forward import prepare_projection_forward
from .step import prepare_token_step

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
Times = tuple[int, int, int]
"""How often an instruction of the longest loop counts, of a loop inside it, and of one inside that."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cost:
    """What one compiled kernel needs; loop is the walk over the mini-batches.

    That is the longest backward branch, or, where that one goes from segment to segment, what lies in loops inside it.
    """

    registers: int  # per thread
    spills: int  # instructions that store or load spilled registers
    loop_spills: int  # of them in the loop
    shared_memory: int  # bytes per program
    loop_instructions: int  # per warp and mini-batch
    tensor_core: int  # of them matrix products
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


def compile_for(
    architecture: str, op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype, length: int = 50
) -> Cost:
    """Compile a kernel for an architecture, as it would be launched for 4 heads and sequences that are not packed.

    Which of its kernels ``projection_forward`` stands for, or another of those around the inner loop, follows from the
    width, 4 heads.
    """
    driver.set_active(OfflineDriver(architecture))
    around = {
        "projection": _prepare_projection,
        "convolution": _prepare_convolution,
        "epilogue": _prepare_epilogue,
    }
    prepare = _prepare_step if op.endswith("step") else around.get(op.split("_")[0], _prepare_inner_loop)
    prepared = prepare(op, head_dim, mini_batch_size, dtype, length)
    compiled = prepared.kernel.warmup(*prepared.arguments, grid=prepared.grid, **prepared.options())
    count = _amd_cost if architecture.startswith("gfx") else _nvidia_cost
    if prepare is not _prepare_inner_loop:
        return count(compiled, (1, 1, 1))
    return count(compiled, (0, 1, max(1, prepared.arguments[-1].chunks)))


def _prepare_inner_loop(op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype, length: int) -> launch.Launch:
    q = torch.empty(2, length, 4, head_dim, dtype=dtype, device="meta")
    hidden = 4 * head_dim
    tokens = q, q, q, _meta(2, length, 4), _meta(mini_batch_size)
    W, b = _meta(2, 4, head_dim, head_dim), _meta(2, 4, head_dim)
    W1, b1, W2 = _meta(2, 4, head_dim, hidden), _meta(2, 4, hidden), _meta(2, 4, hidden, head_dim)
    gamma = beta = _meta(4, head_dim)
    checkpoints = _meta(0, 4, 1)  # only that it is float32 counts
    if op == "linear_forward":
        return prepare_linear_forward(*tokens, W, b, gamma, beta, None, None, 1e-6, 16)[-1]
    if op == "linear_backward":
        return prepare_linear_backward(q, W, b, *tokens, W, b, q, checkpoints, gamma, beta, None, None, 1e-6, 16)[-1]
    if op == "mlp_forward":
        return prepare_mlp_forward(*tokens, W1, b1, W2, b, gamma, beta, None, None, 1e-6, 16)[-1]
    weights, Z1 = (W1, b1, W2, b), torch.empty(2, length, 4, hidden, dtype=dtype, device="meta")
    return prepare_mlp_backward(q, weights, *tokens, weights, Z1, q, checkpoints, gamma, beta, None, None, 1e-6, 16)[-1]


def _prepare_projection(op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype, length: int) -> launch.Launch:
    width = 4 * head_dim
    x, q = _meta(2, length, width).to(dtype), _meta(2, length, 4, head_dim).to(dtype)
    weights, lr_weight = [_meta(width, width).to(dtype)] * 3, _meta(4, width).to(dtype)
    cos, positions = _meta(mini_batch_size, head_dim // 2), _meta(length).long()
    options = (cos, cos, positions, 2, 1.0, dtype)
    if op == "projection_forward":
        return prepare_projection_forward(x, weights, lr_weight, _meta(4).to(dtype), *options)[-1]
    rates = _meta(2, length, 4)
    return prepare_projection_backward([q] * 3, rates, rates, x, weights, lr_weight, *options)[-1]


def _prepare_convolution(
    op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype, length: int
) -> launch.Launch:
    x, weights = _meta(2, length, 4 * head_dim).to(dtype), [_meta(4 * head_dim, 4).to(dtype)] * 2
    cos, places = _meta(mini_batch_size, head_dim // 2), _meta(2, length).long()
    if op == "convolution_forward":
        return prepare_convolution_forward(x, weights, [weights[0][:, 0]] * 2, cos, cos, places, places, 0)[-1]
    return prepare_convolution_backward([x] * 2, x, weights, cos, cos, places, places, 0)[-1]


def _prepare_epilogue(op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype, length: int) -> launch.Launch:
    width = 4 * head_dim
    o, gate = _meta(2, length, 4, head_dim).to(dtype), _meta(2, length, width).to(dtype)
    mask, parameters = (
        _meta(2, length).bool(),
        [_meta(*shape).to(dtype) for shape in ((width,), (width,), (width, width))],
    )
    if op == "epilogue_forward":
        return prepare_epilogue_forward(o, gate, mask, parameters, 1e-6)[-1]
    return prepare_epilogue_backward(gate.flatten(0, 1), o, gate, mask, parameters, 1e-6)[-1]


def _prepare_step(op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype, length: int) -> launch.Launch:
    q, index = _meta(2, 4, head_dim).to(dtype), _meta(2).long()
    records = _meta(9, 4, 8 * 443)  # of their size, only what divides it counts
    norm, hidden = _meta(4, head_dim), 0 if op == "linear_step" else 4 * head_dim
    rates = _meta(2, 4), _meta(mini_batch_size)
    return prepare_token_step(q, q, q, *rates, norm, norm, index, index, records, hidden, 1e-6)[-1]


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _nvidia_cost(compiled: Any, times: Times) -> Cost:
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
    branches = []
    for address, text in instructions.items():
        target = re.search(r"BRA.*? `?\(?(?:\.L_x_\d+|0x([0-9a-f]+))", text)
        if target and target[1]:
            branches.append((int(target[1], 16), address))
    return _cost(compiled, times, registers, instructions, branches, r"\b(LDL|STL)\b")


def _amd_cost(compiled: Any, times: Times) -> Cost:
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
    branches = []
    for address, text in instructions.items():
        branch = re.match(r"s_c?branch\w* (\.LBB\w+)", text)
        if branch and branch[1] in labels:
            branches.append((labels[branch[1]], address))
    spill = r"scratch_(load|store)|buffer_(load|store)\S* .*\bs32\b"
    return _cost(compiled, times, registers, instructions, branches, spill)


def _cost(
    compiled: Any,
    times: Times,
    registers: int,
    instructions: dict[int, str],
    branches: list[tuple[int, int]],
    spill: str,
) -> Cost:
    """Count in the longest loop and in those inside it that have products."""
    loops = [b for b in branches if b[0] <= b[1]]
    spills = {address for address, text in instructions.items() if re.search(spill, text)}
    products = {address for address, text in instructions.items() if re.search(r"MMA|v_mfma", text)}
    start, stop = max(loops, key=lambda b: b[1] - b[0], default=(0, -1))
    ends: dict[int, int] = {}  # of loops by their beginnings; their code may end behind that of the loop around them
    for begin, end in loops:
        if start < begin <= stop and any(begin <= p <= end for p in products):
            ends[begin] = max(end, ends.get(begin, end))
    counts = {
        address: times[min(sum(begin <= address <= end for begin, end in ends.items()), 2)]
        for address in instructions
        if start <= address <= max([stop, *ends.values()])
    }
    return Cost(
        registers=registers,
        spills=len(spills),
        loop_spills=sum(n for address, n in counts.items() if address in spills),
        shared_memory=compiled.metadata.shared,
        loop_instructions=sum(counts.values()),
        tensor_core=sum(n for address, n in counts.items() if address in products),
        ttgir=compiled.asm["ttgir"],
    )


def main() -> None:
    """Print what kernels cost, as a table or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "kernels", nargs="+", help="op:architecture:head_dim:mini_batch_size:dtype, e.g. linear_forward:sm_90:16:8:bf16"
    )
    parser.add_argument("--blocks", nargs="+", type=int, metavar="WARPS STAGES HEADS CHUNKS")
    parser.add_argument("--json", action="store_true", help="one object per kernel, the intermediate form included")
    given = parser.parse_args()
    if given.blocks:
        launch.blocks = lambda *_: launch.Blocks(*given.blocks)
    for kernel in given.kernels:
        op, architecture, head_dim, mini_batch_size, dtype = kernel.split(":")
        cost = compile_for(architecture, op, int(head_dim), int(mini_batch_size), DTYPES[dtype])
        print(json.dumps({"kernel": kernel, **asdict(cost)}) if given.json else f"{kernel:36} {cost}", flush=True)


if __name__ == "__main__":
    main()
