"""The event log: what any must do, and what the one in SQLite does when things go wrong."""

import math
import random
import re
import resource
import sqlite3
from collections import Counter
from contextlib import closing

import numpy as np
import pytest

from tests.support.crash import fork, wait
from tests.support.online_data import MemoryEventLog, append_two_users, assert_damage_is_named, history, run_threads
from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.online import events
from ttt4rec.recsys.online.events import DamagedLogError, Event, Known, SQLiteEventLog, Tail, events_of
from ttt4rec.recsys.online.postgres import PostgresEventLog


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow), "memory"])
def log(request, tmp_path):
    if request.param == "memory":
        yield MemoryEventLog()
        return
    sqlite = request.param == "sqlite"
    database = tmp_path / "log.db" if sqlite else request.getfixturevalue("server").conninfo()
    with closing((SQLiteEventLog if sqlite else PostgresEventLog)(database)) as made:
        yield made


def read(log, user, *known, limit=None):
    """What one user's history has beyond beginnings that are given with the marks."""
    return log.read([user], [known], limit)[0]


def test_histories_grow_at_their_ends(log):
    assert log.append([Event("u", "a"), Event("v", "b"), Event("u", "c")]) == [True] * 3
    first, other = log.read(["u", "v"], [[], []])
    assert (first.start, first.items, first.length, other.items, other.length) == (0, ["a", "c"], 2, ["b"], 1)
    log.append([Event("u", "a")])
    known, others = Known(2, first.marks[-1]), Known(1, other.marks[-1])
    tail, nothing = log.read(["u", "v"], [[known], [others]])
    assert (tail.start, tail.items, tail.length) == (2, ["a"], 3)
    assert nothing == Tail(1, [], [], 1)
    everything = read(log, "u")
    assert everything.marks == [*first.marks, *tail.marks]
    assert read(log, "u", others) == read(log, "u", Known(9, first.marks[-1])) == everything


def test_the_longest_known_beginning_counts(log):
    log.append([Event("u", item) for item in "abcde"])
    everything = read(log, "u")
    known = [Known(length, mark) for length, mark in enumerate(everything.marks, start=1)]
    assert read(log, "u", known[4], known[1]) == Tail(5, [], [], 5)
    tail = read(log, "u", Known(4, 123), known[2], known[1])
    assert tail == Tail(3, ["d", "e"], everything.marks[3:], 5, everything.times[3:])


def test_no_more_is_read_than_asked_for(log):
    log.append([Event(user, item) for user in "uv" for item in "abc"])
    (u, v), everything = log.read(["u", "v"], [[], []], 2), read(log, "v")
    assert (u.items, u.length, u.is_whole, v) == (["a", "b"], 3, False, Tail(0, [], [], 3))
    u, v = log.read(["u", "v"], [[Known(2, u.marks[-1])], []], 2)
    assert (u.items, u.is_whole, v.items, v.marks) == (["c"], True, ["a"], everything.marks[:1])
    assert log.read(["u", "v"], [[], [Known(1, v.marks[0])]], 0) == [Tail(0, [], [], 3), Tail(1, [], [], 3)]


def test_nothing_is_known_of_strangers(log):
    assert read(log, "u") == read(log, "u", Known(3, 7)) == Tail(0, [], [], 0)
    assert log.read([], []) == []
    assert log.append([]) == []
    log.forget(["u"])


def test_an_event_counts_once(log):
    batch = [Event("u", "a", "1"), Event("u", "b", "1"), Event("v", "a", "1"), Event("u", "a"), Event("u", "a")]
    assert log.append(batch) == [True, False, True, True, True]
    before = read(log, "u")
    assert log.append([Event("u", "c", "1", time=-5.0), Event("u", "c", "2")]) == [False, True]
    assert read(log, "u", Known(3, before.marks[-1]))[:2] == (3, ["c"])


