"""The compiled functions behind the eager path's signatures, which ``ttt4rec.eager`` describes."""

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import build
from .threads import share

_Pointer, _Integer = ctypes.c_void_p, ctypes.c_int64
_TOKENS, _NORM = ("q", "k", "v", "lr", "scale"), ("gamma", "beta")


def _fields(kind: Any, *names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, kind) for name in names)


class _ScanCall(ctypes.Structure):
    """``Call`` of inner_loop.cpp."""

    _fields_ = (
        *_fields(_Integer, "H", "K", "segment"),
        *_fields(_Pointer, "starts", "lengths"),
        ("eps", ctypes.c_double),
        *_fields(_Pointer, *_TOKENS, *_NORM),
        ("weights", _Pointer * 4),
        ("strides", _Integer * 4),
        ("kept", _Pointer * 2),
        *_fields(_Pointer, "checkpoints", "o"),
        ("outgoing", _Pointer * 4),
        ("grad_o", _Pointer),
        ("grad_weights", _Pointer * 4),
        ("grad_strides", _Integer * 4),
        *_fields(_Pointer, "dq", "dk", "dv", "d_lr", "d_scale"),
        ("d_weights", _Pointer * 4),
        *_fields(_Pointer, "d_gamma", "d_beta"),
    )


class _StepCall(ctypes.Structure):
    """``Call`` of step.cpp."""

    _fields_ = (
        *_fields(_Integer, "H", "K", "record"),
        *_fields(_Pointer, "slots", "offset"),
        ("eps", ctypes.c_double),
        *_fields(_Pointer, *_TOKENS, *_NORM, "records", "o"),
    )


class _Scan:
    """A call of the inner loop being prepared: its structure, and the tensors its pointers point into, kept alive."""

    def __init__(
        self,
        tokens: Sequence[Tensor],
        token_scale: Tensor,
        weights: Sequence[Tensor],
        norm: Sequence[Tensor],
        spans: Sequence[Tensor | None],
        eps: float,
        segment: int,
    ) -> None:
        self._call, self._alive, self._dtype = _ScanCall(), list[Tensor](), weights[0].dtype
        B, L, H, self.head_dim = tokens[0].shape
        self.hidden = weights[0].shape[-1] if len(weights) == 4 else 0
        starts, lengths = spans
        self._covered = starts is None or lengths is None
        if starts is None or lengths is None:
            starts, lengths = torch.arange(B) * L, torch.full((B,), L)
        elif min(starts.min(), lengths.min()) < 0 or (starts + lengths).max() > B * L:
            raise ValueError(f"sequences must lie among the {B * L} tokens; given {starts} and {lengths}")
        self._rows = starts.numel() * H
        self._call.H, self._call.K, self._call.segment, self._call.eps = H, token_scale.numel(), segment, eps
        self._call.starts, self._call.lengths = self._pointer(starts.long()), self._pointer(lengths.long())
        for name, x in zip((*_TOKENS, *_NORM), (*tokens, token_scale, *norm), strict=True):
            self.set(name, x)
        self.set_weights("weights", "strides", weights)

    def set(self, name: str, x: Tensor) -> None:
        """An argument in the weights' dtype, or the memory for a result."""
        setattr(self._call, name, self._pointer(x.to(self._dtype)))

    def set_all(self, name: str, tensors: Sequence[Tensor]) -> None:
        """An array of arguments or of memory for results."""
        for i, x in enumerate(tensors):
            getattr(self._call, name)[i] = self._pointer(x)

    def set_weights(self, name: str, strides: str, weights: Sequence[Tensor]) -> None:
        """Weights ``[N, H, ...]``; those that all sequences share are not copied."""
        shared = [w.stride(0) == 0 for w in weights]
        self.set_all(name, [w[:1] if once else w for w, once in zip(weights, shared, strict=True)])
        for i, (w, once) in enumerate(zip(weights, shared, strict=True)):
            getattr(self._call, strides)[i] = 0 if once else w.shape[1:].numel()

    def results(self, *shape: int) -> Tensor:
        """Memory for results ``[B, L, ...]``: zeros where tokens may lie outside every sequence."""
        return (torch.empty if self._covered else torch.zeros)(shape, dtype=self._dtype)

    def run(self, function: str) -> None:
        """Call the compiled function for all rows."""
        library = build.library(self.head_dim, self.hidden, build.SCALARS[self._dtype])
        _run(getattr(library, function), self._call, self._rows)

    def _pointer(self, x: Tensor) -> int:
        self._alive.append(x.contiguous())
        return self._alive[-1].data_ptr()


