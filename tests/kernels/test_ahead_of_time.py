"""Kernels compiled for GPUs that need not be there: what they cost, and how they update the state."""

import itertools
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton

from tests.support.compiled import cost_of, environment
from tools import resources
from tools.aot import DTYPES, TARGETS, unlike_sums
from tools.documents import ROOT
from ttt4rec.kernels import launch, limits

SAMPLE = [  # of the table's kernels, compiled here
    *(f"linear_{op}:{arch}:16:8:bf16" for op in ("forward", "backward") for arch in TARGETS),
    *(f"linear_{op}:{arch}:64:16:bf16" for op in ("forward", "backward") for arch in ("sm_90", "gfx942")),
    *(f"linear_{op}:sm_90:{shape}" for op in ("forward", "backward") for shape in ("32:16:bf16", "16:8:fp32")),
    *(f"mlp_{op}:{arch}:16:8:bf16" for op in ("forward", "backward") for arch in ("sm_90", "gfx942")),
    "mlp_forward:sm_90:32:16:bf16",
    "mlp_backward:sm_90:64:16:bf16",  # in chunks
    "mlp_forward:sm_90:16:8:fp32",
    "segment_replay:sm_90:64:16:bf16",
]
STATE_SHAPE = {  # stacked heads by what each inner layer puts out
    ("linear", "16:8"): "32x16",
    ("linear", "32:16"): "32x32",
    ("linear", "64:16"): "64x64",
    ("mlp", "16:8"): "32x64",
    ("mlp", "32:16"): "32x128",
}
NUM_WEIGHTS = {"linear": 1, "mlp": 2}  # matrices

TABLE = resources.read(resources.FILE.read_text())
VERSIONS = ("3.6.0", "3.9.0")  # oldest and newest
UNSPILLED = {  # D and K without a spill in the loop, on sm_90 and sm_100
    "linear_forward": [(D, K) for D in (16, 32, 64) for K in (8, 16, 32, 64) if (D, K) != (64, 64)],  # 3, under 3.6.0
    "linear_backward": [(16, 8), (16, 16), (16, 32), (32, 8), (32, 16), (64, 16)],
    "mlp_forward": [(16, 8), (16, 16), (32, 8), (32, 16)],
}
FEW_SPILLS = [  # of some 1,500 instructions, where the oldest Triton leaves fewer than a table's costs may differ by
    *(("3.6.0", architecture, "mlp_forward", 16, 16) for architecture in ("sm_90", "sm_100")),
    ("3.6.0", "sm_100", "linear_backward", 32, 8),
]
PRODUCTS = {
    "linear_forward": 6,
    "linear_backward": 18,
    "mlp_forward": 56,
    "mlp_backward": 168,
    "segment_replay": 24,
    "segment_outputs": 64,
    "segment_walk": 104,
}
"""FLOPs of a token's products with weights, as multiples of D²."""
LARGEST_PRODUCT = {"sm_80": 4096, "gfx942": 16384}
"""FLOPs of an instruction at most, where an instruction is a warp's; elsewhere several warps make one."""
CHOSEN_WITH_SPILLS = {  # on sm_90, whose cuts are chosen by predicted time; the most that either Triton leaves
    ("linear_backward", 32, 8): 74,
    ("linear_backward", 32, 16): 1,
    ("linear_backward", 64, 16): 58,
    ("mlp_forward", 16, 8): 137,
    ("mlp_forward", 32, 8): 134,
    ("mlp_forward", 32, 16): 134,
}
TRAPS = [("3.6.0", "sm_100", "linear_backward", 128, 64)]


def test_the_table_has_every_configuration() -> None:
    """Of the launch table, with its present cuts."""
    assert set(TABLE) == {(version, architecture) for version in VERSIONS for architecture in TARGETS}
    for (_, architecture), rows in TABLE.items():
        assert [f"{r.op}:{r.head_dim}:{r.mini_batch_size}:{r.dtype}" for r in rows] == list(
            resources.configurations(architecture)
        )
        for r in rows:
            cut = launch.blocks(r.op, r.head_dim, r.mini_batch_size, DTYPES[r.dtype], architecture, 4)
            assert (r.num_warps, r.num_stages, r.heads, r.chunks) == cut


