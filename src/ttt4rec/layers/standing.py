"""Calls of compiled code that were prepared once, and serve as long as nothing that they were prepared from changes.

Before a step of microseconds, some twenty tensors and modules must be looked at: weights may be loaded, moved or
replaced, modules hooked or adapted, options set. To look at them and to write their addresses into a structure takes
longer than the step. To see that all of it is as it was takes a third of that.
"""

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import contains, is_, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

OPTIONS = (
    *("adapt", "backbone", "backend", "base_lr", "conv_kernel", "forget", "head_dim", "inner", "inner_lr_scale"),
    *("max_inner_step", "mini_batch_size", "num_heads", "rope_theta", "width"),  # of a layer
    *("eps", "max_norm", "p"),  # of a norm, an embedding, dropout
)
"""Attributes of modules, none of them a tensor, that a prepared call may depend on."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_prepared = WeakKeyDictionary[Any, tuple["Standing", Any]]()


class Standing:
    """A module and all below it, and some tensors beside it, as they stood when a call was prepared.

    Args:
        root: the module.
        beside: tensors that are no parameters of it, or None.
    """

    def __init__(self, root: nn.Module, beside: Sequence[Tensor | None]) -> None:
        modules = tuple(root.modules())
        own = [m.__dict__ for m in modules]
        self._root, self._modules, self._types = root, modules, [*map(type, modules)]
        self._below, self._parameters = [m._modules for m in modules], [m._parameters for m in modules]
        self._unhooked = [hooks for d in own for hooks in map(d.__getitem__, _HOOKS) if not hooks]
        self._unpatched = [d for d in own if "forward" not in d]
        chosen = [(d, [name for name in OPTIONS if name in d]) for d in own]
        self._options = [(itemgetter(*names), d) for d, names in chosen if names]
        self._tensors = self._all_tensors(beside)
        self._there = [x for x in self._tensors if x is not None]
        self._seen = self._look()

    def stands(self, root: nn.Module, beside: Sequence[Tensor | None]) -> bool:
        """Whether all of it is as it was."""
        if root is not self._root:
            return False
        tensors = self._all_tensors(beside)
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        return same and self._look() == self._seen

    def _all_tensors(self, beside: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [*chain.from_iterable(map(dict.values, self._parameters)), *beside]

    def _look(self) -> tuple[Any, ...]:
        there = self._there
        return (
            [*map(Tensor.data_ptr, there)],
            [x.shape for x in there],
            [*map(Tensor.is_contiguous, there)],
            [*chain.from_iterable(map(dict.values, self._below))],
            [*map(type, self._modules)],
            any(self._unhooked),
            any(map(contains, self._unpatched, repeat("forward"))),
            self._root.training,
            [get(d) for get, d in self._options],
        )


def prepared(
    pool: Any, root: nn.Module, beside: Sequence[Tensor | None], prepare: Callable[[], Callable[..., Any] | None]
) -> Callable[..., Any] | None:
    """What ``prepare`` returned when it was last called for a pool, if all that it saw still stands; or else now.

    Args:
        pool: for which the call is kept, as long as it lives.
        root: the module that the call computes.
        beside: tensors that are no parameters of it, or None.
        prepare: makes the call, or returns None if it cannot be made.
    """
    standing, call = _prepared.get(pool, (None, None))
    if standing is not None and standing.stands(root, beside):
        return call
    call = prepare()
    if call is None:
        _prepared.pop(pool, None)
    else:
        _prepared[pool] = Standing(root, beside), call
    return call
