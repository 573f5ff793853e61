"""The event log: every user's history, durable and in order; what anything else knows of a user comes from it."""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple, Protocol

import numpy as np

from ttt4rec.recsys.data import DataError, Histories

_APPLICATION, _VERSION = 0x74747434, 1  # "ttt4"
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
CREATE TABLE users (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, length INTEGER NOT NULL, latest NOT NULL
);
CREATE TABLE events (
    user INTEGER NOT NULL, number INTEGER NOT NULL, item TEXT NOT NULL, time NOT NULL, event TEXT,
    PRIMARY KEY (user, number)
) WITHOUT ROWID;
CREATE UNIQUE INDEX events_of_users ON events (user, event) WHERE event IS NOT NULL;
"""
_NO_TIME = -math.inf
_PATIENCE = 30
"""Seconds to wait for other processes."""
_PATIENCE_WIPING = 0.5
"""The same where others of this process wait meanwhile."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A user took an item.

    Attributes:
        user_id: who; a text of at least one character, as is item_id.
        item_id: what.
        event_id: tells a repeated message from a repeated act: of one user's events with the same id only the first
            counts. None: the event is always new.
        time: its place among the user's events, in any unit; equal times keep the order of arrival. None: behind all
            that are there.

    Raises:
        DataError: an id is not a text with a character, or the time not a finite int or float of 64 bits.
    """

    user_id: str
    item_id: str
    event_id: str | None = None
    time: float | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("user_id", "item_id", "event_id"):
            value = getattr(self, name)
            if not is_text(value) and not (name == "event_id" and value is None):
                raise DataError(f"{name} must be a text of at least one character; given {value!r}")
        if self.time is not None and not _is_time(self.time):
            raise DataError(f"time must be a finite int or float of 64 bits; given {self.time!r}")


def events_of(histories: Histories) -> list[Event]:
    """All that the users of a data set did, with its times, to begin a log with."""
    owners = np.repeat(np.arange(histories.num_users), np.diff(histories.offsets)).tolist()
    return [
        Event(histories.user_ids[user], histories.item_ids[item - 1], time=time)
        for user, item, time in zip(owners, histories.items.tolist(), histories.times.tolist(), strict=True)
    ]


def is_text(value: object) -> bool:
    """Whether something can be an id: a text with a character, and with none that no file can hold."""
    if not isinstance(value, str) or not value:
        return False
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _is_time(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, float) and math.isfinite(value)


class Known(NamedTuple):
    """What a reader has of a history: its version and so many of its items."""

    version: int
    length: int


NOTHING = Known(0, 0)


class Tail(NamedTuple):
    """What a reader has not: the items from ``start`` on.

    ``version`` stays while items are put at a history's end and changes to one never used before when the history
    changes in any other way; 0 is that of a user without events. ``start`` is the known length if the known version
    is this one, else 0.
    """

    version: int
    start: int
    items: list[str]


class EventLog(Protocol):
    """What ``OnlineRecommender`` needs of a store of events; several threads call its methods at once."""

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Log a batch; when it returns, all of it is durable, and when it raises, nothing of it is logged.

        Events of a user go where ``Event.time`` and ``Event.event_id`` say.

        Returns:
            For each event whether it was new, not logged already under its ``event_id``.

        Raises:
            OSError: the store cannot take them.
        """
        ...

    def read(self, user_ids: Sequence[str], known: Sequence[Known]) -> list[Tail]:
        """For each user what lies beyond what is known, all of the same moment; every finished append is seen.

        Raises:
            OSError: the store cannot be read.
        """
        ...

    def forget(self, user_ids: Sequence[str]) -> None:
        """Delete these users' histories for good; users without one are passed over.

        Raises:
            OSError: the store cannot delete; nothing is deleted then.
        """
        ...


