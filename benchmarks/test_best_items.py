"""The best items by an index, against reading every item: ``pytest benchmarks/test_best_items.py --benchmark-only``."""

import pytest

from .best_items import best_items_contests
from .measure import REPLAY

contests = best_items_contests


@pytest.mark.benchmark(timer=REPLAY)
def test_best_items(record, contest, side):
    outcome = record(contest, side)
    assert outcome.seconds or outcome.why_not
