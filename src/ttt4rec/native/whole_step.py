"""The compiled step of one token through a whole layer or model: small calls want it, all else costs them more."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..arguments import BlockParts, LayerParts, ModelParts, NormParts, Step
from . import build
from .calls import INTEGER, POINTER, fields
from .threads import share

ALONE = 4 << 20
"""The most multiply-adds, a third of a millisecond, that one thread takes alone: others come late and cost it time."""


class LayerCall(ctypes.Structure):
    """``LayerCall`` of layer_step.h."""

    _fields_ = (
        *fields(INTEGER, "H", "K", "record", "taps", "adapt"),
        *fields(ctypes.c_double, "eps", "norm_eps", "base_lr", "lr_scale", "max_inner_step"),
        *fields(POINTER, "cos", "sin", "token_offset", "query", "key", "value", "gate", "output"),
        *fields(POINTER, "query_conv", "query_bias", "key_conv", "key_bias", "lr_weight", "lr_bias"),
        *fields(POINTER, "gamma", "beta", "norm_weight", "norm_bias", "records", "conv", "position"),
        *fields(POINTER, "forget_bias", "forget_weight"),
        ("initial", POINTER * 4),
    )


class NormCall(ctypes.Structure):
    """``NormCall`` of whole_step.cpp, as the following are theirs there."""

    _fields_ = (*fields(POINTER, "weight", "bias"), ("eps", ctypes.c_double))


class BlockCall(ctypes.Structure):
    """Of a block."""

    _fields_ = (
        ("layer", LayerCall),
        *fields(INTEGER, "taps", "ffn_width", "gelu"),
        *fields(NormCall, "conv_norm", "mixer_norm", "ffn_norm"),
        *fields(POINTER, "conv_weight", "conv_bias", "gate", "up", "up_bias", "down", "down_bias", "conv"),
    )


class ModelCall(ctypes.Structure):
    """Of a model."""

    _fields_ = (
        ("num_blocks", INTEGER),
        ("blocks", ctypes.POINTER(BlockCall)),
        *fields(NormCall, "embedding_norm", "norm"),
        ("table", POINTER),
    )


class _LayerStep:
    """See ``layer_step``; it keeps the tables that its call points into, which nobody else does for sure."""

    def __init__(self, given: LayerParts) -> None:
        self._library, self._call, self._num_slots = _library(given), _layer(given), given.position.shape[0]
        self._work, self._tables = _work(given), (given.around.cos, given.around.sin)

    def __call__(self, x: Tensor, slots: Tensor) -> Tensor | None:
        if not _are_places(self._library, slots, self._num_slots):
            return None
        y = torch.empty_like(x)
        _run(self._library.ttt_layer_step, self._call, slots, x, y, self._work)
        return y


class _ModelStep:
    """See ``model_step``; it keeps the tables, as a layer's step does."""

    def __init__(self, given: ModelParts) -> None:
        blocks = given.blocks
        layer, (self._rows, self._width), self._dtype = blocks[0].layer, given.table.shape, given.table.dtype
        self._library, self._num_slots = _library(layer), layer.position.shape[0]
        calls = (BlockCall * len(blocks))(*map(_block, blocks))
        norms = _norm(given.embedding_norm), _norm(given.norm)
        self._call = ModelCall(len(blocks), calls, *norms, given.table.data_ptr())
        self._tables = [(block.layer.around.cos, block.layer.around.sin) for block in blocks]
        self._work = sum(_work(block.layer) + 3 * block.up[0].numel() for block in blocks)

    def __call__(self, ids: Tensor, slots: Tensor, rows: Tensor | None = None) -> Tensor | None:
        library = self._library
        if not _are_within(library, ids, 1, self._rows - 1) or not _are_places(library, slots, self._num_slots):
            return None
        y = torch.empty(ids.shape[0], self._width, dtype=self._dtype, device="cpu")
        if rows is None:
            call = self._call
        else:  # they are a table whose rows are taken in their order
            call, ids = ModelCall.from_buffer_copy(self._call), torch.arange(ids.shape[0])
            call.table = rows.data_ptr()
        _run(library.ttt_model_step, call, slots, ids, y, self._work)
        return y


def layer_step(given: LayerParts) -> Step:
    """Of inputs ``[B, C]`` and slots: outputs; None, and nothing has changed, if slots are not B different places."""
    return _LayerStep(given)


