"""Copies of the weights, from which the walk back replays.

Of every ``segment`` mini-batches but a sequence's first the forward keeps the weights before them: a checkpoint.
Checkpoints are ``[B L // (segment K) + 2, H, numbers]``, W and b of all layers in a row. That of a segment which begins
at token t of the flattened tokens is number t // (segment K) - 1. Such a segment comes after a whole one, so no two
begin among the same segment K tokens. The last two are spare: a size that may be 0 or 1 would bind traced programs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .layout import MiniBatch, RowChunk


class Checkpoints:
    """The weights before every ``segment``-th mini-batch; a checkpoint."""

    def __init__(self, memory: Tensor, mini_batch_size: int, segment: int) -> None:
        self.memory, self._K, self._segment = memory, mini_batch_size, segment

    @classmethod
    def empty(cls, tokens: int, mini_batch_size: int, segment: int, weights: Sequence[Tensor]) -> "Checkpoints":
        """For that many tokens in all sequences together."""
        H, numbers = weights[0].shape[1], sum(w.shape[2:].numel() for w in weights)
        number = tokens // (segment * mini_batch_size) + 2
        return cls(weights[0].new_zeros(number, H, numbers), mini_batch_size, segment)

    def write(self, chunk: RowChunk, part: MiniBatch, rows: Sequence[Tensor]) -> None:
        """Keep the weights, ``[R, in + 1, out]`` a layer, of the sequences that have this mini-batch."""
        flat = torch.cat([W[: part.rows].flatten(1) for W in rows], 1)
        self.memory[self._slots(chunk, part)] = flat.unflatten(0, (-1, self.memory.shape[1]))

    def read(self, chunk: RowChunk, part: MiniBatch, initial: Sequence[Tensor]) -> list[Tensor]:
        """Fresh weights before this mini-batch, the first of a segment."""
        if part.place == 0:
            return [chunk.affine(W, b, W.dtype) for W, b in layers(initial)]
        flat = self.memory[self._slots(chunk, part)].flatten(0, 1)
        sizes = [W.shape[2:].numel() + b.shape[2:].numel() for W, b in layers(initial)]
        parts = zip(flat.split(sizes, 1), initial[1::2], strict=True)
        return [part.unflatten(1, (-1, b.shape[2])).contiguous() for part, b in parts]

    def _slots(self, chunk: RowChunk, part: MiniBatch) -> Tensor:
        starts = chunk.starts[: part.rows // self.memory.shape[1]]
        return (starts + part.place * self._K) // (self._segment * self._K) - 1


def layers(weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(W, b) of every inner layer."""
    return zip(weights[::2], weights[1::2], strict=True)
