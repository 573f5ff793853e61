"""The compiled step of one token."""

import ctypes

import torch
from torch import Tensor

from ..arguments import TokenStep
from . import build
from .calls import INTEGER, NORM, POINTER, TOKENS, fields, run


class DecayCall(ctypes.Structure):
    """``DecayCall`` of step.h."""

    _fields_ = (*fields(POINTER, "log_decay"), ("initial", POINTER * 4), ("strides", INTEGER * 4))


class StepCall(ctypes.Structure):
    """``StepCall`` of step.h."""

    _fields_ = (
        *fields(INTEGER, "H", "K", "record"),
        *fields(POINTER, "slots", "offset"),
        ("eps", ctypes.c_double),
        *fields(POINTER, *TOKENS, *NORM, "records", "o"),
        ("decay", DecayCall),
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
    decay, _alive = _decay(step)
    call = StepCall(*sizes, slots_at, offset_at, step.eps, *pointers, decay)
    run(build.library(step.inner, D, step.hidden, build.SCALARS[dtype], build.STEP).ttt_step, call, B * H)
    return (o.to(step.q.dtype),)


forgetting_token_step = token_step


def _decay(step: TokenStep) -> tuple[DecayCall, tuple[Tensor, ...]]:
    """What a step is told of the decays, and the tensors that it points into."""
    if step.log_decay is None or step.initial is None:
        return DecayCall(), ()
    dtype = step.records.dtype
    log_decay, initial = step.log_decay.to(dtype).contiguous(), step.initial.to(dtype).contiguous()
    # W and b of a layer lie side by side, as in a record.
    ends = [end for layer in step.record.weight_parts(initial) for end in (layer[0], layer[0, -1])]
    strides = (INTEGER * 4)(*[initial.shape[1]] * len(ends))
    return DecayCall(log_decay.data_ptr(), (POINTER * 4)(*(x.data_ptr() for x in ends)), strides), (log_decay, initial)