class SQLiteEventLog:
    """An ``EventLog`` in an SQLite file, for any number of threads, and of processes of one machine.

    A batch is one transaction in a write-ahead log that is flushed to the disk before ``append`` returns
    (``synchronous=FULL``). Deleted histories are overwritten with zeros.

    Args:
        path: the file, made if missing; two more, ``-wal`` and ``-shm``, lie beside it while it is open.

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be opened or made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.name == ":memory:":
            raise ValueError("the event log must be a file; given ':memory:', which every connection has for itself")
        self._unwiped = False
        self._locks = threading.Lock(), threading.Lock()
        self._writer, self._reader = self._connect(), self._connect()
        with self._transaction(writing=True) as database:
            if _is_empty(database):
                for statement in _SCHEMA.split(";\n"):
                    database.execute(statement)

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See ``EventLog``."""
        by_user: dict[str, list[int]] = {}
        for number, event in enumerate(events):
            by_user.setdefault(event.user_id, []).append(number)
        new = [False] * len(events)
        with self._transaction(writing=True) as database:
            for user, numbers in by_user.items():
                taken = _append(database, user, [events[number] for number in numbers])
                for number, is_new in zip(numbers, taken, strict=True):
                    new[number] = is_new
        if self._unwiped:
            self._wipe(0)
        return new

    def read(self, user_ids: Sequence[str], known: Sequence[Known]) -> list[Tail]:
        """See ``EventLog``."""
        tails = []
        with self._transaction(writing=False) as database:
            for user, (version, length) in zip(user_ids, known, strict=True):
                row = database.execute("SELECT id, length FROM users WHERE name = ?", (user,)).fetchone()
                if row is None:
                    tails.append(Tail(0, 0, []))
                    continue
                start = length if row[0] == version and length <= row[1] else 0
                query = "SELECT item FROM events WHERE user = ? AND number >= ? ORDER BY number"
                items = database.execute(query, (row[0], start)) if start < row[1] else ()
                tails.append(Tail(row[0], start, [item for (item,) in items]))
        return tails

    def forget(self, user_ids: Sequence[str]) -> None:
        """See ``EventLog``.

        While another process reads, what was deleted may still stand in the ``-wal`` file: a warning to ``logging``
        says so, and one of the next calls wipes it.
        """
        with self._transaction(writing=True) as database:
            for user in user_ids:
                _delete(database, user)
        self._wipe(_PATIENCE_WIPING)
        if self._unwiped:
            logger.warning("what was forgotten stands in %s-wal until no other process reads the log", self.path)

    def users(self) -> list[str]:
        """All users that have a history, in the order in which these began or were last rewritten."""
        with self._transaction(writing=False) as database:
            return [name for (name,) in database.execute("SELECT name FROM users ORDER BY id")]

    def close(self) -> None:
        """Close the file; the log cannot be used any more."""
        for lock, connection in zip(self._locks, (self._writer, self._reader), strict=True):
            with lock:
                connection.close()

    def _wipe(self, patience: float) -> None:
        """Empty the ``-wal`` file, in which what was deleted still stands; seconds to wait for those who read it."""
        with self._locks[0], suppress(sqlite3.OperationalError):
            self._unwiped = True
            try:
                self._writer.execute(f"PRAGMA busy_timeout = {round(1000 * patience)}")
                (busy, *_) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self._unwiped = bool(busy)
            finally:
                self._writer.execute(f"PRAGMA busy_timeout = {1000 * _PATIENCE}")

    def _connect(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            connection.execute("BEGIN")  # what follows is of one moment: another process may be making the file
            marks = tuple(connection.execute(f"PRAGMA {x}").fetchone()[0] for x in ("application_id", "user_version"))
            is_other = marks != (_APPLICATION, _VERSION) and not _is_empty(connection)
            connection.execute("COMMIT")
            if is_other:
                raise ValueError(f"{self.path} is a database, but no event log of version {_VERSION}")
            _write_ahead(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
        except sqlite3.OperationalError as error:
            raise OSError(f"cannot open the event log {self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is not an event log: {error}") from error
        return connection

    @contextmanager
    def _transaction(self, *, writing: bool) -> Iterator[sqlite3.Connection]:
        """All or nothing; sqlite3's errors become OSError."""
        lock, database = (self._locks[0], self._writer) if writing else (self._locks[1], self._reader)
        with lock:
            try:
                database.execute("BEGIN IMMEDIATE" if writing else "BEGIN")
                yield database
                database.execute("COMMIT")
            except BaseException as error:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    what = "write to" if writing else "read"
                    raise OSError(f"cannot {what} the event log {self.path}, which is as before: {error}") from error
                raise


def _write_ahead(database: sqlite3.Connection) -> None:
    """Switch to a write-ahead log, for which SQLite itself waits for nobody: processes that make a file may meet."""
    deadline = monotonic() + _PATIENCE
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or monotonic() > deadline:
                raise
            sleep(0.01)


def _is_empty(database: sqlite3.Connection) -> bool:
    return database.execute("SELECT 1 FROM sqlite_master").fetchone() is None


def _append(database: sqlite3.Connection, user: str, events: Sequence[Event]) -> list[bool]:
    """Log one user's events; which of them are new."""
    row = database.execute("SELECT id, length, latest FROM users WHERE name = ?", (user,)).fetchone()
    key, length, latest = row or (0, 0, _NO_TIME)
    new, rows, ids = [], [], set()
    newest = latest
    for event in events:
        is_new = event.event_id is None or not (event.event_id in ids or _has(database, key, event.event_id))
        new.append(is_new)
        if is_new:
            ids.add(event.event_id)
            time = newest if event.time is None else event.time
            newest = max(newest, time)
            rows.append((event.item_id, time, event.event_id))
    if not rows:
        return new
    if min(time for _, time, _ in rows) < latest:  # out of order: the history begins anew, with another version
        query = "SELECT item, time, event FROM events WHERE user = ? ORDER BY number"
        rows = database.execute(query, (key,)).fetchall() + rows
        _delete(database, user)
        key, length = 0, 0
    rows.sort(key=lambda row: row[1])
    if not key:
        insertion = database.execute("INSERT INTO users (name, length, latest) VALUES (?, 0, ?)", (user, newest))
        key = insertion.lastrowid
    numbered = [(key, length + i, *row) for i, row in enumerate(rows)]
    database.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", numbered)
    database.execute("UPDATE users SET length = ?, latest = ? WHERE id = ?", (length + len(rows), newest, key))
    return new


def _has(database: sqlite3.Connection, key: int, event_id: str) -> bool:
    found = database.execute("SELECT 1 FROM events WHERE user = ? AND event = ?", (key, event_id))
    return found.fetchone() is not None


def _delete(database: sqlite3.Connection, user: str) -> None:
    row = database.execute("SELECT id FROM users WHERE name = ?", (user,)).fetchone()
    if row is not None:
        database.execute("DELETE FROM events WHERE user = ?", row)
        database.execute("DELETE FROM users WHERE id = ?", row)
