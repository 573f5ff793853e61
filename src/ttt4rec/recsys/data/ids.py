"""Ids of users and items: texts, whole numbers or UUIDs, of one type in a column, which come back as they came."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias
from uuid import UUID

from ttt4rec.recsys.data.text import DataError

Id: TypeAlias = str | int | UUID
"""What names a user or an item."""

KINDS: dict[str, type[Id]] = {"str": str, "int": int, "uuid": UUID}
"""The types of ids, by the names that files give them."""

_WHOLE = re.compile(r"0|-?[1-9]\d*", re.ASCII)


def kind_of(ids: Sequence[Id]) -> type[Id]:
    """The type of some ids, which is one for all; ``str`` if there are none; DataError if no ids can be of it.

    NumPy's texts, which are of a type of their own, are texts.
    """
    if not ids:
        return str
    for kind in KINDS.values():
        if isinstance(ids[0], kind):
            return kind
    raise DataError(f"ids must be texts, whole numbers of Python's or UUIDs; given {ids[0]!r}")


def name_of(kind: type[Id]) -> str:
    """What files call a type of ids."""
    return next(name for name, known in KINDS.items() if known is kind)


def as_kind(value: Id, kind: type[Id]) -> Id | None:
    """The id of another kind that is written alike, such as 5 for ``"5"``; None if there is none.

    The command line and JSON have texts for ids that are numbers or UUIDs in the data.
    """
    if isinstance(value, kind):
        return value
    text = str(value)
    if kind is str:
        return text
    if kind is int:
        return int(text) if len(text) < 40 and _WHOLE.fullmatch(text) else None
    try:
        return UUID(text)
    except ValueError:
        return None


def all_as_kind(ids: Sequence[Id], kind: type[Id]) -> tuple[Id, ...]:
    """Ids as a kind has them; DataError if one cannot be written so."""
    if kind_of(ids) is kind:
        return tuple(ids)
    found = tuple(x for value in ids if (x := as_kind(value, kind)) is not None)
    if len(found) < len(ids):
        odd = next(value for value in ids if as_kind(value, kind) is None)
        raise DataError(f"ids must be {name_of(kind)}, as those they are to go with; given {odd!r}")
    return found
