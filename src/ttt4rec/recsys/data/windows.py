"""Histories cut into windows, so that one causal pass over a window predicts all of its targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ttt4rec.models.event_times import time_between
from ttt4rec.recsys.data.interactions import IntArray
from ttt4rec.recsys.data.split import Part, Split


@dataclass(frozen=True, eq=False)
class Windows:
    """Runs of consecutive positions of one user's history.

    The inputs of a window are items[start : start + length] and the target at each input is the item after
    it. The first ``leading`` targets are not scored: their inputs are context only. Windows are ordered by
    user and time, so the scored targets of windows 0, 1, 2, ... are in that order too.

    Attributes:
        items: int64 [n], the flat item codes of all histories.
        starts: int64 [W], index into ``items``.
        lengths: int64 [W], number of inputs, at least 1.
        leading: int64 [W], number of leading inputs whose target is not scored, less than ``lengths``.
        begins: int64 [W], index into ``items`` of the first item of the user's history.
        times: int64 or float64 [n], of all histories, where they are known.
    """

    items: Tensor
    starts: Tensor
    lengths: Tensor
    leading: Tensor
    begins: Tensor
    times: Tensor | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def __repr__(self) -> str:
        tensors = (self.starts, self.lengths, self.leading, self.begins)
        size = sum(x.nbytes for x in (self.items, *tensors))
        return (
            f"Windows({len(self):,} with {self.num_targets:,} targets among {len(self.items):,} items, {size:,} bytes)"
        )

    def take(self, indices: Tensor) -> Windows:
        """Some of the windows."""
        starts, lengths, leading, begins = (x[indices] for x in (self.starts, self.lengths, self.leading, self.begins))
        return Windows(self.items, starts, lengths, leading, begins, self.times)

    @property
    def targets_per_window(self) -> Tensor:
        """Number of scored targets of every window, int64 [W]."""
        return self.lengths - self.leading

    @property
    def num_targets(self) -> int:
        """Number of scored targets of all windows together."""
        return int(self.targets_per_window.sum())

    def packed_batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets of some windows, one behind the other without padding.

        Args:
            indices: int64 [B], which windows.

        Returns:
            ids: int64 [1, total].
            targets: int64 [total], the item after each input; 0 where it is not scored.
            cu_seqlens: int64 [B + 1], where each window begins and the last one ends.

        Raises:
            ValueError: there are no indices.
        """
        if indices.numel() == 0:
            raise ValueError("indices must name at least one window; given none")
        lengths = self.lengths[indices]
        cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        position = self._places(indices)
        scored = position >= (self.starts + self.leading)[indices].repeat_interleave(lengths)
        return self.items[position][None], self.items[position + 1] * scored, cu_seqlens

    def packed_times(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Times between the events of ``packed_batch``, as ``TTT4Rec.predict`` takes them.

        A window's first input has the gap that it has in the whole history, which may begin before the window.

        Args:
            indices: int64 [B], which windows.

        Returns:
            gaps: float64 [1, total], from the event before to each input; infinity at a history's first.
            elapsed: float64 [total], from each input to the event after it.

        Raises:
            ValueError: the times are not known.
        """
        if self.times is None:
            raise ValueError("windows must have times for a model that reads them; given None")
        position = self._places(indices)
        first = position == self.begins[indices].repeat_interleave(self.lengths[indices])
        now = self.times[position]
        before = self.times[position - 1].double().masked_fill(first, torch.nan)
        return time_between(before, now)[None], time_between(now, self.times[position + 1])

    def _places(self, indices: Tensor) -> Tensor:
        """Indices into ``items`` of the inputs of some windows, one window behind the other."""
        lengths = self.lengths[indices]
        return self.starts[indices].repeat_interleave(lengths) + _count_up(lengths)

    def target_places(self, indices: Tensor) -> Tensor:
        """Indices into ``items`` of the scored targets of some windows, in the order of ``packed_batch``."""
        count = self.targets_per_window[indices]
        return (self.starts + self.leading + 1)[indices].repeat_interleave(count) + _count_up(count)

    def seen(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """All that a user had before each scored target, also before the window.

        Args:
            indices: int64 [B], which windows.

        Returns:
            rows: int64 [P], number of the scored target, in the order of ``packed_batch``.
            items: int64 [P], an item before it.
        """
        count = self.targets_per_window[indices]
        target = self.target_places(indices)
        before = target - self.begins[indices].repeat_interleave(count)
        rows = torch.arange(len(target)).repeat_interleave(before)
        return rows, self.items[(target - before).repeat_interleave(before) + _count_up(before)]


def training_windows(split: Split, *, max_len: int, part: Part = "train") -> Windows:
    """Windows that score every target of a part exactly once, with at least ``max_len`` items of context.

    A user's first window holds up to 2 * max_len inputs, beginning with the at most max_len inputs of the
    part's first target; every later window holds max_len inputs of context and up to max_len scored ones. So
    the target at history position p sees at least min(p, max_len) items and never one at or after p. With
    ``part="train"`` no input lies outside the training part.

    Raises:
        ValueError: ``max_len`` is below 1 or the part is unknown.
    """
    _check_max_len(max_len)
    first, end = split.bounds(part)
    begin = np.maximum(first - max_len, 0)
    beyond_first_window = np.maximum(end - 1 - begin - 2 * max_len, 0)
    counts = np.where(end > first, 1 + -(-beyond_first_window // max_len), 0)
    user, nth = _enumerate_windows(counts)
    start = begin[user] + nth * max_len
    length = np.minimum(start + 2 * max_len, end[user] - 1) - start
    leading = np.where(nth == 0, first[user] - 1 - start, max_len)
    return _make_windows(split, user, start, length, leading)


def evaluation_prefixes(split: Split, part: Part, *, max_len: int) -> Windows:
    """Windows in which the target at position p sees exactly the at most ``max_len`` items before it.

    The targets of a user at positions p <= max_len share one window that begins with the history; every later
    target has a window of max_len inputs for itself, of which only the last is scored.

    Raises:
        ValueError: ``max_len`` is below 1 or the part is unknown.
    """
    _check_max_len(max_len)
    first, end = split.bounds(part)
    end_shared = np.minimum(end, max_len + 1)
    has_shared = end_shared > first
    counts = has_shared + end - np.maximum(first, end_shared)
    user, nth = _enumerate_windows(counts)
    shared = has_shared[user] & (nth == 0)
    target = np.maximum(first, end_shared)[user] + nth - has_shared[user]
    start = np.where(shared, 0, target - max_len)
    length = np.where(shared, end_shared[user] - 1, max_len)
    leading = np.where(shared, first[user] - 1, max_len - 1)
    return _make_windows(split, user, start, length, leading)


def batches(windows: Windows, *, targets_per_batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Every window once, in random order, in batches of about ``targets_per_batch`` scored targets.

    Yields:
        int64 [B] indices of windows, B >= 1. A batch is off by less than the targets of one window.

    Raises:
        ValueError: ``targets_per_batch`` is below 1.
    """
    if targets_per_batch < 1:
        raise ValueError(f"targets_per_batch must be at least 1; given {targets_per_batch}")
    order = torch.randperm(len(windows), generator=generator)
    targets = windows.targets_per_window[order]
    batch = (targets.cumsum(0) - targets) // targets_per_batch
    ends = batch.diff().nonzero().flatten() + 1
    return iter(order.tensor_split(ends.tolist()) if len(windows) else ())


def _count_up(lengths: Tensor) -> Tensor:
    """0, 1, ..., length - 1 for each length, one behind the other."""
    return torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)


def _check_max_len(max_len: int) -> None:
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1; given {max_len}")


def _enumerate_windows(counts: IntArray) -> tuple[IntArray, IntArray]:
    """User of every window and its number within that user, each int64 [counts.sum()]."""
    user = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return user, np.arange(len(user)) - before[user]


def _make_windows(split: Split, user: IntArray, start: IntArray, length: IntArray, leading: IntArray) -> Windows:
    """Windows with ``start`` a position in the user's history."""
    begins = split.histories.offsets[user]
    items, *arrays = (
        torch.from_numpy(np.array(array, dtype=np.int64))
        for array in (split.histories.items, begins + start, length, leading, begins)
    )
    times = torch.from_numpy(np.require(split.histories.times, requirements="W"))
    return Windows(items, arrays[0], arrays[1], arrays[2], arrays[3], times)
