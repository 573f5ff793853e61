"""A whole layer's forward and backward in compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import WholeLayer
from . import build, threads
from .calls import INTEGER, POINTER, fields
from .inner_loop import rows

Results = tuple[Tensor, ...]
Spans = tuple[Tensor, Tensor] | None
"""First token and length of each sequence in the flattened tokens, int64 ``[N]``; None: every row is one."""
_Tensors = POINTER * 21  # ``Tensors`` of pass.cpp


class PassCall(ctypes.Structure):
    """``PassCall`` of pass.cpp."""

    _fields_ = (
        *fields(INTEGER, "H", "K", "taps", "hidden", "gates", "segment"),
        *fields(ctypes.c_double, "most_rate", "norm_eps", "eps"),
        *fields(POINTER, "forward", "backward", "cos", "sin"),
        *fields(INTEGER, "N", "total", "back"),
        *fields(POINTER, "starts", "lengths"),
        *fields(_Tensors, "given", "gradients"),
        *fields(POINTER, "x", "views", "o", "y", "kept", "dy", "d_views", "d_o", "inside", "outside"),
    )


class ProductCall(ctypes.Structure):
    """``ProductCall`` of pass.cpp."""

    _fields_ = (
        *fields(INTEGER, "rows", "M", "N", "row", "column", "b_stride", "c_stride"),
        *fields(POINTER, "a", "b", "c"),
    )


class _Phases(NamedTuple):
    """Phases of pass.cpp, and which memory they need."""

    first: int
    end: int
    inside: bool
    outside: bool


GROUP_OF_ROWS = 16
"""Of pass.cpp: rows of a product that are a unit of work."""
_FORWARD, _BACKWARD = _Phases(0, 7, True, True), _Phases(7, 17, True, True)
_INSIDE, _BACK_INSIDE = _Phases(0, 4, True, False), _Phases(11, 17, True, False)
_OUTSIDE, _BACK_OUTSIDE = _Phases(4, 7, False, True), _Phases(7, 11, False, True)
_NONE: tuple[int | None, ...] = (None,) * 4
_BEHIND = 3  # of a layer's tensors how many, the first, belong to what is behind the inner loop


class LayerPasses:
    """A layer's passes: of the whole, or of what is up to the inner loop, inside, and of what is behind, outside.

    Of what they were made from only shapes and options stay, and the tables of rotations. Each pass is given its
    parameters, in the order of ``WholeLayer.tensors``, except outside the input; what another part gave it;
    and where the sequences are. Forwards return outputs and what is kept. Backwards are given that too, and gradients
    of the outputs, and return gradients of the tensors that were given. All are contiguous.
    """

    def __init__(self, given: WholeLayer) -> None:
        around, forgetting = given.around, given.forgetting
        (H, C), K, convolutions = around.lr_weight.shape, around.token_offset.shape[0], around.convolutions
        dtype = build.SCALARS[around.cos.dtype]
        self._library = build.library("linear", C // H, 0, dtype, build.PASS)
        inner_loop = build.library(around.inner, C // H, given.hidden, dtype, build.INNER_LOOP)
        self._counts, self._tables = (len(convolutions), len(forgetting)), (around.cos, around.sin)
        gates = H * len(forgetting[1:])
        self._width = 3 * C + H + gates
        self._call = PassCall(
            H, K, convolutions[0].shape[1] if convolutions else 0, given.hidden, gates, given.segment,
            around.base_lr * around.lr_scale * H / C, around.norm_eps, around.eps,
            *(ctypes.cast(compiled, POINTER).value for compiled in (inner_loop.ttt_forward, inner_loop.ttt_backward)),
            around.cos.data_ptr(), around.sin.data_ptr(),
        )  # fmt: skip

    def forward(self, given: Results, _: Results, spans: Spans) -> tuple[Results, Results]:
        """The layer's outputs ``[B, L, C]``."""
        *parameters, x = given
        work = self._prepare(x, spans, parameters)
        o, y, views, kept = torch.empty_like(x), torch.empty_like(x), self._views(x), x.new_empty(work.kept)
        work.run(_FORWARD, x=x, o=o, y=y, views=views, kept=kept)
        return (y,), (o, views, kept)

    def backward(self, given: Results, _: Results, spans: Spans, saved: Results, grads: Results) -> Results:
        """Gradients of all."""
        (*parameters, x), (o, views, kept) = given, saved
        work, gradients = self._prepare(x, spans, parameters, back=True), [*map(torch.empty_like, given)]
        work.call.gradients = self._places(gradients[:-1])
        dy, d_views = grads[0], torch.empty_like(views)
        work.run(_BACKWARD, x=x, o=o, views=views, kept=kept, dy=dy, d_views=d_views, d_o=gradients[-1])
        return tuple(gradients)

    def inside_forward(self, given: Results, _: Results, spans: Spans) -> tuple[Results, Results]:
        """The inner loop's outputs ``[B, L, C]`` and, if there is a gate, the views of x."""
        *parameters, x = given
        work, o, views = self._prepare(x, spans, parameters, skipped=_BEHIND), torch.empty_like(x), self._views(x)
        kept = x.new_empty(work.kept)
        work.run(_INSIDE, x=x, o=o, views=views, kept=kept)
        return (o, views) if self._counts[0] else (o,), (views, kept)

    def inside_backward(self, given: Results, _: Results, spans: Spans, saved: Results, grads: Results) -> Results:
        """Gradients of the views, if they come, are completed where they are; x's take the memory of o's."""
        (*parameters, x), (views, kept), (d_o, *d_gate) = given, saved, grads
        work = self._prepare(x, spans, parameters, skipped=_BEHIND, back=True)
        gradients, d_views = [*map(torch.empty_like, parameters)], d_gate[0] if d_gate else torch.empty_like(views)
        work.call.gradients = self._places(gradients, _BEHIND)
        work.run(_BACK_INSIDE, x=x, views=views, kept=kept, d_views=d_views, d_o=d_o)
        return *gradients, d_o

    def outside_forward(self, given: Results, between: Results, spans: Spans) -> tuple[Results, Results]:
        """The layer's outputs ``[B, L, C]``; nothing is kept."""
        o = between[0]
        work, y = self._prepare(o, spans, given), torch.empty_like(o)
        work.run(_OUTSIDE, y=y, **dict(zip(("o", "views"), between, strict=False)))
        return (y,), ()

    def outside_backward(self, given: Results, between: Results, spans: Spans, _: Results, grads: Results) -> Results:
        """Gradients of the views, in which the gate's alone is there, come last."""
        # anomaly detection looks at all numbers of a gradient
        new = torch.zeros_like if torch.is_anomaly_enabled() else torch.empty_like
        o, dy, d_between = between[0], grads[0], [*map(new, between)]
        work, gradients = self._prepare(o, spans, given, back=True), [*map(torch.empty_like, given)]
        work.call.gradients = self._places(gradients)
        named = zip(("o", "views"), between, strict=False), zip(("d_o", "d_views"), d_between, strict=False)
        work.run(_BACK_OUTSIDE, dy=dy, **dict(chain(*named)))
        return *gradients, *d_between

    def _views(self, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:2], self._width)

    def _prepare(
        self, x: Tensor, spans: Spans, parameters: Sequence[Tensor], *, skipped: int = 0, back: bool = False
    ) -> _Work:
        """For tokens that lie as x does, and parameters of which the first may be skipped."""
        call, (B, L, _) = PassCall.from_buffer_copy(self._call), x.shape
        starts, lengths = rows(B, L) if spans is None else spans
        call.N, call.total, call.back = starts.shape[0], B * L, back
        call.starts, call.lengths = starts.data_ptr(), lengths.data_ptr()
        call.given = self._places(parameters, skipped)
        return _Work(self._library, call, x, (starts, lengths))

    def _places(self, tensors: Sequence[Tensor], skipped: int = 0) -> ctypes.Array[ctypes.c_void_p]:
        """As ``Tensors`` of pass.cpp has them, null where there is none."""
        places, (taps, gates) = [*_NONE[:skipped], *map(Tensor.data_ptr, tensors)], self._counts
        gates_at, weights_at = 11 + taps, 11 + taps + gates
        return _Tensors(
            *places[:gates_at], *_NONE[taps:], *places[gates_at:weights_at], *_NONE[2 + gates :], *places[weights_at:]
        )


