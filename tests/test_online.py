"""Recommendations that follow events: whatever happened on the way, they are those of a pass over the whole history."""

import copy
import itertools
import random
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from checks import ROUNDING
from online_data import ITEMS, MemoryEventLog, batch_scores, history, make_model, slot_bytes
from test_events import run_threads
from ttt4rec.recsys import streams, users
from ttt4rec.recsys.events import SQLiteEventLog
from ttt4rec.recsys.online import OnlineRecommender

ROUNDED = 2**-24 + ROUNDING  # scores come back in float32, of whatever the model computes in
USERS = ("u", "v", "w", "x", "y")
MODELS = [
    make_model(0, inner="mlp", block_conv=True),
    make_model(1, inner="linear", backbone="mamba", mini_batch_size=4),
]


def make_online(model=MODELS[0], slots=2, log=None, items=ITEMS, **options):
    return OnlineRecommender(model, items, log or MemoryEventLog(), pool_bytes=slots * slot_bytes(model), **options)


def assert_up_to_date(online, user, taken, model=MODELS[0], items=ITEMS, tolerance=ROUNDED):
    """Everything recommended to a user, and what is left without the seen, against one pass over what was taken."""
    everything, unseen = (online.recommend([user], len(items), exclude_seen=seen)[0] for seen in (False, True))
    if not taken:
        assert everything == unseen == []
        return
    expected = batch_scores(model, taken, items)
    scale = max(map(abs, expected.values()))
    assert dict(everything).keys() == expected.keys()
    assert all(abs(score - expected[item]) <= tolerance * scale for item, score in everything)
    assert [score for _, score in everything] == sorted((score for _, score in everything), reverse=True)
    assert unseen == [(item, score) for item, score in everything if item not in taken]


class Interleavings(RuleBasedStateMachine):
    """One to three slots for five users, so that hardly a call goes by without an eviction."""

    def __init__(self):
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.taken, self.order, self.model = {}, itertools.count(), 0

    @initialize(slots=st.integers(1, 3))
    def start(self, slots):
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
        self.online.log.close()
        self.place.cleanup()


Interleavings.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
test_any_interleaving = pytest.mark.filterwarnings("ignore")(Interleavings.TestCase)


@pytest.mark.parametrize("inner", ["linear", "mlp"])
@pytest.mark.parametrize("backbone", ["transformer", "mamba"])
def test_float32_loses_what_a_batch_pass_loses(inner, backbone):
    """Against float64: at most twice as much, the same sums being taken in another order."""
    exact = make_model(2, inner=inner, backbone=backbone)
    model = copy.deepcopy(exact).float()
    online, rng, taken, lost, allowed = make_online(model, 3), random.Random(0), {}, 0.0, 0.0
    for _ in range(120):
        user, item = rng.choice(USERS), rng.choice(ITEMS)
        taken.setdefault(user, []).append(item)
        online.observe([user], [item])
        expected, batch = (batch_scores(m, taken[user]) for m in (exact, model))
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
