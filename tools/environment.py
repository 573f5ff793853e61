"""What a result was measured on."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "ttt4rec", "torch", "triton", "numpy", "transformers", "mamba-ssm", "causal-conv1d", "flash-linear-attention",
    "fla-core",
)  # fmt: skip


def environment(device: str) -> dict[str, Any]:
    """Device, driver, versions and threads; what stays the same from run to run."""
    return {
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "driver": _nvidia("driver_version") if device == "cuda" else "",
        "memory_gib": round(_memory_bytes(device) / 2**30, 1),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def cpu_name() -> str:
    """The processor's name and the number of its cores that this process may use."""
    from cpuinfo import get_cpu_info

    return f"{get_cpu_info().get('brand_raw', platform.machine())}, {os.cpu_count()} cores"


def load_average() -> float | None:
    """Processes that were ready to run during the last minute, where the system counts them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _memory_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _nvidia(field: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or "unknown"


def _commit() -> str:
    """The commit that is checked out; empty outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
