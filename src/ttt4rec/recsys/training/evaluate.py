"""Ranking the full catalogue for every target of a part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.recsys.data.windows import Windows
from ttt4rec.recsys.training import parallel
from ttt4rec.recsys.training.intervals import Estimate, estimates
from ttt4rec.recsys.training.metrics import RankingMetrics
from ttt4rec.recsys.training.progress import progress_bar

TOKENS_PER_BATCH = 16_384
"""Inputs read at once; enough to fill a CPU's matmuls, small enough for its caches."""


def evaluate(
    model: TTT4Rec,
    windows: Windows,
    *,
    cutoffs: Sequence[int] = (10, 50),
    exclude_seen: bool = False,
    shared: bool = False,
    progress: bool = False,
) -> dict[str, float]:
    """HR, NDCG and MRR of the model's ranking of all items, every scored target weighing the same.

    Args:
        model: put into evaluation mode, and back if it was training.
        windows: whose targets to rank; ``evaluation_prefixes`` gives the paper's protocol.
        cutoffs: the k of HR@k, NDCG@k and MRR@k.
        exclude_seen: rank only targets that the user has not had before, among items that the user has not had; a
            repeated target, which could not be recommended, is passed over. Otherwise all items are ranked for all
            targets.
        shared: all processes of ``torch.distributed`` call this, and each ranks the targets of a part of the windows.
        progress: show a progress bar.

    Returns:
        Metrics by name, as ``RankingMetrics.compute`` gives them.

    Raises:
        ValueError: there is no target, or a score is NaN.
    """
    if shared:
        windows = windows.take(torch.arange(parallel.rank(), len(windows), parallel.world_size()))
    metrics = RankingMetrics(cutoffs)
    for ranks, _ in ranked_targets(model, windows, exclude_seen, progress):
        metrics.update(ranks)
    if shared:
        metrics.add_up()
    return metrics.compute()


def evaluate_with_intervals(
    model: TTT4Rec,
    windows: Windows,
    *,
    cutoffs: Sequence[int] = (10, 50),
    exclude_seen: bool = False,
    samples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Estimate]:
    """As ``evaluate``, with the intervals that a bootstrap over users gives: a user's targets come and go together.

    Args:
        model: put into evaluation mode, and back if it was training.
        windows: whose targets to rank.
        cutoffs: the k.
        exclude_seen: as there.
        samples: how many times users are drawn.
        seed: of the draws.
        progress: show a progress bar.

    Raises:
        ValueError: there is no target, or a score is NaN.
    """
    metrics = RankingMetrics(cutoffs)
    gains, owners = [], []
    begins = windows.begins.unique()
    for ranks, places in ranked_targets(model, windows, exclude_seen, progress):
        gains.append(metrics.gains(ranks))
        owners.append(torch.searchsorted(begins, places, right=True))
    users, place = torch.cat(owners).unique(return_inverse=True)
    if not len(users):
        raise ValueError("targets must be at least one; given none")
    rows = torch.cat(gains)
    sums = torch.zeros(len(users), rows.shape[1], dtype=torch.float64).index_add_(0, place, rows)
    weights = torch.bincount(place).double()[:, None].expand_as(sums)
    return estimates(metrics.names, sums.numpy(), weights.numpy(), samples, seed)


@torch.no_grad()
def ranked_targets(
    model: TTT4Rec, windows: Windows, exclude_seen: bool, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ranks ``[N]`` of targets, and their places in the windows' items, int64 ``[N]``, batch by batch."""
    training = model.training
    model.eval()
    device = model.embedding.weight.device
    try:
        with progress_bar(total=windows.num_targets, unit="target", desc="evaluate", enabled=progress) as bar:
            for indices in _by_length(windows):
                (hidden, items), seen = model.predict(*packed(model, windows, indices)), None
                places = windows.target_places(indices)
                count = len(items)
                if exclude_seen:
                    new, seen = _new_targets(items, *(x.to(device) for x in windows.seen(indices)))
                    hidden, items, places = hidden[new], items[new], places[new.cpu()]
                yield model.ranks(hidden, items, seen), places
                bar.update(count)
    finally:
        model.train(training)


def packed(model: TTT4Rec, windows: Windows, indices: Tensor) -> tuple[Tensor, ...]:
    """What ``TTT4Rec.predict`` takes of some windows, on the model's device: times too, if the model reads them."""
    batch: tuple[Tensor, ...] = windows.packed_batch(indices)
    if model.event_times is not None:
        batch += windows.packed_times(indices)
    return tuple(x.to(model.embedding.weight.device) for x in batch)


def _new_targets(items: Tensor, rows: Tensor, seen: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which targets are not among what was seen before them, and what was seen before those, by their new numbers."""
    new = torch.ones_like(items, dtype=torch.bool)
    new[rows[seen == items[rows]]] = False
    kept = new[rows]
    return new, ((new.cumsum(0) - 1)[rows[kept]], seen[kept])


def _by_length(windows: Windows) -> Iterator[Tensor]:
    """Batches of windows of like length, about ``TOKENS_PER_BATCH`` inputs each."""
    order = torch.argsort(windows.lengths, stable=True)
    start = 0
    for last, length in enumerate(windows.lengths[order].tolist()):  # the longest of those before it
        if start < last and length * (last + 1 - start) > TOKENS_PER_BATCH:
            yield order[start:last]
            start = last
    if start < len(order):
        yield order[start:]
