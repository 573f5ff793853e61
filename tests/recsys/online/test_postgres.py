"""The event log in PostgreSQL when things go wrong, and several services on one log."""

import multiprocessing
import os
import signal
from collections import Counter
from contextlib import closing

import numpy as np
import psycopg
import pytest
from psycopg import errors

from tests.support.crash import fork, wait
from tests.support.online_data import (
    ITEMS,
    MODELS,
    append_two_users,
    assert_damage_is_named,
    assert_up_to_date,
    history,
    make_online,
)
from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.online import postgres_session
from ttt4rec.recsys.online.events import Event, Known, events_of
from ttt4rec.recsys.online.postgres import PostgresEventLog
from ttt4rec.recsys.online.sharing import service_of

pytestmark = pytest.mark.slow  # it wants PostgreSQL's programs, which the quick tests do not


@pytest.fixture
def conninfo(server):
    return server.conninfo()


@pytest.fixture
def log(conninfo):
    with closing(PostgresEventLog(conninfo)) as made:
        yield made


def test_it_outlives_its_server(server, conninfo, log):
    """Killed without time to write anything; those who have the log open go on when it is back."""
    log.append([Event("ü", "ä\x00b", "1", time=2.5), Event("v", "b", time=-0.0)])
    before = log.read(["ü", "v"], [[], []])
    server.kill()
    with pytest.raises(OSError, match="cannot write to the event log in the database postgres on /"):
        log.append([Event("w", "a")])
    with pytest.raises(OSError, match="cannot read the event log"):
        log.read(["ü"], [[]])
    server.start()
    assert log.read(["ü", "v"], [[], []]) == before
    assert log.append([Event("ü", "c", "1"), Event("ü", "d")]) == [False, True]
    assert history(log, "ü") == ["ä\x00b", "d"]
    assert log.users() == ["v", "ü"]
    log.check()


@pytest.mark.parametrize(
    ("default", "flush", "used"), [("off", True, "on"), ("on", False, "off"), ("local", True, "local")]
)
def test_a_commit_is_flushed_whatever_the_default(conninfo, default, flush, used):
    own = conninfo.replace("search_path", f"synchronous_commit={default} -c search_path")
    with closing(PostgresEventLog(own, flush=flush)) as log:
        assert log._writer.run(lambda database: database.execute("SHOW synchronous_commit").fetchone()) == (used,)


def test_a_server_that_never_flushes_is_refused(server, conninfo):
    server.execute("ALTER SYSTEM SET fsync = off")
    server.kill()
    server.start()
    try:
        with pytest.raises(ValueError, match="fsync must be on in the database postgres"):
            PostgresEventLog(conninfo)
        PostgresEventLog(conninfo, flush=False).close()
    finally:
        server.execute("ALTER SYSTEM RESET fsync")
        server.kill()
        server.start()


def test_processes_share_a_database(conninfo):
    """From the first moment, when each of them would make the tables; they append for the same users at once."""
    data = Histories(np.array([1, 2]), np.array([0, 1, 2]), np.array([5, 6]), ("u", "v"), ("a", "b"))

    def child(number):
        log = PostgresEventLog(conninfo)
        log.begin(data)
        for step in range(10):
            events = [Event(user, "a", f"{number} {step}") for user in ("u", "v", f"new {step}")]
            assert log.append(events[:: 1 if number % 2 else -1]) == [True] * 3

    children = [fork(lambda number=number: child(number)) for number in range(4)]
    assert [wait(child) for child in children] == [0] * 4
    with closing(PostgresEventLog(conninfo)) as log:
        assert Counter(history(log, "u")) == {"a": 41}
        assert history(log, "v")[0] == "b"
        assert [len(history(log, f"new {step}")) for step in range(10)] == [4] * 10
        assert log.append(events_of(data)) == [False, False]
        log.forget(log.users())
        assert not log.begin(data)
        log.check()


def break_at_commit(monkeypatch, log, committed, meanwhile=lambda: None):
    """The next commit of a log breaks the connection, after it or before it."""
    connection = log._writer._connection
    execute = connection.execute

    def broken(query, *arguments, **options):
        if query != "COMMIT":
            return execute(query, *arguments, **options)
        if committed:
            execute(query)
        connection.close()
        meanwhile()
        raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(connection, "execute", broken)


