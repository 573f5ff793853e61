"""Recommendations that follow events: whatever happened on the way, they are those of a pass over the whole history."""

import copy
import itertools
import random
import tempfile
import threading
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.online_data import (
    ITEMS,
    MODELS,
    USERS,
    MemoryEventLog,
    assert_up_to_date,
    batch_scores,
    history,
    make_model,
    make_online,
    run_threads,
    slot_bytes,
)
from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.online import OnlineRecommender, earlier, streams
from ttt4rec.recsys.online.events import Event, SQLiteEventLog
from ttt4rec.recsys.online.user_states import Turns
from ttt4rec.recsys.recommend import Recommender


def in_short_pieces(patch):
    """Three items are a piece, and the states after beginnings of histories of three items are kept."""
    patch.setattr(streams, "TOKENS_AT_ONCE", 3)
    patch.setattr(earlier, "LONG", 2)
    patch.setattr(earlier, "_NEAREST", 1)


class Interleavings(RuleBasedStateMachine):
    """One to three slots for five users, so that hardly a call goes by without an eviction.

    With short pieces, hardly a history is read in one call, and states of its beginnings are kept.
    """

    def __init__(self):
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.taken, self.order, self.model = {}, itertools.count(), 0
        self.patch = pytest.MonkeyPatch()

    @initialize(slots=st.integers(1, 3), short=st.booleans())
    def start(self, slots, short):
        if short:
            in_short_pieces(self.patch)
        self.pool_bytes = slots * max(map(slot_bytes, MODELS))
        self.open()

    def open(self):
        folder = Path(self.place.name)
        options = {"pool_bytes": self.pool_bytes, "snapshot": folder / "snapshot"}
        self.online = OnlineRecommender(MODELS[self.model], ITEMS, SQLiteEventLog(folder / "log.db"), **options)

    @rule(
        batch=st.lists(
            st.tuples(
                st.sampled_from(USERS),
                st.sampled_from(ITEMS),
                st.none() | st.integers(0, 6).map(str),
                st.none() | st.integers(0, 3),
            ),
            max_size=6,
        )
    )
    def observe(self, batch):
        new = []
        for user, item, name, time in batch:
            events = self.taken.setdefault(user, [])
            new.append(name is None or all(name != other for *_, other in events))
            if new[-1]:
                latest = max((t for t, *_ in events), default=float("-inf"))
                events.append((latest if time is None else time, next(self.order), item, name))
        columns = [list(column) for column in zip(*batch, strict=True)] or [[]] * 4
        assert self.online.observe(columns[0], columns[1], event_ids=columns[2], times=columns[3]) == new

    @rule(user=st.sampled_from(USERS))
    def recommend(self, user):
        taken = [item for _, _, item, _ in sorted(self.taken.get(user, []))]
        assert_up_to_date(self.online, user, taken, MODELS[self.model])

    @rule(chosen=st.lists(st.sampled_from(USERS), max_size=6), exclude=st.booleans())
    def recommend_to_many(self, chosen, exclude):
        together = self.online.recommend(chosen, 3, exclude_seen=exclude)
        for user, best in zip(chosen, together, strict=True):
            alone = self.online.recommend([user], 3, exclude_seen=exclude)[0]
            assert [item for item, _ in best] == [item for item, _ in alone]

    @rule(chosen=st.lists(st.sampled_from(USERS), max_size=2))
    def forget(self, chosen):
        self.online.forget(chosen)
        for user in chosen:
            self.taken.pop(user, None)

    @rule()
    def save_snapshot(self):
        self.online.save_snapshot()

    @rule()
    def restart(self):
        """As after a kill: nothing is saved."""
        self.online.log.close()
        self.open()

    @rule()
    def refresh(self):
        self.model = 1 - self.model
        self.online.refresh(MODELS[self.model])

    @invariant()
    def states_fit(self):
        assert self.online.stats()["users"] <= self.online.stats()["slots"]

    def teardown(self):
        self.patch.undo()
        self.online.log.close()
        self.place.cleanup()


Interleavings.TestCase.settings = settings(max_examples=20, stateful_step_count=30)
test_any_interleaving = pytest.mark.filterwarnings("ignore")(Interleavings.TestCase)


