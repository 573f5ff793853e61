"""Hiding items for a model that reads in both directions (BERT4Rec): some of them in training, later the next one.

Histories are packed, ids ``[1, total]`` with ``cu_seqlens [N + 1]``; targets ``[total]`` hold the item after each
input, or 0 where it is not to be predicted. A hidden item has id 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS_AT_ONCE = 1 << 16


class Hidden(NamedTuple):
    """Histories with hidden items."""

    ids: Tensor  # int64 [1, total]
    cu_seqlens: Tensor  # int64 [N + 1]
    places: Tensor  # int64 [P], where the hidden items stand in ids
    items: Tensor  # int64 [P], what they are


def hide_some(ids: Tensor, targets: Tensor, cu_seqlens: Tensor, rate: float) -> Hidden:
    """Every history with its last target behind it; targets are hidden with probability ``rate``, the last one always.

    Items that are no targets are context and stay. The last item alone is what will be hidden after training.
    """
    count = torch.arange(len(cu_seqlens) - 1, device=ids.device)
    lengths, ends = cu_seqlens.diff(), cu_seqlens[1:] - 1
    places = torch.arange(ids.shape[1], device=ids.device) + count.repeat_interleave(lengths)
    hide = (torch.rand(len(targets), device=ids.device) < rate) & (targets != 0)
    hide[ends] = True
    longer = ids.new_zeros(ids.shape[1] + len(count))
    longer[places] = ids[0]
    hidden = places[hide] + 1
    longer[hidden] = 0
    return Hidden(longer[None], cu_seqlens + F.pad(count + 1, (1, 0)), hidden, targets[hide])


def hide_next(ids: Tensor, targets: Tensor, cu_seqlens: Tensor, max_len: int) -> Iterator[Hidden]:
    """For each target, in their order, a history of its own: the at most ``max_len`` inputs before it, then it, hidden.

    They come in parts of about ``TOKENS_AT_ONCE`` tokens.
    """
    begins = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    for last in targets.nonzero().flatten().split(max(1, TOKENS_AT_ONCE // (max_len + 1))):
        first = torch.maximum(begins[last], last - max_len + 1)
        lengths = last - first + 2
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        place = torch.arange(int(bounds[-1]), device=ids.device) + (first - bounds[:-1]).repeat_interleave(lengths)
        ends = bounds[1:] - 1
        prefixes = F.pad(ids[0], (0, 1))[place]
        prefixes[ends] = 0
        yield Hidden(prefixes[None], bounds, ends, targets[last])
