"""What the tests of the studies share."""

import gzip
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the data set "toy": 20 users with 15 of 12 items each."""
    rng = np.random.default_rng(0)
    rows = [f"{user}\t{rng.integers(12)}\t{time}" for user in range(20) for time in range(15)]
    (tmp_path / "toy").mkdir()
    with gzip.open(tmp_path / "toy" / "toy.inter.gz", "wt") as file:
        file.write("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]))
    return tmp_path
