"""Ahead-of-time compilation without a GPU: what a kernel costs on an architecture, read from its machine code.

``python -m tools.aot linear_forward:sm_90:16:8:bf16 ...`` prints a table. Kernels are compiled exactly as
they would be launched: launches are prepared on ``meta`` tensors, behind a driver that only names an architecture.
Not under the interpreter.
"""

import argparse
import contextlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ttt4rec import kernels
from ttt4rec.kernels import launch, segments
from ttt4rec.kernels.convolution import prepare_convolution, prepare_convolution_backward
from ttt4rec.kernels.decays import prepared_decays
from ttt4rec.kernels.linear_backward import prepare_linear_scan_backward
from ttt4rec.kernels.linear_forward import prepare_linear_scan
from ttt4rec.kernels.mlp_backward import prepare_mlp_scan_backward
from ttt4rec.kernels.mlp_forward import prepare_mlp_scan
from ttt4rec.kernels.output import prepare_output, prepare_output_backward
from ttt4rec.kernels.projection_backward import prepare_projection_backward
from ttt4rec.kernels.projection_forward import prepare_projection
from ttt4rec.kernels.step import prepare_token_step
from ttt4rec.operators import (
    CONVOLUTIONS,
    FORGETTING_SCANS,
    SCANS,
    Operator,
    forgetting_token_step,
    output,
    projection,
    token_step,
)
from ttt4rec.operators.samples import Sizes

from . import sass
from .loops import Code, loops


def _of_a_segment(number: int) -> Callable[..., Any]:
    """What prepares one of the three kernels of a backward by segments."""
    return lambda scan, kept, grads: list(itertools.islice(segments.prepare(scan, kept, grads)[1], number + 1))