def test_a_connection_that_breaks_at_a_commit_leaves_no_doubt(monkeypatch, log):
    log.append([Event("u", "a")])
    break_at_commit(monkeypatch, log, committed=True)
    assert log.append([Event("u", "b")]) == [True]
    assert history(log, "u") == ["a", "b"]
    break_at_commit(monkeypatch, log, committed=False)
    with pytest.raises(OSError, match="which is as before: the connection is lost"):
        log.append([Event("u", "c")])
    assert history(log, "u") == ["a", "b"]


def test_an_outcome_that_nobody_knows_is_called_so(monkeypatch, server, log):
    log.append([Event("u", "a")])
    monkeypatch.setattr(postgres_session, "_PATIENCE", 0.1)
    break_at_commit(monkeypatch, log, committed=True, meanwhile=server.kill)
    try:
        with pytest.raises(OSError, match=r"cannot write to the event log in [^,]*: the conn.* does not say"):
            log.append([Event("u", "b", "1")])
    finally:
        server.start()
    log.append([Event("u", "b", "1")])
    assert history(log, "u") == ["a", "b"]


def test_a_connection_that_was_cut_is_made_anew(server, log):
    log.append([Event("u", "a")])
    server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()")
    assert log.append([Event("u", "b")]) == [True]
    assert history(log, "u") == ["a", "b"]


def test_who_meets_a_deadlock_tries_again(log):
    met = []

    def work(database):
        database.execute("INSERT INTO ttt4rec_log VALUES (2, false)")
        met.append(database)
        if len(met) < 3:
            raise errors.DeadlockDetected
        database.execute("DELETE FROM ttt4rec_log WHERE version = 2")

    log._writer.run(work)
    assert len(met) == 3
    log.append([Event("u", "a")])


def test_what_the_server_refuses_changes_nothing(log):
    """Here an id that no index holds."""
    log.append([Event("u", "a")])
    with pytest.raises(OSError, match=r"cannot write to the event log in .*, which is as before: index row"):
        log.append([Event("u", "b"), Event(os.urandom(5000).hex(), "b")])
    assert history(log, "u") == ["a"]
    assert log.append([Event("u", "c")]) == [True]


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("events", "item = 'c' WHERE number = 1", "the checksum of event 1 of user 'u' is wrong"),
        ("events", "item = '\\xff' WHERE number = 1", "the checksum of event 1 of user 'u' is wrong"),
        (
            "events",
            "fraction = 1, whole = NULL WHERE number = 0 AND event IS NOT NULL",
            "the checksum of event 0 of user 'u' is wrong",
        ),
        ("events", "whole = NULL WHERE number = 2", "event 2 of user 'u' has no time"),
        ("events", "number = 5 WHERE number = 1", "event 1 of user 'u' is missing"),
        ("users", "length = 2 WHERE name = 'u'", "the checksum of user 'u' is wrong"),
    ],
)
def test_damage_is_named(log, table, change, message):
    append_two_users(log)
    log._writer.run(lambda database: database.execute(f"UPDATE ttt4rec_{table} SET {change}"))
    late = [Event("u", "e", time=0)]
    meetings = (lambda: log.append(late), *([lambda: log.check()] if "no time" not in message else []))
    assert_damage_is_named(log, message, "database", *meetings)


def test_no_table_is_read_as_a_whole(monkeypatch, log):
    """Also before the server has counted what is in it."""
    log.append([Event(f"u{n % 500}", "a", f"e{n}") for n in range(5000)])
    users, plans = [f"u{n}" for n in range(50)], []
    known = [[Known(3, tail.marks[2])] for tail in log.read(users, [[]] * 50)]
    for session in (log._reader, log._writer):
        execute = session._connection.execute

        def explained(query, *given, execute=execute, **options):
            plain = query if isinstance(query, bytes) else query.encode()
            if plain.startswith(b"SELECT") and b"ttt4rec_" in plain:
                plans.append("".join(line for (line,) in execute(b"EXPLAIN " + plain, *given).fetchall()))
            return execute(query, *given, **options)

        monkeypatch.setattr(session._connection, "execute", explained)
    assert [len(tail.items) for tail in log.read(users, known)] == [7] * 50
    log.append([Event(user, "b", "e0") for user in users])
    assert len(plans) == 5
    assert not [plan for plan in plans if "Seq Scan on" in plan]


