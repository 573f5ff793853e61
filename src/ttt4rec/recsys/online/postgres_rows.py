"""The tables of an event log in PostgreSQL. What a batch asks or writes is one statement, for all its users.

Ids are bytes of UTF-8, since PostgreSQL's texts hold no character 0. A time is a whole number or a float, each in a
column of its own, so that neither is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import psycopg

from ttt4rec.recsys.online import event_chain
from ttt4rec.recsys.online.event_chain import DamageError, MarkedRow, Row, User

Connection: TypeAlias = "psycopg.Connection[Any]"

VERSION = 1
_SCHEMA = (
    "CREATE TABLE ttt4rec_log (version integer NOT NULL, used boolean NOT NULL)",
    "CREATE TABLE ttt4rec_users (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name bytea NOT NULL UNIQUE, "
    "length bigint NOT NULL, whole bigint, fraction double precision, mark bigint NOT NULL, checksum bigint NOT NULL)",
    "CREATE TABLE ttt4rec_events (owner bigint NOT NULL, number bigint NOT NULL, item bytea NOT NULL, whole bigint, "
    "fraction double precision, event bytea, mark bigint NOT NULL, PRIMARY KEY (owner, number))",
    "CREATE UNIQUE INDEX ttt4rec_events_of_users ON ttt4rec_events (owner, event) WHERE event IS NOT NULL",
)
_LOCK = 0x74747434
_BACKWARDS = 64
"""Events whose times are looked at together."""


class Change(NamedTuple):
    """What a user's history becomes: ``rows`` from ``place`` on, and the user's row."""

    before: User
    place: int
    rows: list[MarkedRow]
    after: User


class Span(NamedTuple):
    """Events ``start`` to ``stop`` of a history, and the mark before them."""

    user: User
    start: int
    stop: int
    mark: int


def prepare(database: Connection) -> None:
    """Make the tables unless they are there; one process at a time."""
    database.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
    if database.execute("SELECT to_regclass('ttt4rec_log')").fetchone() == (None,):
        for statement in _SCHEMA:
            database.execute(statement.encode())
        database.execute("INSERT INTO ttt4rec_log VALUES (%s, false)", (VERSION,))
    found = database.execute("SELECT version FROM ttt4rec_log").fetchall()
    if found != [(VERSION,)]:
        raise ValueError(f"the event log must be of version {VERSION}; given {[version for (version,) in found]}")


def flushes(database: Connection) -> bool:
    """Whether the server waits for its disk at all."""
    return database.execute("SHOW fsync").fetchone() == ("on",)


def is_used(database: Connection) -> bool:
    """Whether anything was ever logged."""
    return database.execute("SELECT used FROM ttt4rec_log").fetchone() == (True,)


def use(database: Connection) -> bool:
    """Say that something was logged; whether it is the first time. Who comes second waits for the first to commit."""
    return bool(database.execute("UPDATE ttt4rec_log SET used = true WHERE NOT used").rowcount)


def users(database: Connection) -> list[str]:
    """Their names, the oldest first."""
    rows = database.execute("SELECT name FROM ttt4rec_users ORDER BY id", binary=True)
    return [_text(name) for (name,) in rows]


def find(database: Connection, names: Sequence[str], *, lock: bool = False) -> dict[str, User]:
    """Users who are there by name; DamageError if one's row is not what was written."""
    query = (
        b"SELECT id, name, length, whole, fraction, mark, checksum FROM ttt4rec_users "
        b"WHERE name = ANY(%s::bytea[]) ORDER BY name" + (b" FOR UPDATE" if lock else b"")
    )
    rows = database.execute(query, ([name.encode() for name in names],), binary=True).fetchall()
    found = {}
    for number, name, length, whole, fraction, mark, checksum in rows:
        found[_text(name)] = event_chain.checked_user(
            (number, _text(name), length, _time(whole, fraction), mark, checksum)
        )
    return found


def locked(database: Connection, names: Sequence[str]) -> dict[str, User]:
    """Users by name, made where missing; nobody else changes them before this transaction ends."""
    found = find(database, names, lock=True)
    while missing := sorted(name.encode() for name in names if name not in found):
        made = database.execute(
            "INSERT INTO ttt4rec_users (name, length, fraction, mark, checksum) "
            "SELECT name, 0, '-infinity', 0, 0 FROM unnest(%s::bytea[]) AS missing (name) "
            "ON CONFLICT (name) DO NOTHING RETURNING id, name",
            (missing,),
            binary=True,
        )
        found |= {_text(name): event_chain.new_user(number, _text(name)) for number, name in made}
        others = [name for name in names if name not in found]  # whom somebody else made meanwhile
        if others:
            found |= find(database, others, lock=True)
    return found


def logged(database: Connection, ids: Sequence[tuple[int, str]]) -> set[tuple[int, str]]:
    """Which events, by their users' numbers and their ids, are there."""
    if not ids:
        return set()
    rows = database.execute(
        "SELECT owner, event FROM ttt4rec_events JOIN unnest(%s::bigint[], %s::bytea[]) AS asked (owner, event) "
        "USING (owner, event)",
        ([owner for owner, _ in ids], [event.encode() for _, event in ids]),
        binary=True,
    )
    return {(owner, _text(event)) for owner, event in rows}