def _forward(num_weights: int, *given: Any) -> tuple[Tensor, ...]:
    tokens, token_scale, weights = given[:4], given[4], given[5 : 5 + num_weights]
    gamma, beta, starts, lengths, eps, segment = given[5 + num_weights :]
    scan = _Scan(tokens, token_scale, weights, (gamma, beta), (starts, lengths), eps, segment)
    o = scan.results(*tokens[0].shape)
    widths = (scan.hidden, scan.head_dim) if scan.hidden else (scan.head_dim,)
    kept = [scan.results(*tokens[0].shape[:3], width) for width in widths]
    outgoing = [w.new_empty(w.shape) for w in weights]
    B, L, H = o.shape[:3]
    num_checkpoints = B * L // (segment * token_scale.numel()) + 2
    checkpoints = weights[0].new_zeros(num_checkpoints, H, sum(w.shape[2:].numel() for w in weights))
    scan.set("o", o)
    scan.set_all("kept", kept)
    scan.set("checkpoints", checkpoints)
    scan.set_all("outgoing", outgoing)
    scan.run("ttt_forward")
    return o.to(tokens[0].dtype), *outgoing, *kept, checkpoints


def _backward(num_weights: int, grad_o: Tensor, *given: Any) -> tuple[Tensor, ...]:
    grad_weights, given = given[:num_weights], given[num_weights:]
    tokens, token_scale, weights = given[:4], given[4], given[5 : 5 + num_weights]
    (*kept, checkpoints), (gamma, beta, starts, lengths, eps, segment) = given[5 + num_weights : -6], given[-6:]
    scan = _Scan(tokens, token_scale, weights, (gamma, beta), (starts, lengths), eps, segment)
    scan.set("grad_o", grad_o)
    scan.set_weights("grad_weights", "grad_strides", grad_weights)
    scan.set_all("kept", kept)
    scan.set("checkpoints", checkpoints)
    d_tokens = [scan.results(*x.shape) for x in tokens]
    (H, D), K = gamma.shape, token_scale.numel()
    d_scale, *d_norm = (weights[0].new_zeros(weights[0].shape[0], H, width) for width in (K, D, D))
    d_weights = [w.new_empty(w.shape) for w in weights]
    names = ("dq", "dk", "dv", "d_lr", "d_scale", "d_gamma", "d_beta")
    for name, x in zip(names, (*d_tokens, d_scale, *d_norm), strict=True):
        scan.set(name, x)
    scan.set_all("d_weights", d_weights)
    scan.run("ttt_backward")
    d_tokens = [d.to(x.dtype) for d, x in zip(d_tokens, tokens, strict=True)]
    return *d_tokens, d_scale.sum((0, 1)), *d_weights, *(d.sum(0) for d in d_norm)


linear_forward, mlp_forward = partial(_forward, 2), partial(_forward, 4)
linear_backward, mlp_backward = partial(_backward, 2), partial(_backward, 4)


def token_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    slots: Tensor,
    offset: Tensor,
    records: Tensor,
    hidden: int,
    eps: float,
) -> Tensor:
    """As ``eager.token_step``."""
    (B, H, D), dtype = q.shape, records.dtype
    least, most = slots.aminmax()
    if least < 0 or most >= len(records):  # a compiled program has not looked
        raise ValueError(f"slots must be from 0 to {len(records) - 1}; given {int(least)} to {int(most)}")
    o = torch.empty(B, H, D, dtype=dtype)
    floats = (q, k, v, inner_lr, token_scale, ln_weight, ln_bias)
    given = [slots.contiguous(), offset.contiguous(), *(x.to(dtype).contiguous() for x in floats), records, o]
    slots_at, offset_at, *pointers = (x.data_ptr() for x in given)
    call = _StepCall(H, token_scale.numel(), records.shape[-1], slots_at, offset_at, eps, *pointers)
    _run(build.library(D, hidden, build.SCALARS[dtype]).ttt_step, call, B * H)
    return o.to(q.dtype)


def _run(compiled: Callable[..., int], call: ctypes.Structure, rows: int) -> None:
    """Call a compiled function for all rows, by all threads."""
    share(lambda begin, end: compiled(ctypes.byref(call), _Integer(begin), _Integer(end)), rows)
