"""Triton's interpreter without what it does again and again: the same bits in half the time.

It puts its own functions in place of the language's before each call of a function within a kernel, thousands of times
a launch. Here it does so once a launch for each of the language's two modules. NumPy's types it looks up in a table
that it makes anew for each value; here the table is kept.
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


def _by_name(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    @functools.wraps(find)
    def found(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = find(kind)
        return known[name]

    return found


PLACES = (
    (interpreter, "_patch_lang", _once_a_launch),
    (interpreter, "_get_np_dtype", _by_name),
    (interpreter.GridExecutor, "__call__", _launch),
)


def hasten() -> None:
    """From now on, where this Triton has all that is replaced."""
    if all(hasattr(owner, name) for owner, name, _ in PLACES):
        for owner, name, wrap in PLACES:
            setattr(owner, name, wrap(getattr(owner, name)))
