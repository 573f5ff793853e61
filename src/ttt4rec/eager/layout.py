"""How tokens are laid out for the walk over mini-batches.

Tokens arrive as ``[B, L, H, ...]`` with sequences of unequal length inside. The walk wants, for every mini-batch, one
dense ``[rows, K, D]`` operand whose rows are (sequence, head) pairs. Sequences are sorted by length, longest first,
so that those still alive in a mini-batch are a prefix of the rows and nothing is computed for those that have ended.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CACHE_BYTES = 1 << 20
"""Rows are walked in chunks whose widest operand is about this large, so that elementwise passes stay in cache."""


@dataclass(frozen=True)
class RowChunk:
    """A set of sequences walked together; rows are (sequence, head) pairs, ``R`` of them."""

    sequences: Tensor  # [n] which sequences, longest first
    token_rows: Tensor  # [T, R, K] index of each slot in the flattened [B·L·H] token rows; 0 where there is no token
    empty: Tensor | None  # flat slots without a token; None when there are none
    filled: Tensor | None  # flat slots with a token; None when all are
    alive: list[int]  # per mini-batch: rows that have a token in it
    complete: list[int]  # per mini-batch: rows that have all K tokens in it

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, L, H, D] to [T, R, K, D]; [B, L, H] to [T, R, K]. Slots without a token are zero."""
        rows = x.reshape(-1, *x.shape[3:]).index_select(0, self.token_rows.view(-1)).to(dtype)
        if self.empty is not None:
            rows[self.empty] = 0
        return rows.view(*self.token_rows.shape, *x.shape[3:])

    def scatter(self, rows: Tensor, out: Tensor) -> None:
        """Write [T, R, K, D] (or [T, R, K]) to their tokens in out, ``[B, L, H, D]`` (or ``[B, L, H]``), contiguous."""
        source, index = rows.flatten(0, 2), self.token_rows.view(-1)
        if self.filled is not None:
            source, index = source[self.filled], index[self.filled]
        out.view(-1, *out.shape[3:]).index_copy_(0, index, source.to(out.dtype))

    def weights(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, H, ...] to a fresh [R, ...]."""
        return w.index_select(0, self.sequences).flatten(0, 1).to(dtype)

    def per_head(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """[H, D] to [R, 1, D]."""
        return parameter.to(dtype).repeat(self.sequences.numel(), 1).unsqueeze(1)

    def write_weights(self, rows: Tensor, out: Tensor) -> None:
        """[R, ...] back into out ``[N, H, ...]``."""
        out.index_copy_(0, self.sequences, rows.view(-1, *out.shape[1:]).to(out.dtype))


def row_chunks(
    x: Tensor, starts: Tensor | None, lengths: Tensor | None, mini_batch_size: int, row_bytes: int
) -> list[RowChunk]:
    """Cut the sequences inside x ``[B, L, H, D]`` into chunks of rows.

    Args:
        x: any of the token tensors; only its shape and device are read.
        starts: first token of each sequence in the flattened ``[B·L]`` tokens, or None: each batch row is a sequence.
        lengths: number of tokens of each sequence, or None.
        mini_batch_size: K.
        row_bytes: size of one row's widest operand.
    """
    B, L, H = x.shape[:3]
    if starts is None or lengths is None:
        starts = torch.arange(B, device=x.device) * L
        lengths = torch.full((B,), L, device=x.device)
    order = torch.argsort(lengths, descending=True, stable=True)
    per_chunk = max(1, CACHE_BYTES // (row_bytes * H))
    return [
        _row_chunk(sequences, starts[sequences], lengths[sequences], H, mini_batch_size)
        for sequences in order.split(per_chunk)
    ]


def _row_chunk(sequences: Tensor, starts: Tensor, lengths: Tensor, H: int, K: int) -> RowChunk:
    device = starts.device
    T = (int(lengths[0]) + K - 1) // K if lengths.numel() else 0  # longest first
    slots = torch.arange(T * K, device=device).view(T, 1, K)
    valid = slots < lengths.view(1, -1, 1)  # [T, n, K]
    tokens = torch.where(valid, starts.view(1, -1, 1) + slots, 0)
    heads = torch.arange(H, device=device).view(1, 1, H, 1)
    token_rows = (tokens.unsqueeze(2) * H + heads).flatten(1, 2)  # [T, n·H, K]
    boundaries = torch.arange(T, device=device).view(-1, 1) * K
    all_valid = bool(valid.all())
    slot_valid = None if all_valid else valid.unsqueeze(2).expand(-1, -1, H, -1).flatten()
    return RowChunk(
        sequences=sequences,
        token_rows=token_rows,
        empty=None if slot_valid is None else (~slot_valid).nonzero().squeeze(1),
        filled=None if slot_valid is None else slot_valid.nonzero().squeeze(1),
        alive=((lengths > boundaries).sum(1) * H).tolist(),
        complete=((lengths >= boundaries + K).sum(1) * H).tolist(),
    )
