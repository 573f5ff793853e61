"""Losses, ranks and best items over a whole catalogue, in blocks of items; the matrix of all scores is never held.

Throughout, the catalogue is an embedding table ``[num_items + 1, C]`` whose row 0 is padding and takes no part, and the
score of item j for hidden state h is their dot product. Scores are float32 (float64 where an input is), also under
autocast. At most about ``SCORES_PER_BLOCK`` of them are held at once: those of all hidden states with a block of items,
so that an item's gradient is one product over all of them and written once; or, for a sum of losses where the catalogue
is so small that the table may be visited more often, those of some hidden states with all items. The latter computes
the gradients, in float32, together with the loss and holds them until the backward; nothing else takes memory.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..operators.transforms import check_has_values, operator, transformed
from ..precision import without_autocast

SCORES_PER_BLOCK = (1 << 23) - (1 << 16)
"""Scores held at once: just below the 32 MiB of float32 from which on glibc asks for fresh pages every time."""
MANY_ROWS = 256
"""Hidden states at a time with which a product takes longer than reading the table."""
FEW_ROWS, CACHED_ROWS = 64, 256
"""Hidden states at a time for which a visit of the table pays, and whose scores a CPU's cache still holds."""
COLUMNS = 16
"""Widths of blocks are multiples of this: products with odd ones take a CPU twice the time."""

PLAIN_SCORES = "use torch.nn.functional.cross_entropy of all scores, which is plain PyTorch and has them"

Reduction: TypeAlias = Literal["none", "sum", "mean"]

Block: TypeAlias = tuple[int, Tensor, Tensor]
"""The first item of a block, its rows of the table ``[c, C]``, the scores ``[N, c]``."""


def nll(h: Tensor, table: Tensor, items: Tensor, reduction: Reduction = "none") -> Tensor:
    """Negative log-likelihood of items under the softmax over the catalogue.

    A sum or mean is faster to differentiate than as many losses, for which scores are computed twice. Within transforms
    of ``torch.func`` and forward-mode differentiation the matrix of all scores is held.

    Args:
        h: hidden states ``[N, C]``, any float dtype.
        table: embeddings ``[num_items + 1, C]``.
        items: int64 ``[N]``, the target of each hidden state, from 1 to num_items.
        reduction: of the N losses, as in ``torch.nn.functional.cross_entropy``.

    Returns:
        float32 (float64), ``[N]`` or a scalar; it may be differentiated once, with respect to h and table.

    Raises:
        ValueError: shapes do not fit, no such item or reduction. TypeError: items are not int64.
    """
    _check(h, table, items)
    if reduction not in get_args(Reduction):
        raise ValueError(f"expected a reduction out of 'none', 'sum' and 'mean', given {reduction!r}")
    differentiable = torch.is_grad_enabled() and (h.requires_grad or table.requires_grad)
    if transformed():
        return reduced(_plain_nll(h, table, items), reduction)
    rows = _rows_at_once(table)  # while tracing, the number of hidden states may be open, and does not decide
    pays = rows >= FEW_ROWS or (not torch.compiler.is_compiling() and rows >= h.shape[0])
    if reduction != "none" and differentiable and pays:
        total: Tensor = catalogue_total_nll(h, table, items)[0]
        return total / h.shape[0] if reduction == "mean" else total
    losses: Tensor = catalogue_nll(h, table, items)[0]
    return reduced(losses, reduction)


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
    at_once = SCORES_PER_BLOCK // max(1, table.shape[0] - 1)
    if seen is None and MANY_ROWS <= at_once < len(items):  # whole rows of scores, so that one pass is enough
        parts = zip(h.split(at_once), items.split(at_once), strict=True)
        return torch.cat([ranks(rows, table, own) for rows, own in parts])
    passes: list[Iterable[Block]] = [_blocks(h, table, seen) for _ in range(2)]
    if _is_one_block(h, table):
        passes = [list(passes[0])] * 2
    target = torch.zeros(h.shape[0], 1, dtype=score_dtype(h, table), device=h.device)
    nan = torch.zeros((), dtype=torch.bool, device=h.device)
    for first, _, scores in passes[0]:
        column, inside = _columns(items, first, scores)
        target = torch.where(inside, scores.gather(1, column), target)
        nan |= scores.amax().isnan()  # a maximum over any NaN is NaN
    if nan:
        raise ValueError("expected scores that are numbers, got NaN among them; has the model diverged in training?")
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
    _check(h, table)
    check_has_values("top_k", h)
    if k < 1:
        raise ValueError(f"expected k of at least 1, given {k}")
    best = torch.empty(h.shape[0], 0, dtype=torch.int64, device=h.device)
    for first, _, scores in _blocks(h, table, seen):
        found = torch.cat((best, _best_keys(scores.float(), first, k)), 1)
        best = found.topk(min(k, found.shape[1]), dim=1).values
    return _scores_of(best), ~best & _LOW


