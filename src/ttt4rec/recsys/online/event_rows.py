"""The tables of an event log in SQLite: every row carries a checksum, every event one of the history up to it."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

APPLICATION, VERSION = 0x74747434, 2  # "ttt4"
SCHEMA = (
    "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, length INTEGER NOT NULL, "
    "latest NOT NULL, mark INTEGER NOT NULL, checksum INTEGER NOT NULL)",
    "CREATE TABLE events (user INTEGER NOT NULL, number INTEGER NOT NULL, item TEXT NOT NULL, time NOT NULL, "
    "event TEXT, mark INTEGER NOT NULL, PRIMARY KEY (user, number)) WITHOUT ROWID",
    "CREATE UNIQUE INDEX events_of_users ON events (user, event) WHERE event IS NOT NULL",
)
NO_TIME = -math.inf

Row = tuple[str, float, "str | None"]
"""Item, time and event id, as a history holds them in order."""


class DamageError(Exception):
    """What the log holds is not what was written; the message says what and where."""


class User(NamedTuple):
    """A row of ``users``: the time of the latest event, and the mark after the whole history."""

    id: int
    name: str
    length: int
    latest: float
    mark: int


def checksum(*values: object) -> int:
    """64 bits of texts and numbers, exact ones: 1 and 1.0 differ."""
    code = repr(values).encode("utf-8", "backslashreplace")  # whatever a damaged row holds
    return int.from_bytes(blake2b(code, digest_size=8).digest(), "little", signed=True)


def create(database: sqlite3.Connection) -> None:
    """Make the tables in an empty file."""
    for statement in SCHEMA:
        database.execute(statement)
    database.execute(f"PRAGMA application_id = {APPLICATION}")
    database.execute(f"PRAGMA user_version = {VERSION}")


def check_file(database: sqlite3.Connection) -> None:
    """SQLite's own check of every page and index, and of what it takes for granted; DamageError says what is wrong.

    Without it a search might miss what is there.
    """
    wrong = [text for (text,) in database.execute("PRAGMA integrity_check(3)") if text != "ok"]
    made = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'sqlite_sequence' ORDER BY rowid"
    if sorted(sql for (sql,) in database.execute(made)) != sorted(SCHEMA):
        wrong.append("the tables are not an event log's")
    if database.execute("SELECT name FROM sqlite_sequence WHERE name != 'users'").fetchone():
        wrong.append("the sequence belongs to no table")
    if database.execute("PRAGMA encoding").fetchone() != ("UTF-8",):
        wrong.append("the encoding is not UTF-8")
    if wrong:
        raise DamageError("; ".join(text.replace("\n", " ") for text in wrong))


def find_user(database: sqlite3.Connection, name: str) -> User | None:
    """A user's row, None if there is none; DamageError if it is not what was written."""
    row = database.execute(
        "SELECT id, name, length, latest, mark, checksum FROM users WHERE name = ?", (name,)
    ).fetchone()
    if row is None:
        return None
    if checksum(*row[:-1]) != row[-1]:
        raise DamageError(f"the checksum of user {name!r} is wrong")
    return User(*row[:-1])


def mark_at(database: sqlite3.Connection, user: User, length: int) -> int:
    """The mark after the first ``length`` events; not compared with them."""
    if length in (0, user.length):
        return user.mark if length else checksum(user.name)
    query = "SELECT mark FROM events WHERE user = ? AND number = ?"
    row = database.execute(query, (user.id, length - 1)).fetchone()
    if row is None:
        raise DamageError(f"event {length - 1} of user {user.name!r} is missing")
    return row[0]  # type: ignore[no-any-return]


def read_rows(
    database: sqlite3.Connection, user: User, start: int, stop: int, mark: int
) -> Iterator[tuple[str, float, str | None, int]]:
    """Events ``start`` to ``stop`` with their marks, compared with these; ``mark`` is the one before the first."""
    query = "SELECT number, item, time, event, mark FROM events WHERE user = ? AND number >= ? AND number < ?"
    place = start
    try:
        for number, *row in database.execute(query + " ORDER BY number", (user.id, start, stop)):
            if number != place:
                break
            mark = checksum(mark, *row[:-1])
            if mark != row[-1]:
                raise DamageError(f"the checksum of event {place} of user {user.name!r} is wrong")
            yield row[0], row[1], row[2], mark
            place += 1
    except sqlite3.OperationalError as error:
        if "decode" not in str(error):  # as UTF-8
            raise
        raise DamageError(f"event {place} of user {user.name!r} is no text") from error
    if place < stop:
        raise DamageError(f"event {place} of user {user.name!r} is missing")
    if stop == user.length and mark != user.mark:
        raise DamageError(f"the events of user {user.name!r} do not end as they were written")