def test_nothing_is_compiled_to_read_one_row(log):
    plan = log._writer.run(lambda database: database.execute("EXPLAIN SELECT used FROM ttt4rec_log").fetchall())
    assert "JIT" not in str(plan)


def test_a_late_event_in_a_long_history(log):
    log.append([Event("u", str(time), time=time) for time in range(500)])
    log.append([Event("u", "late", time=99.5), Event("u", "last")])
    assert history(log, "u") == [*map(str, range(100)), "late", *map(str, range(100, 500)), "last"]


def test_what_is_no_log_is_refused(server, log, conninfo):
    with pytest.raises(ValueError, match="the event log must be a database as libpq takes it; given another: "):
        PostgresEventLog("events.db")
    with pytest.raises(OSError, match=r"cannot read the event log in the database nowhere on /"):
        PostgresEventLog(f"{server.base} dbname=nowhere")
    log._writer.run(lambda database: database.execute("UPDATE ttt4rec_log SET version = 7"))
    with pytest.raises(ValueError, match=r"the event log must be of version 1; given \[7\]"):
        PostgresEventLog(conninfo)
    log.close()
    with pytest.raises(OSError, match="it was closed"):
        log.users()


def test_users_of_a_service_that_is_gone_move_and_no_others():
    names, users = ["a", "b", "c"], [f"user {n}" for n in range(300)]
    before = {user: service_of(user, names) for user in users}
    after = {user: service_of(user, ["c", "a"]) for user in users}
    assert min(Counter(before.values()).values()) > 70
    assert [user for user in users if before[user] != after[user]] == [user for user in users if before[user] == "b"]
    with pytest.raises(ValueError, match="services must have at least one name"):
        service_of("u", [])


class Services:
    """Processes with a recommender each, on one log."""

    def __init__(self, conninfo, names):
        self.pipes, self.children = {}, {}
        for name in names:
            here, there = multiprocessing.Pipe()
            self.children[name] = fork(lambda there=there: self._serve(there, conninfo))
            there.close()
            self.pipes[name] = here

    @staticmethod
    def _serve(pipe, conninfo):
        online = make_online(MODELS[0], slots=20, log=PostgresEventLog(conninfo))
        while True:
            user, item, event_id = pipe.recv()
            online.observe([user], [item], event_ids=[event_id])
            pipe.send(online.recommend([user], 1, exclude_seen=False)[0][0])

    def ask(self, user, item, event_id):
        """Take an event where its user is at home, or where he is when that one does not answer."""
        while True:
            name = service_of(user, list(self.pipes))
            try:
                self.pipes[name].send((user, item, event_id))
                return name, self.pipes[name].recv()
            except (EOFError, OSError):
                del self.pipes[name]

    def end(self):
        for child in self.children.values():
            os.kill(child, signal.SIGKILL)
            wait(child)


def test_a_service_is_killed_and_others_take_its_users(conninfo):
    """Nothing that was acknowledged is lost, and nothing that is sent again counts twice."""
    users = [f"user {n}" for n in range(12)]
    services, taken, owners = Services(conninfo, ["a", "b", "c"]), {user: [] for user in users}, {}
    try:
        for number in range(60):
            user, item = users[number % 12], ITEMS[number * 7 % 12]
            if number == 30:
                victim = service_of(user, ["a", "b", "c"])
                services.pipes[victim].send((user, item, f"event {number}"))  # answered or not, it is sent again
                os.kill(services.children[victim], signal.SIGKILL)
            owners[user, number >= 30], (best, score) = services.ask(user, item, f"event {number}")
            taken[user].append(item)
        assert {name for (_, late), name in owners.items() if late} == {"a", "b", "c"} - {victim}
        with closing(PostgresEventLog(conninfo)) as log:
            assert {user: history(log, user) for user in users} == taken
            online = make_online(MODELS[0], slots=20, log=log)
            for user in users:
                assert_up_to_date(online, user, taken[user])
            assert online.recommend([user], 1, exclude_seen=False)[0] == [(best, pytest.approx(score, rel=1e-6))]
    finally:
        services.end()
