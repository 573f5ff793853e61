"""The event log in a PostgreSQL database, for services on several machines (needs the package ``psycopg``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg import errors

from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.online import event_chain, postgres_rows
from ttt4rec.recsys.online.events import (
    DamagedLogError,
    Event,
    Known,
    Tail,
    by_user,
    check_histories,
    event_tail,
    events_of,
)
from ttt4rec.recsys.online.group_commit import GroupCommit
from ttt4rec.recsys.online.postgres_session import Session, UnknownOutcomeError

T = TypeVar("T")
_DAMAGED = (errors.DataCorrupted, errors.IndexCorrupted, event_chain.DamageError)


class PostgresEventLog:
    """An ``EventLog`` in a PostgreSQL database, for any number of threads, processes and machines.

    A batch is part of one transaction, which the server has flushed to its disk before ``append`` returns; batches that
    threads append at once share it, see ``GroupCommit``. Users' rows are locked in one order, so that writers of the
    same users follow each other. Every row is compared with its checksum when it is read. The tables, ``ttt4rec_log``,
    ``_users`` and ``_events``, are made if missing, in the first schema of the search path.

    A connection that breaks, since the server was started again say, is replaced at the next call. Should it break
    while a batch is committed, the server is asked what became of it for up to 30 seconds.

    Deleted rows stay in the server's files until it vacuums, and in its write-ahead logs and backups until these go.

    Args:
        conninfo: the database, as libpq takes it: ``postgresql://user@host/database`` or ``host=... dbname=...``. A
            password belongs into ``$PGPASSWORD`` or ``~/.pgpass``.
        flush: whether ``append`` waits for the server's disk (``synchronous_commit``). If not, and the server crashes,
            the last batches for which ``append`` returned may be gone.

    Attributes:
        damage: what was found damaged since the log was opened; None: nothing.

    Raises:
        ValueError: the conninfo is none, the tables are another version's, or the server never flushes (``fsync``).
        OSError: the database cannot be reached or the tables not be made.
    """

    def __init__(self, conninfo: str, *, flush: bool = True) -> None:
        self.damage: str | None = None
        self._used = False
        self._commits = GroupCommit(self._write)
        self._writer, self._reader = Session(conninfo, flush), Session(conninfo, flush)
        try:
            if flush and not self._run(self._reader, postgres_rows.flushes):
                raise ValueError(f"fsync must be on in {self._reader.name}; given off; or log without flush")
            self._run(self._writer, postgres_rows.prepare)
        except BaseException:
            self.close()
            raise

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See ``EventLog``. An event that comes late costs what lies behind it in its user's history.

        Raises:
            OSError: also if the connection broke while the batch was committed, and the server cannot be asked what
                became of it; the message says so. Send that batch again, with event ids.
        """
        return self._commits.append(events) if events else []

    def begin(self, histories: Histories) -> bool:
        """Log a data set if nothing was ever logged here; of several who try at once, one does.

        Nothing is logged either if all users of before were forgotten.

        Returns:
            Whether it was logged.

        Raises:
            OSError: as ``append``.
        """
        if self._run(self._reader, postgres_rows.is_used):
            return False
        events = events_of(histories)

        def work(database: psycopg.Connection[Any]) -> bool:
            if not postgres_rows.use(database):
                return False
            _append(database, events)
            return True

        return self._run(self._writer, work)

    def read(self, user_ids: Sequence[str], known: Sequence[Sequence[Known]], limit: int | None = None) -> list[Tail]:
        """See ``EventLog``."""
        if not user_ids:
            return []
        return self._run(self._reader, lambda database: _read(database, user_ids, known, limit), reading=True)

    def forget(self, user_ids: Sequence[str]) -> None:
        """See ``EventLog``."""
        self._run(self._writer, lambda database: postgres_rows.delete_users(database, user_ids))

    def check(self, stop: Callable[[], bool] = bool) -> None:
        """See ``CheckedEventLog``; the server's own checks are ``initdb --data-checksums`` and ``pg_amcheck``."""
        check_histories(self, self.users(), stop)

    def users(self) -> list[str]:
        """All users that have a history, in the order in which these began; of one batch, in the order of the ids."""
        return self._run(self._reader, postgres_rows.users)

    def close(self) -> None:
        """Close the connections; the log cannot be used any more."""
        for session in (self._writer, self._reader):
            session.close()

    def _write(self, events: Sequence[Event]) -> list[bool]:
        def work(database: psycopg.Connection[Any]) -> list[bool]:
            if not self._used:
                postgres_rows.use(database)
            return _append(database, events)

        new = self._run(self._writer, work)
        self._used = True
        return new

    def _run(self, session: Session, work: Callable[[psycopg.Connection[Any]], T], *, reading: bool = False) -> T:
        """What work returns, in one transaction; psycopg's errors become OSError."""
        try:
            return session.run(work, reading=reading)
        except _DAMAGED as error:
            self.damage = str(error)
            raise DamagedLogError(
                f"the event log in {session.name} is damaged: {error}; restore the database from a backup, or forget "
                "the user who is named"
            ) from error
        except psycopg.Error as error:
            what = "write to" if session is self._writer else "read"
            reason = " ".join(str(error).split())
            state = "" if isinstance(error, UnknownOutcomeError) else ", which is as before"
            raise OSError(f"cannot {what} the event log in {session.name}{state}: {reason}") from error


