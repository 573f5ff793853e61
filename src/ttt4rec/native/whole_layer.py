"""A whole layer's forward and backward in compiled code."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import LayerForward
from ..inner_models import INNER_MODELS
from . import build
from .calls import INTEGER, POINTER, fields, run
from .inner_loop import ScanCall, rows

Results = tuple[Tensor, ...]


class AroundCall(ctypes.Structure):
    """``AroundCall`` of around.cpp."""

    _fields_ = (
        *fields(INTEGER, "H", "K", "taps", "stride"),
        *fields(POINTER, "starts", "lengths"),
        *fields(ctypes.c_double, "norm_eps", "most_rate"),
        *fields(POINTER, "cos", "sin", "lr_weight", "lr_bias", "norm_weight", "norm_bias"),
        *fields(POINTER, "query_conv", "query_bias", "key_conv", "key_bias"),
        *fields(POINTER, "x", "views", "q", "k", "lr", "o", "h", "d_lr", "d_o", "dq", "dk", "d_views"),
        *fields(POINTER, "d_norm_weight", "d_norm_bias", "d_lr_bias"),
        *fields(POINTER, "d_query_conv", "d_query_bias", "d_key_conv", "d_key_bias"),
    )


class ProductCall(ctypes.Structure):
    """``ProductCall`` of around.cpp."""

    _fields_ = (
        *fields(INTEGER, "rows", "M", "N", "row", "column", "b_stride", "c_stride"),
        *fields(POINTER, "a", "b", "c"),
    )


GROUP_OF_ROWS = 16
"""Of around.cpp: rows of a product that are a part of its work."""
CONVOLUTIONS = ("query_conv", "query_bias", "key_conv", "key_bias")


class _Tokens:
    """Where q, k and v, or their gradients, lie: in the views ``[total, 3C + H]``, or q and k, if convolved, apart.

    Attributes:
        places: addresses.
        strides: numbers between tokens.
    """

    def __init__(self, given: LayerForward, views: Tensor, apart: Tensor | None = None) -> None:
        C, width = given.x.shape[2], views.shape[1]
        first, step = views.data_ptr(), C * views.element_size()
        self.apart, self.places, self.strides = apart, [first, first + step, first + 2 * step], [width] * 3
        if given.around.convolutions:
            self.apart = apart = views.new_empty(2, views.shape[0], C) if apart is None else apart
            self.places, self.strides = [apart[0].data_ptr(), apart[1].data_ptr(), first + step], [C, C, width]


class _Around:
    """Calls of what surrounds the inner loop, for one layer and its tokens."""

    def __init__(self, given: LayerForward) -> None:
        (B, L, _), around = given.x.shape, given.around
        H, C = around.lr_weight.shape
        starts, lengths = given.starts, given.lengths
        if starts is None or lengths is None:
            starts, lengths = rows(B, L)
        self._alive, self.sequences, self._numbers = (starts, lengths), starts.shape[0], given.x.numel()
        self._library = build.library("linear", C // H, 0, build.SCALARS[given.x.dtype], build.AROUND)
        taps = around.convolutions[0].shape[1] if around.convolutions else 0
        stride = C if taps else 3 * C + H
        most = around.base_lr * around.lr_scale * H / C
        tensors = (
            around.cos, around.sin, around.lr_weight, around.lr_bias, around.norm_weight, around.norm_bias,
            *around.convolutions,
        )  # fmt: skip
        self._call = AroundCall(
            H, around.cos.shape[0], taps, stride, starts.data_ptr(), lengths.data_ptr(), around.norm_eps, most,
            *(x.data_ptr() for x in tensors),
        )  # fmt: skip

    def run(
        self, part: str, tokens: _Tokens | None = None, gradients: _Tokens | None = None, /, **tensors: Tensor
    ) -> None:
        """Call a compiled function for all sequences; tensors are contiguous, and stay known from call to call."""
        if tokens is not None:
            self._call.q, self._call.k = tokens.places[:2]
        if gradients is not None:
            self._call.dq, self._call.dk = gradients.places[:2]
        for name, x in tensors.items():
            setattr(self._call, name, x.data_ptr())
        run(getattr(self._library, part), self._call, self.sequences, self._numbers)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """a b, a ``[rows, M]`` in any order, b as wide as whole heads, out at least."""
        (rows, M), (row, column), N = a.shape, a.stride(), b.shape[1]
        strides = row, column, b.stride(0), out.stride(0)
        call = ProductCall(rows, M, N, *strides, a.data_ptr(), b.data_ptr(), out.data_ptr())
        run(self._library.ttt_product, call, -(-rows // GROUP_OF_ROWS), self._numbers)
        return out

    def scan(
        self,
        given: LayerForward,
        part: str,
        tokens: _Tokens,
        gradients: _Tokens | None,
        d_weights: Sequence[Tensor] = (),
        /,
        **tensors: Tensor,
    ) -> None:
        """Call the inner loop, which computes Z1 of TTT-MLP again; tensors by the names of its structure."""
        around, H = given.around, given.around.lr_weight.shape[0]
        model = INNER_MODELS[around.inner]
        K, D, hidden = around.token_offset.shape[0], around.ln_weight.shape[1], model.hidden(given.weights)
        starts, lengths = self._alive
        call = ScanCall(H, K, given.segment, *tokens.strides)
        if gradients is not None:
            call.dq_stride, call.dk_stride, call.dv_stride = gradients.strides
            call.dq, call.dk, call.dv = gradients.places
        call.q, call.k, call.v = tokens.places
        call.starts, call.lengths, call.eps = starts.data_ptr(), lengths.data_ptr(), around.eps
        call.gamma, call.beta = around.ln_weight.data_ptr(), around.ln_bias.data_ptr()
        call.kept[len(model.kept) - 1] = tensors.pop("kept").data_ptr()
        for name, x in tensors.items():
            setattr(call, name, x.data_ptr())
        for i, w in enumerate(given.weights):  # shared by all sequences, which their strides of zero say
            call.weights[i] = call.initial[i] = w.data_ptr()
        for i, w in enumerate(d_weights):
            call.d_weights[i] = w.data_ptr()
        library = build.library(around.inner, D, hidden, build.SCALARS[given.x.dtype], build.INNER_LOOP)
        run(getattr(library, part), call, self.sequences * H, self._numbers)

    def checkpoints(self, given: LayerForward) -> Tensor:
        """Memory for the weights before every segment that is not its sequence's first, as ``Scan.new_checkpoints``."""
        (H, C), K = given.around.lr_weight.shape, given.around.token_offset.shape[0]
        number = given.x.numel() // (C * given.segment * K)
        return given.x.new_empty(number, H, sum(w.shape[1:].numel() for w in given.weights))


