"""The full softmax, with compiled code for the softmax of a block of scores."""

import ctypes
import functools

import torch
from torch import Tensor

from .. import item_blocks
from ..arguments import FullSoftmax
from . import build
from .cache import BuildError
from .threads import share

SHAPE = (
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
        build.library(*SHAPE)
    except BuildError as error:
        return build.refusal(error)
    return None


def full_softmax_nll(given: FullSoftmax) -> tuple[Tensor, ...]:
    """As ``eager.full_softmax_nll``."""
    return item_blocks.nll(given, log_sum_exp)


def full_softmax_nll_backward(
    given: FullSoftmax, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of h and table."""
    return item_blocks.nll_backward(given, kept[0], grads[0], to_gradient)


def full_softmax_total_nll(given: FullSoftmax) -> tuple[Tensor, ...]:
    """As ``eager.full_softmax_total_nll``."""
    return item_blocks.total_nll(given, log_sum_exp, to_gradient)


full_softmax_total_nll_backward = item_blocks.total_nll_backward


def log_sum_exp(scores: Tensor) -> Tensor:
    """log Σ exp of every row of a block, as ``item_blocks.LogSumExp``."""
    lse = torch.empty(len(scores), dtype=torch.float64)
    _run("softmax_forward", scores, lse)
    return lse


def to_gradient(scores: Tensor, lse: Tensor, column: Tensor, grad: Tensor) -> None:
    """As ``item_blocks.ToGradient``; columns of scores stand one behind the other."""
    _run("softmax_backward", scores, lse, column.contiguous(), grad.contiguous())


def _run(function: str, scores: Tensor, *others: Tensor) -> None:
    call = _Call(scores.shape[1], scores.stride(0), *(x.data_ptr() for x in (scores, *others)))
    compiled = getattr(build.library(*SHAPE), function)
    share(lambda begin, end: compiled(ctypes.byref(call), ctypes.c_int64(begin), ctypes.c_int64(end)), len(scores))