def test_the_file_is_read_as_it_was_written() -> None:
    assert resources.written(TABLE) == resources.FILE.read_text()
    assert resources.read(resources.written(TABLE)) == TABLE


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SAMPLE)
def test_costs_are_those_of_the_table(kernel: str) -> None:
    """To the instruction under a Triton of the table; under another one nothing may be a quarter worse."""
    architecture = kernel.split(":")[1]
    measured = resources.row(architecture, cost_of(kernel))
    known = triton.__version__ in VERSIONS
    rows = TABLE[triton.__version__ if known else VERSIONS[-1], architecture]
    (expected,) = (r for r in rows if r[:4] == measured[:4])
    if known:
        assert measured == expected
    assert measured.loop_spills <= 1.25 * expected.loop_spills + 8
    assert measured.loop_instructions <= 1.25 * expected.loop_instructions


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SAMPLE)
def test_lanes_sum_alike(kernel: str) -> None:
    assert cost_of(kernel)["unlike_sums"] == 0


def test_sums_of_lanes_that_differ_are_counted() -> None:
    own, exchange = "FMUL R4, R2, R3", "SHFL.BFLY PT, R5, R4, 0x10, 0x1f"
    fused = [own, exchange, "MOV R7, R4", "@P0 FFMA R6, R2, -R3.reuse, R5"]
    assert unlike_sums(fused) == 1
    assert unlike_sums([*fused, exchange, "FADD R6, R4, R5", "FFMA R6, R2, R3, R5"]) == 1
    assert unlike_sums([own, exchange, "FFMA R6, R5, R3, R2"]) == 0
    assert unlike_sums([own, exchange, "FMUL R5, R2, R3", "FFMA R6, R2, R3, R5"]) == 0


@pytest.mark.parametrize(("version", "architecture"), TABLE)
def test_all_kernels_fit_and_the_important_ones_do_not_spill(version: str, architecture: str) -> None:
    machine = resources.MACHINES[architecture]
    for r in TABLE[version, architecture]:
        if (version, architecture, *r[:3]) in TRAPS:
            continue
        assert r.shared_memory <= machine.shared_memory
        assert r.programs >= 1
        assert r.tensor_core > 0
        assert r.loop_instructions > 100  # fewer, and the loop was not found
        shape = r.head_dim, r.mini_batch_size
        if architecture in ("sm_90", "sm_100") and r.dtype == "bf16" and shape in UNSPILLED.get(r.op, []):
            most = 8 if (version, architecture, r.op, *shape) in FEW_SPILLS else 0
            if architecture == "sm_90":
                most = CHOSEN_WITH_SPILLS.get((r.op, *shape), most)
            assert r.loop_spills <= most, r


@pytest.mark.parametrize(("version", "architecture"), [key for key in TABLE if key[1] in LARGEST_PRODUCT])
def test_counts_are_of_whole_mini_batches(version: str, architecture: str) -> None:
    """All products of a mini-batch are counted; where some are missing, a part of its loops was not found."""
    for r in TABLE[version, architecture]:
        least = (
            PRODUCTS[launch.without_decay(r.op)]
            * r.head_dim**2
            * r.mini_batch_size
            * r.heads
            / LARGEST_PRODUCT[architecture]
        )
        assert r.tensor_core * r.num_warps >= least, r


@pytest.mark.parametrize("trap", TRAPS)
def test_what_a_compiler_turns_into_a_trap_is_refused(trap: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    version, architecture, op, head_dim, mini_batch_size = trap
    (r,) = (r for r in TABLE[version, architecture] if r[:3] == trap[2:])
    assert r.tensor_core == 0  # if it has become a kernel, the refusal can go
    monkeypatch.setattr(launch, "architecture", lambda: architecture)
    q = torch.empty(1, 1, 1, head_dim, dtype=torch.bfloat16)
    limits.check(op, q, mini_batch_size // 2)
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(ValueError, match=r"under a Triton newer than 3\.6; given 3\.6\.0"):
        limits.check(op, q, mini_batch_size)


def test_what_does_not_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda: "sm_100")
    q = torch.empty(1, 1, 1, 16)
    limits.check("mlp_backward", q, 32)
    with pytest.raises(ValueError, match="trains TTT-MLP with a mini_batch_size of up to 32; given 33"):
        limits.check("mlp_backward", q, 33)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942", "interpreter"])
def test_every_kernel_has_its_blocks_or_is_refused(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda: architecture)
    ops = ("linear_forward", "linear_backward", "mlp_forward", "mlp_backward")
    for op, D, K, dtype in itertools.product(ops, (1, 16, 17, 64, 128), range(1, 65), (torch.float32, torch.bfloat16)):
        if limits.scan_refusal(op, D, K, dtype) is None:
            launch.blocks(op, D, K, dtype, architecture, 4)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("sm_86", "sm_80"), ("sm_90", "sm_90"), ("sm_103", "sm_100"), ("sm_120", "sm_80"), ("gfx950", "gfx942")],
)
def test_architectures_that_were_not_looked_at_take_the_nearest_ones_cuts(name: str, nearest: str) -> None:
    assert launch.nearest(name) == nearest