def _is_one_block(h: Tensor, table: Tensor) -> bool:
    """Whether all scores are so few that they may as well be kept."""
    return h.shape[0] * (table.shape[0] - 1) <= SCORES_PER_BLOCK


def _is_compiled(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operator computes by compiled code; while it is traced, nothing is compiled to find out."""
    if torch.compiler.is_compiling():
        return device.type == "cpu" and dtype == torch.float32
    return native.softmax_refusal(device, dtype) is None


def score_dtype(h: Tensor, table: Tensor) -> torch.dtype:
    """Of the scores of hidden states: float32 at least."""
    return torch.promote_types(torch.promote_types(h.dtype, table.dtype), torch.float32)


def _check(h: Tensor, table: Tensor, items: Tensor | None = None) -> None:
    if h.dim() != 2 or table.dim() != 2 or h.shape[1] != table.shape[1]:
        raise ValueError(
            f"h must be [N, C] and table [num_items + 1, C]; given {list(h.shape)} and {list(table.shape)}"
        )
    if items is not None and items.dtype != torch.int64:
        raise TypeError(f"items must be int64; given {items.dtype}")
    if items is not None and items.shape != h.shape[:1]:
        raise ValueError(f"items must be [N], one for each of {h.shape[0]} hidden states; given {list(items.shape)}")


def check_range(items: Tensor, table: Tensor) -> None:
    """Refuse items that are not in a table by ValueError; within the operators, so that compiled programs do it too."""
    if items.numel() and not 1 <= int(items.min()) <= int(items.max()) < table.shape[0]:
        raise ValueError(
            f"items must be from 1 to {table.shape[0] - 1}; given {int(items.min())} to {int(items.max())}"
        )


def _blocks(h: Tensor, table: Tensor, seen: tuple[Tensor, Tensor] | None = None) -> Iterator[Block]:
    """The catalogue block by block, each in the place of the one before; what a row has seen has score -inf.

    Every product has the same shape, the last one overlapping the one before it: a narrow one could be summed in
    another order, and equal items would no longer score the same.
    """
    dtype = score_dtype(h, table)
    size = max(1, table.shape[0] - 1)
    if not _is_one_block(h, table):
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


def _columns(items: Tensor, first: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Column of each row's item in a block, and whether it stands there, ``[N, 1]`` each."""
    column = (items - first).unsqueeze(1)
    inside = (column >= 0) & (column < scores.shape[1])
    return column.clamp(0, scores.shape[1] - 1), inside


_LOW = (1 << 32) - 1


def _best_keys(scores: Tensor, first: int, k: int) -> Tensor:
    """Sort keys ``[N, min(k, c)]`` of the best of a block's scores, float32 ``[N, c]``."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if bool(values.isnan().any()):  # NaN comes before any number
        raise ValueError("expected scores that are numbers, got NaN from the model; it has diverged in training")
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


@operator("catalogue_nll", instead=PLAIN_SCORES)
def catalogue_nll(h: Tensor, table: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods ``[N]``, and the logarithms of the softmax's denominators, float64 ``[N]``."""
    check_range(items, table)
    lse = torch.full((h.shape[0],), -torch.inf, dtype=torch.float64, device=h.device)
    target = torch.zeros(h.shape[0], 1, dtype=score_dtype(h, table), device=h.device)
    for first, _, scores in _blocks(h, table):
        column, inside = _columns(items, first, scores)
        target = torch.where(inside, scores.gather(1, column), target)
        lse = torch.logaddexp(lse, _log_sum_exp(scores))
    return (lse - target.squeeze(1)).to(target.dtype), lse


@operator("catalogue_nll_backward", instead=PLAIN_SCORES)
def catalogue_nll_backward(grad: Tensor, h: Tensor, table: Tensor, items: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of h and table; the scores are computed again, block by block."""
    dtype = score_dtype(h, table)
    grad_h = torch.zeros(h.shape, dtype=dtype, device=h.device)
    grad_table = table.new_empty(table.shape)
    grad_table[0] = 0
    wide, grad = h.to(dtype), grad.to(dtype)
    for first, rows, scores in _blocks(h, table):
        _to_gradient(scores, lse, items - first, grad)
        with without_autocast(h.device.type):
            grad_table[first : first + rows.shape[0]] = scores.T @ wide
            grad_h.addmm_(scores, rows)
    return grad_h.to(h.dtype), grad_table


@operator("catalogue_total_nll", instead=PLAIN_SCORES)
def catalogue_total_nll(h: Tensor, table: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the negative log-likelihoods, and its gradients with respect to h and table, float32 (float64).

    Some hidden states at a time, whose scores are computed once and become their gradients in place.
    """
    check_range(items, table)
    dtype = score_dtype(h, table)
    wide, rows, columns = h.to(dtype), table[1:].to(dtype), items - 1
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    grad_h, grad_table = wide.new_empty(wide.shape), wide.new_zeros(table.shape)
    ones = wide.new_ones(_rows_at_once(table))
    memory = wide.new_empty(min(len(ones), h.shape[0]), rows.shape[0])
    for part in (slice(first, first + len(ones)) for first in range(0, h.shape[0], len(ones))):
        scores = _scores(wide[part], rows, memory)
        lse = _log_sum_exp(scores)
        total += (lse - scores.gather(1, columns[part, None]).squeeze(1)).sum()
        _to_gradient(scores, lse, columns[part], ones[: len(scores)])
        with without_autocast(h.device.type):
            torch.mm(scores, rows, out=grad_h[part])
            grad_table[1:].addmm_(scores.T, wide[part])
    return total.to(dtype), grad_h, grad_table


@operator("catalogue_total_nll_backward", instead=PLAIN_SCORES)
def catalogue_total_nll_backward(
    grad: Tensor, grad_h: Tensor, grad_table: Tensor, h_dtype: torch.dtype, table_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """grad times the gradients of the forward; an operator, so that a second derivative is an error and not zero."""
    return (grad * grad_h).to(h_dtype), (grad * grad_table).to(table_dtype)


def _rows_at_once(table: Tensor) -> int:
    """How many hidden states' scores with all items are one block; on a CPU, one that stays in its cache."""
    block = max(1, SCORES_PER_BLOCK // max(1, table.shape[0] - 1))
    return min(CACHED_ROWS, block) if table.device.type == "cpu" else block


def _scores(h: Tensor, rows: Tensor, memory: Tensor) -> Tensor:
    """Hidden states times rows of the table ``[N, c]``, in memory ``[N or more, c]``; float32 also under autocast."""
    with without_autocast(h.device.type):
        return torch.mm(h, rows.T, out=memory[: len(h)])


def _log_sum_exp(scores: Tensor) -> Tensor:
    """log Σ exp of every row of a block, float64."""
    if _is_compiled(scores.device, scores.dtype):
        return native.log_sum_exp(scores)
    return scores.logsumexp(1).double()


def _to_gradient(scores: Tensor, lse: Tensor, column: Tensor, grad: Tensor) -> None:
    """grad times the probabilities, less 1 at the target: the gradient of the scores takes their place."""
    if _is_compiled(scores.device, scores.dtype):
        native.softmax_gradient(scores, lse, column, grad)
        return
    scores.sub_(lse.to(scores.dtype).unsqueeze(1)).exp_().mul_(grad.unsqueeze(1))
    column, inside = _columns(column, 0, scores)
    scores.scatter_add_(1, column, -grad.unsqueeze(1) * inside)


@catalogue_nll.register_fake
def _(h: Tensor, table: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape[0], dtype=score_dtype(h, table)), h.new_empty(h.shape[0], dtype=torch.float64)


@catalogue_nll_backward.register_fake
def _(grad: Tensor, h: Tensor, table: Tensor, items: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), table.new_empty(table.shape)


@catalogue_total_nll.register_fake
def _(h: Tensor, table: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = score_dtype(h, table)
    return h.new_empty((), dtype=dtype), h.new_empty(h.shape, dtype=dtype), h.new_empty(table.shape, dtype=dtype)


@catalogue_total_nll_backward.register_fake
def _(
    grad: Tensor, grad_h: Tensor, grad_table: Tensor, h_dtype: torch.dtype, table_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return grad_h.new_empty(grad_h.shape, dtype=h_dtype), grad_table.new_empty(grad_table.shape, dtype=table_dtype)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    return *catalogue_nll_backward(grad, *ctx.saved_tensors), None


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtypes = [x.dtype for x in inputs[:2]]
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    return *catalogue_total_nll_backward(grad, *ctx.saved_tensors, *ctx.dtypes), None


catalogue_nll.register_autograd(_backward, setup_context=_save_inputs)
catalogue_total_nll.register_autograd(_scale_gradients, setup_context=_save_gradients)
