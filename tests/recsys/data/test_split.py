import contextlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt4rec.recsys.data import DataError, Histories, Interactions, build_histories
from ttt4rec.recsys.data.split import PARTS, Split, split_by_ratio, split_by_time, split_leave_one_out
from ttt4rec.recsys.data.windows import evaluation_prefixes, training_windows
from ttt4rec.recsys.training.report import describe_data


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
    with pytest.raises(ValueError, match="ratios must be three whole numbers"):
        split_by_ratio(histories_of([5]), ratios)


def test_unknown_part() -> None:
    with pytest.raises(ValueError, match="given 'dev'"):
        split_by_ratio(histories_of([5])).bounds("dev")


@pytest.mark.parametrize(
    ("interactions", "expected"), [(1, (0, 0, 0)), (2, (1, 0, 0)), (3, (1, 0, 1)), (4, (1, 1, 1)), (9, (6, 1, 1))]
)
def test_leave_one_out_by_hand(interactions: int, expected: tuple[int, int, int]) -> None:
    assert counts_of(split_leave_one_out(histories_of([interactions])), 0) == expected


Row = tuple[int, int, int]  # user, item, time
ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7), st.integers(0, 30)), min_size=4, max_size=60)


def interactions_of(rows: list[Row]) -> Interactions:
    users, items, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return Interactions(users, items, times, tuple(f"u{u}" for u in range(9)), tuple(f"i{i}" for i in range(12)))


def splits_of(rows: list[Row]) -> dict[str, Split]:
    interactions = interactions_of(rows)
    histories = build_histories(interactions)
    found = {"ratio": split_by_ratio(histories), "last": split_leave_one_out(histories)}
    with contextlib.suppress(DataError):
        found["time"] = split_by_time(interactions, (6, 2, 2), min_user=2, min_item=2)[0]
    return found


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_no_target_sees_itself_or_anything_later(rows: list[Row]) -> None:
    for split in splits_of(rows).values():
        histories = split.histories
        user_of = np.repeat(np.arange(histories.num_users), np.diff(histories.offsets))
        for part in PARTS:
            for build in (training_windows, evaluation_prefixes):
                windows = build(split, max_len=3, part=part)
                for start, length in zip(windows.starts.tolist(), windows.lengths.tolist(), strict=True):
                    assert len(set(user_of[start : start + length + 1])) == 1
                    assert (np.diff(histories.times[start : start + length + 1]) >= 0).all()
            if len(windows):
                taken, seen = windows.seen(torch.arange(len(windows)))
                first, end = split.bounds(part)
                expected = [
                    histories.history(u)[:p].tolist()
                    for u in range(histories.num_users)
                    for p in range(first[u], end[u])
                ]
                assert [seen[taken == row].tolist() for row in range(len(expected))] == expected


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_training_reads_and_counts_its_own_part_only(rows: list[Row]) -> None:
    for name, split in splits_of(rows).items():
        histories = split.histories
        bounds = list(zip(split.train_begin.tolist(), split.train_end.tolist(), strict=True))
        own = [code for u, (begin, end) in enumerate(bounds) for code in histories.history(u)[begin:end].tolist()]
        assert split.train_counts().tolist() == [own.count(j + 1) for j in range(histories.num_items)], name
        windows = training_windows(split, max_len=3)
        ends = (windows.starts + windows.lengths + 1 - windows.begins).tolist()
        users = np.searchsorted(histories.offsets, windows.begins.numpy(), side="right") - 1
        assert all(end <= split.train_end[user] for end, user in zip(ends, users, strict=True))


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_the_time_split_cuts_all_users_at_the_same_moments(rows: list[Row]) -> None:
    try:
        split, (valid_from, test_from) = split_by_time(interactions_of(rows), (6, 2, 2))
    except DataError:
        return
    assert sum(row[2] < valid_from for row in rows) <= len(rows) * 6 // 10
    known = {row[1] for row in rows if row[2] < valid_from}
    assert set(split.histories.item_ids) == {f"i{item}" for item in known}
    limits = {"train": (-1, valid_from), "valid": (valid_from, test_from), "test": (test_from, 31)}
    for part, (low, high) in limits.items():
        for user, (first, end) in enumerate(zip(*split.bounds(part), strict=True)):
            times = split.histories.times[split.histories.offsets[user] :][first:end]
            assert ((low <= times) & (times < high)).all()
            expected = sorted(r[2] for r in rows if f"u{r[0]}" == split.histories.user_ids[user] and r[1] in known)
            expected = [time for p, time in enumerate(expected) if p and low <= time < high]
            assert times.tolist() == expected


