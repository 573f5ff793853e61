"""The compiled step of one token through a whole layer, which small calls want: all else costs more than they do."""

import ctypes

import torch
from torch import Tensor

from ..arguments import LayerStep
from . import build
from .calls import INTEGER, POINTER, fields, run

ALONE = 4
"""Up to so many streams one thread takes: another would come too late."""


class LayerCall(ctypes.Structure):
    """``LayerCall`` of layer_step.cpp."""

    _fields_ = (
        *fields(INTEGER, "H", "K", "record", "taps", "adapt"),
        *fields(ctypes.c_double, "eps", "norm_eps", "base_lr", "lr_scale", "max_inner_step"),
        *fields(POINTER, "cos", "sin", "token_offset", "query", "key", "value", "gate", "output"),
        *fields(POINTER, "query_conv", "query_bias", "key_conv", "key_bias", "lr_weight", "lr_bias"),
        *fields(POINTER, "gamma", "beta", "norm_weight", "norm_bias", "records", "conv", "position", "slots", "x", "y"),
    )


def layer_step(given: LayerStep) -> Tensor | None:
    """Outputs ``[B, C]``; None, and nothing has changed, if slots are not B different places of the pool."""
    H, C = given.lr_weight.shape
    library = build.library(given.inner, C // H, given.hidden, build.SCALARS[given.x.dtype])
    B, slots = given.x.shape[0], given.slots.data_ptr()
    if not library.ttt_are_places(POINTER(slots), INTEGER(B), INTEGER(given.records.shape[0])):
        return None
    query, *others = (w.data_ptr() for w in given.projections)
    backbone: tuple[int | None, ...] = (*others, None)  # key, value, gate
    convolutions: tuple[int | None, ...] = (None,) * 4
    context, taps = None, 0
    if given.context is not None:
        backbone, context, taps = (None, *others), given.context.data_ptr(), given.context.shape[1] + 1
        convolutions = tuple(w.data_ptr() for w in given.convolutions)
    y = torch.empty_like(given.x)
    parameters = (given.lr_weight, given.lr_bias, given.ln_weight, given.ln_bias, given.norm_weight, given.norm_bias)
    call = LayerCall(
        H, given.cos.shape[0], given.records.shape[2], taps, given.adapt,
        given.eps, given.norm_eps, given.base_lr, given.lr_scale, given.max_inner_step,
        given.cos.data_ptr(), given.sin.data_ptr(), given.token_offset.data_ptr(),
        query, *backbone, given.output.data_ptr(),
        *convolutions, *(p.data_ptr() for p in parameters), given.records.data_ptr(), context,
        given.position.data_ptr(), slots, given.x.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    if B > ALONE:
        run(library.ttt_layer_step, call, B)
    elif library.ttt_layer_step(ctypes.byref(call), INTEGER(0), INTEGER(B)):
        raise MemoryError("the compiled step found no memory for its tiles")
    return y
