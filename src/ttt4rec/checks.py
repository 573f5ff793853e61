"""Checks that all parts share; every error names what is wrong, what was expected and what was given."""

from collections.abc import Collection

import torch
from torch import Tensor


def check_shape(name: str, x: Tensor, expected: tuple[int, ...], letters: str) -> None:
    """Raise ValueError unless x has the expected shape, whose letters the message explains."""
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} must have shape {letters} = {list(expected)}; given {list(x.shape)}")


def check_device(whose: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors that are there are on the device."""
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(f"{name} must be on {whose} device {device}; given {x.device}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; given {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless value is a finite number above zero."""
    if not is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be finite and above 0; given {value!r}")


def check_integer(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError unless value is an integer that large."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; given {value!r}")
    if value >= 2**63:  # torch's integers end there
        raise ValueError(f"{name} must be below 2**63; given {value!r}")


def is_number(value: object) -> bool:
    """Whether value is an int or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def printable(text: str, most: int | None = None) -> str:
    """A text as a terminal, a log or an error message may show it: no character of it does anything but appear.

    Others, such as those that move a cursor, end a line or turn the direction of writing, are escaped.

    Args:
        text: any.
        most: of its characters are shown; all of them if None.
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]}..."
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)
