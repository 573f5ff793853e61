"""A model's step in one call of compiled code, where nothing would see its parts; see ``layers.step_at_once``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import BlockParts, ModelParts, NormParts, Step
from ..layers.convolution import CausalConv
from ..layers.pool import StatePool
from ..layers.standing import prepared
from ..layers.step_at_once import are_rows, fit, is_like, layer_parts, patched, unobserved
from ..layers.ttt import TTTLayer
from ..operators.backends import shortcut
from .blocks import Block, BlockPool, GELUFeedForward, SwiGLU
from .event_times import check_times

LANES = 16
"""The compiled feed-forward network takes hidden widths that are multiples of this."""


@torch.no_grad()
def step_at_once(
    model: Any, ids: Tensor, pools: Sequence[BlockPool], slots: Tensor, gaps: Tensor | None = None
) -> Tensor | None:
    """As ``TTT4Rec.step``; None, and nothing has changed, if the parts must do it, or refuse it."""
    if not unobserved() or not are_rows(ids, slots) or ids.dim() != 1 or ids.dtype is not torch.int64 or not pools:
        return None
    if not all(isinstance(pool.mixer, StatePool) for pool in pools):  # other mixers' own
        return None
    if (model.event_times is None) != (gaps is None):
        return None
    tensors = [x for pool in pools for x in (*pool.mixer.tensors, pool.conv)]
    if model.features is not None:
        if model.features.training and model.features.id_dropout:
            return None
        tensors.append(model.served_items())  # the same one as long as nothing changes that it is made of
    found = prepared(pools[0].mixer, model, tensors, lambda _: _prepare(model, pools))
    if found is None:
        return None
    if gaps is None:
        return found[0](ids.contiguous(), slots.contiguous())
    check_times("gaps", gaps, model.config.times, True, tuple(ids.shape))
    rows = model.event_times.read(model.item_rows(ids), gaps)
    return found[0](ids.contiguous(), slots.contiguous(), rows)


def _prepare(model: Any, pools: Sequence[BlockPool]) -> Step | None:
    modules = model._modules
    if patched(model):
        return None
    embedding, dropout, blocks = modules["embedding"], modules["dropout"], [*modules["blocks"]._modules.values()]
    if (dropout.training and dropout.p > 0) or not is_like(dropout, nn.Dropout) or model.hidden_item is not None:
        return None
    if not is_like(embedding, nn.Embedding) or embedding.max_norm is not None or len(pools) != len(blocks):
        return None
    if len({pool.mixer.num_slots for pool in pools}) != 1:
        return None
    parts = [_block(block, pool) for block, pool in zip(blocks, pools, strict=True)]
    embedding_norm, final_norm = _norm(modules["embedding_norm"]), _norm(modules["norm"])
    if embedding_norm is None or final_norm is None:
        return None
    whole = tuple(part for part in parts if part is not None)
    table = embedding._parameters["weight"] if model.features is None else model.served_items()
    dtype, C = pools[0].mixer.records.dtype, model.config.width
    tensors: list[tuple[Any, tuple[int, ...]]] = [(table, (table.shape[0], C))]
    tensors += _there(*((x, (C,)) for norm in (embedding_norm, final_norm) for x in norm[:2]))
    if len(whole) < len(parts) or not fit(dtype, *zip(*tensors, strict=True)):
        return None
    kinds = {(part.layer.around.inner, part.layer.hidden, part.layer.around.lr_weight.shape) for part in whole}
    if len(kinds) > 1 or whole[0].layer.around.lr_weight.shape[1] != C:  # code is compiled for one kind of head
        return None
    given = ModelParts(table, embedding_norm, whole, final_norm)
    backend, *others = {block._modules["mixer"].backend for block in blocks}
    if others or backend == "reference":
        return None
    compute = shortcut("model_step", backend, given)
    return None if compute is None else compute(given)


def _block(block: Any, pool: BlockPool) -> BlockParts | None:
    """What a block has, as it is now; None if something was done to a part of it."""
    modules = block._modules
    mixer = modules["mixer"]
    if type(block) is not Block or type(mixer) is not TTTLayer or patched(block):
        return None
    if block.ffn is None or block.ffn_norm is None or block.mixer_gate is not None or block.ffn_gate is not None:
        return None
    layer, mixer_norm, ffn_norm = (
        layer_parts(mixer, pool.mixer),
        _norm(modules["mixer_norm"]),
        _norm(modules["ffn_norm"]),
    )
    ffn, conv = _feed_forward(modules["ffn"]), _convolution(block, pool)
    if layer is None or mixer_norm is None or ffn_norm is None or ffn is None or (conv is None and block.has_conv):
        return None
    gate, up, down = ffn
    C, hidden = layer.around.output.shape[0], up[0].shape[0]
    tensors: list[tuple[Any, tuple[int, ...]]] = [(up[0], (hidden, C)), (down[0], (C, hidden))]
    tensors += _there((gate, (hidden, C)), (up[1], (hidden,)), (down[1], (C,)))
    for norm in (mixer_norm, ffn_norm, *([] if conv is None else conv[:1])):
        tensors += _there((norm.weight, (C,)), (norm.bias, (C,)))
    if conv is not None:
        taps = conv[1].shape[-1]
        tensors += [(conv[1], (C, taps)), (conv[2], (C,)), (conv[3], (pool.mixer.num_slots, taps - 1, C))]
    if hidden % LANES or not fit(layer.records.dtype, *zip(*tensors, strict=True)):
        return None
    return BlockParts(layer, mixer_norm, ffn_norm, gate, up, down, conv)


def _there(*tensors: tuple[Any, tuple[int, ...]]) -> list[tuple[Any, tuple[int, ...]]]:
    """Tensors that are not None, with their shapes."""
    return [(x, shape) for x, shape in tensors if x is not None]


Linear = tuple[Tensor, Tensor | None]


def _feed_forward(ffn: Any) -> tuple[Tensor | None, Linear, Linear] | None:
    """The gate's weight, and weights and biases of up and down."""
    gated, modules = is_like(ffn, SwiGLU), ffn._modules
    linears = [modules.get(name) for name in (("up", "down", "gate") if gated else ("up", "down"))]
    if not (gated or is_like(ffn, GELUFeedForward)) or not all(is_like(x, nn.Linear) for x in linears):
        return None
    up, down, *gate = ((x._parameters["weight"], x._parameters["bias"]) for x in linears)
    if gated and gate[0][1] is not None:
        return None
    return gate[0][0] if gated else None, up, down


def _convolution(block: Any, pool: BlockPool) -> tuple[NormParts, Tensor, Tensor, Tensor] | None:
    """The norm before a block's own convolution, its weight and bias, and the streams' contexts."""
    if not block.has_conv or pool.conv is None or type(block.conv) is not CausalConv:
        return None
    norm = _norm(block.conv_norm)
    weight, bias = (block.conv._parameters.get(name) for name in ("weight", "bias"))
    return None if norm is None or weight is None or bias is None else (norm, weight, bias, pool.conv)


def _norm(module: Any) -> NormParts | None:
    parameters = module._parameters
    weight, bias, eps = parameters.get("weight"), parameters.get("bias"), getattr(module, "eps", None)
    whole = is_like(module, nn.RMSNorm) or (bias is not None and is_like(module, nn.LayerNorm))
    return NormParts(weight, bias, eps) if whole and weight is not None and eps is not None else None
