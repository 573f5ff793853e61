"""A connection to PostgreSQL that is replaced when it broke, and whose transactions have one outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any, TypeVar

import psycopg
from psycopg import conninfo as conninfos
from psycopg import errors

T = TypeVar("T")
_PATIENCE = 30.0
"""Seconds to ask what became of a commit."""
_SETTINGS = (
    b"SET extra_float_digits = 1",  # every bit of a time
    # What is looked up is few rows of many, by indices; a server without statistics yet would read whole tables.
    b"SET enable_seqscan = off",
    b"SET enable_hashjoin = off",
    b"SET enable_mergejoin = off",
    b"SET jit = off",  # which the price of the one row of ttt4rec_log, without an index, would call up
)
_AGAIN = (errors.DeadlockDetected, errors.SerializationFailure)
_ATTEMPTS = 10


class UnknownOutcomeError(psycopg.OperationalError):
    """Nobody can say whether a transaction was committed."""


class Session:
    """One connection, for one transaction at a time.

    Args:
        conninfo: the database.
        flush: whether a commit waits for the server's disk.

    Raises:
        ValueError: the conninfo is none.
    """

    def __init__(self, conninfo: str, flush: bool) -> None:
        try:
            known = conninfos.conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError as error:
            message = str(error).strip().splitlines()[0]
            raise ValueError(f"the event log must be a database as libpq takes it; given another: {message}") from error
        self.name = f"the database {known.get('dbname', 'of the user')} on {known.get('host', 'this machine')}"
        self._conninfo, self._flush = conninfo, flush
        self._connection: psycopg.Connection[Any] | None = None
        self._lock, self._closed = threading.Lock(), False

    def run(self, work: Callable[[psycopg.Connection[Any]], T], *, reading: bool = False) -> T:
        """What work returns, all of whose statements take effect, or none; work may be called again.

        Args:
            work: gets the connection, in a transaction.
            reading: everything is read as of one moment, and nothing is written.

        Raises:
            psycopg.Error: nothing took effect. UnknownOutcomeError: that is unknown.
        """
        mode = "ISOLATION LEVEL REPEATABLE READ READ ONLY" if reading else "ISOLATION LEVEL READ COMMITTED"
        with self._lock:
            for attempt in range(_ATTEMPTS):
                fresh = self._connection is None or self._connection.closed
                connection = self._connect() if fresh else self._connection
                assert connection is not None
                try:
                    connection.execute(f"BEGIN {mode}".encode())
                    result = work(connection)
                    number = None if reading else _number(connection)
                except BaseException as error:
                    self._leave(connection)
                    lost = connection.closed and not fresh and isinstance(error, psycopg.OperationalError)
                    if (lost or isinstance(error, _AGAIN)) and attempt + 1 < _ATTEMPTS:
                        continue
                    raise
                self._commit(connection, number)
                return result
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Close the connection for good."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()

    def _connect(self) -> psycopg.Connection[Any]:
        if self._closed:
            raise psycopg.OperationalError("it was closed")
        connection = psycopg.connect(self._conninfo, autocommit=True, client_encoding="UTF8")
        try:
            for setting in _SETTINGS:
                connection.execute(setting)
            (commit,) = connection.execute("SHOW synchronous_commit").fetchone() or ("off",)
            if not self._flush:
                connection.execute("SET synchronous_commit = off")
            elif commit == "off":
                connection.execute("SET synchronous_commit = on")
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _leave(self, connection: psycopg.Connection[Any]) -> None:
        """End a transaction in which something went wrong; the connection too if it cannot be told to."""
        try:
            connection.execute("ROLLBACK")
        except psycopg.Error:
            connection.close()

    def _commit(self, connection: psycopg.Connection[Any], number: str | None) -> None:
        try:
            connection.execute("COMMIT")
        except BaseException as error:
            connection.close()
            if number is None or self._is_committed(number, error):
                if not isinstance(error, psycopg.Error):  # an interruption
                    raise
                return
            raise

    def _is_committed(self, number: str, error: BaseException) -> bool:
        """Whether a transaction was, by the server's word."""
        deadline = monotonic() + _PATIENCE
        while True:
            try:
                row = self._connect().execute("SELECT pg_xact_status(%s::xid8)", (number,)).fetchone()
                if row is not None and row[0] in ("committed", "aborted"):
                    return bool(row[0] == "committed")
            except psycopg.Error:
                pass
            if monotonic() > deadline:
                raise UnknownOutcomeError(
                    "the connection broke while a batch was committed, and the server does not say what became of it; "
                    "send the batch again, with event ids"
                ) from error
            sleep(0.1)


def _number(connection: psycopg.Connection[Any]) -> str | None:
    """The running transaction's, None if it has written nothing."""
    row = connection.execute("SELECT pg_current_xact_id_if_assigned()::text").fetchone()
    return None if row is None else row[0]
