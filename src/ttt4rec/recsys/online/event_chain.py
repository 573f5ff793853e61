"""What any event log does with histories, wherever its rows are: their order, and a checksum in every row.

Every event carries a mark, a checksum of the history up to it. So a row that changes is noticed, and two histories can
be compared by one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

NO_TIME = -math.inf

Row = tuple[str, float, "str | None"]
"""Item, time and event id, as a history holds them in order."""
MarkedRow = tuple[int, str, float, "str | None", int]
"""Number, item, time, event id and mark."""


class Act(Protocol):
    """What an ``Event`` says of its user."""

    @property
    def item_id(self) -> str:
        """What was taken."""
        ...

    @property
    def event_id(self) -> str | None:
        """Which event it is."""
        ...

    @property
    def time(self) -> float | None:
        """When."""
        ...


class DamageError(Exception):
    """What the log holds is not what was written; the message says what and where."""


class User(NamedTuple):
    """A user's row: the time of the latest event, and the mark after the whole history."""

    id: int
    name: str
    length: int
    latest: float
    mark: int


def checksum(*values: object) -> int:
    """64 bits of texts and numbers, exact ones: 1 and 1.0 differ."""
    code = repr(values).encode("utf-8", "backslashreplace")  # whatever a damaged row holds
    return int.from_bytes(blake2b(code, digest_size=8).digest(), "little", signed=True)


def checked_user(row: Sequence[object]) -> User:
    """The user of a row, behind whose fields the checksum stands; DamageError if it is not what was written."""
    user = User(*row[:-1])  # type: ignore[arg-type]  # what a damaged row holds does not pass the next line
    if checksum(*user) != row[-1]:
        raise DamageError(f"the checksum of user {user.name!r} is wrong")
    return user


def new_user(number: int, name: str) -> User:
    """Who has no event yet."""
    return User(number, name, 0, NO_TIME, checksum(name))


def new_rows(events: Sequence[Act], latest: float, is_logged: Callable[[str], bool]) -> tuple[list[bool], list[Row]]:
    """Which of one user's events are new, and their rows.

    Args:
        events: in the order of their arrival.
        latest: the time of the user's latest event.
        is_logged: whether the user has an event of an id.
    """
    new, rows, ids = [], [], set()
    for event in events:
        is_new = event.event_id is None or not (event.event_id in ids or is_logged(event.event_id))
        new.append(is_new)
        if is_new:
            ids.add(event.event_id)
            time = latest if event.time is None else event.time
            latest = max(latest, time)
            rows.append((event.item_id, time, event.event_id))
    return new, rows


def marked(user: User, place: int, mark: int, rows: Sequence[Row]) -> tuple[list[MarkedRow], User]:
    """Rows, put in order, as those from a place on to the history's end; and the user who has them."""
    numbered = []
    for number, row in enumerate(sorted(rows, key=lambda row: row[1]), start=place):
        mark = checksum(mark, *row)
        numbered.append((number, *row, mark))
    return numbered, user._replace(length=place + len(rows), latest=numbered[-1][2], mark=mark)


def compared(user: User, start: int, stop: int, mark: int, rows: Iterable[MarkedRow]) -> Iterator[MarkedRow]:
    """A user's rows ``start`` to ``stop``, compared with their marks; ``mark`` is the one before the first."""
    place = start
    for number, *row, written in rows:
        if number != place:
            break
        mark = checksum(mark, *row)
        if mark != written:
            raise DamageError(f"the checksum of event {place} of user {user.name!r} is wrong")
        yield number, *row, mark  # type: ignore[misc]
        place += 1
    if place < stop:
        raise DamageError(f"event {place} of user {user.name!r} is missing")
    if stop == user.length and mark != user.mark:
        raise DamageError(f"the events of user {user.name!r} do not end as they were written")


def later_from(user: User, time: float, backwards: Iterable[tuple[int, object]]) -> int:
    """The number of the first event that is later than a time, ``user.length`` if none is.

    Args:
        user: whose.
        time: behind whose events a new one belongs.
        backwards: numbers and times of the history from its end on; no more is read than is needed.
    """
    place = user.length
    for number, other in backwards:
        if not isinstance(other, int | float):
            raise DamageError(f"event {number} of user {user.name!r} has no time")
        if other <= time:
            break
        place = number
    return place


def beginning(user: User, known: Sequence[tuple[int, int]], mark_at: Callable[[int], int]) -> tuple[int, int]:
    """Length and mark of the first of the known beginnings that is one of the history; of the empty one if none is."""
    for length, mark in known:
        if length <= user.length and mark_at(length) == mark:
            return length, mark
    return 0, checksum(user.name)
