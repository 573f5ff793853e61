from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.data.split import Split, split_by_ratio
from ttt4rec.recsys.data.windows import Windows, batches, evaluation_prefixes, training_windows

Seen = list[tuple[int, tuple[int, ...]]]

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
RATIOS = st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 6))
PARTS = st.sampled_from(["train", "valid", "test"])
MAX_LEN = st.integers(1, 12)


def split_of(lengths: list[int], ratios: tuple[int, int, int] = (3, 2, 5)) -> Split:
    """A split in which every interaction has an item of its own: the item at flat position i is i + 1."""
    total = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    users, items = tuple(map(str, range(len(lengths)))), tuple(map(str, range(total)))
    return split_by_ratio(Histories(np.arange(1, total + 1), offsets, np.arange(total), users, items), ratios)


def targets_of(split: Split, part: str) -> list[tuple[int, tuple[int, ...]]]:
    """Every target of a part with all the items before it, by user and time."""
    first, end = split.bounds(part)
    found = []
    for user in range(split.histories.num_users):
        history = split.histories.history(user).tolist()
        found += [(history[p], tuple(history[:p])) for p in range(first[user], end[user])]
    return found


def seen_by_a_causal_model(windows: Windows) -> Seen:
    """Every scored target with the inputs of its window up to it, in the order of the windows."""
    if not len(windows):
        return []
    found = []
    for row, row_targets in zip(*rows_of(windows), strict=True):
        found += [(target, tuple(row[: i + 1])) for i, target in enumerate(row_targets) if target]
    return found


