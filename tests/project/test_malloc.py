"""The heap keeps its pages when told to."""

import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource, torch
from ttt4rec.heap import keep_freed_memory
assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told anything")
def test_freed_memory_is_used_again() -> None:
    faults = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True).stdout
    assert int(faults) < 20 * 16_384  # the pages of 64 MiB, which are asked for forty times; they settle after some
