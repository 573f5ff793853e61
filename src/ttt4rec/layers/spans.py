"""Where the sequences lie inside a batch of tokens, and how to put context in front of each.

A batch ``[B, L, ...]`` holds N sequences: one per row (dense), one per row with padding before or behind it (a mask),
or several in the only row (``cu_seqlens``). Everything here is index arithmetic of fixed shapes on the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spans:
    """N sequences among the ``B·L`` flattened tokens."""

    starts: Tensor  # [N] first token
    lengths: Tensor  # [N]
    rooms: Tensor  # [N] first slot that belongs to the sequence, its padding included
    sequence: Tensor  # [B, L] to which sequence a token belongs
    offset: Tensor  # [B, L] its index there; meaningless for padding
    valid: Tensor | None  # [B, L] False for padding; None: there is none

    @staticmethod
    def from_mask(mask: Tensor) -> "Spans":
        """One sequence a row; True marks its tokens, which must be adjacent."""
        B, L = mask.shape
        rows = torch.arange(B, device=mask.device)
        first = mask.to(torch.int8).argmax(1)  # the first True, or 0
        slots = torch.arange(L, device=mask.device)
        return Spans(
            starts=rows * L + first,
            lengths=mask.sum(1),
            rooms=rows * L,
            sequence=rows[:, None].expand(B, L),
            offset=slots - first[:, None],
            valid=mask,
        )

    @staticmethod
    def from_cu_seqlens(cu_seqlens: Tensor, total: int) -> "Spans":
        """Sequence n is ``[cu_seqlens[n], cu_seqlens[n+1])`` of the only row."""
        cu_seqlens = cu_seqlens.long()
        tokens = torch.arange(total, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
        return Spans(
            starts=cu_seqlens[:-1],
            lengths=cu_seqlens.diff(),
            rooms=cu_seqlens[:-1],
            sequence=sequence[None],
            offset=(tokens - cu_seqlens[sequence])[None],
            valid=None,
        )

    def with_context(self, size: int) -> "Extended":
        """Make room for ``size`` slots directly before every sequence."""
        N = self.starts.numel()
        first = self.rooms + size * (torch.arange(N, device=self.rooms.device) + 1)
        total = self.sequence.numel() + size * N
        slots = first[self.sequence] + self.offset
        if self.valid is not None:
            slots = torch.where(self.valid, slots, total)  # padding goes to a spare slot behind the end
        return Extended(first, self.lengths, slots, size, total + 1)


@dataclass(frozen=True)
class Extended:
    """A batch laid out in one row with ``size`` slots of context before each sequence."""

    first: Tensor  # [N] slot of each sequence's first own token
    lengths: Tensor  # [N]
    slots: Tensor  # [B, L] slot of every token
    size: int
    total: int

    def join(self, context: Tensor, x: Tensor) -> Tensor:
        """Context ``[N, size, ...]`` and x ``[B, L, ...]`` to ``[1, total, ...]``; unused slots are zero."""
        joined = x.new_zeros(self.total, *x.shape[2:])
        before = self.first[:, None] - self.size + torch.arange(self.size, device=x.device)
        joined = joined.index_copy(0, self.slots.flatten(), x.flatten(0, 1))
        return joined.index_copy(0, before.flatten(), context.to(x.dtype).flatten(0, 1))[None]

    def part(self, joined: Tensor) -> Tensor:
        """The tokens' own results, ``[1, total, ...]`` back to ``[B, L, ...]``."""
        return joined[0].index_select(0, self.slots.flatten()).view(*self.slots.shape, *joined.shape[2:])


def last_tokens(x: Tensor, starts: Tensor, lengths: Tensor, size: int, count: Tensor) -> Tensor:
    """The last ``count[n] <= size`` tokens of each sequence, right-aligned in ``[N, size, ...]``, zeros before them."""
    slots = torch.arange(size, device=x.device)
    index = (starts + lengths)[:, None] - size + slots
    flat = x.flatten(0, 1).index_select(0, index.clamp_min(0).flatten()).unflatten(0, index.shape)
    keep = slots >= size - count[:, None]
    return torch.where(keep.view(*keep.shape, *(1,) * (x.dim() - 2)), flat, flat.new_zeros(()))


def dense_spans(B: int, L: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Starts and lengths of a batch in which every row is one full sequence."""
    return torch.arange(B, device=device) * L, torch.full((B,), L, device=device)
