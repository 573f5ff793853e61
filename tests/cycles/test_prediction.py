"""What is predicted of a kernel: from loops written by hand, and from one that is compiled."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.cycles.listing import instructions
from tests.support.compiled import environment
from tools.cycles.__main__ import report
from tools.cycles.machines import MACHINES
from tools.cycles.prediction import Kernel, binding, filled, fitting, floors, machine_for, slowest_lines, summary
from tools.cycles.walk import Loop
from tools.documents import ROOT
from ttt4rec.kernels.launch import Blocks
from ttt4rec.operators.samples import Sizes

MACHINE = MACHINES["H200"]
WORK = "FFMA stall=4\n" * 50
PRODUCT = "HMMA.16816.F32.BF16 stall=24\n"


def kernel(*listings: str, times=1, warps=4, registers=128, D=16, op="linear_backward") -> Kernel:
    loops = [Loop(instructions(listing), times) for listing in listings]
    sizes = Sizes(2, 50, 4, D, 8)
    return Kernel(op, sizes, torch.bfloat16, Blocks(warps, 1, heads=2), 2, registers, 1024, loops)


def test_loops_of_a_mini_batch_add_up():
    once = filled(kernel(WORK), MACHINE, 1)
    assert filled(kernel(WORK, WORK), MACHINE, 1).cycles == 2 * once.cycles
    assert filled(kernel(WORK, times=3), MACHINE, 1).cycles == 3 * once.cycles


def test_picoseconds_are_of_the_whole_gpu():
    """Two heads of eight tokens on each of 132 multiprocessors."""
    found = filled(kernel(WORK), MACHINE, 1)
    assert found.cycles == pytest.approx(200, rel=0.02)
    assert found.picoseconds == pytest.approx(found.cycles / 1.98e-3 / 132 / 16)
    assert filled(kernel(WORK), MACHINE, 4).picoseconds == pytest.approx(found.picoseconds / 4, rel=0.05)


@pytest.mark.parametrize(
    ("listing", "cost"),
    [
        (WORK + "BAR.SYNC stall=1\n" * 30, "barriers"),
        (WORK + "LDL stall=1 written=0\nFFMA stall=4 wait=0\n" * 30, "spills"),
        (WORK + "LDG.E stall=1 written=0\nFFMA stall=4 wait=0\n", "loads"),
        (WORK + "LDS.128 stall=1 written=0\nFFMA stall=4 wait=0\n" * 30, "shared memory"),
        (WORK + "SHFL.BFLY stall=1 written=0\nFFMA stall=4 wait=0\n" * 30, "shuffles"),
        (WORK + PRODUCT * 30, "tensor cores"),
    ],
)
def test_what_a_kernel_waits_for_most_binds(listing, cost):
    of = kernel(listing)
    saved = binding(of, MACHINE, filled(of, MACHINE, 1))
    assert next(iter(saved)) == cost
    assert saved[cost] > 0.5
    assert saved["stores"] == 0


def test_a_full_machine_is_bound_by_issue_and_an_empty_one_by_pauses():
    of = kernel("FFMA stall=4\n" * 20, registers=64)
    assert next(iter(binding(of, MACHINE, filled(of, MACHINE, 1)))) == "fixed latencies"
    assert next(iter(binding(of, MACHINE, filled(of, MACHINE, fitting(of, MACHINE))))) == "issue"


def test_floors_are_counted():
    found = floors(kernel(WORK + PRODUCT, warps=4), MACHINE)
    assert found["memory"] == pytest.approx(1000 * (16 * 16 + 8) / 4300)
    assert found["issue"] == pytest.approx(MACHINE.picoseconds(51 / 16))
    assert found["tensor cores"] == pytest.approx(MACHINE.picoseconds(6 / 16))


def test_copies_of_the_weights_are_in_memory_if_the_cache_does_not_hold_them():
    replay = "STG.E.128 stall=1 read=0\n"
    (stored,) = instructions(replay)
    copies = ROOT / "src/ttt4rec/kernels/copies.py"
    lines = copies.read_text(encoding="utf-8").splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "tl.store(copies + W_place" in text)
    loop = Loop([replace(stored, source=((str(copies), line),))], 1)
    small, large = (kernel(WORK, D=D)._replace(loops=[loop]) for D in (16, 64))
    assert "memory" not in filled(small, MACHINE, 1).busy()
    assert "memory" in filled(large, MACHINE, 8).busy()


def test_cuts_that_do_not_fit_have_no_prediction():
    assert summary(kernel(WORK)._replace(shared_memory=300_000), MACHINE) is None
    assert "no program" in report(kernel(WORK)._replace(shared_memory=300_000), MACHINE)
    found = summary(kernel(WORK), MACHINE)
    assert found is not None
    assert found.programs == 4


def test_a_report_says_what_is_predicted():
    text = report(kernel(WORK + PRODUCT), MACHINE)
    assert text.count("predicted") == 3
    assert "1 program a multiprocessor" in text
    assert "4 programs a multiprocessor" in text
    assert "binds: tensor cores" in text or "binds: fixed latencies" in text


def test_lines_that_take_the_time_are_those_of_the_kernels_own_files():
    waiting, working = "LDG.E stall=1 written=0\nFFMA stall=4 wait=0\n", WORK
    slow, fast = ("/a/mlp_forward.py", 7), ("/a/mlp_forward.py", 8)
    sources = [((("/a/primitives.py", 3), slow), waiting), ((fast,), working), ((("/a/primitives.py", 3),), working)]
    trip = [replace(x, source=source) for source, listing in sources for x in instructions(listing)]
    of = kernel(WORK)._replace(loops=[Loop(trip, 1)])
    shares = slowest_lines(of, filled(of, MACHINE, 1))
    assert list(shares) == [slow, fast]
    assert shares[slow] > 0.5
    assert sum(shares.values()) < 1
    assert "mlp_forward.py:7" in report(of, MACHINE, counterfactuals=False, lines=1)
    assert "mlp_forward.py:8" not in report(of, MACHINE, counterfactuals=False, lines=1)


def test_other_architectures_have_no_machine():
    with pytest.raises(ValueError, match="must be one whose machine code is known, sm_80, sm_90; given gfx942"):
        machine_for("gfx942")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_compiled_kernel_is_predicted(architecture):
    command = [sys.executable, "-m", "tools.cycles", "linear_backward", "--arch", architecture, "--quick"]
    command += ["--mini-batch-size", "8", "--warps", "1"]
    run = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "8 programs a multiprocessor: predicted" in run.stdout
    assert "2 heads" in run.stdout
