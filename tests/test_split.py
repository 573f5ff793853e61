from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.split import Split, split_by_ratio


def histories_of(lengths: list[int]) -> Histories:
    total = sum(lengths)
    return Histories(
        np.arange(1, total + 1),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.arange(total),
        tuple(map(str, range(len(lengths)))),
        tuple(map(str, range(total))),
    )


def counts_of(split: Split, user: int) -> tuple[int, int, int]:
    first = [int(split.bounds(part)[0][user]) for part in ("train", "valid", "test")]
    end = [int(split.bounds(part)[1][user]) for part in ("train", "valid", "test")]
    assert first[0] == 1
    assert end[:2] == first[1:]
    train, valid, test = (stop - start for start, stop in zip(first, end, strict=True))
    return train, valid, test


def plain_counts(targets: int, ratios: tuple[int, int, int]) -> tuple[int, int, int]:
    share = [Fraction(ratio, sum(ratios)) for ratio in ratios]
    valid, test = int(share[1] * targets), int(share[2] * targets)
    train = targets - valid - test
    if ratios[2] and test == 0 and train > 1:
        test, train = 1, train - 1
    if ratios[1] and valid == 0 and train > 1:
        valid, train = 1, train - 1
    return train, valid, test


@pytest.mark.parametrize(
    ("interactions", "expected"),
    [
        (1, (0, 0, 0)),
        (2, (1, 0, 0)),
        (3, (1, 0, 1)),
        (4, (1, 1, 1)),
        (5, (1, 1, 2)),
        (6, (2, 1, 2)),
        (11, (3, 2, 5)),
        (20, (7, 3, 9)),
    ],
)
def test_the_paper_ratio_by_hand(interactions: int, expected: tuple[int, int, int]) -> None:
    assert counts_of(split_by_ratio(histories_of([interactions])), 0) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)),
)
def test_counts_are_those_of_the_plain_definition(lengths: list[int], ratios: tuple[int, int, int]) -> None:
    split = split_by_ratio(histories_of(lengths), ratios)
    counts = [counts_of(split, user) for user in range(len(lengths))]
    assert counts == [plain_counts(length - 1, ratios) for length in lengths]
    for index, part in enumerate(("train", "valid", "test")):
        assert split.num_targets(part) == sum(count[index] for count in counts)
    assert all(count[0] >= 1 for count, length in zip(counts, lengths, strict=True) if length > 1)


def test_a_part_of_ratio_zero_stays_empty() -> None:
    assert counts_of(split_by_ratio(histories_of([11]), (8, 2, 0)), 0) == (8, 2, 0)


@pytest.mark.parametrize("ratios", [(0, 2, 5), (3, -1, 5), (3, 2), (3, 2, 5, 1), (0.6, 0.2, 0.2), (3.0, 2, 5)])
def test_bad_ratios(ratios: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected three whole-number ratios"):
        split_by_ratio(histories_of([5]), ratios)


def test_unknown_part() -> None:
    with pytest.raises(ValueError, match="got 'dev'"):
        split_by_ratio(histories_of([5])).bounds("dev")
