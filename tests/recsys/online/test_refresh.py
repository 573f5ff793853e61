"""Another model takes the place of the one that is served; the index of its items comes with it."""

import numpy as np
import pytest
import torch

from tests.support.online_data import ITEMS, MODELS, USERS, assert_up_to_date, make_model, make_online, slot_bytes
from ttt4rec.models import full_softmax
from ttt4rec.recsys.online import OnlineRecommender
from ttt4rec.recsys.online.user_states import UserStates


def test_refresh_serves_the_old_model_until_the_new_one_is_ready(monkeypatch):
    """Events that come meanwhile are in the new states, users forgotten meanwhile are not."""
    old, new = MODELS
    online = make_online(old, slots=4)
    online.observe(["v", "u", "w"], ["i2", "i1", "i3"])
    advance = UserStates.advance

    def meanwhile(states, users):
        """After the first user's history was read with the new model: events, requests, and v leaves."""
        advance(states, users)
        if states is not online._states and not online.recommend(["x"])[0]:
            online.observe(["u", "x"], ["i5", "i6"])
            online.forget(["v"])
            assert "v" not in states.users()
            assert_up_to_date(online, "u", ["i1", "i5"], old)

    monkeypatch.setattr("ttt4rec.recsys.online.recommender._REFRESHED_AT_ONCE", 1)
    monkeypatch.setattr(UserStates, "advance", meanwhile)
    online.refresh(new)
    for user, taken in {"u": ["i1", "i5"], "v": [], "w": ["i3"], "x": ["i6"]}.items():
        assert_up_to_date(online, user, taken, new)


def test_a_refresh_into_fewer_slots_keeps_the_most_recently_used():
    online = make_online(slots=4)
    online.observe(USERS[:4], ITEMS[:4])
    wider = make_model(3, num_blocks=4)
    online.refresh(wider)
    kept = online.stats()["slots"]
    assert 1 <= kept < 4
    assert online._states.users() == list(USERS[4 - kept : 4])


def test_a_refresh_that_fails_keeps_the_old_states_alone(monkeypatch):
    online = make_online()
    online.observe(["u"], ["i1"])

    def fail(states, users):
        raise OSError("cannot read")

    with monkeypatch.context() as patch:
        patch.setattr(UserStates, "advance", fail)
        with pytest.raises(OSError, match="cannot read"):
            online.refresh(MODELS[1])
    assert online._coming is online._states
    assert_up_to_date(online, "u", ["i1"])
    with pytest.raises(ValueError, match="item_ids must be 12 different ones"):
        online.refresh(MODELS[0], [])
    online.refresh(MODELS[1], np.array(ITEMS))
    assert_up_to_date(online, "u", ["i1"], MODELS[1])


def test_every_model_has_an_index_of_its_items(monkeypatch):
    monkeypatch.setattr(full_softmax, "top_k", None)  # the way without an index
    first, second, broken = (make_model(seed).float() for seed in (0, 1, 2))
    online = make_online(first)
    online.observe(["u", "u", "v"], list(ITEMS[:3]))
    for model in (first, second):
        online.refresh(model)
        made = online._states.index._made
        fresh = OnlineRecommender(model, ITEMS, online.log, pool_bytes=2 * slot_bytes(model))
        assert online.recommend(["u", "v"]) == fresh.recommend(["u", "v"])
        assert online._states.index._made is made is not None
    with torch.no_grad():
        broken.embedding.weight[5, 0] = float("nan")
    before = online.recommend(["u"])
    with pytest.raises(ValueError, match="item table must have finite numbers; given some from nan to nan"):
        online.refresh(broken)
    assert online.recommend(["u"]) == before


def test_refresh_with_another_catalogue():
    """Items in another order, one fewer and two more."""
    online = make_online()
    online.observe(["u"] * 4, ["i1", "i2", "i3", "i11"])
    items = (*ITEMS[10::-1], "n1", "n2")
    model = make_model(5, num_items=13)
    online.refresh(model, items)
    assert_up_to_date(online, "u", ["i1", "i2", "i3"], model, items)
    online.observe(["u"], ["n2"])
    assert_up_to_date(online, "u", ["i1", "i2", "i3", "n2"], model, items)
    with pytest.raises(ValueError, match="1 unknown: 'i11'"):
        online.observe(["u"], ["i11"])
    with pytest.raises(ValueError, match="item_ids must be 12 different ones"):
        online.refresh(MODELS[0])
    assert_up_to_date(online, "u", ["i1", "i2", "i3", "n2"], model, items)
