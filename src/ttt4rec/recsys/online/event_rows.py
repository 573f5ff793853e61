"""The tables of an event log in SQLite: every row carries a checksum, every event one of the history up to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing

from ttt4rec.recsys.online import event_chain
from ttt4rec.recsys.online.event_chain import NO_TIME, DamageError, MarkedRow, Row, User, checksum

APPLICATION, VERSION = 0x74747434, 2  # "ttt4"
SCHEMA = (
    "CREATE TABLE users (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, length INTEGER NOT NULL, "
    "latest NOT NULL, mark INTEGER NOT NULL, checksum INTEGER NOT NULL)",
    "CREATE TABLE events (user INTEGER NOT NULL, number INTEGER NOT NULL, item TEXT NOT NULL, time NOT NULL, "
    "event TEXT, mark INTEGER NOT NULL, PRIMARY KEY (user, number)) WITHOUT ROWID",
    "CREATE UNIQUE INDEX events_of_users ON events (user, event) WHERE event IS NOT NULL",
)


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
    return None if row is None else event_chain.checked_user(row)


def mark_at(database: sqlite3.Connection, user: User, length: int) -> int:
    """The mark after the first ``length`` events; not compared with them."""
    if length in (0, user.length):
        return user.mark if length else checksum(user.name)
    query = "SELECT mark FROM events WHERE user = ? AND number = ?"
    row = database.execute(query, (user.id, length - 1)).fetchone()
    if row is None:
        raise DamageError(f"event {length - 1} of user {user.name!r} is missing")
    return row[0]  # type: ignore[no-any-return]


def read_rows(database: sqlite3.Connection, user: User, start: int, stop: int, mark: int) -> Iterator[MarkedRow]:
    """Events ``start`` to ``stop``, compared with their marks; ``mark`` is the one before the first."""
    query = "SELECT number, item, time, event, mark FROM events WHERE user = ? AND number >= ? AND number < ?"
    try:
        # closed, or an error that is kept would keep the moment at which the connection reads
        with closing(database.execute(query + " ORDER BY number", (user.id, start, stop))) as rows:
            yield from event_chain.compared(user, start, stop, mark, rows)
    except sqlite3.OperationalError as error:
        if "decode" not in str(error):  # as UTF-8
            raise
        place = _no_text(database, user, start, stop)
        raise DamageError(f"event {place} of user {user.name!r} is no text") from error


def _no_text(database: sqlite3.Connection, user: User, start: int, stop: int) -> int:
    """The first event whose item or id cannot be decoded; a cursor of Python 3.10 fails one row before it."""
    query = "SELECT number, CAST(item AS BLOB), CAST(event AS BLOB) FROM events WHERE user = ? AND number >= ?"
    with closing(database.execute(query + " AND number < ? ORDER BY number", (user.id, start, stop))) as rows:
        for number, *texts in rows:
            try:
                for text in texts:
                    (text or b"").decode()
            except UnicodeDecodeError:
                return int(number)
    return start


def has_event(database: sqlite3.Connection, user: User | None, event_id: str) -> bool:
    """Whether the user's history, if there is one, holds an event with this id."""
    if user is None:
        return False
    found = database.execute("SELECT 1 FROM events WHERE user = ? AND event = ?", (user.id, event_id))
    return found.fetchone() is not None


def add_user(database: sqlite3.Connection, name: str) -> User:
    """Begin a history."""
    row = (name, 0, NO_TIME, 0, 0)
    added = database.execute("INSERT INTO users (name, length, latest, mark, checksum) VALUES (?, ?, ?, ?, ?)", row)
    return event_chain.new_user(int(added.lastrowid or 0), name)


def add_rows(database: sqlite3.Connection, user: User, rows: Sequence[Row]) -> None:
    """Put events where their times belong, behind others of the same time; only what lies behind is written again."""
    behind = _later_than(database, user, min(time for _, time, _ in rows))
    place = user.length - len(behind)
    numbered, changed = event_chain.marked(user, place, mark_at(database, user, place), [*behind, *rows])
    if behind:
        database.execute("DELETE FROM events WHERE user = ? AND number >= ?", (user.id, place))
    database.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", [(user.id, *row) for row in numbered])
    database.execute(
        "UPDATE users SET length = ?, latest = ?, mark = ?, checksum = ? WHERE id = ?",
        (*changed[2:], checksum(*changed), user.id),
    )


def _later_than(database: sqlite3.Connection, user: User, time: float) -> list[Row]:
    """The events at a history's end that are later, compared with their marks."""
    if time >= user.latest:
        return []
    backwards = "SELECT number, time FROM events WHERE user = ? ORDER BY number DESC"
    with closing(database.execute(backwards, (user.id,))) as rows:
        place = event_chain.later_from(user, time, rows)
    before = max(0, place - 1)  # which is compared too, since it says that none of those before is later
    found = list(read_rows(database, user, before, user.length, mark_at(database, user, before)))
    return [(item, other, event) for _, item, other, event, _ in found[place - before :]]


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
