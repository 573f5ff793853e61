"""Whole recommenders: TTT4Rec beside its baselines in the same frame, by number of items."""

import pytest

from .measure import REPLAY
from .recommenders import recommender_contests

contests = recommender_contests


@pytest.mark.benchmark(timer=REPLAY)
def test_recommender(record, contest, side):
    outcome = record(contest, side)
    assert outcome.seconds or outcome.why_not
