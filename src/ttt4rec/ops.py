"""The registered operators: schema, shapes for tracing, autograd, and the choice of what computes.

``torch.library`` operators, rather than bare autograd Functions, so that ``torch.compile`` takes each as one node and
``opcheck`` can hold them to their contract. The scans always start at a mini-batch boundary; a stream that goes on
inside a mini-batch is handled above them, in ``functional``. ``token_step`` advances streams in place and has no
gradient.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import eager, native
from .precision import without_autocast
from .projection import path_of
from .transforms import operator


def _path(backend: str, q: Tensor, weights: Tensor, hidden: int) -> ModuleType:
    """The package that computes, on tensors like these.

    Chosen here, where tracing does not see it: the compiled path may have to be compiled first.

    Raises:
        RuntimeError: the compiled path was asked for and cannot run.
    """
    if backend in ("triton", "eager"):
        return path_of(backend == "triton")
    refusal = native.refusal(q.device, q.shape[-1], hidden, weights.dtype)
    if refusal is None:
        return native
    if backend == "native":
        raise RuntimeError(f"backend 'native' {refusal}")
    return eager


@operator("linear_scan")
def linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
    segment: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """TTT-Linear's inner loop: o, W1, b1 after the last complete mini-batch, and what is kept: G and checkpoints."""
    o, W1_out, b1_out, G, checkpoints = _path(backend, q, W1, 0).linear_forward(
        q, k, v, inner_lr, token_scale, W1, b1, ln_weight, ln_bias, starts, lengths, eps, segment
    )
    return o, W1_out, b1_out, G, checkpoints


@operator("linear_scan_backward")
def linear_scan_backward(
    grad_o: Tensor,
    grad_W1: Tensor,
    grad_b1: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    G: Tensor,
    checkpoints: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
    segment: int,
    backend: str,
) -> list[Tensor]:
    """Gradients of ``linear_scan``'s first nine arguments."""
    return list(
        _path(backend, q, W1, 0).linear_backward(
            grad_o, grad_W1, grad_b1, q, k, v, inner_lr, token_scale, W1, b1, G, checkpoints, ln_weight, ln_bias,
            starts, lengths, eps, segment,
        )
    )  # fmt: skip


@operator("mlp_scan")
def mlp_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    b2: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
    segment: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """TTT-MLP's inner loop: o, the four weights after the last complete mini-batch; Z1, G2 and checkpoints kept."""
    o, W1_out, b1_out, W2_out, b2_out, Z1, G2, checkpoints = _path(backend, q, W1, W1.shape[-1]).mlp_forward(
        q, k, v, inner_lr, token_scale, W1, b1, W2, b2, ln_weight, ln_bias, starts, lengths, eps, segment
    )
    return o, W1_out, b1_out, W2_out, b2_out, Z1, G2, checkpoints


@operator("mlp_scan_backward")
def mlp_scan_backward(
    grad_o: Tensor,
    grad_W1: Tensor,
    grad_b1: Tensor,
    grad_W2: Tensor,
    grad_b2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inner_lr: Tensor,
    token_scale: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    b2: Tensor,
    Z1: Tensor,
    G2: Tensor,
    checkpoints: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    eps: float,
    segment: int,
    backend: str,
) -> list[Tensor]:
    """Gradients of ``mlp_scan``'s first eleven arguments."""
    return list(
        _path(backend, q, W1, W1.shape[-1]).mlp_backward(
            grad_o, grad_W1, grad_b1, grad_W2, grad_b2, q, k, v, inner_lr, token_scale, W1, b1, W2, b2, Z1, G2,
            checkpoints, ln_weight, ln_bias, starts, lengths, eps, segment,
        )
    )  # fmt: skip


@operator("token_step", mutates_args=("records",))
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
    backend: str,
) -> Tensor:
    """One token ``[B, H, D]`` of each of B streams whose states are among the records; see ``eager.token_step``."""
    with without_autocast(q.device.type):
        return _path(backend, q, records, hidden).token_step(  # type: ignore[no-any-return]
            q, k, v, inner_lr, token_scale, ln_weight, ln_bias, slots, offset, records, hidden, eps
        )


@token_step.register_fake
def _(q: Tensor, *rest: Any) -> Tensor:
    return _like(q)


@linear_scan.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    q, weights, backend = args[0], args[5:7], args[-1]
    G = _like(q, dtype=_kept_dtype(q, weights[0], backend))
    return _like(q), *map(_like, weights), G, _fake_checkpoints(q, args[4], weights, args[-2])


@mlp_scan.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    q, weights, backend = args[0], args[5:9], args[-1]
    dtype = _kept_dtype(q, weights[0], backend)
    Z1 = q.new_empty(*q.shape[:3], weights[0].shape[-1], dtype=dtype)
    return _like(q), *map(_like, weights), Z1, _like(q, dtype=dtype), _fake_checkpoints(q, args[4], weights, args[-2])


@linear_scan_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    return _fake_gradients(args[3:8], args[8:10], args[12:14])


@mlp_scan_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    return _fake_gradients(args[5:10], args[10:14], args[17:19])


def _fake_checkpoints(q: Tensor, token_scale: Tensor, weights: tuple[Tensor, ...], segment: int) -> Tensor:
    # two more than needed: whether a size is 0 or 1 would become a guard of traced programs
    number = q.shape[0] * q.shape[1] // (segment * token_scale.shape[0]) + 2
    return weights[0].new_empty(number, q.shape[2], sum(w.shape[2:].numel() for w in weights))


def _kept_dtype(q: Tensor, W: Tensor, backend: str) -> torch.dtype:
    """Kernels keep inner gradients as rounded for their products, the other paths in full precision."""
    return q.dtype if backend == "triton" else W.dtype


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _fake_gradients(tokens: Any, weights: Any, layer_norm: Any) -> list[Tensor]:
    """q, k, v and the rates keep their dtype; parameters' gradients come in that of the weights."""
    dtype = weights[0].dtype
    return [*map(_like, tokens[:4]), *(_like(x, dtype=dtype) for x in (tokens[4], *weights, *layer_norm))]


def _save(num_weights: int) -> Any:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        tokens_and_weights, (*layer_norm, starts, lengths) = inputs[: 5 + num_weights], inputs[5 + num_weights : -3]
        ctx.eps, ctx.segment, ctx.backend = inputs[-3:]
        ctx.save_for_backward(*tokens_and_weights, *output[1 + num_weights :], *layer_norm, starts, lengths)

    return setup_context


def _zeros(x: Tensor) -> Tensor:
    """What stands for a gradient that nobody gave: one sequence's and head's; tokens' a kernel makes whole."""
    return x.new_zeros(1, 1, *x.shape[2:]).expand(x.shape)


def _backward(operator: Any, num_weights: int) -> Any:
    def backward(ctx: Any, grad_o: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weights = saved[5 : 5 + num_weights]
        d_weights = [_zeros(w) if g is None else g for w, g in zip(weights, grads, strict=False)]
        d_out = _zeros(saved[0]) if grad_o is None else grad_o
        gradients = operator(d_out, *d_weights, *saved, ctx.eps, ctx.segment, ctx.backend)
        inputs = (*saved[:5], *weights, *saved[-4:-2])
        return *(g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)), *[None] * 5

    return backward


linear_scan.register_autograd(_backward(linear_scan_backward, 2), setup_context=_save(2))
mlp_scan.register_autograd(_backward(mlp_scan_backward, 4), setup_context=_save(4))