def test_times_decide_the_order(log):
    log.append([Event("u", "c", time=3), Event("u", "a", time=1.5), Event("u", "d", time=3), Event("u", "e")])
    assert history(log, "u") == ["a", "c", "d", "e"]
    before = read(log, "u")
    log.append([Event("u", "f", time=3), Event("v", "x", time=-1)])
    assert read(log, "u", Known(4, before.marks[-1]))[:2] == (4, ["f"])
    log.append([Event("u", "b", time=2), Event("u", "g", time=4)])
    late = read(log, "u", Known(4, before.marks[3]), Known(3, before.marks[2]), Known(1, before.marks[0]))
    assert (late.start, late.items) == (1, ["b", "c", "d", "e", "f", "g"])
    assert read(log, "u", Known(4, before.marks[3])).items == ["a", "b", "c", "d", "e", "f", "g"]
    log.append([Event("u", "h")])
    assert read(log, "u", Known(7, late.marks[-1]))[:2] == (7, ["h"])


def test_large_whole_times_are_exact(log):
    """Nanoseconds since 1970 do not fit into a float."""
    now = 1_700_000_000_000_000_000
    log.append([Event("u", "b", time=now + 1), Event("u", "a", time=now)])
    assert history(log, "u") == ["a", "b"]
    assert read(log, "u").times == (now, now + 1)


def test_times_come_with_the_items(log):
    log.append([Event("u", "a"), Event("u", "b"), Event("u", "c", time=1.5), Event("u", "d"), Event("v", "e", time=3)])
    u, v = log.read(["u", "v"], [[], []])
    assert (u.times, v.times) == ((-math.inf, -math.inf, 1.5, 1.5), (3,))
    assert read(log, "u", Known(2, u.marks[1]), limit=1).times == (1.5,)


def test_a_forgotten_history_never_comes_back(log):
    log.append([Event("u", "a", "1"), Event("v", "b")])
    known = Known(1, read(log, "u").marks[-1])
    log.forget(["u", "stranger"])
    assert read(log, "u", known) == Tail(0, [], [], 0)
    assert log.append([Event("u", "c", "1")]) == [True]
    assert read(log, "u", known)[:2] == (0, ["c"])
    assert history(log, "v") == ["b"]


def test_many_threads(log):
    """Every thread writes its user in order and a common one; batches of the common one stay together."""

    def work(number):
        for step in range(20):
            log.append([Event(f"u{number}", str(step)), Event("all", f"{number}"), Event("all", f"{number}")])
            assert history(log, f"u{number}") == [str(i) for i in range(step + 1)]
            together = history(log, "all")
            assert together[::2] == together[1::2]

    run_threads(work, 5)
    assert sorted(history(log, "all")) == sorted(str(n) for n in range(5) for _ in range(40))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "a"), "user_id must be a text of at least one character; given ''"),
        ((1, "a"), "user_id must be a text of at least one character; given 1"),
        (("u", None), "item_id must be a text of at least one character; given None"),
        (("u", "\ud800"), "item_id must be a text"),
        (("u", "a", ""), "event_id must be a text"),
        (("u", "a", 5), "event_id must be a text"),
        (("u", "a", None, float("nan")), "time must be a finite int or float of 64 bits; given nan"),
        (("u", "a", None, float("inf")), "time must be a finite int or float"),
        (("u", "a", None, 2**63), "time must be a finite int or float"),
        (("u", "a", None, -(2**63) - 1), "time must be a finite int or float"),
        (("u", "a", None, np.int64(5)), r"time must be a finite int or float of 64 bits; given np\.int64\(5\)"),
        (("u", "a", None, True), "time must be a finite int or float"),
        (("u", "a", None, "3"), "time must be a finite int or float"),
    ],
)
def test_bad_events(arguments, message):
    with pytest.raises(ValueError, match=message):
        Event(*arguments)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.db"


def test_it_stays_on_disk(path):
    log = SQLiteEventLog(path)
    log.append([Event("ü", "ä\x00b", "1", time=2.5), Event("v", "b")])
    mark = read(log, "ü").marks[-1]
    log.close()
    log = SQLiteEventLog(path)
    assert log.append([Event("ü", "c", "1"), Event("ü", "d")]) == [False, True]
    assert read(log, "ü", Known(1, mark))[:2] == (1, ["d"])
    assert log.users() == ["ü", "v"]


def test_a_commit_is_flushed_before_it_is_acknowledged(path):
    """By SQLite's own word for it: write-ahead log, flushed at every commit."""
    log = SQLiteEventLog(path)
    assert log._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert log._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_many_commits_are_moved_to_the_file_together(path):
    """After some 16 MB of them."""
    log = SQLiteEventLog(path)
    wal = path.with_name(f"{path.name}-wal")
    before = path.stat().st_size
    for n in range(3):
        log.append([Event("u", f"{n} {number} {'i' * 3000}") for number in range(500)])
    assert wal.stat().st_size > 1000 * 4096
    assert path.stat().st_size == before
    for n in range(3, 12):
        log.append([Event("u", f"{n} {number} {'i' * 3000}") for number in range(500)])
    assert path.stat().st_size > 4000 * 4096


