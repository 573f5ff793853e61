"""Operators of ours, and what they do not have: rules for ``torch.func``'s transforms and forward-mode derivatives.

A transform that meets an operator without a rule of its own is answered by PyTorch with a derivative of zero, or with a
word about ``setup_context``. Every operator of ours is made by ``operator``, which answers in its place.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.library import CustomOpDef  # type: ignore[attr-defined]

REFERENCE = 'use backend="reference", which is plain PyTorch and has them'
_library = torch.library.Library("ttt4rec", "FRAGMENT")


def transformed() -> bool:
    """Whether this call is within a transform (vmap, grad, jvp, ...) or a level of forward-mode differentiation."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def operator(
    name: str, mutates_args: Iterable[str] = (), instead: str = REFERENCE, schema: str | None = None
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function the operator ``ttt4rec::name``, which refuses transforms and derivatives that it does not have.

    Transforms are refused by kernels that PyTorch looks for only within them, so that other calls pay nothing. Forward
    mode alone, without a transform, has no such place; there a level of it is refused, whether or not the arguments
    have tangents, which at that depth PyTorch no longer tells.

    Args:
        name: without the namespace.
        mutates_args: names of the arguments that it changes.
        instead: what to use where there are transforms.
        schema: of its arguments and results; None: as the function's annotations say.
    """

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"ttt4rec::{name} has no autograd formula for this: it knows no transforms of torch.func (vmap, grad, jvp, "
            f"...), forward-mode derivatives or second derivatives; {instead}"
        )

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
