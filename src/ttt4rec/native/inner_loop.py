"""The compiled inner loops behind the signatures that all backends have; ``ttt4rec.eager`` describes the results."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import Scan
from . import build
from .calls import INTEGER, NORM, POINTER, TOKENS, fields, run


class ScanCall(ctypes.Structure):
    """``Call`` of inner_loop.cpp."""

    _fields_ = (
        *fields(INTEGER, "H", "K", "segment"),
        *fields(INTEGER, "q_stride", "k_stride", "v_stride", "dq_stride", "dk_stride", "dv_stride"),
        *fields(POINTER, "starts", "lengths"),
        ("eps", ctypes.c_double),
        *fields(POINTER, *TOKENS, *NORM),
        ("weights", POINTER * 4),
        ("strides", INTEGER * 4),
        ("kept", POINTER * 2),
        *fields(POINTER, "checkpoints", "o"),
        ("outgoing", POINTER * 4),
        ("grad_o", POINTER),
        ("grad_weights", POINTER * 4),
        ("grad_strides", INTEGER * 4),
        *fields(POINTER, "dq", "dk", "dv", "d_lr", "d_scale"),
        ("d_weights", POINTER * 4),
        *fields(POINTER, "d_gamma", "d_beta"),
        *fields(POINTER, "log_decay"),
        ("initial", POINTER * 4),
        *fields(POINTER, "d_log_decay"),
        ("d_initial", POINTER * 4),
    )


class _Call:
    """A call of the inner loop being prepared: its structure, and the tensors its pointers point into, kept alive."""

    def __init__(self, scan: Scan) -> None:
        self._call, self._alive, self._dtype = ScanCall(), list[Tensor](), scan.weights[0].dtype
        (B, L, H, _), weights, self._scan = scan.q.shape, scan.weights, scan
        starts, lengths = scan.starts, scan.lengths
        self._covered = starts is None or lengths is None
        if starts is None or lengths is None:
            starts, lengths = rows(B, L)
        elif min(starts.min(), lengths.min()) < 0 or (starts + lengths).max() > B * L:
            raise ValueError(f"sequences must lie among the {B * L} tokens; given {starts} and {lengths}")
        self._rows = starts.numel() * H
        self._call.H, self._call.K, self._call.segment = H, scan.token_scale.numel(), scan.segment
        self._call.eps = scan.eps
        self._call.starts, self._call.lengths = self._pointer(starts.long()), self._pointer(lengths.long())
        for name, x in zip(TOKENS, scan.tokens[:3], strict=False):
            self.set_tokens(name, x)
        given = (scan.inner_lr, scan.token_scale, scan.ln_weight, scan.ln_bias)
        for name, x in zip((*TOKENS[3:], *NORM), given, strict=True):
            self.set(name, x)
        self.set_weights("weights", "strides", weights)
        if scan.log_decay is not None:
            self.set("log_decay", scan.log_decay)
            self.set_all("initial", scan.initial)

    def set(self, name: str, x: Tensor) -> None:
        """An argument in the weights' dtype, or the memory for a result."""
        setattr(self._call, name, self._pointer(x if x.dtype is self._dtype else x.to(self._dtype)))

    def set_tokens(self, name: str, x: Tensor) -> None:
        """An argument or a result ``[B, L, H, D]``, whose tokens may be parts of wider rows."""
        x = x if x.dtype is self._dtype else x.to(self._dtype)
        (B, L, H, D), (row, token, head, feature) = x.shape, x.stride()
        token = row if L == 1 else token  # strides of sizes of one say nothing
        if (B > 1 and row != L * token) or (H > 1 and head != D) or feature != 1:
            x = x.contiguous()
            token = H * D
        self._alive.append(x)
        setattr(self._call, name, x.data_ptr())
        setattr(self._call, f"{name}_stride", token)

    def set_all(self, name: str, tensors: Sequence[Tensor]) -> None:
        """An array of arguments or of memory for results."""
        array = getattr(self._call, name)
        for i, x in enumerate(tensors):
            array[i] = self._pointer(x)

    def set_weights(self, name: str, strides: str, weights: Sequence[Tensor]) -> None:
        """Weights ``[N, H, ...]``; those that all sequences share are not copied."""
        pointers, distances = getattr(self._call, name), getattr(self._call, strides)
        for i, w in enumerate(weights):
            shared = w.stride(0) == 0
            pointers[i] = self._pointer(w[:1] if shared else w)
            distances[i] = 0 if shared else w[0].numel()

    def results(self, *shape: int) -> Tensor:
        """Memory for results ``[B, L, ...]``: zeros where tokens may lie outside every sequence."""
        return (torch.empty if self._covered else torch.zeros)(shape, dtype=self._dtype)

    def run(self, function: str) -> None:
        """Call the compiled function for all rows."""
        scan = self._scan
        library = build.library(scan.inner, scan.q.shape[-1], scan.hidden, build.SCALARS[self._dtype])
        run(getattr(library, function), self._call, self._rows, scan.q.numel())

    def _pointer(self, x: Tensor) -> int:
        x = x.contiguous()
        self._alive.append(x)
        return x.data_ptr()