def marks(database: Connection, places: Sequence[tuple[User, int]]) -> list[int]:
    """The marks after given numbers of users' events; not compared with the events."""
    inside = [(user.id, length - 1) for user, length in places if 0 < length < user.length]
    found: dict[tuple[int, int], int] = {}
    if inside:
        rows = database.execute(
            "SELECT owner, number, mark FROM ttt4rec_events "
            "JOIN unnest(%s::bigint[], %s::bigint[]) AS asked (owner, number) USING (owner, number)",
            tuple(map(list, zip(*inside, strict=True))),
            binary=True,
        )
        found = {(owner, number): mark for owner, number, mark in rows}
    listed = []
    for user, length in places:
        if length in (0, user.length):
            listed.append(user.mark if length else event_chain.checksum(user.name))
        elif (user.id, length - 1) in found:
            listed.append(found[user.id, length - 1])
        else:
            raise DamageError(f"event {length - 1} of user {user.name!r} is missing")
    return listed


def read(database: Connection, spans: Sequence[Span]) -> list[list[MarkedRow]]:
    """The events of spans, compared with their marks."""
    asked = [(span.user.id, span.start, span.stop, place) for place, span in enumerate(spans) if span.start < span.stop]
    rows: Iterable[Any] = ()
    if asked:
        rows = database.execute(
            b"SELECT place, number, item, whole, fraction, event, mark FROM ttt4rec_events "
            b"JOIN unnest(%s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[]) AS asked (owner, start, stop, place) "
            b"USING (owner) WHERE number >= start AND number < stop ORDER BY place, number",
            tuple(map(list, zip(*asked, strict=True))),
            binary=True,
        )
    found = {place: list(map(_marked, group)) for place, group in groupby(rows, key=lambda row: row[0])}
    return [
        list(event_chain.compared(*span[:3], span.mark, found.get(place, []))) if span.start < span.stop else []
        for place, span in enumerate(spans)
    ]


def later_than(database: Connection, user: User, time: float) -> list[Row]:
    """The events at a history's end that are later, compared with their marks."""
    if time >= user.latest:
        return []
    place = event_chain.later_from(user, time, _backwards(database, user))
    before = max(0, place - 1)  # which is compared too, since it says that none of those before is later
    (mark,) = marks(database, [(user, before)])
    (found,) = read(database, [Span(user, before, user.length, mark)])
    return [(item, other, event) for _, item, other, event, _ in found[place - before :]]


def write(database: Connection, changes: Sequence[Change]) -> None:
    """Put new rows in the places of old ones."""
    if not changes:
        return
    for before, place, _, _ in changes:
        if place < before.length:
            database.execute("DELETE FROM ttt4rec_events WHERE owner = %s AND number >= %s", (before.id, place))
    rows = [
        (after.id, number, item.encode(), *_parts(time), None if event is None else event.encode(), mark)
        for _, _, marked, after in changes
        for number, item, time, event, mark in marked
    ]
    database.execute(
        "INSERT INTO ttt4rec_events SELECT * FROM unnest("
        "%s::bigint[], %s::bigint[], %s::bytea[], %s::bigint[], %s::float8[], %s::bytea[], %s::bigint[])",
        tuple(map(list, zip(*rows, strict=True))),
    )
    changed = [
        (after.id, after.length, *_parts(after.latest), after.mark, event_chain.checksum(*after))
        for *_, after in changes
    ]
    database.execute(
        b"UPDATE ttt4rec_users AS old SET length = new.length, whole = new.whole, fraction = new.fraction, "
        b"mark = new.mark, checksum = new.checksum FROM unnest("
        b"%s::bigint[], %s::bigint[], %s::bigint[], %s::float8[], %s::bigint[], %s::bigint[]) "
        b"AS new (id, length, whole, fraction, mark, checksum) WHERE old.id = new.id",
        tuple(map(list, zip(*changed, strict=True))),
    )


def delete_users(database: Connection, names: Sequence[str]) -> None:
    """Delete histories, whatever state they are in."""
    rows = database.execute(
        "SELECT id FROM ttt4rec_users WHERE name = ANY(%s::bytea[]) ORDER BY name FOR UPDATE",
        ([name.encode() for name in names],),
    )
    numbers = [number for (number,) in rows]
    database.execute("DELETE FROM ttt4rec_events WHERE owner = ANY(%s::bigint[])", (numbers,))
    database.execute("DELETE FROM ttt4rec_users WHERE id = ANY(%s::bigint[])", (numbers,))


def _backwards(database: Connection, user: User) -> Iterator[tuple[int, object]]:
    """Numbers and times of a history from its end on."""
    before, some = user.length, _BACKWARDS
    while True:
        rows = database.execute(
            "SELECT number, whole, fraction FROM ttt4rec_events WHERE owner = %s AND number < %s "
            "ORDER BY number DESC LIMIT %s",
            (user.id, before, some),
            binary=True,
        ).fetchall()
        for number, whole, fraction in rows:
            yield number, _time(whole, fraction)
        if len(rows) < some:
            return
        before, some = rows[-1][0], 2 * some


def _marked(row: Any) -> MarkedRow:
    _, number, item, whole, fraction, event, mark = row
    return number, _text(item), _time(whole, fraction), None if event is None else _text(event), mark


def _text(code: bytes) -> str:
    return code.decode(errors="surrogateescape")  # which no checksum of a text is of


def _parts(time: float) -> tuple[int | None, float | None]:
    """A time for the columns of whole numbers and of floats."""
    return (time, None) if isinstance(time, int) else (None, time)


def _time(whole: int | None, fraction: float | None) -> Any:
    """The time of two columns; neither a number nor what a checksum was made of unless one of them has it."""
    if whole is None:
        return fraction
    return whole if fraction is None else None
