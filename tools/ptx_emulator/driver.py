"""Triton launches kernels through a driver; this one executes what was compiled on tensors of the CPU.

Everything before the launch is Triton's own: specialisation, compilation, the loading of the binary, the launcher's
arguments. The binary is empty: the PTX is executed, and nothing is assembled, which takes as long as all the rest.
"""

import functools
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .decoder import decode
from .machine import ORDERS, Finding, Launch, Region, Report, merged
from .program import Program

MAX_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}


class EmulationError(RuntimeError):
    """A kernel did what it must not do; ``findings`` tell what."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(str(finding) for finding in findings))
        self.findings = tuple(findings)


@dataclass(frozen=True)
class Record:
    """A launch that was executed."""

    report: Report
    grid: tuple[int, int, int]
    threads: int
    type: str  # of the first pointer's elements: "bf16"
    seconds: float  # of the processor, in all orders


@dataclass
class Emulator:
    """How launches are executed, and what came of them.

    Args:
        architecture: ``"sm_90"``, for example.
        orders: of programs and warps; results must not depend on them.
        strict: whether a finding raises EmulationError; if not, ``records`` tell.
        inspect: is given every launch before it is executed.
    """

    architecture: str
    orders: Sequence[int] = ORDERS
    strict: bool = True
    inspect: Callable[[Launch], None] | None = None
    records: list[Record] = field(default_factory=list)

    def execute(self, launch: Launch, element_type: str) -> None:
        """Run a launch and record it."""
        if self.inspect is not None:
            self.inspect(launch)
        begin = time.process_time()
        report = launch.check(self.orders)
        seconds = time.process_time() - begin
        self.records.append(Record(report, launch.grid, launch.program.threads, element_type, seconds))
        if report.findings and self.strict:
            raise EmulationError(report.findings)


class EmulatedDriver:
    """What Triton asks of a driver."""

    def __init__(self, emulator: Emulator) -> None:
        number = int(emulator.architecture.removeprefix("sm_"))
        if number not in MAX_SHARED:
            known = ", ".join(f"sm_{arch}" for arch in MAX_SHARED)
            raise ValueError(f"the emulator knows the architectures {known}, got {emulator.architecture!r}")
        self.emulator = emulator
        self.number = number  # of the device too: Triton keeps compiled kernels per device
        self.utils = self
        self.launcher_cls = _Launcher
        self.loaded: Path | None = None

    def get_current_device(self) -> int:
        """The device kernels are compiled for."""
        return self.number

    def set_current_device(self, device: int) -> None:
        """There is only one."""

    def get_current_stream(self, device: int) -> int:
        """Launches are executed at once."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The architecture kernels are compiled for."""
        return GPUTarget("cuda", self.number, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton looks at before it loads a kernel."""
        most = MAX_SHARED[self.number]
        return {"max_shared_mem": most, "max_num_regs": 65536, "multiprocessor_count": 108, "warpSize": 32}

    def note(self, module: object, function: object, name: str, metadata_group: dict[str, str], key: str) -> None:
        """Triton's hook before it loads a binary: where the files of the kernel are."""
        self.loaded = next(Path(path) for file, path in metadata_group.items() if file.endswith(".ptx"))

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """Module, function, registers, spills, and most threads."""
        if self.loaded is None:
            raise RuntimeError(f"kernel {name} came without its PTX")
        return object(), _program(self.loaded), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        """Nothing is held."""


class _Launcher:
    """Launches one kernel under whichever emulator is active then: Triton keeps it as long as the kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.shared = metadata.shared
        self.signature: dict[str, Any] = {
            name if isinstance(name, str) else source.fn.arg_names[name[0]]: kind
            for name, kind in source.signature.items()
        }
        if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "num_ctas", 1) != 1:
            raise ValueError("the emulator has neither scratch memory nor clusters of programs")

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: Program,
        packed: Any,
        metadata: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        if not x * y * z:
            return
        if enter is not None:
            enter(metadata)
        parameters: list[int] = []
        regions: list[Region] = []
        flat = list(_flat(self.signature.items(), arguments))
        for name, kind, value in flat:
            parameters.append(_bits(name, kind, value))
            if kind.startswith("*") and value is not None and value.numel():
                regions.append(_region(name, value))
        missing = len(function.parameters) - len(parameters)  # scratch memory, of which there is none
        if not 0 <= missing <= 2:
            raise ValueError(
                f"{function.name} takes {len(function.parameters)} parameters, its launch gives {len(parameters)}"
            )
        parameters += [0] * missing
        element_type = next((kind[1:] for _, kind, _ in flat if kind.startswith("*")), "")
        launch = Launch(function, self.shared, (x, y, z), parameters, merged(regions))
        driver.active.emulator.execute(launch, element_type)
        if leave is not None:
            leave(metadata)


@functools.cache
def _program(path: Path) -> Program:
    return decode(path.read_text(encoding="utf-8"))


def _flat(signature: Any, arguments: Sequence[Any]) -> Iterator[tuple[str, str, Any]]:
    """Name, type and value of what reaches the kernel: no constants, tuples by their parts."""
    for (name, kind), value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flat([(f"{name}[{i}]", part) for i, part in enumerate(kind)], value)
        elif kind != "constexpr":
            yield name, kind, value


def _bits(name: str, kind: str, value: Any) -> int:
    if kind.startswith("*"):
        return 0 if value is None else int(value.data_ptr())
    if kind in ("fp32", "fp64"):
        whole, number = {"fp32": ("I", "f"), "fp64": ("Q", "d")}[kind]
        return int(struct.unpack(whole, struct.pack(number, value))[0])
    if kind[0] in "iu" and kind[1:].isdigit():
        return int(value)
    raise ValueError(f"argument {name} of type {kind}: the emulator takes pointers, integers, fp32 and fp64")


def _region(name: str, tensor: Any) -> Region:
    base = getattr(tensor, "base", tensor)
    if base.device.type != "cpu":
        raise ValueError(f"argument {name} lies on {base.device}, the emulator takes tensors of the CPU")
    elements = sum((n - 1) * stride for n, stride in zip(base.shape, base.stride(), strict=True)) + 1
    return Region(base.data_ptr(), elements * base.element_size(), base.element_size(), name)


@contextmanager
def emulated(architecture: str, **options: Any) -> Iterator[Emulator]:
    """Within it, launches of Triton kernels are executed for an architecture; arguments as for ``Emulator``.

    Kernels must not have been imported under Triton's interpreter.
    """
    emulator = Emulator(architecture, **options)
    own, config, knobs = EmulatedDriver(emulator), driver, triton.knobs
    before, hook = config._active, knobs.runtime.kernel_load_start_hook
    config.set_active(own)
    hook.add(own.note)
    try:
        with knobs.runtime.scope(), knobs.nvidia.scope():
            knobs.runtime.add_stages_inspection_hook = _without_assembler
            knobs.nvidia.disable_ptxas_opt = True  # what has no binary has another key in Triton's cache by this
            yield emulator
    finally:
        hook.remove(own.note)
        config._active = before


def _without_assembler(*given: Any) -> tuple[str, str] | None:
    """Triton's hook between its stages: compile no further than PTX. Newer Tritons ask for a part of the key too."""
    if not given:
        return ("emulated", "emulated")
    given[1]["cubin"] = lambda source, metadata: b""
    return None