def test_processes_share_a_file(path):
    """From the first moment, when each of them would make it."""

    def child():
        log = SQLiteEventLog(path)
        for _ in range(20):
            log.append([Event("u", "a"), Event("u", "a")])

    children = [fork(child) for _ in range(4)]
    assert [wait(c) for c in children] == [0] * 4
    assert history(SQLiteEventLog(path), "u") == ["a"] * 160


@pytest.mark.parametrize("default", [False, True])
def test_deleted_pages_are_zeroed_whatever_sqlite_would_do(path, monkeypatch, default):
    connect = sqlite3.connect

    def connect_by_default(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.execute(f"PRAGMA secure_delete = {int(default)}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect_by_default)
    assert SQLiteEventLog(path)._writer.execute("PRAGMA secure_delete").fetchone() == (1,)


def test_what_is_forgotten_while_another_process_reads_is_wiped_later(path, monkeypatch, caplog):
    monkeypatch.setattr(events, "_PATIENCE_WIPING", 0.01)
    log = SQLiteEventLog(path)
    log.append([Event("secret person", "taken")])
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM users").fetchall()

    def stands():
        return b"secret person" in b"".join(file.read_bytes() for file in path.parent.iterdir())

    log.forget(["secret person"])
    assert "stands in" in caplog.text
    assert stands()
    log.append([Event("v", "a")])
    assert stands()
    reader.execute("COMMIT")
    log.append([Event("v", "a")])
    assert not stands()
    assert log._writer.execute("PRAGMA busy_timeout").fetchone() == (30_000,)
    assert history(log, "v") == ["a", "a"]


def test_a_log_in_memory_is_refused():
    with pytest.raises(ValueError, match="must be a file; given ':memory:'"):
        SQLiteEventLog(":memory:")


def test_what_is_forgotten_is_not_on_disk(path):
    log = SQLiteEventLog(path)
    log.append([Event(name, "taken", f"id of {name}", time=3) for name in ("secret person", "other person")] * 3)
    log.append([Event("secret person", "taken", time=1)])
    log.forget(["secret person"])
    content = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"secret person" not in content
    assert b"other person" in content


@pytest.mark.parametrize("limit", ["pages", "file size"])
def test_a_full_disk_is_an_error_and_changes_nothing(path, limit):
    """SQLite's own limit, and the operating system's, under which a write fails half way."""
    log = SQLiteEventLog(path)
    log.append([Event("u", "a", "1"), Event("v", "a")])
    log.close()

    def child():
        log = SQLiteEventLog(path)
        if limit == "pages":
            pages = log._writer.execute("PRAGMA page_count").fetchone()[0]
            log._writer.execute(f"PRAGMA max_page_count = {pages}")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        before = read(log, "u")
        with pytest.raises(OSError, match=r"cannot write to the event log .*log\.db, which is as before"):
            log.append([Event("u", f"{i}" * 100, f"{i}", time=-i) for i in range(2000)])
        assert read(log, "u") == before
        assert log.append([Event("u", "b")]) == [True]  # there is room for this one

    assert wait(fork(child)) == 0
    log = SQLiteEventLog(path)
    assert history(log, "u") == ["a", "b"]
    assert log.append([Event("u", "c", "1")]) == [False]


def test_a_full_disk_says_how_much_forgetting_needs(path):
    """So much is enough, and without it nothing is forgotten."""
    log = SQLiteEventLog(path)
    log.append([Event("u", "item" * 20, f"id {i}") for i in range(3000)] + [Event("v", "a")])
    log.close()

    def child():
        log = SQLiteEventLog(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(
            OSError, match=r"to forget them takes up to .* bytes on its disk, where .* are free"
        ) as error:
            log.forget(["u", "stranger"])
        assert len(history(log, "u")) == 3000
        room = int(re.search(r"up to ([\d,]+) bytes", str(error.value))[1].replace(",", ""))
        assert room < 3 * path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(room, path.stat().st_size), resource.RLIM_INFINITY))
        log.forget(["u", "stranger"])
        assert (history(log, "u"), history(log, "v")) == ([], ["a"])

    assert wait(fork(child)) == 0


def test_a_late_event_costs_what_lies_behind_it(path):
    """In rows written."""
    log = SQLiteEventLog(path)
    log.append([Event("u", "a", time=time) for time in range(1000)])
    before = log._writer.total_changes
    log.append([Event("u", "b", time=989.5)])
    assert log._writer.total_changes - before == 10 + 11 + 1  # deleted, written again with the new one, and the user's
    assert history(log, "u") == ["a"] * 990 + ["b"] + ["a"] * 10


def test_a_data_set_is_logged_once(path):
    """However many begin at the same time or send it again, and not when all have been forgotten."""
    data = Histories(np.array([1, 2, 2, 1]), np.array([0, 3, 4]), np.array([5, 6, 6, 5]), ("u", "v"), ("a", "b"))

    def child():
        SQLiteEventLog(path).begin(data)

    children = [fork(child) for _ in range(4)]
    assert [wait(c) for c in children] == [0] * 4
    log = SQLiteEventLog(path)
    assert [history(log, user) for user in log.users()] == [["a", "b", "b"], ["a"]]
    assert log.append(events_of(data)) == [False] * 4  # they have ids
    log.forget(["u", "v"])
    assert not log.begin(data)
    assert log.users() == []
    other = SQLiteEventLog(path.with_name("other.db"))
    assert other.begin(data)
    assert not other.begin(ONE_EVENT)


def test_only_the_owner_may_read_it(path):
    SQLiteEventLog(path).append([Event("u", "a")])
    files = list(path.parent.iterdir())
    assert {file.name for file in files} == {"log.db", "log.db-wal", "log.db-shm"}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


ONE_EVENT = Histories(np.array([1]), np.array([0, 1]), np.array([5]), ("w",), ("a",))
OLD = """
PRAGMA application_id = 0x74747434;
PRAGMA user_version = 1;
CREATE TABLE users (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, length INTEGER NOT NULL, latest NOT NULL
);
CREATE TABLE events (
    user INTEGER NOT NULL, number INTEGER NOT NULL, item TEXT NOT NULL, time NOT NULL, event TEXT,
    PRIMARY KEY (user, number)
) WITHOUT ROWID;
CREATE UNIQUE INDEX events_of_users ON events (user, event) WHERE event IS NOT NULL;
"""


@pytest.mark.parametrize("users", ["some", "none any more"])
def test_a_log_of_version_1_is_brought_up(path, users):
    with closing(sqlite3.connect(path)) as old:
        old.executescript(OLD)
        old.executemany("INSERT INTO users VALUES (?, ?, ?, ?)", [(3, "u", 2, 7), (5, "v", 1, float("-inf"))])
        rows = [(3, 0, "a", 5, None), (3, 1, "b", 7, "1"), (5, 0, "c", float("-inf"), None)]
        old.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
        if users == "none any more":
            old.executescript("DELETE FROM users; DELETE FROM events")
        old.commit()
    path.chmod(0o644)
    log = SQLiteEventLog(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not log.begin(ONE_EVENT)
    log.check()
    if users == "some":
        fresh = SQLiteEventLog(path.with_name("fresh.db"))
        fresh.append([Event("u", "a", time=5), Event("u", "b", "1", time=7), Event("v", "c")])
        assert log.users() == ["u", "v"]
        assert [read(log, user) for user in "uv"] == [read(fresh, user) for user in "uv"]
        assert log.append([Event("u", "b", "1"), Event("u", "d", time=6)]) == [False, True]
        assert history(log, "u") == ["a", "d", "b"]
    else:
        assert log.users() == []


def filled(path):
    """The bytes of a log of which every page counts."""
    log, rng = SQLiteEventLog(path), random.Random(0)
    for start in range(0, 400, 100):
        log.append(
            [
                Event(
                    f"user {rng.randrange(40)}", f"item {rng.randrange(99)}", rng.choice([None, f"id {n}"]), time=n / 4
                )
                for n in range(start, start + 100)
            ]
        )
    log.append([Event("user 7", "late", "id of it", time=1)])
    log.forget(["user 3"])
    log.close()
    return path.read_bytes()


def answers(log):
    """All that the log may be asked."""
    repeated = log.append([Event(f"user {n % 40}", "again", f"id {n}", time=-n) for n in range(400)])
    users = log.users()
    return repeated, log.read(["user 3", *users], [[] for _ in ["user 3", *users]]), log.begin(ONE_EVENT)


def test_no_flipped_bit_changes_an_answer(path):
    """Everywhere in the file; each is an error or of no account."""
    whole, rng, found = filled(path), random.Random(1), Counter()
    with closing(SQLiteEventLog(path)) as log:
        expected = answers(log)
    for _ in range(200):
        for file in path.parent.iterdir():
            file.unlink()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            with closing(SQLiteEventLog(path)) as log:
                assert answers(log) == expected
            found["right"] += 1
        except (OSError, ValueError) as error:
            kind = "damaged" if isinstance(error, DamagedLogError) else "other"
            found[kind if "log.db" in str(error) else "nameless"] += 1
    assert found["damaged"] > 100
    assert found["other"] < 10  # in the file's header
    assert not found["nameless"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("item = 'c' WHERE number = 1", "the checksum of event 1 of user 'u' is wrong"),
        ("item = CAST(x'ff' AS TEXT) WHERE number = 1", "event 1 of user 'u' is no text"),
        ("time = 1.0 WHERE number = 0 AND user = 1", "the checksum of event 0 of user 'u' is wrong"),
        ("mark = mark + 1 WHERE number = 2", "the checksum of event 2 of user 'u' is wrong"),
        ("number = 5 WHERE number = 1", "event 1 of user 'u' is missing"),
        ("user = 9 WHERE number = 2", "event 2 of user 'u' is missing"),
    ],
)
def test_a_damaged_event_is_named(path, change, message):
    log = SQLiteEventLog(path)
    append_two_users(log)
    with closing(sqlite3.connect(path)) as other:
        other.execute(f"UPDATE events SET {change}")
        other.commit()
    assert log.damage is None
    meetings = (lambda: history(log, "u"), lambda: log.append([Event("u", "e", time=0)]), lambda: log.check())
    assert_damage_is_named(log, message, "file", *meetings)


@pytest.mark.parametrize("time", [-1.0, 9.0, "soon"])
def test_a_late_event_is_put_beside_no_damaged_one(path, time):
    """Whose time would say where the late one belongs."""
    log = SQLiteEventLog(path)
    log.append([Event("u", item, time=n) for n, item in enumerate("abcd", start=1)])
    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE events SET time = ? WHERE number = 2", (time,))
        other.commit()
    with pytest.raises(DamagedLogError, match="event 2 of user 'u'"):
        log.append([Event("u", "e", time=1.5)])


@pytest.mark.parametrize("change", ["name = 'w'", "length = 2", "latest = 9", "mark = 5"])
def test_a_damaged_user_is_named(path, change):
    log = SQLiteEventLog(path)
    log.append([Event("u", item, time=5) for item in "abc"])
    with closing(sqlite3.connect(path)) as other:
        other.execute(f"UPDATE users SET {change}")
        other.commit()
    name = "w" if "name" in change else "u"
    for meet in (lambda: history(log, name), lambda: log.append([Event(name, "e")]), lambda: log.check()):
        with pytest.raises(DamagedLogError, match=f"the checksum of user '{name}' is wrong"):
            meet()


def test_what_is_no_log_is_left_alone(path):
    path.write_text("user,item\n" * 1000)
    with pytest.raises(ValueError, match=r"log\.db is not an event log: file is not a database"):
        SQLiteEventLog(path)
    assert path.read_text() == "user,item\n" * 1000
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE users (name)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is a database, but no event log of version 2 or before"):
        SQLiteEventLog(path)
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="cannot open the event log"):
        SQLiteEventLog(path / "below")
    damaged = path.with_name("damaged.db")
    log = SQLiteEventLog(damaged)
    log.append([Event("u", "a" * 50) for _ in range(1000)])
    log.close()
    content = damaged.read_bytes()
    damaged.write_bytes(content[:8192] + bytes([255]) * (len(content) - 8192))
    with pytest.raises(
        DamagedLogError, match=r"the event log .*damaged\.db is damaged: .*restore the file from a backup"
    ):
        SQLiteEventLog(damaged)
