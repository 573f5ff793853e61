"""Triton's interpreter without what it does again and again: the same bits in a third of the time.

It puts its own functions in place of the language's before each call of a function within a kernel, thousands of times
a launch. Here it does so once a launch for each of the language's two modules. For each value it makes types and shapes
of the language's own kind anew, and looks NumPy's type up in a table made for that; here equal ones are shared. It
reduces number by number, unless it is told of a sum.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from triton import language
from triton.runtime import interpreter

Seen = tuple[bool, bool]
"""Whether a function sees the one module, and the other."""
_replaced: set[Seen] | None = None  # for what, during the launch at hand, if there is one


@functools.cache
def _seen(function: FunctionType) -> Seen:
    """Which of the two modules a function sees: what is replaced for it."""
    seen = {id(value) for value in function.__globals__.values()}
    return id(language) in seen, id(language.core) in seen


def _once_a_launch(replace: Callable[[FunctionType], Any]) -> Callable[[FunctionType], Any]:
    @functools.wraps(replace)
    def replace_once(function: FunctionType) -> Any:
        if _replaced is None:
            return replace(function)
        if (seen := _seen(function)) in _replaced:
            return None  # nobody looks at it but the launch itself, whose function comes first
        _replaced.add(seen)
        return replace(function)

    return replace_once


def _launch(call: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(call)
    def launch(*arguments: Any, **options: Any) -> None:
        global _replaced
        before, _replaced = _replaced, set()
        try:
            call(*arguments, **options)
        finally:
            _replaced = before

    return launch


def _numpy_type(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    @functools.wraps(find)
    def found(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = find(kind)
        return known[name]

    return found


def _tensor(initialise: Callable[..., None]) -> Callable[..., None]:
    """Tensors of one type share it, and their shape."""
    known: dict[str, dict[str, Any]] = {}

    @functools.wraps(initialise)
    def init(self: Any, handle: Any, type: Any) -> None:
        if type.name in known:
            vars(self).update(known[type.name], handle=handle)
        else:
            initialise(self, handle, type)
            known[type.name] = {name: value for name, value in vars(self).items() if name != "handle"}

    return init


def _block_type(initialise: Callable[..., None]) -> Callable[..., None]:
    """Equal types share their shape."""
    known: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}

    @functools.wraps(initialise)
    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, language.constexpr) else size for size in shape])
        if (element_ty.name, sizes) in known:
            vars(self).update(known[element_ty.name, sizes])
        else:
            initialise(self, element_ty, shape)
            known[element_ty.name, sizes] = dict(vars(self))

    return init


def _reduction(initialise: Callable[..., None]) -> Callable[..., None]:
    """The kernels' own sum is one."""
    from ttt4rec.kernels.primitives import plus

    @functools.wraps(initialise)
    def init(self: Any, axis: Any, combine: Any, *options: Any) -> None:
        initialise(self, axis, language.standard._sum_combine if combine is plus else combine, *options)

    return init


PLACES = (
    (interpreter, "_patch_lang", _once_a_launch),
    (interpreter.GridExecutor, "__call__", _launch),
    (interpreter, "_get_np_dtype", _numpy_type),
    (language.tensor, "__init__", _tensor),
    (language.block_type, "__init__", _block_type),
    (interpreter.ReduceOps, "__init__", _reduction),
)


def hasten() -> None:
    """From now on, where this Triton has all that is replaced."""
    if all(hasattr(owner, name) for owner, name, _ in PLACES):
        for owner, name, wrap in PLACES:
            setattr(owner, name, wrap(getattr(owner, name)))
