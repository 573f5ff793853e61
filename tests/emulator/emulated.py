"""Small Triton kernels with and without faults, to be run by ``pytest --emulate``; test_emulation.py does."""

import inspect
import os
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from tools.ptx_emulator.driver import EmulationError, Emulator, emulated
from tools.ptx_emulator.plugin import poisoning

pytestmark = pytest.mark.compiled


@pytest.fixture
def emulator(pytestconfig: pytest.Config) -> Iterator[Emulator]:
    with emulated(pytestconfig.getoption("--emulate")) as own:
        yield own


@triton.jit
def scale_kernel(inputs, nothing, result, factor, n, columns: tl.constexpr):
    row = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    at = tl.arange(0, columns)
    x = tl.load(inputs[0] + row * columns + at, mask=at < n)
    y = tl.load(inputs[1] + row * columns + at, mask=at < n)
    if nothing is None:
        tl.store(result + row * columns + at, factor * x + y.to(tl.float32), mask=at < n)


def test_arguments_of_every_kind(emulator: Emulator) -> None:
    """Tuples, None, floats, integers that are specialised away, constants, and a grid of two dimensions."""
    x, y = torch.randn(6, 64), torch.randn(6, 64).bfloat16()
    for n in (1, 50, 64):
        result = torch.zeros(6, 64)
        scale_kernel[(2, 3)]((x, y), None, result, 0.5, n, 64)
        expected = (0.5 * x + y.float()) * (torch.arange(64) < n)
        assert torch.equal(result, expected)
    assert [record.grid for record in emulator.records] == [(2, 3, 1)] * 3
    assert all(record.report.instructions > 0 for record in emulator.records)


@triton.jit
def product_kernel(a, b, c, size: tl.constexpr):
    row, column = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    at = row * size + column
    tl.store(c + at, tl.dot(tl.load(a + at), tl.trans(tl.load(b + at))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_matrix_product(dtype: torch.dtype, emulator: Emulator) -> None:
    """Of whole numbers, so that every order of the sums is exact."""
    a, b = (torch.randint(-8, 9, (64, 64)).to(dtype) for _ in range(2))
    c = torch.zeros(64, 64)
    product_kernel[(1,)](a, b, c, 64, num_warps=4)
    assert torch.equal(c, a.float() @ b.float().t())


def test_nothing_is_assembled(emulator: Emulator) -> None:
    """And what has no binary is not what a GPU would find in Triton's cache."""
    x = torch.zeros(64, 64)
    assert product_kernel.warmup(x, x, x, 64, num_warps=4, grid=(1,)).asm["cubin"] == b""
    assert os.environ["DISABLE_PTXAS_OPT"] == "1"  # a part of the cache's key


def line_of(text: str) -> str:
    """Where a statement stands in this file."""
    source = inspect.getsource(inspect.getmodule(line_of)).splitlines()  # type: ignore[arg-type]
    return f"emulated.py:{next(i for i, line in enumerate(source, 1) if text in line)}"


@triton.jit
def neighbours_kernel(x, synchronise: tl.constexpr):
    at = tl.arange(0, 128)
    tl.store(x + at, at.to(tl.float32))
    if synchronise:
        tl.debug_barrier()
    other = tl.load(x + (at ^ 64))
    tl.store(x + 128 + at, other)


def test_a_race_is_reported_with_both_lines(emulator: Emulator) -> None:
    x = torch.zeros(256)
    neighbours_kernel[(1,)](x, True)
    assert torch.equal(x[128:], (torch.arange(128) ^ 64).float())
    x.zero_()
    with pytest.raises(EmulationError, match="read after another warp's write without a barrier") as caught:
        neighbours_kernel[(1,)](x, False)
    finding = next(each for each in caught.value.findings if each.what.startswith("read after"))
    assert finding.kernel == "neighbours_kernel"
    assert finding.place.startswith("x, element ")
    assert [access.source for access in finding.accesses] == [
        line_of("other = tl.load(x + (at ^ 64))"),
        line_of("tl.store(x + at, at.to(tl.float32))"),
    ]


@triton.jit
def sum_kernel(x, result, n, masked: tl.constexpr):
    at = tl.program_id(0) * 64 + tl.arange(0, 64)
    values = tl.load(x + at, mask=at < n, other=0.0) if masked else tl.load(x + at)
    tl.store(result, tl.sum(values, 0))


def test_results_of_two_programs_in_one_place(emulator: Emulator) -> None:
    with pytest.raises(EmulationError, match="write where another program wrote") as caught:
        sum_kernel[(2,)](torch.randn(128), torch.zeros(1), 128, True)
    assert any("depend on the order" in finding.what for finding in caught.value.findings)


def test_a_load_beyond_the_end(emulator: Emulator) -> None:
    sum_kernel[(1,)](torch.randn(50), torch.zeros(1), 50, True)
    with pytest.raises(EmulationError, match="access to memory that is no argument's"):
        sum_kernel[(1,)](torch.randn(50), torch.zeros(1), 50, False)


@pytest.mark.parametrize("fill", [False, True])
def test_a_load_of_fresh_memory(fill: bool, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.empty gives it, or where a test has put NaN."""
    for owner, name, function in poisoning():
        monkeypatch.setattr(owner, name, function)
    x = torch.ones(64).fill_(float("nan")) if fill else torch.empty(64)
    x[:50] = 1
    sum_kernel[(1,)](x, torch.zeros(1), 50, True)
    with pytest.raises(EmulationError, match=r"read of global memory that nobody wrote, x, element 50"):
        sum_kernel[(1,)](x, torch.zeros(1), 64, True)


def test_findings_that_are_only_recorded(pytestconfig: pytest.Config) -> None:
    with emulated(pytestconfig.getoption("--emulate"), strict=False) as emulator:
        neighbours_kernel[(1,)](torch.zeros(256), False)
    assert emulator.records[0].report.findings


def test_an_architecture_that_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"sm_80, .*sm_120, got 'sm_70'"), emulated("sm_70"):
        pass
