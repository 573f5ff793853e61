"""The event log: every user's history, durable and in order; what anything else knows of a user comes from it."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ttt4rec.recsys.data import DataError, Histories
from ttt4rec.recsys.online import event_chain, event_rows
from ttt4rec.recsys.online.group_commit import GroupCommit

_PATIENCE = 30
"""Seconds to wait for other processes."""
_PATIENCE_WIPING = 0.5
"""The same where others of this process wait meanwhile."""
_PAGES_AHEAD = 4000
"""Pages, 16 MB, that the write-ahead log has before they are moved to where they belong: seven requests of 64
users fill SQLite's own 1,000, and many a page would be moved again and again."""
_CHECKED_AT_ONCE = 2048
"""Events; others wait while these are read."""

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
        if self.time is not None and not is_time(self.time):
            raise DataError(f"time must be a finite int or float of 64 bits; given {self.time!r}")


def events_of(histories: Histories) -> list[Event]:
    """All that the users of a data set did, with its times, to begin a log with.

    The event ids are places in the users' histories, so that a log takes a data set once, however often it is sent.
    """
    lengths = np.diff(histories.offsets)
    owners = np.repeat(np.arange(histories.num_users), lengths).tolist()
    places = (np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], lengths)).tolist()
    columns = owners, histories.items.tolist(), histories.times.tolist(), places
    users, items = (list(map(str, ids)) for ids in (histories.user_ids, histories.item_ids))
    return [
        Event(users[user], items[item - 1], f"data set: {place}", time)
        for user, item, time, place in zip(*columns, strict=True)
    ]


def is_text(value: object) -> bool:
    """Whether something can be an id: a text with a character, and with none that no file can hold."""
    if not isinstance(value, str) or not value:
        return False
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def is_time(value: object) -> bool:
    """Whether something can be the time of an event: a finite int or float of 64 bits."""
    if isinstance(value, int):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, float) and math.isfinite(value)


class Known(NamedTuple):
    """A beginning of a history that a reader has: its length in items, and the log's mark after it."""

    length: int
    mark: int