def _forward(scan: Scan) -> tuple[Tensor, ...]:
    call, weights = _Call(scan), scan.weights
    o = call.results(*scan.q.shape)
    B, L, H, D = o.shape
    kept = [call.results(B, L, H, width) for width in scan.model.kept_widths(D, scan.hidden)]
    outgoing = [w.new_empty(w.shape) for w in weights]
    checkpoints = scan.new_checkpoints()
    call.set("o", o)
    call.set_all("kept", kept)
    call.set("checkpoints", checkpoints)
    call.set_all("outgoing", outgoing)
    call.run("ttt_forward")
    return o.to(scan.q.dtype), *outgoing, *kept, checkpoints


def _backward(
    scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...], into: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """As all backends' backward; ``into`` is memory for the gradients of q, k and v, as ``set_tokens`` takes it."""
    call, weights, (grad_o, *grad_weights), (*kept_tokens, checkpoints) = _Call(scan), scan.weights, grads, kept
    call.set("grad_o", grad_o)
    call.set_weights("grad_weights", "grad_strides", grad_weights)
    call.set_all("kept", kept_tokens)
    call.set("checkpoints", checkpoints)
    d_tokens = [*(into or (call.results(*x.shape) for x in scan.tokens[:3])), call.results(*scan.inner_lr.shape)]
    (H, D), K = scan.ln_weight.shape, scan.token_scale.numel()
    d_scale, *d_norm = (weights[0].new_zeros(weights[0].shape[0], H, width) for width in (K, D, D))
    d_weights = [w.new_empty(w.shape) for w in weights]
    for name, x in zip(("dq", "dk", "dv"), d_tokens, strict=False):
        call.set_tokens(name, x)
    for name, x in zip(("d_lr", "d_scale", "d_gamma", "d_beta"), (d_tokens[3], d_scale, *d_norm), strict=True):
        call.set(name, x)
    call.set_all("d_weights", d_weights)
    d_decays = _d_decays(scan)
    if d_decays:
        call.set("d_log_decay", d_decays[0])
        call.set_all("d_initial", d_decays[1:])
    call.run("ttt_backward")
    d_tokens = [d.to(x.dtype) for d, x in zip(d_tokens, scan.tokens, strict=True)]
    return *d_tokens, d_scale.sum((0, 1)), *d_weights, *(d.sum(0) for d in d_norm), *_totals(d_decays)


def _d_decays(scan: Scan) -> list[Tensor]:
    """Zeros for the gradients of the decays, and memory for the initial weights' of every sequence."""
    if scan.log_decay is None:
        return []
    return [scan.log_decay.new_zeros(scan.log_decay.shape, dtype=scan.weights[0].dtype)] + [
        w.new_empty(w.shape) for w in scan.weights
    ]


def _totals(d_decays: list[Tensor]) -> list[Tensor]:
    """The same, with the initial weights' summed."""
    return [*d_decays[:1], *(w.sum(0) for w in d_decays[1:])]


@functools.lru_cache(maxsize=32)
def rows(B: int, L: int) -> tuple[Tensor, Tensor]:
    """Starts and lengths ``[B]`` of sequences that are the rows of a batch; not to be changed."""
    with torch.inference_mode(False):
        return torch.arange(B) * L, torch.full((B,), L)


linear_scan = mlp_scan = _forward
linear_scan_backward = mlp_scan_backward = _backward
linear_forgetting_scan = mlp_forgetting_scan = _forward
linear_forgetting_scan_backward = mlp_forgetting_scan_backward = _backward
