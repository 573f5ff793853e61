"""The event log: what any must do, and what the one in SQLite does when things go wrong."""

import resource
import sqlite3
import threading

import numpy as np
import pytest

from crash import fork, wait
from online_data import MemoryEventLog, history
from ttt4rec.recsys import events
from ttt4rec.recsys.events import NOTHING, Event, Known, SQLiteEventLog, Tail


@pytest.fixture(params=["sqlite", "memory"])
def log(request, tmp_path):
    return SQLiteEventLog(tmp_path / "log.db") if request.param == "sqlite" else MemoryEventLog()


def test_histories_grow_at_their_ends(log):
    assert log.append([Event("u", "a"), Event("v", "b"), Event("u", "c")]) == [True] * 3
    first, other = log.read(["u", "v"], [NOTHING] * 2)
    assert (first.start, first.items, other.items) == (0, ["a", "c"], ["b"])
    log.append([Event("u", "a")])
    known = Known(first.version, 2)
    assert log.read(["u", "v"], [known, Known(other.version, 1)]) == [
        Tail(first.version, 2, ["a"]),
        Tail(other.version, 1, []),
    ]
    assert log.read(["u"], [Known(other.version, 1)])[0] == Tail(first.version, 0, ["a", "c", "a"])
    assert log.read(["u"], [Known(first.version, 9)])[0] == Tail(first.version, 0, ["a", "c", "a"])


def test_nothing_is_known_of_strangers(log):
    assert log.read(["u"], [NOTHING]) == [Tail(0, 0, [])]
    assert log.read(["u"], [Known(7, 3)]) == [Tail(0, 0, [])]
    assert log.read([], []) == []
    assert log.append([]) == []
    log.forget(["u"])


def test_an_event_counts_once(log):
    batch = [Event("u", "a", "1"), Event("u", "b", "1"), Event("v", "a", "1"), Event("u", "a"), Event("u", "a")]
    assert log.append(batch) == [True, False, True, True, True]
    version = log.read(["u"], [NOTHING])[0].version
    assert log.append([Event("u", "c", "1", time=-5.0), Event("u", "c", "2")]) == [False, True]
    assert log.read(["u"], [NOTHING])[0] == Tail(version, 0, ["a", "a", "a", "c"])


def test_times_decide_the_order(log):
    log.append([Event("u", "c", time=3), Event("u", "a", time=1.5), Event("u", "d", time=3), Event("u", "e")])
    assert history(log, "u") == ["a", "c", "d", "e"]
    before = log.read(["u"], [NOTHING])[0]
    log.append([Event("u", "f", time=3), Event("v", "x", time=-1)])
    assert log.read(["u"], [Known(before.version, 4)]) == [Tail(before.version, 4, ["f"])]
    log.append([Event("u", "b", time=2), Event("u", "g", time=4)])
    late = log.read(["u"], [Known(before.version, 5)])[0]
    assert (late.start, late.items) == (0, ["a", "b", "c", "d", "e", "f", "g"])
    assert late.version not in (0, before.version)
    log.append([Event("u", "h")])
    assert log.read(["u"], [Known(late.version, 7)]) == [Tail(late.version, 7, ["h"])]


def test_large_whole_times_are_exact(log):
    """Nanoseconds since 1970 do not fit into a float."""
    now = 1_700_000_000_000_000_000
    log.append([Event("u", "b", time=now + 1), Event("u", "a", time=now)])
    assert history(log, "u") == ["a", "b"]


def test_a_forgotten_history_never_comes_back(log):
    log.append([Event("u", "a", "1"), Event("v", "b")])
    known = Known(log.read(["u"], [NOTHING])[0].version, 1)
    log.forget(["u", "stranger"])
    assert log.read(["u"], [known]) == [Tail(0, 0, [])]
    assert log.append([Event("u", "c", "1")]) == [True]
    again = log.read(["u"], [known])[0]
    assert (again.start, again.items) == (0, ["c"])
    assert again.version != known.version
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


def run_threads(work, count):
    errors = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


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
    version = log.read(["ü"], [NOTHING])[0].version
    log.close()
    log = SQLiteEventLog(path)
    assert log.append([Event("ü", "c", "1"), Event("ü", "d")]) == [False, True]
    assert log.read(["ü"], [Known(version, 1)]) == [Tail(version, 1, ["d"])]
    assert log.users() == ["ü", "v"]


def test_a_commit_is_flushed_before_it_is_acknowledged(path):
    """By SQLite's own word for it: write-ahead log, flushed at every commit."""
    log = SQLiteEventLog(path)
    assert log._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert log._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


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
        before = log.read(["u"], [NOTHING])
        with pytest.raises(OSError, match=r"cannot write to the event log .*log\.db, which is as before"):
            log.append([Event("u", f"{i}" * 100, f"{i}", time=-i) for i in range(2000)])
        assert log.read(["u"], [NOTHING]) == before
        assert log.append([Event("u", "b")]) == [True]  # there is room for this one

    assert wait(fork(child)) == 0
    log = SQLiteEventLog(path)
    assert history(log, "u") == ["a", "b"]
    assert log.append([Event("u", "c", "1")]) == [False]


def test_what_is_no_log_is_left_alone(path):
    path.write_text("user,item\n" * 1000)
    with pytest.raises(ValueError, match=r"log\.db is not an event log: file is not a database"):
        SQLiteEventLog(path)
    assert path.read_text() == "user,item\n" * 1000
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE users (name)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is a database, but no event log of version 1"):
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
    with pytest.raises(OSError, match="cannot read the event log"):
        history(SQLiteEventLog(damaged), "u")
