"""A short run of what ``python -m tests.recsys.online.online_soak`` does at length."""

from tests.recsys.online.online_soak import survive


def test_killed_at_random_moments(tmp_path):
    happened = survive(tmp_path, kills=8)
    assert happened["kills"] == 8
    assert happened["acknowledged events"] > 0
