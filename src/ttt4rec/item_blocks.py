"""What the backends of the full softmax share: the walk over a catalogue's items in blocks.

The catalogue is an embedding table ``[num_items + 1, C]`` whose row 0 is padding and takes no part. The score of item j
for hidden state h is their dot product. Scores are float32 (float64 where an input is). At most about
``SCORES_PER_BLOCK`` of them are held at once. Either all hidden states meet a block of items: an item's gradient is
then one product over all of them and written once. Or some hidden states meet all items, for a sum of losses where the
catalogue is so small that the table may be visited more often. That computes the gradients, in float32, together with
the loss and holds them until the backward. Nothing else takes memory.

A backend's part is the softmax of a block: ``log_sum_exp(scores)`` and ``to_gradient(scores, lse, column, grad)``.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from .arguments import FullSoftmax
from .precision import without_autocast

SCORES_PER_BLOCK = (1 << 23) - (1 << 16)
"""Scores held at once: just below the 32 MiB of float32 from which on glibc asks for fresh pages every time."""
MANY_ROWS = 256
"""Hidden states at a time with which a product takes longer than reading the table."""
FEW_ROWS, CACHED_ROWS = 64, 256
"""Hidden states at a time for which a visit of the table pays, and with scores that a CPU's cache still holds."""
COLUMNS = 16
"""Widths of blocks are multiples of this: products with odd ones take a CPU twice the time."""

Block: TypeAlias = tuple[int, Tensor, Tensor]
"""The first item of a block, its rows of the table ``[c, C]``, the scores ``[N, c]``."""


LogSumExp: TypeAlias = Callable[[Tensor], Tensor]
"""log Σ exp of every row of a block ``[N, c]``, float64 ``[N]``."""
ToGradient: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Of scores ``[N, c]``, lse, the targets' columns and grad ``[N]`` each: grad times the probabilities, less 1 at the
target, the gradient of the scores, takes their place. A target need not be among the columns."""


def nll(given: FullSoftmax, log_sum_exp: LogSumExp) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods ``[N]``, and the logarithms of the softmax's denominators, float64 ``[N]``."""
    h, table, items = given
    check_range(items, table)
    lse = torch.full((h.shape[0],), -torch.inf, dtype=torch.float64, device=h.device)
    target = torch.zeros(h.shape[0], 1, dtype=score_dtype(h, table), device=h.device)
    for first, _, scores in blocks(h, table):
        column, inside = columns(items, first, scores)
        target = torch.where(inside, scores.gather(1, column), target)
        lse = torch.logaddexp(lse, log_sum_exp(scores))
    return (lse - target.squeeze(1)).to(target.dtype), lse


def nll_backward(given: FullSoftmax, lse: Tensor, grad: Tensor, to_gradient: ToGradient) -> tuple[Tensor, Tensor]:
    """Gradients of h and table; the scores are computed again, block by block."""
    h, table, items = given
    dtype = score_dtype(h, table)
    grad_h = torch.zeros(h.shape, dtype=dtype, device=h.device)
    grad_table = table.new_empty(table.shape)
    grad_table[0] = 0
    wide, grad = h.to(dtype), grad.to(dtype)
    for first, rows, scores in blocks(h, table):
        to_gradient(scores, lse, items - first, grad)
        grad_table[first : first + rows.shape[0]] = scores.T @ wide
        grad_h.addmm_(scores, rows)
    return grad_h.to(h.dtype), grad_table


