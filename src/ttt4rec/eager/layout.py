"""How tokens are laid out for the walk over mini-batches.

Tokens arrive as ``[B, L, H, ...]`` with sequences of unequal length inside. The walk wants, for every mini-batch, one
dense ``[rows, r, D]`` operand whose rows are (sequence, head) pairs. Sequences are sorted by length, longest first,
so that those still alive in a mini-batch are a prefix of the rows and nothing is computed for those that have ended.
Only one mini-batch is laid out at a time: it is read where it lies, stays in cache, and its results are written back.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE_BYTES = 1 << 19
"""Rows are walked in chunks whose widest operand is about this large, so that elementwise passes stay in cache."""
CHUNK_BYTES = 1 << 28
"""The same on a GPU, which wants all rows at once: what several operands of that size take of its memory."""


@dataclass(frozen=True)
class MiniBatch:
    """The ``[n, r]`` tokens of one mini-batch, of those n sequences of a chunk that have any; r = K but in the last."""

    place: int  # among the mini-batches of a sequence
    index: tuple[slice, slice] | Tensor  # of the tokens, in what ``by_token`` returned
    padding: Tensor | None  # [n, r] True where there is no token; None: there is one everywhere
    length: int  # r
    rows: int  # n·H
    complete: int  # rows that have K tokens
    block: int  # what is read is filled up with zeros to a multiple of so many tokens

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[n·H, r, D] of tokens with D features, ``[n·H, r]`` of scalars; zeros where there is no token."""
        rows = self._rows(x, dtype)
        return (rows if self.block == 1 else rows.contiguous()).flatten(0, 1)  # to be cut into blocks

    def read_with_one(self, x: Tensor, dtype: torch.dtype, ones: int = 1) -> Tensor:
        """[n·H, r, D + ones]: behind the features a one, for the bias, and zeros."""
        rows = self._rows(x, dtype)
        if ones == 1:
            return F.pad(rows, (0, 1), value=1.0).flatten(0, 1)
        wide = torch.zeros((*rows.shape[:-1], rows.shape[-1] + ones), dtype=dtype, device=x.device)
        wide[..., : rows.shape[-1]] = rows
        wide[..., rows.shape[-1]] = 1.0
        return wide.flatten(0, 1)

    def write(self, rows: Tensor, out: Tensor) -> None:
        """The inverse of ``read``: into tokens that there are."""
        rows = rows[:, : self.length].unflatten(0, (-1, out.shape[-rows.dim() + 1]))
        index, tokens = self.index, rows.transpose(1, 2)
        if isinstance(index, Tensor) and self.padding is not None:
            index, tokens = index[~self.padding], tokens[~self.padding]
        out[index] = tokens.to(out.dtype) if isinstance(index, Tensor) else tokens

    def _rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        tokens = x[self.index].to(dtype)  # [n, r, H, ...]
        if self.padding is not None:
            tokens = tokens.masked_fill(self.padding.view(*self.padding.shape, *[1] * (tokens.dim() - 2)), 0)
        if more := -self.length % self.block:
            tokens = F.pad(tokens, (*[0, 0] * (tokens.dim() - 2), 0, more))
        return tokens.transpose(1, 2)


@dataclass(frozen=True)
class RowChunk:
    """A set of sequences walked together; rows are (sequence, head) pairs, ``R`` of them."""

    sequences: slice | Tensor  # which, longest first
    starts: Tensor  # their first tokens in the flattened tokens
    mini_batches: list[MiniBatch]

    def affine(self, W: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """W ``[N, H, in, out]`` and b ``[N, H, out]`` to a fresh ``[R, in + 1, out]``, whose last row is the bias."""
        return torch.cat((W[self.sequences], b[self.sequences].unsqueeze(2)), 2).flatten(0, 1).to(dtype)

    def per_head(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """[H, D] to [R, 1, D]."""
        return parameter.to(dtype).repeat(self.starts.numel(), 1).unsqueeze(1)

    def write_affine(self, rows: Tensor, W: Tensor, b: Tensor) -> None:
        """The inverse of ``affine``."""
        both = rows.unflatten(0, (-1, W.shape[1])).to(W.dtype)
        W[self.sequences], b[self.sequences] = both[:, :, :-1], both[:, :, -1]


def by_token(x: Tensor, starts: Tensor | None) -> Tensor:
    """What mini-batches index: x ``[B, L, ...]`` itself where each row is a sequence, else its flattened tokens."""
    return x if starts is None else x.flatten(0, 1)


def row_chunks(
    x: Tensor, starts: Tensor | None, lengths: Tensor | None, mini_batch_size: int, row_bytes: int, block: int
) -> Iterator[RowChunk]:
    """Cut the sequences inside x ``[B, L, H, D]`` into chunks of rows.

    Args:
        x: any of the token tensors; only its shape is read.
        starts: first token of each sequence in the flattened ``[B·L]`` tokens, or None: each batch row is a sequence.
        lengths: number of tokens of each sequence, or None.
        mini_batch_size: K.
        row_bytes: size of one row's widest operand.
        block: as in ``MiniBatch``.
    """
    B, L, H = x.shape[:3]
    per_chunk = max(1, (CHUNK_BYTES if x.is_cuda else CACHE_BYTES) // (row_bytes * H))
    if starts is None or lengths is None:
        for first in range(0, B, per_chunk):
            sequences = slice(first, min(first + per_chunk, B))
            own = L * torch.arange(first, sequences.stop, device=x.device)
            yield RowChunk(sequences, own, _dense(sequences, L, H, mini_batch_size, block))
    else:
        for chosen in torch.argsort(lengths, descending=True, stable=True).split(per_chunk):
            yield RowChunk(chosen, starts[chosen], _ragged(starts[chosen], lengths[chosen], H, mini_batch_size, block))


def _dense(sequences: slice, L: int, H: int, K: int, block: int) -> list[MiniBatch]:
    rows = (sequences.stop - sequences.start) * H
    ends = ((t, min(t + K, L)) for t in range(0, L, K))
    return [
        MiniBatch(t // K, (sequences, slice(t, end)), None, end - t, rows, rows * (end - t == K), block)
        for t, end in ends
    ]


def _ragged(starts: Tensor, lengths: Tensor, H: int, K: int, block: int) -> list[MiniBatch]:
    mini_batches = []
    counted = lengths.tolist()  # once: on a GPU each look is a wait
    longest = counted[0] if counted else 0
    for t in range(0, longest, K):
        alive, complete = sum(n > t for n in counted), sum(n >= t + K for n in counted)
        slots = torch.arange(t, min(t + K, longest), device=starts.device)
        valid = slots < lengths[:alive, None]
        index = torch.where(valid, starts[:alive, None] + slots, 0)
        padding = None if counted[alive - 1] >= t + slots.numel() else ~valid
        mini_batches.append(MiniBatch(t // K, index, padding, slots.numel(), alive * H, complete * H, block))
    return mini_batches
