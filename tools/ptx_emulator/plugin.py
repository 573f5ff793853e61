"""For pytest: ``--emulate sm_90`` runs Triton's kernels from their compiled code, on tensors of the CPU.

Fresh memory is marked, so that a kernel that reads what nobody wrote is found; filling a tensor with NaN, as tests do
to memory that must not be read, marks it too.
"""

import functools
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from .machine import poison

if TYPE_CHECKING:
    from .driver import Emulator
    from .machine import Finding

_STATE = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    group = parser.getgroup("emulate", "compiled Triton kernels on the CPU")
    group.addoption("--emulate", metavar="sm_90", help="run the kernels compiled for this architecture")
    group.addoption(
        "--emulate-findings",
        choices=("fail", "list"),
        default="fail",
        help="whether races and the like fail the test that launches the kernel, or are only listed at the end",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Take Triton's interpreter out and the emulator in, before any test imports kernels."""
    architecture = config.getoption("--emulate")
    if architecture is None:
        return
    if "triton" in sys.modules:
        raise pytest.UsageError("--emulate must come before anything imports triton")
    os.environ["TRITON_INTERPRET"] = "0"
    import triton

    from .driver import emulated

    triton.knobs.runtime.interpret = False  # what is assigned here beats the environment
    os.environ["TRITON_INTERPRET"] = "1"  # by which libraries tell whether kernels take tensors of the CPU
    manager = emulated(architecture, strict=config.getoption("--emulate-findings") == "fail")
    config.stash[_STATE] = manager, manager.__enter__(), poisoning()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Put the other driver back."""
    if (state := config.stash.get(_STATE, None)) is not None:
        state[0].__exit__(None, None, None)


@pytest.fixture(autouse=True, scope="session")
def _fresh_memory_is_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    state = request.config.stash.get(_STATE, None)
    if state is None:
        yield
    else:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, function in state[2]:
                patch.setattr(owner, name, function)
            yield


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was executed."""
    state = config.stash.get(_STATE, None)
    if state is None:
        return
    emulator: Emulator = state[1]
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0, 0])
    for record in emulator.records:
        values = 1, record.report.instructions, record.seconds, len(record.report.findings)
        kernels[record.report.kernel] = [a + b for a, b in zip(kernels[record.report.kernel], values, strict=True)]
    terminalreporter.section(f"kernels executed for {emulator.architecture}")
    for name, (launches, instructions, seconds, findings) in sorted(kernels.items()):
        terminalreporter.line(
            f"{name:32} {launches:6.0f} launches {instructions:12,.0f} warp instructions {seconds:8.1f} s"
            f" {findings:4.0f} findings"
        )
    different: dict[Any, Finding] = {}
    for record in emulator.records:
        for finding in record.report.findings:
            different.setdefault(
                (finding.kernel, finding.what, *(access.source for access in finding.accesses)), finding
            )
    for finding in different.values():
        terminalreporter.line(str(finding))


def poisoning() -> list[tuple[object, str, Callable[..., Any]]]:
    """Replacements for what gives out memory that nobody has written."""
    places = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    fill = torch.Tensor.fill_

    @functools.wraps(fill)
    def marking_fill(self: torch.Tensor, value: Any) -> torch.Tensor:
        if isinstance(value, float) and value != value and self.is_contiguous() and _plain(self):
            poison(self.data_ptr(), self.numel() * self.element_size())
            return self
        return fill(self, value)

    return [(owner, name, _marked(getattr(owner, name))) for owner, name in places] + [
        (torch.Tensor, "fill_", marking_fill)
    ]


def _marked(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def allocate(*args: Any, **options: Any) -> torch.Tensor:
        x = function(*args, **options)
        if _plain(x):
            storage = x.untyped_storage()
            poison(storage.data_ptr(), storage.nbytes())
        return x

    return allocate


def _plain(x: torch.Tensor) -> bool:
    """Whether it is a tensor with memory of the CPU."""
    return type(x) is torch.Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() > 0