def rows_of(windows: Windows) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs and targets of every window, from one packed batch."""
    ids, targets, cu_seqlens = windows.packed_batch(torch.arange(len(windows)))
    assert ids.dtype == targets.dtype == cu_seqlens.dtype == torch.int64
    bounds = list(pairwise(cu_seqlens.tolist()))
    assert bounds[-1][1] == ids.shape[1] == len(targets)
    return tuple([row[begin:end].tolist() for begin, end in bounds] for row in (ids[0], targets))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, RATIOS, PARTS, MAX_LEN)
def test_evaluation_shows_exactly_the_items_before(lengths, ratios, part, max_len) -> None:
    split = split_of(lengths, ratios)
    windows = evaluation_prefixes(split, part, max_len=max_len)
    expected = [(target, before[-max_len:]) for target, before in targets_of(split, part)]
    assert seen_by_a_causal_model(windows) == expected
    assert windows.num_targets == len(expected)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, RATIOS, PARTS, MAX_LEN)
def test_training_scores_every_target_once_with_enough_context(lengths, ratios, part, max_len) -> None:
    split = split_of(lengths, ratios)
    windows = training_windows(split, max_len=max_len, part=part)
    seen = seen_by_a_causal_model(windows)
    expected = targets_of(split, part)
    assert [target for target, _ in seen] == [target for target, _ in expected]
    for (_, visible), (_, before) in zip(seen, expected, strict=True):
        assert len(visible) >= min(len(before), max_len)
        assert visible == before[-len(visible) :]
    assert windows.num_targets == len(expected)
    if len(windows):
        assert int(windows.lengths.max()) <= 2 * max_len
        assert int(windows.targets_per_window.min()) >= 1


def test_training_never_reads_beyond_the_training_part() -> None:
    split = split_of([30, 2, 17])
    windows = training_windows(split, max_len=3)
    ids, targets, _ = windows.packed_batch(torch.arange(len(windows)))
    used = set(ids.flatten().tolist()) | set(targets.tolist())
    for user, start in enumerate(split.histories.offsets[:-1]):
        later = range(start + split.train_end[user], split.histories.offsets[user + 1])
        assert not used & {position + 1 for position in later}


def test_windows_of_a_long_history_by_hand() -> None:
    split = split_of([12], (1, 0, 0))
    windows = training_windows(split, max_len=3)
    ids, targets = rows_of(windows)
    assert ids == [[1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8, 9], [7, 8, 9, 10, 11]]
    assert targets == [[2, 3, 4, 5, 6, 7], [0, 0, 0, 8, 9, 10], [0, 0, 0, 11, 12]]


def test_evaluation_windows_by_hand() -> None:
    split = split_of([8], (1, 0, 6))
    windows = evaluation_prefixes(split, "test", max_len=5)
    ids, targets = rows_of(windows)
    assert ids == [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [3, 4, 5, 6, 7]]
    assert targets == [[0, 3, 4, 5, 6], [0, 0, 0, 0, 7], [0, 0, 0, 0, 8]]


def test_a_batch_follows_the_indices() -> None:
    windows = training_windows(split_of([3, 6, 4], (1, 0, 0)), max_len=5)
    ids, targets, cu_seqlens = windows.packed_batch(torch.tensor([2, 0]))
    assert ids.tolist() == [[10, 11, 12, 1, 2]]
    assert targets.tolist() == [11, 12, 13, 2, 3]
    assert cu_seqlens.tolist() == [0, 3, 5]
    with pytest.raises(ValueError, match="at least one window"):
        windows.packed_batch(torch.tensor([], dtype=torch.int64))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, MAX_LEN, st.integers(1, 60), st.integers(0, 3))
def test_batches_hold_every_window_once_and_about_enough_targets(lengths, max_len, wanted, seed) -> None:
    windows = training_windows(split_of(lengths), max_len=max_len)
    found = list(batches(windows, targets_per_batch=wanted, generator=torch.Generator().manual_seed(seed)))
    assert Counter(index for batch in found for index in batch.tolist()) == Counter(range(len(windows)))
    largest = 2 * max_len
    for number, batch in enumerate(found):
        targets = int(windows.targets_per_window[batch].sum())
        assert len(batch) >= 1
        assert targets < wanted + largest
        if number < len(found) - 1:
            assert targets > wanted - largest


def test_batches_depend_on_the_generator_only() -> None:
    windows = training_windows(split_of([30] * 40), max_len=4)

    def order(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [batch.tolist() for batch in batches(windows, targets_per_batch=16, generator=generator)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    flat = [index for batch in order(1) for index in batch]
    assert flat != sorted(flat)


def test_bad_arguments() -> None:
    split = split_of([9])
    for build in (training_windows, lambda split, max_len: evaluation_prefixes(split, "test", max_len=max_len)):
        with pytest.raises(ValueError, match="max_len must be at least 1; given 0"):
            build(split, max_len=0)
    with pytest.raises(ValueError, match="given 'dev'"):
        training_windows(split, max_len=2, part="dev")
    with pytest.raises(ValueError, match="targets_per_batch must be at least 1"):
        batches(training_windows(split, max_len=2), targets_per_batch=0, generator=torch.Generator())


@settings(max_examples=20, deadline=None)
@given(LENGTHS, RATIOS, PARTS, MAX_LEN, st.sampled_from([np.int64, np.float64]))
def test_gaps_are_those_of_whole_histories(lengths, ratios, part, max_len, dtype) -> None:
    split = split_of(lengths, ratios)
    offsets = split.histories.offsets
    times = np.cumsum(np.arange(sum(lengths)) % 4).astype(dtype)
    split = replace(split, histories=replace(split.histories, times=times))
    windows = evaluation_prefixes(split, part, max_len=max_len)
    if not len(windows):
        return
    everything = torch.arange(len(windows))
    ids, _, bounds = windows.packed_batch(everything)
    gaps, elapsed = windows.take(everything).packed_times(everything)
    assert gaps.dtype == elapsed.dtype == torch.float64
    assert gaps.shape == ids.shape == (1, int(bounds[-1]))
    place = ids[0].numpy() - 1  # every interaction has an item of its own
    expected = np.where(np.isin(place, offsets), np.inf, times[place] - times[place - 1])
    assert gaps[0].tolist() == expected.tolist()
    assert elapsed.tolist() == (times[place + 1] - times[place]).tolist()


def test_windows_without_times_say_so() -> None:
    windows = replace(training_windows(split_of([9]), max_len=3), times=None)
    with pytest.raises(ValueError, match="windows must have times for a model that reads them; given None"):
        windows.packed_times(torch.tensor([0]))