def total_nll(given: FullSoftmax, log_sum_exp: LogSumExp, to_gradient: ToGradient) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the negative log-likelihoods, and its gradients with respect to h and table, float32 (float64).

    Some hidden states at a time, whose scores are computed once and become their gradients in place.
    """
    h, table, items = given
    check_range(items, table)
    dtype = score_dtype(h, table)
    wide, rows, column = h.to(dtype), table[1:].to(dtype), items - 1
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    grad_h, grad_table = wide.new_empty(wide.shape), wide.new_zeros(table.shape)
    ones = wide.new_ones(rows_at_once(table))
    memory = wide.new_empty(min(len(ones), h.shape[0]), rows.shape[0])
    for part in (slice(first, first + len(ones)) for first in range(0, h.shape[0], len(ones))):
        scores = _scores(wide[part], rows, memory)
        lse = log_sum_exp(scores)
        total += (lse - scores.gather(1, column[part, None]).squeeze(1)).sum()
        to_gradient(scores, lse, column[part], ones[: len(scores)])
        torch.mm(scores, rows, out=grad_h[part])
        grad_table[1:].addmm_(scores.T, wide[part])
    return total.to(dtype), grad_h, grad_table


def total_nll_backward(given: FullSoftmax, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Grad times the gradients of the forward; an operator, so that a second derivative is an error and not zero."""
    return tuple((grads[0] * gradient).to(x.dtype) for gradient, x in zip(kept, given[:2], strict=True))


def score_dtype(h: Tensor, table: Tensor) -> torch.dtype:
    """Of the scores of hidden states: float32 at least."""
    return torch.promote_types(torch.promote_types(h.dtype, table.dtype), torch.float32)


def check_range(items: Tensor, table: Tensor) -> None:
    """Refuse items that are not in a table by ValueError; within the operators, so that compiled programs do it too."""
    if items.numel() and not 1 <= int(items.min()) <= int(items.max()) < table.shape[0]:
        raise ValueError(
            f"items must be from 1 to {table.shape[0] - 1}; given {int(items.min())} to {int(items.max())}"
        )


def is_one_block(h: Tensor, table: Tensor) -> bool:
    """Whether all scores are so few that they may as well be kept."""
    return h.shape[0] * (table.shape[0] - 1) <= SCORES_PER_BLOCK


def blocks(h: Tensor, table: Tensor, seen: tuple[Tensor, Tensor] | None = None) -> Iterator[Block]:
    """The catalogue block by block, each in the memory of the one before; what a row has seen has score -inf.

    Every product has the same shape, the last one overlapping the one before it: a narrow one could be summed in
    another order, and equal items would no longer score the same.
    """
    dtype = score_dtype(h, table)
    size = max(1, table.shape[0] - 1)
    if not is_one_block(h, table):
        size = max(1, SCORES_PER_BLOCK // h.shape[0])
        size -= size % COLUMNS if size > COLUMNS else 0
    bounds: list[int] = []
    if seen is not None:
        check_range(seen[1], table)
        order = seen[1].argsort()
        seen = (seen[0][order], seen[1][order])
        edges = torch.arange(1, table.shape[0] + size, size, device=h.device)
        bounds = torch.searchsorted(seen[1], edges).tolist()
    h = h.to(dtype)
    memory = h.new_empty(h.shape[0], size)
    for number, first in enumerate(range(1, table.shape[0], size)):
        overlap = max(0, min(first - 1, first + size - table.shape[0]))
        rows = table[first - overlap : first + size].to(dtype)
        scores = _scores(h, rows, memory)[:, overlap:]
        rows = rows[overlap:]
        if seen is not None:
            part = slice(bounds[number], bounds[number + 1])
            scores[seen[0][part], seen[1][part] - first] = -torch.inf
        yield first, rows, scores


def columns(items: Tensor, first: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Column of each row's item in a block, and whether it stands there, ``[N, 1]`` each."""
    column = (items - first).unsqueeze(1)
    inside = (column >= 0) & (column < scores.shape[1])
    return column.clamp(0, scores.shape[1] - 1), inside


def rows_at_once(table: Tensor) -> int:
    """How many hidden states' scores with all items are one block; on a CPU, one that stays in its cache."""
    block = max(1, SCORES_PER_BLOCK // max(1, table.shape[0] - 1))
    return min(CACHED_ROWS, block) if table.device.type == "cpu" else block


def _scores(h: Tensor, rows: Tensor, memory: Tensor) -> Tensor:
    """Hidden states times rows of the table ``[N, c]``, in memory ``[N or more, c]``; float32 also under autocast."""
    with without_autocast(h.device.type):
        return torch.mm(h, rows.T, out=memory[: len(h)])