def layer_forward(given: LayerForward) -> tuple[Results, Results]:
    """Outputs ``[B, L, C]``, and what the backward needs."""
    around = _Around(given)
    between, kept = inside_forward(given, around=around)
    outputs, _ = outside_forward(given, *between, around=around)
    return outputs, (between[0], *kept)


def layer_backward(given: LayerForward, _: Results, kept: Results, grads: Results) -> Results:
    """Gradients of what the two parts give them, without what lies between them; first of what stands behind."""
    o, *inside = kept
    between = (o, inside[0]) if given.around.convolutions else (o,)
    around = _Around(given)
    d_output, d_weight, d_bias, *d_between = outside_backward(given, between, (), grads, around)
    return d_output, d_weight, d_bias, *inside_backward(given, (), tuple(inside), tuple(d_between), around)


def inside_forward(given: LayerForward, *, around: _Around | None = None) -> tuple[Results, Results]:
    """The inner loop's outputs ``[total, C]`` and, if there is a gate, the views of x; what the backward needs."""
    x, layer = given.x.flatten(0, 1), given.around
    around, C, scale = around or _Around(given), x.shape[1], _token_scale(layer.token_offset)
    weights = torch.cat(layer.projections).t().contiguous()
    views = around.product(x, weights, x.new_empty(x.shape[0], 3 * C + layer.lr_weight.shape[0]))
    tokens, lr = _Tokens(given, views), x.new_empty(x.shape[0], layer.lr_weight.shape[0])
    around.run("ttt_before", tokens, x=x, views=views, lr=lr)
    o, inner = torch.empty_like(x), torch.empty_like(x)
    checkpoints = around.checkpoints(given)
    decays = _log_decay(given, x)
    around.scan(
        given, "ttt_forward", tokens, None, lr=lr, scale=scale, kept=inner, checkpoints=checkpoints, o=o, **decays
    )
    kept = views, lr, scale, inner, checkpoints, *decays.values()
    return (o, views) if layer.convolutions else (o,), kept


