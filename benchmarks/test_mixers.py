"""Sequence mixers of one width: TTT-Linear and TTT-MLP beside attention, GRU, Mamba and the delta rule."""

import pytest

from .contests import mixer_contests
from .measure import REPLAY

contests = mixer_contests


@pytest.mark.benchmark(timer=REPLAY)
def test_mixer(record, contest, side):
    outcome = record(contest, side)
    assert outcome.seconds or outcome.why_not
