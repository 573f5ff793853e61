"""Copies of the weights, from which the walk back replays.

Of every ``segment`` mini-batches but a sequence's first the forward keeps the weights before them: a checkpoint.
Checkpoints are ``[B L // (segment K) + 2, H, numbers]``, W and b of all layers in a row. The checkpoint of a segment
that begins at token t of the flattened tokens is number t // (segment K) - 1. It comes after a whole one, so no two
begin among the same segment K tokens. The last two are spare: a size that may be 0 or 1 would bind traced programs.
"""

from collections.abc import Iterator, Sequence
from math import comb

import torch
from torch import Tensor

from ..arguments import Scan
from .layout import MiniBatch, RowChunk

HELD_BYTES, LEAST_HELD = 12 << 20, 8
"""States before mini-batches that the walk back holds for a chunk of rows: bytes, and eight states at least."""


class Checkpoints:
    """The weights before every ``segment``-th mini-batch; a checkpoint."""

    def __init__(self, memory: Tensor, scan: Scan) -> None:
        self.memory, self._initial = memory, scan.weights
        self._mini_batch_size, self._segment = scan.token_scale.numel(), scan.segment

    @classmethod
    def empty(cls, scan: Scan) -> "Checkpoints":
        """For all tokens of a scan."""
        return cls(scan.new_checkpoints(), scan)

    def write(self, chunk: RowChunk, part: MiniBatch, rows: Sequence[Tensor]) -> None:
        """Keep the weights, ``[R, in + 1, out]`` a layer, of the sequences that have this mini-batch."""
        flat = torch.cat([W[: part.rows].flatten(1) for W in rows], 1)
        self.memory[self._slots(chunk, part)] = flat.unflatten(0, (-1, self.memory.shape[1]))

    def read(self, chunk: RowChunk, part: MiniBatch) -> list[Tensor]:
        """Fresh weights before this mini-batch, the first of a segment."""
        if part.place == 0:
            return [chunk.affine(W, b, W.dtype) for W, b in layers(self._initial)]
        flat = self.memory[self._slots(chunk, part)].flatten(0, 1)
        sizes = [W.shape[2:].numel() + b.shape[2:].numel() for W, b in layers(self._initial)]
        parts = zip(flat.split(sizes, 1), self._initial[1::2], strict=True)
        return [part.unflatten(1, (-1, b.shape[2])).contiguous() for part, b in parts]

    def _slots(self, chunk: RowChunk, part: MiniBatch) -> Tensor:
        starts = chunk.starts[: part.rows // self.memory.shape[1]]
        return (starts + part.place * self._mini_batch_size) // (self._segment * self._mini_batch_size) - 1


def layers(weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(W, b) of every inner layer."""
    return zip(weights[::2], weights[1::2], strict=True)


def room_for(state_bytes: int) -> int:
    """How many states of a chunk the walk back holds."""
    return max(LEAST_HELD, HELD_BYTES // state_bytes)


def steps_ahead(mini_batches: int, room: int) -> int:
    """How far to go ahead among mini-batches that are more than the room for states.

    That many mini-batches are served from a state before the first: go ahead, serve those behind from there with one
    state less, and go back to those before. If none is replayed more than t times, ``comb(room + t - 1, t)`` can be
    served. If t is 1, they are held all at once. Else they are the ones behind, served with one state less, and the
    ones before, served with one time less.
    """
    times = 1
    while comb(room + times - 1, times) < mini_batches:
        times += 1
    return max(mini_batches - comb(room + times - 2, times), 1)
