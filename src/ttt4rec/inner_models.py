"""The inner models, one row each: weights, what a forward keeps of them, and how a stream's record is laid out.

Whoever adds an inner model adds a row here and its mathematics to the backends.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLE = 8  # numbers to which a record and its rows are filled up: the lanes of a vector


class Record(NamedTuple):
    """A stream's memory of a head for ``token_step``: ``[W; b]`` of every layer, then K rows, one a token.

    A row has, for every layer, its inputs X and its steps U, and then v, lr and ln a. Compiled code is told where
    the parts begin.
    """

    weights: tuple[tuple[int, int], ...]  # shapes of [W; b], (in + 1, out), of every layer
    row: tuple[int, ...]  # widths of a row's parts
    row_size: int  # numbers of a row
    rows: int  # K
    size: int  # numbers of a record

    @property
    def weights_at(self) -> tuple[int, ...]:
        """Where every layer's ``[W; b]`` begins, and at last the rows."""
        return tuple(accumulate(map(prod, self.weights), initial=0))

    @property
    def row_at(self) -> tuple[int, ...]:
        """Where the parts of a row begin in it."""
        return tuple(accumulate(self.row[:-1], initial=0))

    def parts(self, records: Tensor) -> tuple[list[Tensor], Tensor]:
        """Views of records ``[..., size]``: ``[W; b]`` of every layer, and the rows ``[..., K, row_size]``."""
        *weights, rows = _views(records, [*self.weights, (self.rows, self.row_size)])
        return weights, rows

    def weight_parts(self, weights: Tensor) -> list[Tensor]:
        """Views of the beginning of a record alone: ``[W; b]`` of every layer."""
        return _views(weights, self.weights)

    def row_parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of the parts of rows ``[..., row_size]``: X and U of every layer, v, lr and ln a."""
        parts: tuple[Tensor, ...] = rows[..., : sum(self.row)].split(self.row, -1)
        return parts


class InnerModel(NamedTuple):
    """One inner model."""

    name: str
    weights: tuple[str, ...]  # W and b of every layer
    kept: tuple[str, ...]  # what a forward keeps for the backward beside checkpoints, as wide as ``kept_widths``
    expansion: int  # hidden features, as a multiple of the head dimension; 0: there are none

    def layers(self, head_dim: int, hidden: int) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of every layer."""
        return ((head_dim, hidden), (hidden, head_dim)) if self.expansion else ((head_dim, head_dim),)

    def hidden(self, weights: Sequence[Tensor]) -> int:
        """How many hidden features given weights have, 0 if there are none."""
        return weights[0].shape[-1] if self.expansion else 0

    def shapes(self, head_dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Of a head's weights by name."""
        each = [shape for layer in self.layers(head_dim, hidden) for shape in (layer, layer[1:])]
        return dict(zip(self.weights, each, strict=True))

    def kept_widths(self, head_dim: int, hidden: int) -> tuple[int, ...]:
        """Features of what is kept, a number for each token and head: the outputs of every layer."""
        return tuple(out for _, out in self.layers(head_dim, hidden))

    def numbers(self, head_dim: int, hidden: int) -> int:
        """How many numbers a head's weights are."""
        return sum(map(prod, self.shapes(head_dim, hidden).values()))

    def record(self, head_dim: int, hidden: int, mini_batch_size: int) -> Record:
        """The layout of a record."""
        layers = self.layers(head_dim, hidden)
        weights = tuple((inputs + 1, out) for inputs, out in layers)
        row = (*(width for layer in layers for width in layer), head_dim, 1, 1)
        row_size = _filled(sum(row))
        size = _filled(sum(map(prod, weights)) + mini_batch_size * row_size)
        return Record(weights, row, row_size, mini_batch_size, size)


LINEAR = InnerModel("linear", ("W1", "b1"), ("G",), expansion=0)
MLP = InnerModel("mlp", ("W1", "b1", "W2", "b2"), ("Z1", "G2"), expansion=4)
INNER_MODELS = {model.name: model for model in (LINEAR, MLP)}


def matrices(weights: Sequence[Tensor]) -> list[Tensor]:
    """``[W; b]`` of every layer, ``[..., in + 1, out]``, from W1, b1, ..."""
    return [torch.cat((W, b.unsqueeze(-2)), -2) for W, b in zip(weights[::2], weights[1::2], strict=True)]


def _views(x: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    sizes = [*map(prod, shapes)]
    parts = zip(x[..., : sum(sizes)].split(sizes, -1), shapes, strict=True)
    return [part.view(*part.shape[:-1], *shape) for part, shape in parts]


def _filled(numbers: int) -> int:
    return -(-numbers // _MULTIPLE) * _MULTIPLE