def has_event(database: sqlite3.Connection, user: User, event_id: str) -> bool:
    """Whether the user's history holds an event with this id."""
    found = database.execute("SELECT 1 FROM events WHERE user = ? AND event = ?", (user.id, event_id))
    return found.fetchone() is not None


def add_user(database: sqlite3.Connection, name: str) -> User:
    """Begin a history."""
    row = (name, 0, NO_TIME, 0, 0)
    added = database.execute("INSERT INTO users (name, length, latest, mark, checksum) VALUES (?, ?, ?, ?, ?)", row)
    return User(int(added.lastrowid or 0), name, 0, NO_TIME, checksum(name))


def add_rows(database: sqlite3.Connection, user: User, rows: Sequence[Row]) -> None:
    """Put events where their times belong, behind others of the same time; only what lies behind is written again."""
    behind = _later_than(database, user, min(time for _, time, _ in rows))
    place = user.length - len(behind)
    mark = mark_at(database, user, place)
    if behind:
        database.execute("DELETE FROM events WHERE user = ? AND number >= ?", (user.id, place))
    ordered = sorted([*behind, *rows], key=lambda row: row[1])
    numbered = []
    for number, row in enumerate(ordered, start=place):
        mark = checksum(mark, *row)
        numbered.append((user.id, number, *row, mark))
    database.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", numbered)
    changed = user._replace(length=place + len(ordered), latest=ordered[-1][1], mark=mark)
    database.execute(
        "UPDATE users SET length = ?, latest = ?, mark = ?, checksum = ? WHERE id = ?",
        (*changed[2:], checksum(*changed), user.id),
    )


def _later_than(database: sqlite3.Connection, user: User, time: float) -> list[Row]:
    """The events at a history's end that are later, compared with their marks."""
    if time >= user.latest:
        return []
    place = user.length
    backwards = "SELECT number, time FROM events WHERE user = ? ORDER BY number DESC"
    for number, other in database.execute(backwards, (user.id,)):
        if not isinstance(other, int | float):
            raise DamageError(f"event {number} of user {user.name!r} has no time")
        if other <= time:
            break
        place = number
    before = max(0, place - 1)  # which is compared too, since it says that none of those before is later
    found = list(read_rows(database, user, before, user.length, mark_at(database, user, before)))
    return [row[:-1] for row in found[place - before :]]


def delete_user(database: sqlite3.Connection, name: str) -> None:
    """Delete a history, whatever state it is in."""
    row = database.execute("SELECT id FROM users WHERE name = ?", (name,)).fetchone()
    if row is not None:
        database.execute("DELETE FROM events WHERE user = ?", row)
        database.execute("DELETE FROM users WHERE id = ?", row)


def bytes_to_delete(database: sqlite3.Connection, names: Sequence[str]) -> int:
    """Room that a write-ahead log needs at most for deleting these users: a copy of every page that changes."""
    page = int(database.execute("PRAGMA page_size").fetchone()[0])
    query = (
        "SELECT SUM(2 * COALESCE(LENGTH(CAST(event AS BLOB)), 0) + LENGTH(CAST(item AS BLOB)) + 64) "
        "FROM events JOIN users ON user = users.id WHERE name = ?"
    )
    pages = 16
    for name in names:
        (size,) = database.execute(query, (name,)).fetchone()
        pages += 24 + 3 * (size or 0) // page  # of both trees; pages are half full at least, and neighbours join
    return min(pages, 16 + int(database.execute("PRAGMA page_count").fetchone()[0])) * (page + 24)


def upgrade(database: sqlite3.Connection) -> None:
    """Bring a log of version 1, whose rows have no checksums, to this version; their content is taken as it is."""
    database.execute("DROP INDEX events_of_users")
    database.execute("ALTER TABLE users RENAME TO old_users")
    database.execute("ALTER TABLE events RENAME TO old_events")
    last = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'old_users'").fetchone()
    create(database)
    for key, name in database.execute("SELECT id, name FROM old_users ORDER BY id").fetchall():
        rows = database.execute("SELECT item, time, event FROM old_events WHERE user = ? ORDER BY number", (key,))
        add_rows(database, add_user(database, name), rows.fetchall())
    database.execute("DROP TABLE old_users")
    database.execute("DROP TABLE old_events")
    if last is not None and not database.execute("SELECT 1 FROM sqlite_sequence WHERE name = 'users'").fetchone():
        database.execute("INSERT INTO sqlite_sequence VALUES ('users', ?)", last)  # it had users once
