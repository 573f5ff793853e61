"""Calls of compiled code that were prepared once, and serve as long as nothing that they were prepared from changes.

Before a step of microseconds, some twenty tensors and modules must be looked at: weights may be loaded, moved or
replaced, modules hooked or adapted, options set. To look at them and to write their addresses into a structure takes
longer than the step. To see that all of it is as it was takes a third of that.
"""

import contextlib
from collections.abc import Callable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

from torch import Tensor, nn

Prepared = TypeVar("Prepared")
OPTIONS = (
    *("adapt", "backbone", "backend", "base_lr", "conv_kernel", "forget", "head_dim", "inner", "inner_lr_scale"),
    *("max_inner_step", "mini_batch_size", "num_heads", "rope_theta", "width"),  # of a layer
    *("eps", "max_norm", "p"),  # of a norm, an embedding, dropout
)
"""Attributes of modules, none of them a tensor, that a prepared call may depend on."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Standing:
    """A module and all below it, and some tensors besides, as they stood when a call was prepared.

    It holds modules, which tell of their parameters, and no tensor: where those that are there now have the addresses,
    types and shapes of those that were, the call serves, and what was replaced may go.

    Args:
        root: the module.
        beside: tensors that are no parameters of it, or None.

    Raises:
        ValueError: a parameter is not initialised yet. RuntimeError: it has no memory to look at, being sparse.
    """

    def __init__(self, root: nn.Module, beside: Sequence[Tensor | None]) -> None:
        modules = tuple(root.modules())
        self._own = own = [m.__dict__ for m in modules]
        self._root, self._modules = root, modules
        self._below, self._parameters = [m._modules for m in modules], [m._parameters for m in modules]
        self._unhooked = [hooks for d in own for hooks in map(d.__getitem__, _HOOKS) if not hooks]
        chosen = [(d, [name for name in OPTIONS if name in d]) for d in own]
        self._options = [(itemgetter(*names), d) for d, names in chosen if names]
        self._dropouts = [d for d in own if "p" in d]
        tensors = self._all_tensors(beside)
        self._kinds = [*map(type, tensors)]
        self._seen = self._look(tensors)

    def tensors(self, root: nn.Module, beside: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """All parameters of the module, in the order of its modules, and the other tensors, if all is as it was."""
        if root is not self._root:
            return None
        tensors = self._all_tensors(beside)
        # their types come first: of another type they may have no address
        return tensors if [*map(type, tensors)] == self._kinds and self._look(tensors) == self._seen else None

    def _all_tensors(self, beside: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [*chain.from_iterable(map(dict.values, self._parameters)), *beside]

    def _look(self, tensors: list[Tensor | None]) -> tuple[Any, ...]:
        there = [x for x in tensors if x is not None]
        return (
            [*map(Tensor.data_ptr, there)],
            [x.shape for x in there],
            [x.dtype for x in there],
            [*map(Tensor.is_contiguous, there)],
            [*chain.from_iterable(map(dict.values, self._below))],
            [*map(type, self._modules)],
            len({*map(id, there)}),  # tied ones may come apart and share their memory still
            any(self._unhooked),
            # A method that is patched is an attribute: one more, or the newest, if another one went before.
            [*map(len, self._own)],
            [*map(next, map(reversed, self._own))],
            [d["training"] for d in self._dropouts],
            [get(d) for get, d in self._options],
        )


def all_tensors(root: nn.Module, beside: Sequence[Tensor | None]) -> list[Tensor | None]:
    """All parameters of a module, in the order of its modules, and the other tensors."""
    return [*chain.from_iterable(m._parameters.values() for m in root.modules()), *beside]


def prepared(
    keeper: Any,
    root: nn.Module,
    beside: Sequence[Tensor | None],
    prepare: Callable[[list[Tensor | None]], Prepared | None],
) -> tuple[Prepared, list[Tensor | None]] | None:
    """What ``prepare`` returned when it was last called for a keeper, if all that it saw still stands; or else now.

    Args:
        keeper: keeps it as its attribute ``prepared``, and goes with it: a table of all keepers would never let go of
            one that is part of its own root.
        root: the module that the call computes.
        beside: tensors that are no parameters of it, or None.
        prepare: makes the call from all tensors, or returns None if it cannot be made.

    Returns:
        The call and all tensors as ``all_tensors`` has them; or None.
    """
    kept: tuple[Standing, Prepared] | None = keeper.prepared  # looked up once: another thread may prepare anew
    if kept is not None:
        tensors = kept[0].tensors(root, beside)
        if tensors is not None:
            return kept[1], tensors
    tensors = all_tensors(root, beside)
    keeper.prepared, call = None, prepare(tensors)
    if call is None:
        return None
    with contextlib.suppress(RuntimeError, ValueError):  # then it is prepared anew every time
        keeper.prepared = Standing(root, beside), call
    return call, tensors
