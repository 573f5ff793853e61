"""A short run of what ``python -m tests.recsys.online.online_soak`` does at length."""

import pytest

from tests.recsys.online.online_soak import survive


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_killed_at_random_moments(tmp_path, threads):
    happened = survive(tmp_path, kills=8, threads=threads)
    assert happened["kills"] == 8
    assert happened["acknowledged events"] > 0
    assert happened["refused batches"] > 0
