"""Batches of several callers are written as one, and each has its own outcome."""

import resource
import sqlite3
import threading
import time
from contextlib import closing

import pytest

from tests.recsys.online import kill_points
from tests.support.checks import ROUNDING
from tests.support.crash import fork, wait
from tests.support.online_data import ITEMS, MemoryEventLog, batch_scores, history, make_model, run_threads
from ttt4rec.recsys.online import Batch, OnlineRecommender
from ttt4rec.recsys.online.events import DamagedLogError, Event, SQLiteEventLog
from ttt4rec.recsys.online.group_commit import GroupCommit, append_together


class Slow:
    """A store whose writes wait until they are let go; it refuses batches with a "bad" in them."""

    def __init__(self):
        self.batches, self.go = [], threading.Semaphore(0)

    def append(self, events):
        self.go.acquire()
        self.batches.append(list(events))
        if "bad" in events:
            raise OSError(f"{len(events)} refused")
        if "interrupt" in events:
            raise KeyboardInterrupt
        return [event != "old" for event in events]


def gather(commits, *batches):
    """Threads that append, one after the other; what each gets is in the list, once they are joined."""
    outcomes, threads = [None] * len(batches), []

    def append(number):
        try:
            outcomes[number] = commits.append(batches[number])
        except BaseException as error:
            outcomes[number] = error

    for number in range(len(batches)):
        threads.append(threading.Thread(target=append, args=(number,)))
        threads[-1].start()
        while len(commits._waiting) < number:  # all but the first, which is being written
            time.sleep(0.001)
    return threads, outcomes


def finish(threads):
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_all_that_waits_is_written_at_once():
    store = Slow()
    threads, outcomes = gather(GroupCommit(store.append), ["a"], ["b", "old"], [], ["old", "c"])
    store.go.release(2)
    finish(threads)
    assert store.batches == [["a"], ["b", "old", "old", "c"]]
    assert outcomes == [[True], [True, False], [], [False, True]]


def test_a_single_caller_waits_for_nobody():
    store = Slow()
    store.go.release(3)
    commits = GroupCommit(store.append)
    assert [commits.append([item]) for item in "abc"] == [[True]] * 3
    assert store.batches == [["a"], ["b"], ["c"]]


def test_an_error_is_its_own_callers():
    store = Slow()
    commits = GroupCommit(store.append)
    threads, outcomes = gather(commits, ["a"], ["b"], ["bad", "b"], ["c"], ["bad"])
    store.go.release(9)
    finish(threads)
    assert store.batches == [["a"], ["b", "bad", "b", "c", "bad"], ["b"], ["bad", "b"], ["c"], ["bad"]]
    assert outcomes[:2] + outcomes[3:4] == [[True]] * 3
    assert [str(outcomes[number]) for number in (2, 4)] == ["2 refused", "1 refused"]
    assert commits.append(["d"]) == [True]


def test_an_interrupted_writer_leaves_nobody_waiting():
    """The others hear that they do not know; those who come later are served."""
    store = Slow()
    commits = GroupCommit(store.append)
    threads, outcomes = gather(commits, ["a"], ["b", "interrupt"], ["c"])
    store.go.release(3)
    finish(threads)
    assert outcomes[0] == [True]
    kinds = sorted(type(outcome).__name__ for outcome in outcomes[1:])
    assert kinds == ["KeyboardInterrupt", "OSError"]
    assert commits.append(["d"]) == [True]


def test_who_is_interrupted_while_waiting_is_gone():
    store = Slow()
    commits = GroupCommit(store.append)

    def interrupted(_):
        raise KeyboardInterrupt

    wait_for, commits._change.wait_for = commits._change.wait_for, interrupted
    with pytest.raises(KeyboardInterrupt):
        commits.append(["a"])
    commits._change.wait_for = wait_for
    store.go.release()
    assert commits.append(["b"]) == [True]
    assert store.batches == [["b"]]


def test_no_batches_are_no_write():
    assert append_together(Slow().append, []) == []


@pytest.fixture
def log(tmp_path):
    with closing(SQLiteEventLog(tmp_path / "log.db")) as log:
        yield log


def at_once(log, *batches):
    """What callers get who come while the log is being written."""
    with log._locks[0]:
        threads, outcomes = gather(log._commits, *batches)
    finish(threads)
    return outcomes


def test_threads_share_a_transaction(log):
    statements = []
    log._writer.set_trace_callback(statements.append)
    batches = [[Event(f"u{number % 3}", f"{number}", "same")] for number in range(9)]
    assert at_once(log, *batches) == [[True]] * 3 + [[False]] * 6  # in the order in which they came
    assert statements.count("COMMIT") == 2
    assert [history(log, f"u{number}") for number in range(3)] == [["0"], ["1"], ["2"]]