class _Work:
    """A call that lacks but the tensors of a part.

    Attributes:
        kept: how many numbers a forward keeps, besides the views and what comes out of the inner loop.
    """

    def __init__(self, library: ctypes.CDLL, call: PassCall, x: Tensor, spans: tuple[Tensor, Tensor]) -> None:
        self.call, self._library, self._x, self._spans = call, library, x, spans  # the latter kept while it runs
        sizes = (INTEGER * 3)()
        library.ttt_pass_memory(ctypes.byref(call), sizes)
        self.kept, self._inside, self._outside = sizes

    def run(self, phases: _Phases, **tensors: Tensor) -> None:
        """Call the compiled code; by all threads, phase by phase, unless there are few numbers.

        Args:
            phases: what is to be done.
            tensors: by their names in the structure.

        Raises:
            MemoryError: it found no memory.
        """
        inside = self._x.new_empty(self._inside if phases.inside else 0)
        outside = self._x.new_empty(self._outside if phases.outside else 0)
        for name, x in {"inside": inside, "outside": outside, **tensors}.items():
            setattr(self.call, name, x.data_ptr())
        call, library = ctypes.byref(self.call), self._library
        if self._x.numel() <= threads.ALONE or torch.get_num_threads() == 1:
            threads.check(library.ttt_pass(call, INTEGER(phases.first), INTEGER(phases.end)))
            return
        for phase in map(INTEGER, range(phases.first, phases.end)):

            def work(begin: int, end: int, phase: ctypes.c_int64 = phase) -> int:
                return library.ttt_pass_phase(call, phase, INTEGER(begin), INTEGER(end))  # type: ignore[no-any-return]

            sizes = (INTEGER * 2)()
            library.ttt_pass_units(call, phase, sizes)
            threads.share(work, *sizes)


layer_passes = LayerPasses