def inside_backward(
    given: LayerForward, between: Results, kept: Results, grads: Results, around: _Around | None = None
) -> Results:
    """Gradients of w_lr, b_lr, τ, γ, β, x, the projections, the convolutions', what is forgotten's, the weights.

    The views' gradients, if they come, are completed where they are, and x's take the memory of o's.
    """
    assert not between
    (views, lr, scale, inner, checkpoints, *decays), (d_o, *d_gate) = kept, grads
    around, layer, x = around or _Around(given), given.around, given.x.flatten(0, 1)
    (H, C), N, K = layer.lr_weight.shape, around.sequences, scale.shape[0]
    d_views = d_gate[0] if d_gate else torch.empty_like(views)
    tokens, d_lr = _Tokens(given, views), torch.empty_like(lr)
    if layer.convolutions:  # q and k once more; a mini-batch's are read before its gradients take their place
        lr = torch.empty_like(lr)
        around.run("ttt_before", tokens, x=x, views=views, lr=lr)
    d_tokens = _Tokens(given, d_views, tokens.apart)
    d_scale, d_gamma, d_beta = (x.new_zeros(N, H, width) for width in (K, C // H, C // H))
    d_weights = [w.new_empty(N, *w.shape) for w in given.weights]
    d_decays = {"log_decay": decays[0], "d_log_decay": torch.zeros_like(lr)} if decays else {}
    around.scan(
        given, "ttt_backward", tokens, d_tokens, d_weights, lr=lr, scale=scale, kept=inner,
        checkpoints=checkpoints, grad_o=d_o, d_lr=d_lr, d_scale=d_scale, d_gamma=d_gamma, d_beta=d_beta, **d_decays,
    )  # fmt: skip
    # What every sequence adds to the gradients of parameters.
    sizes = {"d_lr_bias": H} | {
        f"d_{name}": w.numel() for name, w in zip(CONVOLUTIONS, layer.convolutions, strict=False)
    }
    sums = {name: x.new_zeros(N, size) for name, size in sizes.items()}
    around.run("ttt_back_before", None, d_tokens, views=views, d_views=d_views, lr=lr, d_lr=d_lr, **sums)
    *d_projections, d_lr_weight = around.product(d_views.t(), x, x.new_empty(3 * C + H, C)).split([C, C, C, H])
    d_lr_bias, *d_convolutions = map(_total, sums.values())
    for i in range(0, len(d_convolutions), 2):  # summed as [taps, C]
        d_convolutions[i] = d_convolutions[i].view(-1, C).t()
    weights = torch.cat((*layer.projections, layer.lr_weight))
    d_x = around.product(d_views, weights, d_o)
    d_forgetting = _log_decay_backward(given, x, d_x, **d_decays)
    return (
        d_lr_weight, d_lr_bias, d_scale.sum((0, 1)).mul_(scale > 0), _total(d_gamma), _total(d_beta),
        d_x.view(given.x.shape), *d_projections, *d_convolutions, *d_forgetting, *map(_total, d_weights),
    )  # fmt: skip


def outside_forward(
    given: LayerForward, o: Tensor, *views: Tensor, around: _Around | None = None
) -> tuple[Results, Results]:
    """The layer's outputs ``[B, L, C]``; nothing is kept."""
    around, h = around or _Around(given), torch.empty_like(o)
    around.run("ttt_after", o=o, h=h, **dict(zip(("views",), views, strict=False)))
    y = around.product(h, given.around.output.t().contiguous(), torch.empty_like(o))
    return (y.view(given.x.shape),), ()


def outside_backward(
    given: LayerForward, between: Results, _: Results, grads: Results, around: _Around | None = None
) -> Results:
    """Gradients of the output and the norm's, of o, and of the views, in which the gate's alone is there."""
    (o, *views), around, output = between, around or _Around(given), given.around.output
    dy = grads[0].contiguous().flatten(0, 1)
    sums = {name: o.new_zeros(around.sequences, o.shape[1]) for name in ("d_norm_weight", "d_norm_bias")}
    gate = {"views": views[0], "d_views": torch.empty_like(views[0])} if views else {}
    d_o, h = around.product(dy, output, torch.empty_like(o)), torch.empty_like(o)
    around.run("ttt_back_after", o=o, h=h, d_o=d_o, **gate, **sums)
    d_views = (gate["d_views"],) if views else ()
    d_output = around.product(dy.t(), h, torch.empty_like(output))
    return d_output, *map(_total, sums.values()), d_o, *d_views


layer_passes = layer_forward, layer_backward
inside_passes = inside_forward, inside_backward
outside_passes = outside_forward, outside_backward


def _log_decay(given: LayerForward, x: Tensor) -> dict[str, Tensor]:
    """``log_decay`` ``[total, H]``, as ``layers.forgetting`` has it; nothing for a layer that does not forget."""
    if not given.forgetting:
        return {}
    bias, *weights = given.forgetting
    logits = torch.addmm(bias, x, weights[0].t()) if weights else bias.expand(x.shape[0], -1)
    return {"log_decay": F.logsigmoid(-logits)}


def _log_decay_backward(given: LayerForward, x: Tensor, d_x: Tensor, **decays: Tensor) -> list[Tensor]:
    """Gradients of the gate's parameters; to x's, ``[total, C]``, its own part is added."""
    if not decays:
        return []
    d_logits = decays["d_log_decay"].mul_(decays["log_decay"].expm1())
    d_forgetting = [d_logits.sum(0)]
    for weight in given.forgetting[1:]:
        d_forgetting.append(d_logits.t() @ x)
        d_x.addmm_(d_logits, weight)
    return d_forgetting


def _total(of_sequences: Tensor) -> Tensor:
    return of_sequences[0] if of_sequences.shape[0] == 1 else of_sequences.sum(0)


def _token_scale(offset: Tensor) -> Tensor:
    """s, (31) of docs/mathematics.md."""
    return (_reciprocals(offset.shape[0], offset.dtype) + offset).clamp_min_(0)


@functools.lru_cache(maxsize=32)
def _reciprocals(count: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(1, count + 1, dtype=dtype).reciprocal_()