def _append(database: psycopg.Connection[Any], events: Sequence[Event]) -> list[bool]:
    """Log a batch; which of the events are new."""
    new, changes = [False] * len(events), list[postgres_rows.Change]()
    places = by_user(events)
    users = postgres_rows.locked(database, list(places))
    ids = [(users[event.user_id].id, event.event_id) for event in events if event.event_id is not None]
    logged = postgres_rows.logged(database, ids)
    for name, numbers in places.items():
        user = users[name]
        is_new, rows = event_chain.new_rows(
            [events[number] for number in numbers],
            user.latest,
            lambda event_id, owner=user.id: (owner, event_id) in logged,  # type: ignore[misc]
        )
        for number, value in zip(numbers, is_new, strict=True):
            new[number] = value
        if rows:
            behind = postgres_rows.later_than(database, user, min(time for _, time, _ in rows))
            place = user.length - len(behind)
            mark = postgres_rows.marks(database, [(user, place)])[0]
            numbered, changed = event_chain.marked(user, place, mark, [*behind, *rows])
            changes.append(postgres_rows.Change(user, place, numbered, changed))
    postgres_rows.write(database, changes)
    return new


def _read(
    database: psycopg.Connection[Any], names: Sequence[str], known: Sequence[Sequence[Known]], limit: int | None
) -> list[Tail]:
    """What histories have beyond the longest beginnings that are known and still theirs."""
    users = postgres_rows.find(database, names)
    wanted = [
        (user, length)
        for name, beginnings in zip(names, known, strict=True)
        if (user := users.get(name)) is not None
        for length, _ in beginnings
        if length <= user.length
    ]
    marks = dict(zip(((user.id, n) for user, n in wanted), postgres_rows.marks(database, wanted), strict=True))
    left = math.inf if limit is None else limit
    spans: list[postgres_rows.Span | None] = []
    for name, beginnings in zip(names, known, strict=True):
        user = users.get(name)
        if user is None:
            spans.append(None)
            continue
        start, mark = event_chain.beginning(user, beginnings, lambda n, owner=user.id: marks[owner, n])  # type: ignore[misc]
        stop = int(min(user.length, start + left))
        left -= stop - start
        spans.append(postgres_rows.Span(user, start, stop, mark))
    found = iter(postgres_rows.read(database, [span for span in spans if span is not None]))
    tails = []
    for span in spans:
        rows = [] if span is None else next(found)
        start, length = (0, 0) if span is None else (span.start, span.user.length)
        tails.append(event_tail(start, rows, length))
    return tails