@pytest.mark.parametrize(("inner", "backbone"), [("linear", "mamba"), ("mlp", "transformer")])
def test_float32_loses_what_a_batch_pass_loses(inner, backbone):
    """Against float64: at most twice as much, the same sums being taken in another order."""
    exact = make_model(2, inner=inner, backbone=backbone)
    model = copy.deepcopy(exact).float()
    online, rng, taken, lost, allowed = make_online(model, 3), random.Random(0), {}, 0.0, 0.0
    for _ in range(50):
        user, item = rng.choice(USERS), rng.choice(ITEMS)
        taken.setdefault(user, []).append(item)
        online.observe([user], [item])
        expected, batch = (batch_scores(m, [taken[user]])[0] for m in (exact, model))
        scores = dict(online.recommend([user], len(ITEMS), exclude_seen=False)[0])
        lost = max(lost, *(abs(scores[item] - expected[item]) for item in ITEMS))
        allowed = max(allowed, *(abs(batch[item] - expected[item]) for item in ITEMS))
    assert online.stats()["evictions"] > 10
    assert 0 < lost <= 2 * allowed


def test_a_state_is_kept_or_rebuilt_in_one_call(monkeypatch):
    """What the model is asked to do, call by call."""
    model, online = MODELS[0], make_online(slots=2)
    calls = []
    forward, step = model.forward, model.step
    monkeypatch.setattr(model, "forward", lambda ids, **options: calls.append(ids.shape[1]) or forward(ids, **options))
    monkeypatch.setattr(model, "step", lambda ids, *rest: calls.append("step") or step(ids, *rest))

    def during(function, *arguments):
        calls.clear()
        function(*arguments)
        return calls

    assert during(online.observe, ["u", "v"], ["i1", "i2"]) == ["step"]
    assert during(online.observe, ["u", "v", "u"], ["i1", "i2", "i3"]) == ["step", 2]
    assert during(online.recommend, ["u", "v"]) == []
    assert during(online.observe, ["w"], ["i1"]) == ["step"]  # u, the least recently used, goes
    assert during(online.recommend, ["v", "w"]) == []
    assert during(online.observe, ["u"], ["i4"]) == [4]  # v goes; u is read from the log, with the new event
    assert during(online.recommend, ["w"]) == []
    assert during(online.observe, ["x", "y"], ["i1", "i2"]) == ["step"]
    assert during(online.recommend, ["v", "u"]) == [2 + 4]  # both in one packed call
    assert online.stats() == {"users": 2, "slots": 2, "steps": 3, "prefills": 8, "evictions": 6}
    assert_up_to_date(online, "u", ["i1", "i1", "i3", "i4"])


def test_histories_longer_than_a_call_of_the_model(monkeypatch):
    """They are read piece by piece, also together with others."""
    monkeypatch.setattr(streams, "TOKENS_AT_ONCE", 7)
    log = MemoryEventLog()
    taken = {
        user: [random.Random(user).choice(ITEMS) for _ in range(n)]
        for user, n in {"u": 23, "v": 3, "w": 14, "x": 2}.items()
    }
    log.append([Event(user, item) for user, items in taken.items() for item in items])
    online = make_online(slots=4, log=log)
    online.recommend(list(taken))
    for user, items in taken.items():
        assert_up_to_date(online, user, items)


def test_strangers_and_users_without_known_items(monkeypatch):
    online = make_online()
    assert online.recommend(["u", "v"]) == [[], []]
    online.log.append([Event("u", "not of this model")])
    assert online.recommend(["u"]) == [[]]
    assert online.stats()["users"] == 0
    online.observe(["u"], ["i3"])
    online.log.append([Event("u", "nor this"), Event("u", "i4")])
    assert_up_to_date(online, "u", ["i3", "i4"])
    assert online.recommend([]) == []
    assert online.observe([], []) == []


def test_more_users_than_slots_at_once():
    online = make_online(slots=2)
    assert online.observe(USERS, ITEMS[:5]) == [True] * 5
    assert online.stats() == {"users": 2, "slots": 2, "steps": 0, "prefills": 2, "evictions": 0}
    assert online._states.users() == list(USERS[3:])
    together = online.recommend([*USERS, "u"], 3)
    assert together == [online.recommend([user], 3)[0] for user in (*USERS, "u")]
    for user, item in zip(USERS, ITEMS, strict=False):
        assert_up_to_date(online, user, [item])


