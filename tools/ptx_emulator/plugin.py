"""For pytest: ``--emulate sm_90`` runs Triton's kernels from their compiled code, on tensors of the CPU.

Fresh memory is marked, so that a kernel that reads what nobody wrote is found; filling a tensor with NaN, as tests do
to memory that must not be read, marks it too.
"""

import datetime
import functools
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from .machine import poison

if TYPE_CHECKING:
    from .driver import Emulator
    from .machine import Launch

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
    group.addoption(
        "--emulate-report",
        metavar="FILE",
        help="what was executed and found, and properties of tests, as JSON; without --emulate of the interpreter",
    )
    group.addoption(
        "--emulate-mutations",
        action="store_true",
        help="at each kernel's first launch, try it without each of its barriers, waits, fences and masks in turn",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Take Triton's interpreter out and the emulator in, before any test imports kernels."""
    architecture = config.getoption("--emulate")
    if config.getoption("--emulate-report") is not None:  # long, perhaps: who is told to end says what there was
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if architecture is None:
        return
    if "triton" in sys.modules:
        raise pytest.UsageError("--emulate must come before anything imports triton")
    os.environ["TRITON_INTERPRET"] = "0"
    import triton

    from .driver import emulated

    triton.knobs.runtime.interpret = False  # what is assigned here beats the environment
    os.environ["TRITON_INTERPRET"] = "1"  # by which libraries tell whether kernels take tensors of the CPU
    strict, mutations = config.getoption("--emulate-findings") == "fail", _Mutations()
    inspect = mutations.add if config.getoption("--emulate-mutations") else None
    manager = emulated(architecture, strict=strict, inspect=inspect)
    config.stash[_STATE] = manager, manager.__enter__(), poisoning(), mutations


class _Mutations:
    """What became of the kernels that were tried without something."""

    def __init__(self) -> None:
        self.lines: dict[int, list[str]] = {}  # by the decoded program, of which Triton keeps one
        self.results: list[dict[str, Any]] = []

    def add(self, launch: "Launch") -> None:
        """Try a program that was not tried before."""
        from .mutation import mutate, summary

        if id(launch.program) in self.lines:
            return
        head, outcomes = f"{launch.program.name}, {launch.program.threads} threads", mutate(launch)
        self.lines[id(launch.program)] = [f"{head}:", *(f"  {line}" for line in summary(outcomes))]
        results: dict[str, Counter[str]] = {}
        for outcome in outcomes:
            results.setdefault(outcome.kind, Counter())[outcome.result] += 1
        _, bracket, parameters = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0].partition("[")
        self.results.append({"kernel": f"{head} {bracket}{parameters}".strip(), "results": results})


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
    """Say what was executed, and what was found."""
    state, path = config.stash.get(_STATE, None), config.getoption("--emulate-report")
    if state is None and path is None:
        return
    summary = _versions() | {"architecture": "interpreter", "kernels": {}, "mutations": []}
    if state is not None:
        own: dict[str, Any] = {"architecture": state[1].architecture, "kernels": _kernels(state[1])}
        summary |= own | {"mutations": state[3].results}
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    summary["properties"] = [each for report in called for each in report.user_properties]
    if path is not None:
        Path(path).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if state is None:
        return
    terminalreporter.section(f"kernels executed for {summary['architecture']} by Triton {summary['triton']}")
    for name, kernel in summary["kernels"].items():
        terminalreporter.line(
            f"{name:32} {kernel['launches']:6} launches {kernel['instructions']:12,} warp instructions "
            f"{kernel['seconds']:8.1f} s {len(kernel['findings']):4} findings"
        )
    for kernel in summary["kernels"].values():
        for finding in kernel["findings"]:
            terminalreporter.line(finding)
    for lines in state[3].lines.values():
        terminalreporter.line("\n".join(lines))


def _versions() -> dict[str, Any]:
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


def _kernels(emulator: "Emulator") -> dict[str, dict[str, Any]]:
    """What was executed by kernel; findings of the same kind at the same lines are one."""
    kernels: dict[str, dict[str, Any]] = {}
    for record in sorted(emulator.records, key=lambda record: record.report.kernel):
        new = {"launches": 0, "instructions": 0, "seconds": 0.0, "types": set(), "findings": {}}
        kernel = kernels.setdefault(record.report.kernel, new)
        kernel["launches"] += 1
        kernel["instructions"] += record.report.instructions
        kernel["seconds"] += record.seconds
        kernel["types"].add(record.type)
        for finding in record.report.findings:
            places = finding.what, *(access.source for access in finding.accesses)
            kernel["findings"].setdefault(places, str(finding))
    for kernel in kernels.values():
        kernel["findings"] = list(kernel["findings"].values())
        kernel["types"] = sorted(kernel["types"])
    return kernels


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
