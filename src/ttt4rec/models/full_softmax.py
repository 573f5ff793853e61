"""Losses, ranks and best items over a whole catalogue, in blocks of items; the matrix of all scores is never held.

Throughout, the catalogue is an embedding table ``[num_items + 1, C]`` whose row 0 is padding and takes no part, and the
score of item j for hidden state h is their dot product. Scores are float32 (float64 where an input is), also under
autocast; ``item_blocks`` says which of them are held at once.
"""

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import item_blocks
from ..arguments import FullSoftmax
from ..item_blocks import Block, blocks, check_range, columns, is_one_block, rows_at_once, score_dtype
from ..operators import Backend, choose_backend, full_softmax_nll, full_softmax_total_nll
from ..operators.transforms import check_has_values
from ..precision import without_autocast

Reduction: TypeAlias = Literal["none", "sum", "mean"]


def nll(h: Tensor, table: Tensor, items: Tensor, reduction: Reduction = "none", *, backend: Backend = "auto") -> Tensor:
    """Negative log-likelihood of items under the softmax over the catalogue.

    A sum or mean is faster to differentiate than as many losses, for which scores are computed twice.

    Args:
        h: hidden states ``[N, C]``, any float dtype.
        table: embeddings ``[num_items + 1, C]``.
        items: int64 ``[N]``, the target of each hidden state, from 1 to num_items.
        reduction: of the N losses, as in ``torch.nn.functional.cross_entropy``.
        backend: as of layers. ``"reference"``, which holds the matrix of all scores, is what ``"auto"`` takes within
            transforms of ``torch.func`` and forward-mode differentiation.

    Returns:
        float32 (float64), ``[N]`` or a scalar; it may be differentiated once, with respect to h and table.

    Raises:
        ValueError: shapes do not fit, or the item, reduction or backend is unknown. TypeError: items are not int64.
            RuntimeError: the backend cannot run here.
    """
    _check(h, table, items)
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}; given {reduction!r}")
    differentiable = torch.is_grad_enabled() and (h.requires_grad or table.requires_grad)
    backend = choose_backend(backend, h)
    if backend == "reference":
        return reduced(_plain_nll(h, table, items), reduction)
    rows = rows_at_once(table)  # while tracing, the number of hidden states may be open, and does not decide
    pays = rows >= item_blocks.FEW_ROWS or (not torch.compiler.is_compiling() and rows >= h.shape[0])
    if reduction != "none" and differentiable and pays:
        total = full_softmax_total_nll(FullSoftmax(h, table, items), backend)[0]
        return total / h.shape[0] if reduction == "mean" else total
    return reduced(full_softmax_nll(FullSoftmax(h, table, items), backend)[0], reduction)


def _plain_nll(h: Tensor, table: Tensor, items: Tensor) -> Tensor:
    """The losses from the matrix of all scores, in PyTorch alone."""
    dtype = score_dtype(h, table)
    with without_autocast(h.device.type):
        return F.cross_entropy(F.linear(h.to(dtype), table[1:].to(dtype)), items - 1, reduction="none")


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """Losses ``[N]`` as they are, or their sum or mean."""
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


