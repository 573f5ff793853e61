"""The registry of backends, and the one place that chooses among them."""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..arguments import MAX_HEAD_DIM
from ..precision import autocast_dtype
from .transforms import transformed

Backend = Literal["auto", "reference", "eager", "native", "triton"]
PACKAGES = {"triton": "ttt4rec.kernels", "native": "ttt4rec.native", "eager": "ttt4rec.eager"}
"""What computes operators: a module with a function for each, and perhaps a ``refusal(name, arguments)``.

A backend is added by an entry here. ``"reference"`` is plain PyTorch under autograd, without operators.
"""
_log = logging.getLogger(__name__)


def check_backend(backend: str) -> None:
    """Raise ValueError unless there is a backend of that name."""
    known = dict.fromkeys((*get_args(Backend), *PACKAGES))  # others may have registered theirs
    if backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}; given {backend!r}")


def choose_backend(
    backend: Backend, x: Tensor, head_dim: int = 1, mini_batch_size: int = 1, inner: str | None = None
) -> Backend:
    """What runs: ``"auto"`` becomes the kernels, where there is a GPU and they can run, or else stays what it is.

    Within transforms and forward-mode differentiation ``"auto"`` is ``"reference"``, the only one that knows them.
    Whether it otherwise means ``"native"`` or ``"eager"`` the operators choose, where tracing does not see it.

    Args:
        backend: what was asked for.
        x: any of the inputs; its dtype and device count.
        head_dim: D.
        mini_batch_size: K.
        inner: name of the inner model that must run, its backward too where gradients are enabled; None: there is none.

    Raises:
        RuntimeError: ``"triton"`` was asked for and cannot run; it never falls back silently.
        ValueError: the backend is unknown.
    """
    check_backend(backend)
    if backend == "auto" and transformed():
        return "reference"
    if backend not in ("auto", "triton") or (backend == "auto" and not x.is_cuda):
        return backend
    traced = torch.compiler.is_compiling()
    refusal = kernel_refusal(x, head_dim, mini_batch_size)
    if refusal is None and inner is not None and not traced:
        refusal = _scan_refusal(inner, x, head_dim, mini_batch_size)
    if refusal is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend 'triton' {refusal}")
    if not traced:
        _tell(refusal)
    return "auto"


def effective_backend(
    backend: Backend, x: Tensor, head_dim: int, mini_batch_size: int, inner: str, hidden: int = 0
) -> str:
    """What computes an inner loop, by name: as ``choose_backend``, and ``"auto"`` as the operators understand it.

    On a CPU it may compile, as the first call would.

    Args:
        backend: what was asked for.
        x: whose dtype and device count.
        head_dim: D.
        mini_batch_size: K.
        inner: the inner model's name.
        hidden: F, 0 if there are no hidden features.
    """
    chosen = choose_backend(backend, x, head_dim, mini_batch_size, inner)
    if chosen != "auto":
        return chosen
    refusal = _package("native").shape_refusal(x.device, inner, head_dim, hidden, x.dtype)
    return "native" if refusal is None else "eager"


def function(name: str, backend: str, arguments: Any) -> Callable[..., Any]:
    """The function of a backend that computes an operator, or its backward.

    ``"auto"`` is ``"native"`` where that can run. What a backend does not have at all ``"eager"`` computes.

    Raises:
        RuntimeError: the backend that was asked for cannot run on these arguments; it has a ``refusal`` that says so.
    """
    for candidate in ("native" if backend == "auto" else backend, "eager"):
        package = _package(candidate)
        compute: Callable[..., Any] | None = getattr(package, name, None)
        if compute is None:
            continue
        refusal = package.refusal(name, arguments) if hasattr(package, "refusal") else None
        if refusal is None:
            return compute
        if backend == candidate:
            raise RuntimeError(f"backend {backend!r} {refusal}")
    raise RuntimeError(f"one of the backends {', '.join(PACKAGES)} must compute {name}; none does")


def shortcut(name: str, backend: str, arguments: Any) -> Any:
    """A backend's function, or forward and backward, that do at once what several operators do.

    None if it has none for these arguments.
    """
    package = _package("native" if backend == "auto" else backend)
    compute = getattr(package, name, None)
    return None if compute is None or package.refusal(name, arguments) is not None else compute


@functools.cache
def _package(backend: str) -> ModuleType:
    """Imported when it is first asked for: the kernels import triton."""
    return importlib.import_module(PACKAGES[backend])


@functools.cache
def _tell(refusal: str) -> None:
    """Once for each reason."""
    _log.warning("a slower path than the fused kernels runs on the GPU: backend 'triton' %s", refusal)


def _scan_refusal(inner: str, x: Tensor, head_dim: int, mini_batch_size: int) -> str | None:
    """Why an inner loop has no kernel for tokens like x here; None if it has, or if nothing is known of it."""
    dtype = autocast_dtype(x.dtype, x.device.type) or x.dtype
    ways = ("forward", "backward") if torch.is_grad_enabled() else ("forward",)
    found = (_package("triton").scan_refusal(f"{inner}_{way}", head_dim, mini_batch_size, dtype) for way in ways)
    return next((refusal for refusal in found if refusal is not None), None)


def kernel_refusal(x: Tensor, head_dim: int, mini_batch_size: int) -> str | None:
    """Why the fused kernels cannot run on tensors like x; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on CUDA tensors, or on others with TRITON_INTERPRET=1; given {x.device}"
    if x.dtype == torch.float64 or head_dim > MAX_HEAD_DIM:
        return (
            f"takes float32, bfloat16 and float16 and head dimensions up to {MAX_HEAD_DIM}; "
            f"given {x.dtype} and {head_dim}"
        )
    return None
