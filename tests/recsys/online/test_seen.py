"""Seen items are kept beside the states: requests leave the log alone, and memory has a bound."""

import numpy as np
import pytest

from tests.recsys.online.test_online import MODELS, assert_up_to_date, in_short_pieces, make_online
from tests.support.online_data import history
from ttt4rec.recsys.online import user_states
from ttt4rec.recsys.online.events import Event
from ttt4rec.recsys.online.seen import SeenItems


@pytest.fixture
def read(monkeypatch):
    """How many items were read from a recommender's log since it was asked last."""

    def items(online):
        numbers, plain = [], online.log.read

        def noted(*arguments):
            tails = plain(*arguments)
            numbers.extend(len(tail.items) for tail in tails)
            return tails

        monkeypatch.setattr(online.log, "read", noted)

        def since():
            total = sum(numbers)
            numbers.clear()
            return total

        return since

    return items


def test_a_request_reads_nothing_again(read):
    online = make_online()
    since = read(online)
    online.observe(["u"] * 5 + ["v"], ["i1", "i2", "i3", "i2", "i5", "i4"])
    assert since() == 6
    for _ in range(2):
        assert_up_to_date(online, "u", ["i1", "i2", "i3", "i2", "i5"])
        assert_up_to_date(online, "v", ["i4"])
    assert since() == 0
    online.observe(["u"], ["i6"])
    assert_up_to_date(online, "u", ["i1", "i2", "i3", "i2", "i5", "i6"])
    assert since() == 1


def test_after_a_restart_a_history_is_read_once(read, tmp_path):
    online = make_online(snapshot=tmp_path / "snapshot")
    online.observe(["u"] * 4, ["i1", "i2", "i3", "i4"])
    online.save_snapshot()
    again = make_online(log=online.log, snapshot=tmp_path / "snapshot")
    since = read(again)
    assert again.recommend(["u"]) == online.recommend(["u"])
    assert since() == 4
    assert_up_to_date(again, "u", ["i1", "i2", "i3", "i4"])
    again.observe(["u"], ["i5"])
    assert_up_to_date(again, "u", ["i1", "i2", "i3", "i4", "i5"])
    assert since() == 1


def test_a_late_event_goes_back_in_both(read, monkeypatch):
    in_short_pieces(monkeypatch)
    online = make_online()
    taken = [f"i{n % 12}" for n in range(9)]
    online.observe(["u"] * 9, taken, times=list(range(9)))
    online.recommend(["u"])
    since = read(online)
    online.observe(["u"], ["i11"], times=[6.5])
    assert 0 < since() < 9
    assert_up_to_date(online, "u", [*taken[:7], "i11", *taken[7:]])
    assert since() == 0


def test_who_is_evicted_or_forgotten_leaves_nothing():
    online = make_online(slots=1)
    codes = online._states._seen
    online.observe(["u", "u"], ["i1", "i2"])
    assert codes.num_bytes == 8
    online.observe(["v"], ["i3"])
    assert codes.num_bytes == 4
    assert_up_to_date(online, "u", ["i1", "i2"])
    online.forget(["u"])
    assert codes.num_bytes == 0
    assert_up_to_date(online, "u", [])


def test_items_that_the_model_does_not_know_have_a_place_but_no_code():
    online = make_online(items=(*(f"i{n}" for n in range(11)), "other"))
    online.log.append([Event("u", item) for item in ("i1", "i11", "i3")])
    recommended = {item for item, _ in online.recommend(["u"], 12)[0]}
    assert recommended == {*(f"i{n}" for n in range(11)), "other"} - {"i1", "i3"}
    assert online._states._seen.num_bytes == 12


def test_beyond_the_bound_the_log_is_read(read, monkeypatch):
    monkeypatch.setattr(user_states, "PART_OF_POOL", make_online(slots=4)._states.pool_bytes // 24)
    online = make_online(slots=4)  # six codes fit
    since = read(online)
    for user in "uvw":
        online.observe([user] * 3, ["i1", "i2", "i3"])
    since()
    assert online._states._seen.num_bytes <= 24
    for user in "vw":
        assert_up_to_date(online, user, ["i1", "i2", "i3"])
    assert since() == 0
    for user in "uvwu":
        assert_up_to_date(online, user, ["i1", "i2", "i3"])
        assert online._states._seen.num_bytes <= 24
    assert since() > 0
    online.observe(["x"] * 7, [f"i{n}" for n in range(7)])  # more than fit, of one user
    for _ in range(2):
        assert_up_to_date(online, "x", [f"i{n}" for n in range(7)])
    assert online._states._seen.num_bytes <= 24


def test_a_failure_half_way_leaves_no_wrong_codes(monkeypatch, caplog):
    online = make_online(slots=3)
    online.observe(["u", "v"], ["i1", "i2"])

    def fail(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(MODELS[0].blocks[1], "step", fail)
    assert online.observe(["u"], ["i3"]) == [True]
    assert "no room" in caplog.text
    monkeypatch.undo()
    for user in "uv":
        assert_up_to_date(online, user, history(online.log, user))


def test_codes_of_another_number_of_items_are_no_beginning():
    kept = SeenItems(100)
    kept.read_on("u", 0, [3, 0, 5])
    assert np.array_equal(kept.of("u"), [3, 5])
    kept.read_on("u", 2, [7])
    assert kept.of("u") is None
    assert kept.num_bytes == 0
    kept.read_on("u", 2, [7])
    assert kept.of("u") is None
    kept.read_on("v", 0, [])
    assert kept.of("v").size == 0