KERNELS: dict[str, tuple[Operator[Any], Callable[..., Any], dict[str, Any]]] = {
    "linear_forward": (SCANS["linear"], prepare_linear_scan, {"segment": 16}),
    "linear_backward": (SCANS["linear"], prepare_linear_scan_backward, {"segment": 16}),
    "mlp_forward": (SCANS["mlp"], prepare_mlp_scan, {"segment": 16}),
    "mlp_backward": (SCANS["mlp"], prepare_mlp_scan_backward, {"segment": 16}),
    **{op: (SCANS["mlp"], _of_a_segment(i), {"segment": 16}) for i, op in enumerate(segments.OPS)},
    "projection_forward": (projection, prepare_projection, {}),
    "projection_backward": (projection, prepare_projection_backward, {}),
    "convolution_forward": (CONVOLUTIONS[2], prepare_convolution, {}),
    "convolution_backward": (CONVOLUTIONS[2], prepare_convolution_backward, {}),
    "output_forward": (output, prepare_output, {}),
    "output_backward": (output, prepare_output_backward, {}),
    "linear_step": (token_step, prepare_token_step, {}),
    "mlp_step": (token_step, prepare_token_step, {}),
    "linear_forgetting_forward": (FORGETTING_SCANS["linear"], prepare_linear_scan, {"segment": 16}),
    "linear_forgetting_backward": (FORGETTING_SCANS["linear"], prepare_linear_scan_backward, {"segment": 16}),
    "mlp_forgetting_forward": (FORGETTING_SCANS["mlp"], prepare_mlp_scan, {"segment": 16}),
    "mlp_forgetting_backward": (FORGETTING_SCANS["mlp"], prepare_mlp_scan_backward, {"segment": 16}),
    "mlp_decays": (FORGETTING_SCANS["mlp"], partial(prepared_decays, op="mlp_forward"), {}),
    "linear_decays": (FORGETTING_SCANS["linear"], partial(prepared_decays, op="linear_forward"), {}),
    "linear_forgetting_step": (forgetting_token_step, prepare_token_step, {}),
    "mlp_forgetting_step": (forgetting_token_step, prepare_token_step, {}),
}
"""Operators, what prepares a launch, and options of the sample of which."""
BLOCK_KERNELS = (
    "inner_gradient", "inner_gradient_backward", "output", "output_backward", "gelu", "slope", "hidden_backward",
    "scaled", "causal", "running",
)  # fmt: skip
"""What stands between the products of long mini-batches, as ``blocks/gelu``; of TTT-MLP, whose rows are widest."""
INNER_LOOPS = tuple(
    op for op in KERNELS if (op.startswith(("linear", "mlp")) and op.endswith("ward")) or op in segments.OPS
)
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

    That is the longest loop, or, where that one goes from segment to segment, what lies in loops inside it. A kernel
    with a program for each mini-batch counts as a whole.
    """

    registers: int  # per thread
    spills: int  # instructions that store or load spilled registers
    loop_spills: int  # of them in the loop
    shared_memory: int  # bytes per program
    loop_instructions: int  # per warp and mini-batch
    tensor_core: int  # of them matrix products
    unlike_sums: int  # of two lanes, whose sums may differ; not counted on AMD
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
    kernel, prepared = compiled(architecture, op, Sizes(2, length, 4, head_dim, mini_batch_size), dtype)
    count = _amd_cost if architecture.startswith("gfx") else _nvidia_cost
    chunks = max(1, prepared.arguments[-1].chunks) if op in INNER_LOOPS else 1
    return count(kernel, _times(op, chunks), whole=op == "segment_outputs")


def _times(op: str, chunks: int) -> Times:
    if op not in INNER_LOOPS:
        return 1, 1, 1
    if op == "segment_replay":  # a program has one chunk
        return chunks, chunks, chunks
    return (1, chunks, 1) if op in segments.OPS else (0, 1, chunks)


def compiled(architecture: str, op: str, sizes: Sizes, dtype: torch.dtype) -> tuple[Any, launch.Launch]:
    """What Triton makes of a kernel for an architecture, and the launch it was prepared for."""
    driver.set_active(OfflineDriver(architecture))
    prepared = _prepare(op, sizes, dtype)
    return prepared.kernel.warmup(*prepared.arguments, grid=prepared.grid, **prepared.options()), prepared


@contextlib.contextmanager
def cut_as(blocks: launch.Blocks | None) -> Iterator[None]:
    """Cut kernels like this instead of as the launch table says."""
    table = launch.blocks
    if blocks is not None:
        launch.blocks = lambda *_: blocks
    try:
        yield
    finally:
        launch.blocks = table


def _prepare(op: str, sizes: Sizes, dtype: torch.dtype) -> launch.Launch:
    """The launch of a kernel, of a sample without values."""
    if op.startswith("blocks/"):
        return _widest(op, block_launches("mlp", sizes, dtype))
    operator, prepare, options = KERNELS[op]
    if op.startswith("mlp") and op.endswith("step"):
        options = {"inner": "mlp"}
    given = operator.sample(sizes, dtype, "meta", **options)
    if not op.endswith("backward") and op not in segments.OPS:
        return prepare(given)[-1]  # type: ignore[no-any-return]
    return prepare(given, *operator.backward_sample(operator(given, "triton")))[-1]  # type: ignore[no-any-return]


def block_launches(inner: str, sizes: Sizes, dtype: torch.dtype) -> list[launch.Launch]:
    """What a scan of mini-batches longer than a program's, and its backward, launch."""
    operator, found, run = SCANS[inner], list[launch.Launch](), launch.Launch.run

    def note(prepared: launch.Launch) -> None:
        found.append(prepared)

    given = operator.sample(sizes, dtype, "meta", segment=16)
    kept, grads = operator.backward_sample(operator(given, "triton"))
    launch.Launch.run = note  # type: ignore[assignment, method-assign]
    try:
        getattr(kernels, f"{inner}_scan")(given)
        getattr(kernels, f"{inner}_scan_backward")(given, kept, grads)
    finally:
        launch.Launch.run = run  # type: ignore[method-assign]
    return found


def _widest(op: str, launches: list[launch.Launch]) -> launch.Launch:
    """That of a kernel's launches whose rows have the most features."""
    own = [each for each in launches if each.kernel.fn.__name__ == f"{op.removeprefix('blocks/')}_kernel"]
    return max(own, key=lambda each: each.arguments[-1].features)


def _nvidia_cost(compiled: Any, times: Times, *, whole: bool) -> Cost:
    cubin = compiled.asm["cubin"]
    code = sass.code(sass.decoded(sass.disassembly(cubin)))
    unlike = unlike_sums(code.instructions)
    return _cost(compiled, times, registers_of(cubin), code, r"\b(LDL|STL)\b", unlike, whole=whole)