def test_who_meets_damage_is_alone_with_it(log):
    log.append([Event("damaged", "a")])
    with closing(sqlite3.connect(log.path)) as other:
        other.execute("UPDATE users SET length = 5")
        other.commit()
    batches = [[Event(user, "a"), Event("all", user)] for user in ("u", "v", "damaged", "w")]
    first, second, damaged, last = at_once(log, *batches)
    assert first == second == last == [True, True]
    assert isinstance(damaged, DamagedLogError)
    assert "checksum of user 'damaged' is wrong" in str(damaged)
    assert history(log, "all") == ["u", "v", "w"]


def test_who_fills_the_disk_is_alone_with_it(log):
    def child():
        own = SQLiteEventLog(log.path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        large = [Event("u", f"{number}" * 100) for number in range(3000)]
        first, full, last = at_once(own, [Event("u", "a")], large, [Event("u", "b")])
        assert first == last == [True]
        assert "which is as before" in str(full)
        assert history(own, "u") == ["a", "b"]

    assert wait(fork(child)) == 0


def test_nothing_is_flushed_on_request_only(tmp_path):
    """FULL is the default; NORMAL by name."""
    for name, options, level in (("default", {}, 2), ("flushed", {"flush": True}, 2), ("not", {"flush": False}, 1)):
        with closing(SQLiteEventLog(tmp_path / name, **options)) as log:
            assert log._writer.execute("PRAGMA synchronous").fetchone() == (level,)


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_dying_while_a_group_is_written_loses_nothing_acknowledged(every):
    """Nor is a batch half there; by a kill and by a failure of the power, before, in and after writes and flushes.

    Without flushes the power takes what was acknowledged: so a flush that came too late would show.
    """
    flushed, unflushed = kill_points.run(every)
    for happened in (flushed, unflushed):
        assert happened["deaths"] > 50 / every
        assert happened["batches acknowledged"] > 0
        assert happened["batches of the largest group"] > 1
        assert happened["unflushed bytes"] > 0
    assert flushed["batches lost with the power"] == 0 < unflushed["batches lost with the power"]


def test_batches_of_several_callers_take_effect_together():
    """Each has its own answer; scores are those of the histories that the log has."""
    model = make_model(0, inner="mlp", block_conv=True)
    online = OnlineRecommender(model, ITEMS, MemoryEventLog(), pool_bytes=200_000, horizon=lambda: 100)
    appended = []
    append = online.log.append
    online.log.append = lambda events: [append(events), appended.append(len(events))][0]
    batches = [
        Batch(["u", "v"], ["i1", "i2"], ["1", "1"]),
        Batch(["u"], ["no such item"]),
        Batch(["u", "w"], ["i3", "i4"], ["1", None], [None, 3.5]),
        Batch(["u", "u"], ["i5"]),
        Batch(["u"], ["i5"], times=[101]),
        Batch([], []),
        Batch(None, ["i5"]),
    ]
    first, item, second, lengths, late, nothing, wrong = online.observe_many(batches)
    assert (first, second, nothing) == ([True, True], [False, True], [])
    assert appended == [4]
    assert [type(error).__name__ for error in (item, lengths, late, wrong)] == ["DataError"] * 3 + ["TypeError"]
    assert "1 unknown: 'no such item'" in str(item)
    assert online.stats()["users"] == 3
    best_of_all = online.recommend(["u", "v", "w"], len(ITEMS), exclude_seen=False)
    for best, scores in zip(best_of_all, batch_scores(model, [["i1"], ["i2"], ["i4"]]), strict=True):
        scale = max(map(abs, scores.values()))
        assert dict(best) == pytest.approx(scores, rel=0, abs=(2**-24 + ROUNDING) * scale)
    assert online.observe_many([]) == []


def test_a_log_that_fails_is_every_callers_error():
    online = OnlineRecommender(make_model(), ITEMS, MemoryEventLog(), pool_bytes=200_000)

    def full(events):
        raise OSError(f"no space left for {len(events)}")

    online.log.append = full
    outcomes = online.observe_many([Batch(["u"], ["i1"]), Batch(["v"], ["no"]), Batch(["w", "w"], ["i1", "i2"])])
    assert [str(outcome) for outcome in outcomes[::2]] == ["no space left for 1", "no space left for 2"]
    assert online.stats()["users"] == 0


def test_threads_see_their_own_events_at_once(tmp_path):
    """Through one recommender: what a thread was answered for is in its user's history and in the recommendations."""
    online = OnlineRecommender(make_model(), ITEMS, SQLiteEventLog(tmp_path / "log.db"), pool_bytes=200_000)

    def work(number):
        user = f"u{number}"
        for step in range(8):
            if step == 3:
                with pytest.raises(ValueError, match="1 unknown: 'no'"):
                    online.observe([user, user], ["i1", "no"])
            assert online.observe([user], [ITEMS[step]], event_ids=[f"{step}"]) == [True]
            assert history(online.log, user) == list(ITEMS[: step + 1])
            assert {item for item, _ in online.recommend([user], 12)[0]} == set(ITEMS[step + 1 :])

    run_threads(work, 6)
    online.log.close()
