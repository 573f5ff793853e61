"""The compiled softmax over a block of scores."""

import ctypes
import functools

import torch
from torch import Tensor

from . import build
from .cache import BuildError
from .threads import share

_SHAPE = (
    "linear",
    16,
    0,
    "float",
    build.SOFTMAX,
)  # of an inner model only in name: so many lanes has any vector of float32


class _Call(ctypes.Structure):
    """``Call`` of full_softmax.cpp."""

    _fields_ = (
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("scores", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("column", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
    )


@functools.cache
def softmax_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why scores like these are not for this path; None if they are. The first call compiles it."""
    if device.type != "cpu" or dtype != torch.float32:
        return f"takes float32 on a CPU; given {dtype} on {device}"
    try:
        build.library(*_SHAPE)
    except BuildError as error:
        return build.refusal(error)
    return None


def log_sum_exp(scores: Tensor) -> Tensor:
    """log Σ exp of every row of scores ``[N, c]``, float64 ``[N]``."""
    lse = torch.empty(len(scores), dtype=torch.float64)
    _run("softmax_forward", scores, lse)
    return lse


def softmax_gradient(scores: Tensor, lse: Tensor, column: Tensor, grad: Tensor) -> None:
    """Put grad ∘ (exp(scores - lse) - one_hot(column)) in the place of the scores.

    Args:
        scores: ``[N, c]``, columns one behind the other.
        lse: float64 ``[N]``, of whole rows, of which scores may be a part.
        column: int64 ``[N]``, of the target; it need not be among these columns.
        grad: float32 ``[N]``.
    """
    _run("softmax_backward", scores, lse, column.contiguous(), grad.contiguous())


def _run(function: str, scores: Tensor, *others: Tensor) -> None:
    call = _Call(scores.shape[1], scores.stride(0), *(x.data_ptr() for x in (scores, *others)))
    compiled = getattr(build.library(*_SHAPE), function)
    share(lambda begin, end: compiled(ctypes.byref(call), ctypes.c_int64(begin), ctypes.c_int64(end)), len(scores))