def model_step(given: ModelParts) -> Step:
    """Of ids and slots: hidden states ``[B, C]``; None, and nothing has changed, if one of them is wrong.

    Rows ``[B, C]``, contiguous and of the table's dtype, are read instead of the table's, if they are given as well.
    """
    return _ModelStep(given)


def _library(layer: LayerParts) -> ctypes.CDLL:
    around, dtype = layer.around, layer.records.dtype
    H, C = around.lr_weight.shape
    return build.library(around.inner, C // H, layer.hidden, build.SCALARS[dtype], build.STEP)


def _are_places(library: ctypes.CDLL, slots: Tensor, num_slots: int) -> bool:
    if not _are_within(library, slots, 0, num_slots - 1):
        return False
    return slots.shape[0] == 1 or bool(library.ttt_are_different(_at(slots), INTEGER(slots.shape[0])))


def _are_within(library: ctypes.CDLL, numbers: Tensor, least: int, most: int) -> bool:
    return bool(library.ttt_are_within(_at(numbers), INTEGER(numbers.shape[0]), INTEGER(least), INTEGER(most)))


def _layer(given: LayerParts) -> LayerCall:
    around = given.around
    query, *others = (w.data_ptr() for w in around.projections)
    backbone: tuple[int | None, ...] = (*others, None)  # key, value, gate
    convolutions: tuple[int | None, ...] = (None,) * 4
    context, taps = None, 0
    if given.context is not None:
        backbone, context, taps = (None, *others), given.context.data_ptr(), given.context.shape[1] + 1
        convolutions = tuple(w.data_ptr() for w in around.convolutions)
    parameters = (
        around.lr_weight,
        around.lr_bias,
        around.ln_weight,
        around.ln_bias,
        around.norm_weight,
        around.norm_bias,
    )
    return LayerCall(
        around.lr_weight.shape[0], around.cos.shape[0], given.records.shape[2], taps, given.adapt,
        around.eps, around.norm_eps, around.base_lr, around.lr_scale, given.max_inner_step,
        around.cos.data_ptr(), around.sin.data_ptr(), around.token_offset.data_ptr(),
        query, *backbone, around.output.data_ptr(), *convolutions, *(p.data_ptr() for p in parameters),
        given.records.data_ptr(), context, given.position.data_ptr(), *_forget(given),
    )  # fmt: skip


def _forget(given: LayerParts) -> tuple[Any, ...]:
    if given.forget is None:
        return ()
    bias, weight, initial = given.forget
    return bias.data_ptr(), _maybe(weight), (POINTER * 4)(*(w.data_ptr() for w in initial))


def _norm(given: NormParts) -> NormCall:
    return NormCall(given.weight.data_ptr(), _maybe(given.bias), given.eps)


def _block(given: BlockParts) -> BlockCall:
    taps, norm = 0, NormCall()
    conv: tuple[int | None, ...] = (None,) * 3
    if given.conv is not None:
        parts, *tensors = given.conv
        taps, norm, conv = tensors[0].shape[1], _norm(parts), tuple(map(_maybe, tensors))
    weight, bias, context = conv
    dense = (given.gate, *given.up, *given.down)
    return BlockCall(
        _layer(given.layer), taps, given.up[0].shape[0], given.gate is None,
        norm, _norm(given.mixer_norm), _norm(given.ffn_norm), weight, bias, *map(_maybe, dense), context,
    )  # fmt: skip


def _maybe(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _at(x: Tensor) -> ctypes.c_void_p:
    return POINTER(x.data_ptr())


def _work(layer: LayerParts) -> int:
    """Multiply-adds of a stream: of the four maps, and about three for each number of its record."""
    return 4 * layer.around.output.numel() + 3 * layer.records[0].numel()


def _run(
    compiled: Callable[..., int], call: ctypes.Structure, slots: Tensor, given: Tensor, y: Tensor, work: int
) -> None:
    where: tuple[Any, ...] = (ctypes.byref(call), _at(slots), _at(given), _at(y))
    if work * y.shape[0] > ALONE:
        share(lambda begin, end: compiled(*where, INTEGER(begin), INTEGER(end)), y.shape[0])
    elif compiled(*where, INTEGER(0), INTEGER(y.shape[0])):
        raise MemoryError("the compiled step found no memory for its tiles")