class Tail(NamedTuple):
    """What a reader has not.

    Attributes:
        start: the length of the longest known beginning that still is one of the history; 0 if none is.
        items: what comes next, all or as much as was asked for.
        marks: the log's after each of these: 64 bits of all events up to there, so that two histories with the same
            mark after the same number of items begin with the same events.
        length: of the whole history at present.
        times: when these events happened; minus infinity for one without a time that no other was before. A log may
            leave them out for models that read no times.
    """

    start: int
    items: list[str]
    marks: list[int]
    length: int
    times: tuple[float, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether the items go to the history's end."""
        return self.start + len(self.items) == self.length


def event_tail(start: int, rows: Sequence[event_chain.MarkedRow], length: int) -> Tail:
    """The tail of a history of ``length`` events whose ``rows`` from ``start`` on were read."""
    return Tail(start, [row[1] for row in rows], [row[-1] for row in rows], length, tuple(row[2] for row in rows))


class DamagedLogError(OSError):
    """What the log holds is not what was written to it: a bit has changed on the disk, say."""


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

    def read(self, user_ids: Sequence[str], known: Sequence[Sequence[Known]], limit: int | None = None) -> list[Tail]:
        """For each user what lies beyond what is known, all of the same moment; every finished append is seen.

        Args:
            user_ids: whose histories.
            known: for each user any number of beginnings, the longest first.
            limit: items at most, of all users together, the first users' first; None: all.

        Raises:
            OSError: the store cannot be read. DamagedLogError: a part of what was asked for is damaged.
        """
        ...

    def forget(self, user_ids: Sequence[str]) -> None:
        """Delete these users' histories for good; users without one are passed over.

        Raises:
            OSError: the store cannot delete; nothing is deleted then.
        """
        ...


@runtime_checkable
class CheckedEventLog(EventLog, Protocol):
    """A log that compares itself with checksums.

    Attributes:
        damage: what was found damaged since the log was opened; None: nothing.
    """

    damage: str | None

    def check(self, stop: Callable[[], bool] = bool) -> None:
        """Read the whole log, which others use meanwhile, and compare it with its checksums.

        Args:
            stop: asked before each user; ends the check when it says True.

        Raises:
            DamagedLogError: names the first damaged event, user or page. OSError: the log cannot be read.
        """
        ...


def check_histories(log: EventLog, users: Sequence[str], stop: Callable[[], bool]) -> None:
    """Read all histories of some users, piece by piece; see ``CheckedEventLog.check``."""
    for user in users:
        if stop():
            return
        known: tuple[Known, ...] = ()
        while not (tail := log.read([user], [known], _CHECKED_AT_ONCE)[0]).is_whole:
            known = (Known(tail.start + len(tail.items), tail.marks[-1]),)


def by_user(events: Sequence[Event]) -> dict[str, list[int]]:
    """Places of every user's events in a batch."""
    places: dict[str, list[int]] = {}
    for place, event in enumerate(events):
        places.setdefault(event.user_id, []).append(place)
    return places


class SQLiteEventLog:
    """An ``EventLog`` in an SQLite file, for any number of threads, and of processes of one machine.

    A batch is part of one transaction in a write-ahead log that is flushed to the disk before ``append`` returns
    (``synchronous=FULL``); batches that threads append at once share it, see ``GroupCommit``. Deleted histories are
    overwritten with zeros. The file is checked as a whole when it is opened, and every row by its checksum when it is
    read. A file of version 1, without checksums, is brought to the present version, which takes as much room again
    while it lasts. Only the owner may read a file that is made here.

    Args:
        path: the file, made if missing; two more, ``-wal`` and ``-shm``, lie next to it while it is open.
        flush: whether ``append`` waits for the disk. If not (``synchronous=NORMAL``), a process that is killed still
            loses nothing; but when the power fails or the system crashes, the last batches for which ``append``
            returned may be gone. The log stays whole, with those before them.

    Attributes:
        damage: what was found damaged since the log was opened; None: nothing.

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be opened or made. DamagedLogError: it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, flush: bool = True) -> None:
        self.path, self._flush = Path(path), flush
        if self.path.name == ":memory:":
            raise ValueError("the event log must be a file; given ':memory:', which every connection has for itself")
        self.damage: str | None = None
        self._unwiped = False
        self._locks = threading.Lock(), threading.Lock()
        self._commits = GroupCommit(self._write)
        self._make_private()
        self._writer, self._reader = self._connect(), self._connect()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See ``EventLog``. An event that comes late costs what lies behind it in its user's history."""
        new = self._commits.append(events)
        if self._unwiped:
            self._wipe(0)
        return new

    def begin(self, histories: Histories) -> bool:
        """Log a data set if nothing was ever logged here; of several who try at once, one does.

        Nothing is logged either if all users of before were forgotten.

        Returns:
            Whether it was logged.

        Raises:
            OSError: as ``append``.
        """
        used = "SELECT 1 FROM sqlite_sequence"  # whose row stays when all others are deleted
        with self._transaction(writing=False) as database:
            if database.execute(used).fetchone():
                return False
        events = events_of(histories)
        with self._transaction(writing=True) as database:
            if database.execute(used).fetchone():
                return False
            _append(database, events)
        return True

    def read(self, user_ids: Sequence[str], known: Sequence[Sequence[Known]], limit: int | None = None) -> list[Tail]:
        """See ``EventLog``."""
        tails = []
        left = math.inf if limit is None else limit
        with self._transaction(writing=False) as database:
            for user, beginnings in zip(user_ids, known, strict=True):
                tails.append(_read(database, user, beginnings, left))
                left -= len(tails[-1].items)
        return tails

    def forget(self, user_ids: Sequence[str]) -> None:
        """See ``EventLog``.

        Deleting takes room next to the file until it has happened; the error of a full disk says how much. While
        somebody else reads, what was deleted may still stand in the ``-wal`` file: a warning to ``logging`` says so,
        and one of the next calls wipes it.
        """
        room = 0
        try:
            with self._transaction(writing=True) as database:
                room = event_rows.bytes_to_delete(database, user_ids)
                for user in user_ids:
                    event_rows.delete_user(database, user)
        except OSError as error:
            if not any(word in str(error.__cause__) for word in ("full", "I/O")):
                raise
            free = shutil.disk_usage(self.path.parent).free
            raise OSError(f"{error}; to forget them takes up to {room:,} bytes on its disk, where {free:,} are free; "
                          "make room, and forget them again") from error  # fmt: skip
        self._wipe(_PATIENCE_WIPING)
        if self._unwiped:
            logger.warning("what was forgotten stands in %s-wal until nobody else reads the log", self.path)

    def check(self, stop: Callable[[], bool] = bool) -> None:
        """See ``CheckedEventLog``."""
        with closing(self._connect()) as database, self._whole(database, writing=False):
            event_rows.check_file(database)
        check_histories(self, self.users(), stop)

    def users(self) -> list[str]:
        """All users that have a history, in the order in which these began."""
        with self._transaction(writing=False) as database:
            return [name for (name,) in database.execute("SELECT name FROM users ORDER BY id")]

    def close(self) -> None:
        """Close the file; the log cannot be used any more."""
        for lock, connection in zip(self._locks, (self._writer, self._reader), strict=True):
            with lock:
                connection.close()

    def _write(self, events: Sequence[Event]) -> list[bool]:
        with self._transaction(writing=True) as database:
            return _append(database, events)

    def _wipe(self, patience: float) -> None:
        """Empty the ``-wal`` file, where deleted events still stand; seconds to wait for others who read it."""
        with self._locks[0], suppress(sqlite3.OperationalError):
            self._unwiped = True
            try:
                self._writer.execute(f"PRAGMA busy_timeout = {round(1000 * patience)}")
                (busy, *_) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self._unwiped = bool(busy)
            finally:
                self._writer.execute(f"PRAGMA busy_timeout = {1000 * _PATIENCE}")

    def _prepare(self) -> None:
        with self._transaction(writing=True) as database:
            if _is_empty(database):
                event_rows.create(database)
            elif _marks(database)[1] < event_rows.VERSION:
                event_rows.upgrade(database)
                self.path.chmod(0o600)
        with self._transaction(writing=False) as database:
            event_rows.check_file(database)

    def _make_private(self) -> None:
        """Make the file, if it is missing, for its owner alone; SQLite gives the others next to it the same mode."""
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            pass
        except OSError as error:
            raise OSError(f"cannot open the event log {self.path}: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            connection.execute("BEGIN")  # what follows is of one moment: another process may be making the file
            application, version = _marks(connection)
            is_log = application == event_rows.APPLICATION and 1 <= version <= event_rows.VERSION
            is_other = not is_log and not _is_empty(connection)
            connection.execute("COMMIT")
            if is_other:
                raise ValueError(
                    f"{self.path} is a database, but no event log of version {event_rows.VERSION} or before"
                )
            _write_ahead(connection)
            connection.execute(f"PRAGMA synchronous = {'FULL' if self._flush else 'NORMAL'}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {_PAGES_AHEAD}")
            connection.execute("PRAGMA secure_delete = ON")
        except sqlite3.OperationalError as error:
            raise OSError(f"cannot open the event log {self.path}: {error}") from error
        except (
            sqlite3.DatabaseError,
            UnicodeDecodeError,
        ) as error:  # the latter where a message quotes what is no text
            raise ValueError(f"{self.path} is not an event log: {error}") from error
        return connection

    @contextmanager
    def _transaction(self, *, writing: bool) -> Iterator[sqlite3.Connection]:
        """All or nothing, one at a time."""
        lock, database = (self._locks[0], self._writer) if writing else (self._locks[1], self._reader)
        with lock, self._whole(database, writing=writing):
            yield database

    @contextmanager
    def _whole(self, database: sqlite3.Connection, *, writing: bool) -> Iterator[None]:
        """All or nothing; sqlite3's errors become OSError."""
        try:
            database.execute("BEGIN IMMEDIATE" if writing else "BEGIN")
            yield
            database.execute("COMMIT")
        except BaseException as error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            if isinstance(error, event_chain.DamageError | UnicodeDecodeError) or "malformed" in str(error):
                self.damage = str(error)
                raise DamagedLogError(
                    f"the event log {self.path} is damaged: {error}; restore the file from a backup, or forget "
                    "the user who is named"
                ) from error
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


def _marks(database: sqlite3.Connection) -> tuple[int, int]:
    """Whose file it is, and of which version."""
    application, version = (database.execute(f"PRAGMA {x}").fetchone()[0] for x in ("application_id", "user_version"))
    return application, version


def _append(database: sqlite3.Connection, events: Sequence[Event]) -> list[bool]:
    """Log a batch; which of the events are new."""
    new = [False] * len(events)
    for name, numbers in by_user(events).items():
        user = event_rows.find_user(database, name)
        latest = user.latest if user else event_chain.NO_TIME
        is_new, rows = event_chain.new_rows(
            [events[number] for number in numbers], latest, partial(event_rows.has_event, database, user)
        )
        for number, value in zip(numbers, is_new, strict=True):
            new[number] = value
        if rows:
            event_rows.add_rows(database, user or event_rows.add_user(database, name), rows)
    return new


def _read(database: sqlite3.Connection, name: str, known: Sequence[Known], limit: float) -> Tail:
    """What one user's history has beyond the longest beginning that is known and still one."""
    user = event_rows.find_user(database, name)
    if user is None:
        return Tail(0, [], [], 0)
    start, mark = event_chain.beginning(user, known, partial(event_rows.mark_at, database, user))
    stop = int(min(user.length, start + limit))
    rows = list(event_rows.read_rows(database, user, start, stop, mark)) if start < stop else []
    return event_tail(start, rows, user.length)