@settings(max_examples=100, deadline=None)
@given(ROWS, st.lists(st.tuples(st.integers(0, 8), st.integers(0, 11)), min_size=60, max_size=60))
def test_another_future_changes_nothing_in_training(rows: list[Row], others: list[tuple[int, int]]) -> None:
    options = {"ratios": (6, 2, 2), "min_user": 2, "min_item": 2}
    try:
        split, (valid_from, _) = split_by_time(interactions_of(rows), **options)
    except DataError:
        return
    changed = [row if row[2] < valid_from else (*other, row[2]) for row, other in zip(rows, others, strict=False)]
    again, _ = split_by_time(interactions_of(changed), **options)
    assert again.histories.item_ids == split.histories.item_ids
    assert again.train_counts().tolist() == split.train_counts().tolist()
    windows, windows_again = (training_windows(s, max_len=3) for s in (split, again))
    assert len(windows) == len(windows_again)
    for i in range(len(windows)):
        batches = (w.packed_batch(torch.tensor([i])) for w in (windows, windows_again))
        assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_what_the_filter_leaves_out_of_training_is_still_history() -> None:
    core = [(user, item, time) for time, (user, item) in enumerate([(0, 0), (0, 1), (1, 1), (1, 0), (0, 0)])]
    late = [(2, 0, 10), (0, 1, 11), (3, 1, 12), (2, 1, 13), (2, 5, 14)]
    rows = [(2, 1, 0), (2, 5, 1), *core, *late]  # user 2 is rare before the cut, item 5 too
    split, cuts = split_by_time(interactions_of(rows), (7, 2, 3), min_user=2, min_item=2)
    assert cuts == (10, 12)
    histories = split.histories
    assert histories.item_ids == ("i0", "i1")
    assert histories.user_ids == ("u0", "u1", "u2", "u3")
    assert [histories.history(u).tolist() for u in range(4)] == [[1, 2, 1, 2], [2, 1], [2, 1, 2], [2]]
    assert split.train_counts().tolist() == [3, 2]
    targets = {part: [list(range(*bound)) for bound in zip(*split.bounds(part), strict=True)] for part in PARTS}
    assert targets == {"train": [[1, 2], [1], [], []], "valid": [[3], [], [1], []], "test": [[], [], [2], []]}
    assert describe_data(split)["test targets of new users"] == 1  # user 2's, whose history is of before the cut
    assert [split.num_new_targets(part) for part in PARTS] == [2, 1, 0]


@pytest.mark.parametrize(("ratios", "counts"), [((8, 2, 0), (7, 2, 0)), ((8, 0, 2), (7, 0, 2)), ((1, 0, 0), (9, 0, 0))])
def test_a_ratio_of_zero_leaves_nothing_to_a_part_of_time(
    ratios: tuple[int, int, int], counts: tuple[int, ...]
) -> None:
    split, cuts = split_by_time(interactions_of([(0, 0, time) for time in range(10)]), ratios)
    assert tuple(map(split.num_targets, PARTS)) == counts
    assert (cuts[1] == math.inf) == (ratios[2] == 0)


def test_a_time_split_without_training_data() -> None:
    with pytest.raises(DataError, match=r"before time 3 .* given none"):
        split_by_time(interactions_of([(0, 0, 3), (1, 1, 3)]))
    with pytest.raises(ValueError, match="ratios must be three whole numbers"):
        split_by_time(interactions_of([(0, 0, 3), (1, 1, 3)]), (1, 1))