def registers_of(cubin: bytes) -> int:
    """Registers of a thread."""
    usage = sass.printed("cuobjdump", cubin, "-res-usage")
    return int(re.findall(r"REG:(\d+)", usage)[-1])


def _amd_cost(compiled: Any, times: Times, *, whole: bool) -> Cost:
    code = compiled.asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", code)[0])
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.split(".Lfunc_end")[0].splitlines():  # blocks may lie behind the end of the program
        text = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", text):
            labels[label[1]] = len(instructions)
        elif re.match(r"[a-z]\w+", text):
            instructions.append(text)
    jumps, final = {}, set()
    for i, text in enumerate(instructions):
        if branch := re.match(r"s_(?:c?branch\w* |addc_u32 .*\()(\.LBB\w+)", text):  # the latter before a far jump
            jumps[i] = labels[branch[1]]
        if re.match(r"s_(branch|setpc|endpgm)", text):
            final.add(i)
    spill = r"scratch_(load|store)|buffer_(load|store)\S* .*\bs32\b"
    return _cost(compiled, times, registers, Code(instructions, jumps, final), spill, 0, whole=whole)


def unlike_sums(instructions: Sequence[str]) -> int:
    """Exchanges of products between two lanes after which each adds the other's to its own in one operation.

    The other's product was rounded and the own one was not: the lanes' sums differ in their last bit.
    """
    found = 0
    parsed = [_parts(text) for text in instructions]
    for i, (name, *operands) in enumerate(parsed):
        if not name.startswith("SHFL.BFLY"):
            continue
        _, other, own, *_ = operands
        made = next((earlier[0] for earlier in reversed(parsed[:i]) if earlier[1:2] == [own]), "")
        used = next((later for later in parsed[i + 1 :] if other in later[1:]), [""])
        found += made.startswith("FMUL") and used[0].startswith("FFMA") and used[-1] == other
    return found


def _parts(text: str) -> list[str]:
    """An instruction's name, result and sources."""
    name, _, operands = re.sub(r"^@!?\w+ ", "", text).partition(" ")
    return [name, *(re.sub(r"\.reuse|[-|]", "", operand.strip()) for operand in operands.split(","))]


def _cost(compiled: Any, times: Times, registers: int, code: Code, spill: str, unlike: int, *, whole: bool) -> Cost:
    """Count in the longest loop that has products, or in the whole kernel, and in loops inside it that have some."""
    spills = {i for i, text in enumerate(code.instructions) if re.search(spill, text)}
    products = {i for i, text in enumerate(code.instructions) if re.search(r"MMA|v_mfma", text)}
    everywhere = loops(code)
    multiply = [body for body in everywhere if body & products] or everywhere
    if whole:
        multiply = [set(range(len(code.instructions))), *(body for body in multiply if body & products)]
    longest = multiply[0] if multiply else set()
    counts = {i: times[min(sum(i in body for body in multiply) - 1, 2)] for i in longest}
    return Cost(
        registers=registers,
        spills=len(spills),
        loop_spills=sum(n for i, n in counts.items() if i in spills),
        shared_memory=compiled.metadata.shared,
        loop_instructions=sum(counts.values()),
        tensor_core=sum(n for i, n in counts.items() if i in products),
        unlike_sums=unlike,
        ttgir=compiled.asm["ttgir"],
    )


def main() -> None:
    """Print what kernels cost, as a table or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "kernels",
        nargs="+",
        help="op:architecture:head_dim:mini_batch_size:dtype, e.g. linear_forward:sm_90:16:8:bf16, or - for input",
    )
    parser.add_argument("--blocks", nargs="+", type=int, metavar="WARPS STAGES HEADS CHUNKS")
    parser.add_argument("--json", action="store_true", help="one object per kernel, the intermediate form included")
    given = parser.parse_args()
    for kernel in map(str.strip, sys.stdin) if given.kernels == ["-"] else given.kernels:
        op, architecture, head_dim, mini_batch_size, dtype = kernel.split(":")
        with cut_as(launch.Blocks(*given.blocks) if given.blocks else None):
            cost = compile_for(architecture, op, int(head_dim), int(mini_batch_size), DTYPES[dtype])
        print(json.dumps({"kernel": kernel, **asdict(cost)}) if given.json else f"{kernel:36} {cost}", flush=True)


if __name__ == "__main__":
    main()