@pytest.mark.slow
def test_one_compilation_serves_all_lengths() -> None:
    script = """
import torch
from tools import aot
aot._nvidia_cost = lambda compiled, times, **_: None  # which takes longer than to compile
around = [f"{part}_{way}" for part in ("projection", "convolution", "output") for way in ("forward", "backward")]
for op in ("linear_forward", "linear_backward", "mlp_forward", "mlp_backward", *around):
    for length in (1, 7, 16, 50, 4096):
        aot.compile_for("sm_90", op, 16, 8, torch.bfloat16, length)
import sys
for name, module in sorted(sys.modules.items()):
    if name.startswith("ttt4rec.kernels."):
        for kernel in (x for x in vars(module).values() if getattr(x, "__module__", "") == name):
            caches = getattr(kernel, "device_caches", {}).values()
            if compiled := sum(len(cache[0]) for cache in caches):
                print(compiled, kernel.__name__)
"""
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    printed = run.stdout.splitlines()
    assert len(printed) == 10
    assert {line.split()[0] for line in printed} == {"1"}, printed


def state_shape(kernel: str) -> str | None:
    """Shape of the state that a kernel's walk carries along; None where it lies in memory, or looks like a bias."""
    op, _, head_dim, mini_batch_size, _ = kernel.split(":")
    if kernel == "linear_backward:sm_90:16:8:fp32":
        return None
    return STATE_SHAPE.get((op.split("_")[0], f"{head_dim}:{mini_batch_size}"))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [kernel for kernel in SAMPLE if state_shape(kernel)])
def test_state_is_updated_by_a_float32_subtraction(kernel: str) -> None:
    """Never inside the tensor core's accumulator, which rounds towards zero: errors of one sign would add up.

    The forward carries the weights, so does the replay, and the walk back their gradients.
    """
    carried = carried_tensors(cost_of(kernel)["ttgir"], state_shape(kernel) or "")
    subtracted = {name: subtraction(name, cost_of(kernel)["ttgir"]) for name in carried}
    inner, direction = kernel.split(":")[0].split("_")
    assert len(carried) == NUM_WEIGHTS[inner] * (1 if direction == "forward" else 2)
    assert all(subtracted.values()), subtracted
    for name in carried:
        assert not accumulates_into(name, cost_of(kernel)["ttgir"]), name


@pytest.mark.slow
@pytest.mark.parametrize("op", ["linear_forward", "linear_backward", "mlp_forward"])
def test_float32_products_are_three_tf32_products(op: str) -> None:
    """Never one, which would keep 11 bits."""
    single, half = (cost_of(f"{op}:sm_90:16:8:{dtype}")["ttgir"].count("= tt.dot ") for dtype in ("fp32", "bf16"))
    assert half > 0
    assert single == 3 * half


def innermost_loops(ttgir: str) -> list[str]:
    """First lines of the loops that have none inside."""
    lines, found = ttgir.splitlines(), []
    for i, line in enumerate(lines):
        if "scf.for" in line:
            end = line[: len(line) - len(line.lstrip())] + "}"
            inside = itertools.takewhile(lambda inner, end=end: not inner.startswith(end), lines[i + 1 :])
            if not any("scf.for" in inner for inner in inside):
                found.append(line)
    return found


def carried_tensors(ttgir: str, shape: str) -> list[str]:
    """Names of the float32 tensors of a shape that walks over mini-batches carry along."""
    found = []
    for loop in innermost_loops(ttgir):
        if ") -> (" in loop:
            names = re.findall(r"(%[\w.$-]+) = ", loop.split("iter_args(")[1].split(") -> (")[0])
            types = re.findall(
                r"tensor<(?:[^<>]|<[^<>]*>)*>|![\w.]+(?:<(?:[^<>]|<[^<>]*>)*>)?|\b[if]\d+\b", loop.split(") -> (")[1]
            )
            pairs = zip(names, types, strict=False)
            found += [name for name, kind in pairs if kind.startswith(f"tensor<{shape}xf32")]
    return found


def subtraction(name: str, ttgir: str) -> bool:
    """Whether something is subtracted from the tensor: a difference, or a product by a fused multiplication."""
    own = re.escape(name)
    return re.search(rf"arith\.subf {own},|math\.fma %[\w.#-]+, %[\w.#-]+, {own}\b", ttgir) is not None


def accumulates_into(name: str, ttgir: str) -> bool:
    """Whether the tensor is the accumulator of a matrix product."""
    return (
        re.search(rf"(?:tt\.dot|warp_group_dot|tc_gen5_mma) %[\w.]+, %[\w.]+, {re.escape(name)}\b", ttgir) is not None
    )
