"""What kernels cost on GPUs that need not be there: each is compiled when a test first asks for it."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from typing import IO, Any

from tools.documents import ROOT


def environment() -> dict[str, str]:
    """Of a process that compiles: under the interpreter nothing is."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@functools.cache
def _compiler() -> tuple[subprocess.Popen[str], IO[str]]:
    """A process that is given names of kernels and prints what they cost, and what it says of errors."""
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    command = [sys.executable, "-m", "tools.aot", "--json", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, text=True, bufsize=1, **pipes)
    atexit.register(process.communicate)
    return process, errors


@functools.cache
def cost_of(kernel: str) -> dict[str, Any]:
    """What ``python -m tools.aot`` says of ``op:architecture:head_dim:mini_batch_size:dtype``."""
    process, errors = _compiler()
    assert process.stdin is not None
    assert process.stdout is not None
    print(kernel, file=process.stdin)
    if not (line := process.stdout.readline()):
        process.wait()
        _compiler.cache_clear()
        errors.seek(0)
        raise AssertionError(f"{kernel}: {errors.read()[-2000:]}")
    return json.loads(line)  # type: ignore[no-any-return]
