"""The compiled step of one token."""

import ctypes

import torch
from torch import Tensor

from ..arguments import TokenStep
from . import build
from .calls import INTEGER, NORM, POINTER, TOKENS, fields, run


class StepCall(ctypes.Structure):
    """``Call`` of step.cpp."""

    _fields_ = (
        *fields(INTEGER, "H", "K", "record"),
        *fields(POINTER, "slots", "offset"),
        ("eps", ctypes.c_double),
        *fields(POINTER, *TOKENS, *NORM, "records", "o"),
    )


def token_step(step: TokenStep) -> tuple[Tensor]:
    """As ``eager.token_step``."""
    (B, H, D), slots, records, dtype = step.q.shape, step.slots, step.records, step.records.dtype
    least, most = slots.aminmax()
    if least < 0 or most >= len(records):  # a compiled program has not looked
        raise ValueError(f"slots must be from 0 to {len(records) - 1}; given {int(least)} to {int(most)}")
    o = torch.empty(B, H, D, dtype=dtype)
    given = [slots.contiguous(), step.offset.contiguous(), *(x.to(dtype).contiguous() for x in step[:7]), records, o]
    slots_at, offset_at, *pointers = (x.data_ptr() for x in given)
    sizes = (H, step.token_scale.numel(), records.shape[-1])
    call = StepCall(*sizes, slots_at, offset_at, step.eps, *pointers)
    run(build.library(step.inner, D, step.hidden, build.SCALARS[dtype], build.STEP).ttt_step, call, B * H)
    return (o.to(step.q.dtype),)
