"""Operators of ours, and what they do not have: rules for ``torch.func``'s transforms and forward-mode derivatives.

A transform that meets an operator without a rule of its own is answered by PyTorch with a derivative of zero, or with a
word about ``setup_context``. Every operator of ours is made by ``operator``, which answers in its place. Whether there
are values to look at, which transforms, too, decide, is told here as well.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _AutoDispatchBelowAutograd
from torch._C._functorch import is_legacy_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef  # type: ignore[attr-defined]

REFERENCE = 'use backend="reference", which is plain PyTorch and has them'
_library = torch.library.Library("ttt4rec", "FRAGMENT")


def transformed() -> bool:
    """Whether this call is within a transform (vmap, grad, jvp, ...) or a level of forward-mode differentiation."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether x is what ``autograd.grad(is_grads_batched=True)`` gives a backward."""
    return bool(is_legacy_batchedtensor(x))


def has_values(x: Tensor) -> bool:
    """Whether there are values that may be looked at: not in tracing and transforms, nor on meta and fake tensors."""
    return not (torch.compiler.is_compiling() or _is_empty(x) or transformed())


def check_has_values(what: str, x: Tensor) -> None:
    """Raise ValueError if x is a meta or fake tensor, and what is to be done depends on values."""
    if _is_empty(x):
        raise ValueError(f"{what} depends on values, which meta and fake tensors do not have; give it real ones")


def _is_empty(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def refuse_transforms(what: str) -> NoReturn:
    """Raise RuntimeError, instead of what PyTorch would do with what has no rules for transforms."""
    raise RuntimeError(
        f"{what} has no autograd formula for this: it knows no transforms of torch.func (vmap, grad, jvp, ...), "
        f"forward-mode derivatives or second derivatives; {REFERENCE}"
    )


def operator(
    name: str, mutates_args: Iterable[str] = (), schema: str | None = None
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function the operator ``ttt4rec::name``, which refuses transforms and derivatives that it does not have.

    Transforms are refused by kernels that PyTorch looks for only within them, so that other calls pay nothing. Forward
    mode alone, without a transform, has no place for that; there a level of it is refused, whether or not the arguments
    have tangents, which at that depth PyTorch no longer tells.

    Args:
        name: without the namespace.
        mutates_args: names of the arguments that it changes.
        schema: of its arguments and results; None: as the function's annotations say.
    """

    def refuse(*_: Any, **__: Any) -> NoReturn:
        refuse_transforms(f"ttt4rec::{name}")

    def make(function: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(function)
        def checked(*args: Any) -> Any:
            if forward_ad._current_level >= 0:
                refuse()
            return function(*args)

        made = torch.library.custom_op(f"ttt4rec::{name}", checked, mutates_args=mutates_args, schema=schema)
        for key in ("FuncTorchDynamicLayerFrontMode", "Batched"):  # the latter of autograd.grad(is_grads_batched=True)
            _library.impl(name, refuse, key)
        if not mutates_args:
            made.register_autograd(refuse)  # until it is given a backward
        return made

    return make


def differentiate(name: str, save: Callable[[Any, Any, Any], None], backward: Callable[..., tuple[Any, ...]]) -> None:
    """Give an operator gradients: ``save(ctx, inputs, outputs)``, and ``backward(ctx, *grads)`` to one for each input.

    ``register_autograd`` does the same, but at every call it looks whether inputs have defaults; ours have
    none. That takes time by the square of their number: with 14 inputs 75 µs, a twentieth of a small layer's call.
    """
    overload = getattr(torch.ops.ttt4rec, name).default

    def compute(*inputs: Any) -> Any:
        with _AutoDispatchBelowAutograd():
            return overload(*inputs)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = compute(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    def kernel(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return Differentiated.apply(*inputs)  # type: ignore[no-untyped-call]
        return compute(*inputs)

    with warnings.catch_warnings():  # of the kernel that this one takes the place of
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        _library.impl(name, kernel, "Autograd")
