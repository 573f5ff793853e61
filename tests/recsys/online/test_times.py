"""Models that read times, online: their states are those of one pass over the log's times, however they were made."""

import math
import random

import pytest
import torch

from tests.support.online_data import ITEMS, ROUNDED, MemoryEventLog, make_model, make_online
from ttt4rec.models.event_times import gaps_of
from ttt4rec.recsys.data import DataError
from ttt4rec.recsys.online import streams
from ttt4rec.recsys.online.events import SQLiteEventLog

MODEL = make_model(3, inner="mlp", times="query")
KNOWN = ITEMS[:10]  # of what is logged
GAP = make_model(4, num_items=10, inner="linear", times="gap")


@torch.no_grad()
def expected_scores(model, items, taken, at=None):
    """Scores by item after one pass over all events (item, time) of a history whose items the model knows."""
    known = [(items.index(item) + 1, time) for item, time in taken if item in items]
    codes, times = ([row[n] for row in known] for n in (0, 1))
    hidden = model(torch.tensor([codes]), gaps=gaps_of(torch.tensor([times], dtype=torch.float64)))[:, -1]
    elapsed = torch.tensor([max(0.0, 0.0 if at is None else at - times[-1])], dtype=torch.float64)
    return dict(zip(items, model.scores(model.at_request(hidden, elapsed))[0].tolist(), strict=True))


def assert_right(online, user, model=MODEL, items=ITEMS, at=None):
    (tail,) = online.log.read([user], [[]])
    expected = expected_scores(model, items, list(zip(tail.items, tail.times, strict=True)), at)
    scale = max(map(abs, expected.values()))
    (best,) = online.recommend([user], len(items), exclude_seen=False, at=at)
    assert len(best) == len(items)
    assert all(abs(score - expected[item]) <= ROUNDED * scale for item, score in best)


def walk(online, users, rng, steps, late):
    """Events at times that mostly grow; some at the same moment, some late, some without a time."""
    for step in range(steps):
        user = rng.choice(users)
        kind = rng.random()
        time = None if kind < 0.1 else step * 1000 - (5000 if kind < late else 0)
        online.observe([user], [rng.choice(KNOWN)], times=[time])


@pytest.mark.parametrize("kind", ["memory", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_states_know_the_times_of_the_log(kind, tmp_path):
    log = SQLiteEventLog(tmp_path / "log.db") if kind == "sqlite" else MemoryEventLog()
    online, users = make_online(MODEL, slots=2, log=log), ("u", "v", "w")
    walk(online, users, random.Random(0), 25, late=0.3)
    for user in users:
        for at in (None, 1e5, -1e9):
            assert_right(online, user, at=at)
    (early,), (late,) = (online.recommend(["u"], at=at) for at in (25_000, 1e9))
    assert early != late
    before = online.stats()
    online.recommend(["u"], at=1e9)
    assert online.stats() == before  # no state was made anew


def test_items_that_the_model_does_not_know_leave_no_gap():
    log = MemoryEventLog()
    everything = make_online(MODEL, log=log)
    everything.observe(["u"] * 4, [ITEMS[3], ITEMS[11], ITEMS[10], ITEMS[5]], times=[10, 20, 400, 1000])
    fewer = make_online(GAP, slots=2, log=log, items=KNOWN)
    assert_right(fewer, "u", GAP, KNOWN)
    everything.observe(["u"], [ITEMS[10]], times=[5000])
    everything.observe(["u"], [ITEMS[2]], times=[5001])
    assert_right(fewer, "u", GAP, KNOWN)
    at_once = make_online(GAP, slots=2, log=log, items=KNOWN)
    assert at_once.recommend(["u"])[0][0][0] == fewer.recommend(["u"])[0][0][0]


def test_long_histories_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(streams, "TOKENS_AT_ONCE", 4)
    log = MemoryEventLog()
    make_online(MODEL, log=log).observe(["u"] * 11, [*KNOWN[:10], KNOWN[0]], times=[3**n for n in range(11)])
    assert_right(make_online(MODEL, slots=2, log=log), "u")


def test_the_clock_says_when_a_request_comes():
    moment = [100.0]
    online = make_online(MODEL, clock=lambda: moment[0])
    online.observe(["u"] * 3, ITEMS[:3], times=[1, 2, 100])
    assert online.recommend(["u"]) == online.recommend(["u"], at=100)
    moment[0] = 1e6
    assert online.recommend(["u"]) == online.recommend(["u"], at=1e6) != online.recommend(["u"], at=100)
    for at in (math.nan, math.inf, "now", 2**64):
        with pytest.raises(DataError, match="at must be a finite int or float of 64 bits; given"):
            online.recommend(["u"], at=at)


def test_a_snapshot_has_the_times_and_a_restart_goes_on_from_them(tmp_path):
    log, file = SQLiteEventLog(tmp_path / "log.db"), tmp_path / "states.safetensors"
    online = make_online(MODEL, slots=4, log=log, snapshot=file)
    walk(online, ("u", "v", "w"), random.Random(1), 20, late=0.0)
    assert online.save_snapshot() == 3
    before = {user: online.recommend([user], 12, at=1e6) for user in "uvw"}
    again = make_online(MODEL, slots=4, log=log, snapshot=file)
    assert {user: again.recommend([user], 12, at=1e6) for user in "uvw"} == before
    assert again.stats()["prefills"] == again.stats()["steps"] == 0
    for one in (online, again):
        one.observe(["u"], ["i1"], times=[1e5], event_ids=["the same"])
    assert again.recommend(["u"], 12, at=1e6) == online.recommend(["u"], 12, at=1e6)  # the same bits
    assert_right(again, "u", at=1e6)


def test_surprise_knows_the_times():
    online = make_online(MODEL)
    for user, times in (("u", [0, 1, 2, 3, 4]), ("v", [0, 1000, 50_000, 50_001, 60_000])):
        online.observe([user] * 5, ITEMS[:5], times=times)
    (quick, slow) = ([number for _, number in online.surprise(user)] for user in "uv")
    expected = MODEL.surprise(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[math.inf, 1000, 49_000, 1, 9999]]))
    assert quick != slow == pytest.approx(expected[0].tolist())


class TimelessLog(MemoryEventLog):
    def read(self, user_ids, known, limit=None):
        return [tail._replace(times=()) for tail in super().read(user_ids, known, limit)]


def test_a_log_without_times_serves_models_without_times_alone():
    plain = make_model(5)
    log = TimelessLog()
    online = make_online(plain, log=log)
    online.observe(["u"], ["i1"], times=[3])
    assert online.recommend(["u"]) == online.recommend(["u"], at=1e9) != [[]]
    with pytest.raises(ValueError, match="the log must give times of events for a model with times='query'"):
        make_online(MODEL, log=log).recommend(["u"])