def test_late_events_and_duplicates():
    """Of an event that comes late, the history is read again; one that comes twice changes nothing."""
    online = make_online()
    online.observe(["u"] * 3, ["i1", "i3", "i4"], event_ids=["1", "3", "4"], times=[1, 3, 4])
    assert online.observe(["u"], ["i3"], event_ids=["3"], times=[2]) == [False]
    assert_up_to_date(online, "u", ["i1", "i3", "i4"])
    assert online.observe(["u", "u"], ["i2", "i3"], event_ids=["2", "3"], times=[2, 3]) == [True, False]
    assert_up_to_date(online, "u", ["i1", "i2", "i3", "i4"])
    assert online.stats()["prefills"] == 2


def read_by(online, monkeypatch, action):
    """How many items the streams read during an action."""
    counted, read = [0], online._states._streams.read

    def count(slots, items):
        counted[0] += sum(map(len, items))
        return read(slots, items)

    with monkeypatch.context() as patch:
        patch.setattr(online._states._streams, "read", count)
        action()
    return counted[0]


@pytest.mark.slow
def test_late_events_cost_what_lies_behind_them(monkeypatch):
    """One in the future, those that come after it, and others at any distance from the end, of a long history."""
    online, rng = make_online(slots=3), random.Random(0)
    taken = [rng.choice(ITEMS) for _ in range(1500)]
    online.log.append([Event("u", item, time=time) for time, item in enumerate(taken)])
    online.observe(["u"], ["i0"], times=[10**9])
    after = ["i0"]
    for step in range(20):
        item = rng.choice(ITEMS)
        action = lambda item=item, step=step: online.observe(["u"], [item], times=[1500 + step])  # noqa: E731
        assert read_by(online, monkeypatch, action) <= 70
        taken.append(item)
    assert_up_to_date(online, "u", taken + after)
    for distance in (10, 100, 1000, 30, 300):
        place = len(taken) - distance
        action = lambda place=place: online.observe(["u"], ["i7"], times=[place - 0.5])  # noqa: E731
        assert read_by(online, monkeypatch, action) <= 16 * distance + 70
        taken.insert(place, "i7")
        online.log.forget(["u"])
        online.log.append([Event("u", item, time=time) for time, item in enumerate(taken)])
        online.log.append([Event("u", "i0", time=10**9)])
        online.recommend(["u"])
        assert_up_to_date(online, "u", taken + after)
    assert online.stats()["users"] == 1


def test_a_long_history_grown_item_by_item_has_earlier_states(monkeypatch):
    in_short_pieces(monkeypatch)
    online = make_online(slots=3)
    taken = [ITEMS[n * n % 12] for n in range(40)]
    for time, item in enumerate(taken):
        online.observe(["u"], [item], times=[time])
    action = lambda: online.observe(["u"], ["i7"], times=[37.5])  # noqa: E731
    assert read_by(online, monkeypatch, action) < 12
    assert_up_to_date(online, "u", [*taken[:38], "i7", *taken[38:]])


def test_earlier_states_are_few_and_go_with_their_users():
    online = make_online(slots=3)
    for user in ("u", "v"):
        online.log.append([Event(user, item, time=time) for time, item in enumerate(ITEMS * 100)])
    online.recommend(["u", "v"])
    states = online._states._earlier
    assert not list(states.known("u"))  # of three users one has any
    assert 3 <= len(list(states.known("v"))) <= 6
    for step in range(3):
        for time in range(30):
            online.observe(["v"], ["i1"], times=[1200 + 30 * step + time])
    assert len(list(states.known("v"))) <= 6
    online.forget(["v"])
    assert not list(states.known("v"))
    online.observe(["v"], ["i1"], times=[1])
    assert_up_to_date(online, "v", ["i1"])


def test_others_have_their_turn_while_a_long_history_is_read(monkeypatch):
    """Between its pieces, though they come while the first is being read; also those who evict its user."""
    monkeypatch.setattr(streams, "TOKENS_AT_ONCE", 50)
    online, served = make_online(slots=2), []
    taken = [ITEMS[n * n % 12] for n in range(2000)]
    online.log.append([Event("u", item) for item in taken])
    read = online._states._streams.read
    begun = threading.Event()

    def slowly(slots, items, times):
        if max(map(len, items)) > 1:
            begun.set()
            sleep(0.005)
        read(slots, items, times)

    monkeypatch.setattr(online._states._streams, "read", slowly)

    def ask():
        begun.wait(10)
        for user in USERS[1:]:
            online.observe([user], ["i1"])
            served.append(user)

    other = threading.Thread(target=ask)
    other.start()
    online.recommend(["u"])
    assert len(served) >= 3
    other.join()
    monkeypatch.setattr(online._states._streams, "read", read)
    assert_up_to_date(online, "u", taken)
    for user in USERS[1:]:
        assert_up_to_date(online, user, ["i1"])


