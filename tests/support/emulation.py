"""Small PTX kernels for the tests of the emulator, and how they are run."""

from collections.abc import Sequence

import numpy as np

from tools.ptx_emulator.decoder import decode
from tools.ptx_emulator.machine import Launch, Region, Report

REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}


def module(body: str, parameters: int, threads: int = 32) -> str:
    """A kernel with pointers as parameters; %d0 and up hold them, %r0 holds %tid.x."""
    names = [f"kernel_param_{i}" for i in range(parameters)]
    declared = ",\n".join(f".param .u64 .ptr .global .align 1 {name}" for name in names)
    loads = "\n".join(f"ld.param.b64 %d{i}, [{name}];" for i, name in enumerate(names))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({declared}) .reqntid {threads}
{{
    .reg .pred %p<16>;
    .reg .b16 %h<64>;
    .reg .b32 %r<512>;
    .reg .b64 %d<64>;
    {loads}
    mov.u32 %r0, %tid.x;
{body}
    ret;
}}
"""


def launch(
    body: str,
    arrays: Sequence[np.ndarray],
    *,
    threads: int = 32,
    shared: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
) -> Launch:
    """A launch of a kernel on arrays, which it may change."""
    program = decode(module(body, len(arrays), threads))
    regions = [Region(x.ctypes.data, x.nbytes, x.itemsize, f"array {i}") for i, x in enumerate(arrays)]
    return Launch(program, shared, grid, [x.ctypes.data for x in arrays], sorted(regions))


def check(body: str, arrays: Sequence[np.ndarray], **options: object) -> Report:
    """Run it in all orders."""
    return launch(body, arrays, **options).check()  # type: ignore[arg-type]


def run(body: str, arrays: Sequence[np.ndarray], **options: object) -> None:
    """Run it; a finding is a failure."""
    report = check(body, arrays, **options)
    assert not report.findings, "\n".join(map(str, report.findings))


def lane_address(array: int, size: int, register: str) -> str:
    """The address of the thread's own element of an array in a register."""
    return f"mad.wide.u32 {register}, %r0, {size}, %d{array};"


def apply(instruction: str, result: type, *operands: np.ndarray, before: str = "", guard: str = "") -> np.ndarray:
    """What an instruction makes of its operands, 32 lanes at a time; the results start as zeros."""
    count = -(-max(len(x) for x in operands) // 32) * 32
    columns = [np.resize(x, count) for x in operands]
    out = np.zeros(count, result)
    lines, names = [], []
    for i, x in enumerate(columns):
        name = f"{REGISTER[x.itemsize]}{20 + i}"
        lines += [lane_address(i, x.itemsize, "%d10"), f"ld.global.b{8 * x.itemsize} {name}, [%d10];"]
        names.append(name)
    size = out.itemsize
    target = f"{REGISTER[size]}40"
    lines += [f"mov.b{8 * max(size, 2)} {target}, 0;", before, f"{guard} {instruction} {target}, {', '.join(names)};"]
    lines += [lane_address(len(columns), size, "%d10"), f"st.global.b{8 * size} [%d10], {target};"]
    for first in range(0, count, 32):
        parts = [x[first : first + 32].copy() for x in (*columns, out)]
        run("\n".join(lines), parts)
        out[first : first + 32] = parts[-1]
    return out[: max(len(x) for x in operands)]
