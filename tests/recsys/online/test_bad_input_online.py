"""What an online recommender refuses or cannot do changes nothing, and what failed half-way heals."""

import pytest

from tests.support.online_data import (
    ITEMS,
    MODELS,
    MemoryEventLog,
    assert_up_to_date,
    history,
    make_model,
    make_online,
    slot_bytes,
)
from ttt4rec.recsys.online import OnlineRecommender


def test_a_time_beyond_the_horizon_is_refused():
    now = [1000]
    online = make_online(horizon=lambda: now[0])
    online.observe(["u", "u"], ["i1", "i2"], times=[1000, None])
    with pytest.raises(
        ValueError,
        match=r"time must be at most 1000, this recommender's horizon; given 1000\.5 of an event .*--time-unit",
    ):
        online.observe(["v", "u"], ["i3", "i3"], times=[999, 1000.5])
    assert history(online.log, "v") == []
    now[0] = 1001
    online.observe(["u"], ["i3"], times=[1000.5])
    assert_up_to_date(online, "u", ["i1", "i2", "i3"])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["u", "v", "u"], ["i1", "no", "other"]), {}, "the model's catalogue; 2 unknown: 'no', 'other'"),
        ((["u"] * 9, [f"x{n}" for n in range(9)]), {}, "9 unknown: 'x0', 'x1', 'x2', 'x3', 'x4', ..."),
        ((["u", "v"], ["i1"]), {}, r"must be of one length; given \[2, 1, 2, 2\]"),
        ((["u"], ["i1"]), {"event_ids": []}, r"must be of one length; given \[1, 1, 0, 1\]"),
        ((["u"], ["i1"]), {"times": [float("nan")]}, "time must be a finite int or float of 64 bits; given nan"),
        ((["u", ""], ["i1", "i1"]), {}, "user_id must be a text of at least one character; given ''"),
        ((["u"] * 2, ["i1"] * 2), {"event_ids": "ab"}, "event_ids must be a sequence of ids; given the text 'ab'"),
        (("u", ["i1"]), {}, "user_ids must be a sequence of ids; given the text 'u'"),
        ((["u", "v"], "i1"), {}, "item_ids must be a sequence of ids; given the text 'i1'"),
    ],
)
def test_nothing_of_a_bad_batch_is_applied(arguments, options, message):
    online = make_online()
    online.observe(["u"], ["i1"])
    with pytest.raises(ValueError, match=message):
        online.observe(*arguments, **options)
    assert history(online.log, "u") == ["i1"]
    assert history(online.log, "v") == []
    assert_up_to_date(online, "u", ["i1"])


def test_bad_arguments():
    online = make_online()
    with pytest.raises(ValueError, match="k must be at least 1; given 0"):
        online.recommend(["u"], 0)
    for method in (online.recommend, online.forget):
        with pytest.raises(ValueError, match="given the text 'u'"):
            method("u")
        with pytest.raises(ValueError, match="user_ids must be texts of at least one character; given 5"):
            method(["u", 5])
    with pytest.raises(ValueError, match="this recommender was made with None"):
        online.save_snapshot()
    model = MODELS[0]
    with pytest.raises(ValueError, match=r"item_ids must be 12 different ones, .* given 11, of which 11 differ"):
        make_online(items=ITEMS[1:])
    with pytest.raises(ValueError, match="given 12, of which 11 differ"):
        make_online(items=[*ITEMS[1:], "i1"])
    with pytest.raises(
        ValueError, match=f"pool_bytes must be at least {slot_bytes(model)}, .*; given {slot_bytes(model) - 1}"
    ):
        OnlineRecommender(model, ITEMS, MemoryEventLog(), pool_bytes=slot_bytes(model) - 1)
    with pytest.raises(ValueError, match=r"pool_bytes must be an integer of at least 1; given 1000000\.0"):
        OnlineRecommender(model, ITEMS, MemoryEventLog(), pool_bytes=1e6)
    with pytest.raises(ValueError, match="mixer must have steps and pools, as TTTLayer has; given GRUMixer"):
        OnlineRecommender(make_model(mixer="gru"), ITEMS, MemoryEventLog())


class FailingLog(MemoryEventLog):
    """Its disk is full."""

    def append(self, events):
        raise OSError("cannot write: no space left")

    forget = append


def test_what_the_log_does_not_take_does_not_happen():
    online = make_online()
    online.observe(["u"], ["i1"])
    online.log.__class__ = FailingLog
    with pytest.raises(OSError, match="no space left"):
        online.observe(["u", "v"], ["i2", "i2"])
    with pytest.raises(OSError, match="no space left"):
        online.forget(["u"])
    assert_up_to_date(online, "u", ["i1"])
    assert online.recommend(["v"]) == [[]]


def test_what_is_logged_is_acknowledged_though_the_log_cannot_be_read(monkeypatch, caplog):
    online = make_online()
    online.observe(["u"], ["i1"])

    def fail(*arguments):
        raise OSError("cannot read: no answer")

    monkeypatch.setattr(online.log, "read", fail)
    assert online.observe(["u", "v"], ["i2", "i3"]) == [True, True]
    assert "events are logged, states will follow" in caplog.text
    with pytest.raises(OSError, match="cannot read"):
        online.recommend(["u"])
    monkeypatch.undo()
    assert_up_to_date(online, "u", ["i1", "i2"])
    assert_up_to_date(online, "v", ["i3"])


@pytest.mark.parametrize("broken", ["step", "forward"])
def test_a_failure_half_way_leaves_no_wrong_state(monkeypatch, caplog, broken):
    """The events are logged; the states that were being changed are made anew."""
    online = make_online(slots=3)
    online.observe(["u", "u", "v", "w"], ["i1", "i2", "i3", "i4"])
    block = MODELS[0].blocks[1]

    def fail(*arguments, **options):
        raise MemoryError("no room")

    monkeypatch.setattr(block, broken, fail)
    repeats = 1 if broken == "step" else 2
    assert online.observe(["u", "v"] * repeats, ["i5", "i6"] * repeats) == [True] * 2 * repeats
    assert "states will follow at the next request: no room" in caplog.text
    monkeypatch.undo()
    assert online.stats()["users"] == 1
    assert history(online.log, "u")[:3] == ["i1", "i2", "i5"]
    for user in "uvw":
        assert_up_to_date(online, user, history(online.log, user))
    assert online.stats()["users"] == 3