def test_nobody_has_two_turns_while_somebody_waits():
    turns, order, both = Turns(), [], threading.Barrier(2)

    def work(number):
        both.wait(10)
        for _ in range(30):
            with turns:
                order.append(number)
                sleep(0.002)

    run_threads(work, 2)
    assert sum(one == other for one, other in itertools.pairwise(order)) < 10


@pytest.mark.slow
def test_users_who_evict_each_other_come_to_an_end(monkeypatch):
    in_short_pieces(monkeypatch)
    online = make_online(slots=1)
    for user in "uv":
        online.log.append([Event(user, item) for item in ITEMS * 5])

    def work(number):
        for _ in range(5):
            online.recommend(["uv"[number % 2]])

    run_threads(work, 4)
    assert_up_to_date(online, "u", ITEMS * 5)


def test_unknown_items_alone_take_no_slot(monkeypatch):
    """However many they are."""
    in_short_pieces(monkeypatch)
    online = make_online()
    online.log.append([Event("u", "not of this model") for _ in range(20)])
    assert online.recommend(["u"]) == [[]]
    assert online.stats()["users"] == 0
    online.observe(["u"], ["i3"])
    online.log.append([Event("u", "nor this") for _ in range(20)])
    assert_up_to_date(online, "u", ["i3"])
    online.log.append([Event("v", "neither", time=time) for time in range(20)] + [Event("v", "i3", time=30)])
    assert_up_to_date(online, "v", ["i3"])
    online.log.forget(["v"])
    online.log.append([Event("v", "neither", time=time) for time in range(20)] + [Event("v", "of none", time=30)])
    assert online.recommend(["v"], exclude_seen=False) == [[]]


def test_events_of_another_process_are_seen(tmp_path):
    online = make_online(log=SQLiteEventLog(tmp_path / "log.db"))
    online.observe(["u"], ["i1"])
    other = make_online(log=SQLiteEventLog(tmp_path / "log.db"))
    other.observe(["u", "v"], ["i2", "i3"])
    assert_up_to_date(online, "u", ["i1", "i2"])
    other.forget(["u"])
    assert_up_to_date(online, "u", [])
    other.observe(["u"], ["i4"])
    assert_up_to_date(online, "u", ["i4"])


def test_many_threads(tmp_path):
    """Each with a user of its own, in two slots, and one that all share; another thread refreshes and saves."""
    online = make_online(log=SQLiteEventLog(tmp_path / "log.db"), snapshot=tmp_path / "snapshot")
    model = MODELS[0]

    def work(number):
        if number == 4:
            for _ in range(5):
                online.refresh(model)
                online.save_snapshot()
            return
        rng, taken = random.Random(number), []
        for _ in range(12):
            taken.append(rng.choice(ITEMS))
            online.observe([USERS[number], "all"], [taken[-1]] * 2)
            assert_up_to_date(online, USERS[number], taken)

    run_threads(work, 5)
    assert len(history(online.log, "all")) == 48
    assert_up_to_date(online, "all", history(online.log, "all"))


def test_a_forgotten_users_state_is_wiped():
    online = make_online(slots=2)
    online.observe(["u", "v"], ["i1", "i2"])
    online.forget(["u", "v", "stranger"])
    cells, fresh = online._states._streams, make_online(slots=2)._states._streams
    for name, x in fresh.export([0, 1]).items():
        assert torch.equal(cells.export([0, 1])[name], x), name


def test_it_agrees_with_the_recommender_up_to_max_len():
    """Beyond, the recommender reads the last max_len items, and a stream its whole history."""
    model = MODELS[0]
    codes = np.arange(1, 13)
    histories = Histories(codes, np.array([0, 12]), codes, ("u",), ITEMS)
    recommender, online = Recommender(model, histories), make_online()
    for length in range(1, 8):
        online.observe(["u"], [ITEMS[length - 1]])
        streamed = [item for item, _ in online.recommend(["u"], 12, exclude_seen=False)[0]]
        windowed = [item for item, _ in recommender.recommend(history=ITEMS[:length], k=12, exclude_seen=False).items]
        assert (streamed == windowed) == (length <= model.config.max_len), length
