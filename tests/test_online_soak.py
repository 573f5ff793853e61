"""A short run of what ``python tests/online_soak.py`` does at length."""

from online_soak import survive


def test_killed_at_random_moments(tmp_path):
    happened = survive(tmp_path, kills=8)
    assert happened["kills"] == 8
    assert happened["acknowledged events"] > 0
