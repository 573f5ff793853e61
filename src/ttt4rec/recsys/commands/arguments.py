"""What several commands make of their arguments."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

import torch

_MOST_THREADS = 1024  # the OpenMP library ends the process when it cannot start as many as it was told


def chosen(args: Namespace, target: type[Any]) -> dict[str, Any]:
    """The arguments that are fields of a dataclass."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(target) if hasattr(args, f.name)}


def device_of(args: Namespace) -> str:
    """The device asked for, checked; the number of threads is set on the way."""
    name: str = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads is not None:
        if not 1 <= args.threads <= _MOST_THREADS:
            raise ValueError(f"--threads must be from 1 to {_MOST_THREADS}; given {args.threads}")
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be a name such as cpu or cuda; given {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {name} is not available on this machine")
    return name