@torch.no_grad()
def ranks(h: Tensor, table: Tensor, items: Tensor, seen: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Rank of each hidden state's item in the catalogue, 1 being the best; a tie counts half.

    1 + #(items scored higher) + #(other items scored the same) / 2, so that a model which scores everything the same
    ranks each target in the middle instead of first. In two passes: the first finds the targets' scores, the second
    compares. Both compute a block alike, to the last bit, so that equal scores are equal.

    Args:
        h: hidden states ``[N, C]``.
        table: embeddings ``[num_items + 1, C]``.
        items: int64 ``[N]``.
        seen: pairs (row, item), two int64 ``[P]``, in any order: the item takes no part in that row.

    Returns:
        float64 ``[N]``.

    Raises:
        ValueError: shapes do not fit, an item does not exist, or a score is NaN. TypeError: items are not int64.
    """
    _check(h, table, items)
    check_has_values("ranks", h)
    check_range(items, table)
    if not len(items):
        return torch.zeros(0, dtype=torch.float64, device=h.device)
    at_once = item_blocks.SCORES_PER_BLOCK // max(1, table.shape[0] - 1)
    if seen is None and item_blocks.MANY_ROWS <= at_once < len(items):  # whole rows of scores: one pass is enough
        parts = zip(h.split(at_once), items.split(at_once), strict=True)
        return torch.cat([ranks(rows, table, own) for rows, own in parts])
    passes: list[Iterable[Block]] = [blocks(h, table, seen) for _ in range(2)]
    if is_one_block(h, table):
        passes = [list(passes[0])] * 2
    target = torch.zeros(h.shape[0], 1, dtype=score_dtype(h, table), device=h.device)
    nan = torch.zeros((), dtype=torch.bool, device=h.device)
    for first, _, scores in passes[0]:
        column, inside = columns(items, first, scores)
        target = torch.where(inside, scores.gather(1, column), target)
        nan |= scores.amax().isnan()  # a maximum over any NaN is NaN
    if nan:
        raise ValueError("scores must be numbers; given NaN among them: has the model diverged in training?")
    # With a items above, s the same (the target is one) and b below, a + s + b = num_items and balance = a - b, so that
    # the rank 1 + a + (s - 1) / 2 is (1 + num_items + balance) / 2. Sums of signs stay in the scores' memory, where
    # counts of comparisons would be summed as int64; a block has fewer than 2^24 columns, so they are exact. The sign
    # of inf - inf is 0.
    balance = torch.zeros(h.shape[0], dtype=torch.float64, device=h.device)
    for _, _, scores in passes[1]:
        balance += scores.sub_(target).sign_().sum(1)
    return (table.shape[0] + balance) / 2


@torch.no_grad()
def top_k(h: Tensor, table: Tensor, k: int, seen: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The best items of each hidden state, equal scores in the order of the catalogue.

    Args:
        h: hidden states ``[N, C]``.
        table: embeddings ``[num_items + 1, C]``.
        k: how many, at most num_items of which come back.
        seen: as for ``ranks``; what is left out has score -inf.

    Returns:
        scores float32 ``[N, k]``, descending, and items int64 ``[N, k]``.

    Raises:
        ValueError: shapes do not fit, k is below 1, or a score is NaN.
    """
    check_top_k(h, table, k)
    best = torch.empty(h.shape[0], 0, dtype=torch.int64, device=h.device)
    for first, _, scores in blocks(h, table, seen):
        found = torch.cat((best, _best_keys(scores.float(), first, k)), 1)
        best = found.topk(min(k, found.shape[1]), dim=1).values
    return _scores_of(best), ~best & _LOW


def check_top_k(h: Tensor, table: Tensor, k: int) -> None:
    """ValueError if shapes do not fit, k is below 1 or there are no values."""
    _check(h, table)
    check_has_values("top_k", h)
    if k < 1:
        raise ValueError(f"k must be at least 1; given {k}")


def nan_among_scores() -> ValueError:
    """What ``top_k`` says of scores that are no numbers."""
    return ValueError("scores must be numbers; given NaN from the model, which has diverged in training")


def _check(h: Tensor, table: Tensor, items: Tensor | None = None) -> None:
    if h.dim() != 2 or table.dim() != 2 or h.shape[1] != table.shape[1]:
        raise ValueError(
            f"h must be [N, C] and table [num_items + 1, C]; given {list(h.shape)} and {list(table.shape)}"
        )
    if items is not None and items.dtype != torch.int64:
        raise TypeError(f"items must be int64; given {items.dtype}")
    if items is not None and items.shape != h.shape[:1]:
        raise ValueError(f"items must be [N], one for each of {h.shape[0]} hidden states; given {list(items.shape)}")


_LOW = (1 << 32) - 1


def _best_keys(scores: Tensor, first: int, k: int) -> Tensor:
    """Sort keys ``[N, min(k, c)]`` of the best of a block's scores, float32 ``[N, c]``."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if bool(values.isnan().any()):  # NaN comes before any number
        raise nan_among_scores()
    keys = _sort_keys(values[:, :k], first + columns[:, :k])
    if values.shape[1] > k:  # which ones of equal scores topk takes is not said: those rows once more, by keys
        tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(1)
        everything = torch.arange(first, first + scores.shape[1], device=scores.device)
        keys[tied] = _sort_keys(scores[tied], everything).topk(k, dim=1).values
    return keys


def _sort_keys(scores: Tensor, items: Tensor) -> Tensor:
    """Integers in the order of (score, earlier item), so that no two are alike: the float's bits above the item's."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the same as 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    return (ordered << 32) | (~items & _LOW)


def _scores_of(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
