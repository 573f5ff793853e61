"""Histories that recommendations are asked for, and the hidden states that a model has after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttt4rec.models.event_times import time_between
from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.recsys.data import DataError, Histories, Id, IntArray
from ttt4rec.recsys.data.interactions import TimeArray


class History(NamedTuple):
    """Whose next items are asked for.

    Attributes:
        codes: item codes, oldest first, int64 [n].
        times: when these events happened, [n]; a model with times needs them.
        at: the time of the request, for a model with times="query"; None: the time of the last event.
        unknown: ids that stood among them and that the catalogue does not know.
    """

    codes: IntArray
    times: TimeArray | None = None
    at: float | None = None
    unknown: tuple[Id, ...] = ()


def history_of(histories: Histories, user: Id, at: float | None) -> History:
    """What the data has of a user; nothing of one whom it does not know."""
    code = histories.find_user(user)
    if code is None:
        return History(np.empty(0, dtype=np.int64), at=at)
    own = slice(histories.offsets[code], histories.offsets[code + 1])
    return History(histories.items[own], histories.times[own], at)


def find(histories: Histories, items: Sequence[Id] | None, times: Sequence[float] | None, at: float | None) -> History:
    """A history of original item ids, and the times of these events if they are known.

    Raises:
        DataError: items are a text, or times are not as many finite numbers.
    """
    if isinstance(items, str):
        raise DataError(f"history must be a sequence of item ids; given the string {items!r}")
    items = items or ()
    codes, unknown = histories.item_codes(items)
    if times is None:
        return History(codes, None, at, unknown)
    if len(times) != len(items):
        raise DataError(f"times must be one for each of the history's {len(items)} items; given {len(times)}")
    others = set(unknown)
    return History(codes, as_times("times", times)[[item not in others for item in items]], at, unknown)


def as_times(name: str, values: object, dims: int = 1) -> NDArray[np.float64]:
    """Times as an array with ``dims`` dimensions, 0 for one time; DataError unless they are finite numbers."""
    try:
        times = np.asarray(values)
    except ValueError:  # rows of different lengths
        times = np.asarray(None)
    if times.ndim != dims or times.dtype.kind not in "iuf" or not np.isfinite(times).all():
        raise DataError(f"{name} must be finite numbers, in the unit of the data's times; given {str(values)[:80]}")
    return times.astype(np.float64)


@torch.no_grad()
def hidden_after(model: TTT4Rec, histories: Sequence[History]) -> Tensor:
    """Hidden states ``[N, width]`` after the last ``max_len`` items of each history, none of which is empty.

    Raises:
        DataError: the model reads times, and a history has none.
    """
    recent = [torch.from_numpy(history.codes[-model.config.max_len :].copy()) for history in histories]
    ids = torch.cat(recent)
    ends = torch.tensor([len(codes) for codes in recent]).cumsum(0)
    wanted = torch.zeros_like(ids).index_fill(0, ends - 1, 1)  # any item: what comes next is not known
    batch: tuple[Tensor, ...] = ids[None], wanted, torch.cat((ends.new_zeros(1), ends))
    if model.event_times is not None:
        batch += _times(histories, ends, model.config.max_len)
    training = model.training
    model.eval()
    try:
        hidden, _ = model.predict(*(x.to(model.embedding.weight.device) for x in batch))
    finally:
        model.train(training)
    return hidden


def _times(histories: Sequence[History], ends: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """Gaps and the times until the requests, as ``TTT4Rec.predict`` takes them."""
    before, now, asked = [], [], []
    for history in histories:
        if history.times is None:
            raise DataError(
                "a history must come with times, which the model reads; given items alone; the data has the times of "
                "its users (--user)"
            )
        times = np.concatenate([[np.nan], history.times])[-max_len - 1 :]
        before.append(times[:-1])
        now.append(times[1:])
        asked.append(times[-1] if history.at is None else history.at)
    last = torch.from_numpy(np.concatenate(now))
    elapsed = torch.zeros_like(last)
    elapsed[ends - 1] = time_between(last[ends - 1], torch.tensor(asked, dtype=torch.float64))
    return time_between(torch.from_numpy(np.concatenate(before)), last)[None], elapsed
