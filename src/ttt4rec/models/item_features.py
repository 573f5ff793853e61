"""Items by more than their ids: rows of the item table that are sums of an id's embedding and of what features say.

The row of item j is known_j E_j + P x_j + Σ_v s_jv V_v: the id's embedding E_j if training saw the item, a linear map P
of its numbers x_j, and the weighted sum of the embeddings V of its categories. So an item that training never saw has a
row, and with it a score. All rows stand in one table, which everything behind it takes for an embedding's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import is_number
from ..layers.initialisation import Device
from ..operators.transforms import has_values, transformed
from ..precision import without_autocast
from .item_index import count_fused_steps

DENSE, CATEGORIES = "dense", "categories"


@dataclasses.dataclass(frozen=True)
class FeatureColumn:
    """What is known of one feature: by it the items of training and later ones are encoded alike.

    Attributes:
        name: of the column.
        kind: ``"dense"`` for a number or a vector, ``"categories"`` for one value or several.
        mean: of each component of a dense one.
        scale: by which each component, less its mean, is divided.
        values: of categories.
    """

    name: str
    kind: str
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: they are no description of a column.
        """
        numbers = len(self.mean) == len(self.scale) > 0 and all(map(is_number, self.mean + self.scale))
        texts = bool(self.values) and all(isinstance(value, str) for value in self.values)
        if not isinstance(self.name, str) or not {DENSE: numbers, CATEGORIES: texts}.get(self.kind, False):
            raise ValueError(f"a column of features must be dense or of categories; given {self.name!r}")

    def as_json(self) -> dict[str, Any]:
        """As a JSON file has it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    @staticmethod
    def from_json(content: dict[str, Any]) -> FeatureColumn:
        """What ``as_json`` gave; ValueError or TypeError if it is damaged."""
        given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in content.items()}
        return FeatureColumn(**given)


@dataclasses.dataclass(frozen=True, eq=False)
class ItemFeatures:
    """Encoded features of items 0 to num_items, item 0 being padding, which has none.

    Attributes:
        columns: what is encoded.
        dense: float32 ``[num_items + 1, F]``, the components of all dense columns, zero where one is missing.
        categories: int64 ``[n]``, numbers of values, counted on from column to column; the items' one behind the other.
        weights: float32 ``[n]``, what each of them counts.
        offsets: int64 ``[num_items + 2]``; item j has categories[offsets[j]:offsets[j + 1]].
        known: bool ``[num_items + 1]``, of which items the ids count too: those that training sees.
        id_dropout: share of the ids that are left out in a training step, so that features learn to stand alone.
    """

    columns: tuple[FeatureColumn, ...]
    dense: Tensor
    categories: Tensor
    weights: Tensor
    offsets: Tensor
    known: Tensor
    id_dropout: float = 0.1

    def __post_init__(self) -> None:
        """Check what a damaged file may bring.

        Raises:
            ValueError: sizes or numbers do not fit.
        """
        if not is_number(self.id_dropout) or not 0 <= self.id_dropout < 1:
            raise ValueError(f"id_dropout must be at least 0 and below 1; given {self.id_dropout!r}")
        rows, width = self.known.shape[0], sum(len(column.mean) for column in self.columns)
        fit = (
            self.dense.shape == (rows, width)
            and self.offsets.shape == (rows + 1,)
            and self.categories.shape == self.weights.shape == (int(self.offsets[-1]),)
            and bool((self.offsets.diff() >= 0).all() and self.offsets[0] == 0)
            and bool(((self.categories >= 0) & (self.categories < self.num_values)).all())
        )
        if not fit:
            raise ValueError("features of items must be of the sizes of their columns; given others")

    @property
    def num_values(self) -> int:
        """Number of values of all categories."""
        return sum(len(column.values) for column in self.columns)

    @property
    def num_items(self) -> int:
        """Number of items, padding not counted."""
        return self.known.shape[0] - 1

    def extended(self, num_items: int) -> ItemFeatures:
        """For ``num_items`` items; the new ones have no features, and their ids do not count."""
        more = num_items - self.num_items
        offsets = torch.cat((self.offsets, self.offsets[-1:].expand(more)))
        return dataclasses.replace(
            self, dense=F.pad(self.dense, (0, 0, 0, more)), offsets=offsets, known=F.pad(self.known, (0, more))
        )

    def updated(self, items: Tensor, given: ItemFeatures) -> ItemFeatures:
        """With other features for items, int64 ``[n]``, all different: what items 1, 2, ..., n of ``given`` have."""
        dense, replaced = self.dense.clone(), torch.zeros_like(self.known)
        dense[items], replaced[items] = given.dense[1:].to(dense), True
        old, new = self.owners(), torch.cat((items.new_zeros(1), items))[given.owners()]
        stay = ~replaced[old]
        owners = torch.cat((old[stay], new))
        order = torch.argsort(owners, stable=True)
        counts = torch.bincount(owners, minlength=len(self.known))
        return dataclasses.replace(
            self,
            dense=dense,
            categories=torch.cat((self.categories[stay], given.categories))[order],
            weights=torch.cat((self.weights[stay], given.weights.to(self.weights)))[order],
            offsets=F.pad(counts.cumsum(0), (1, 0)),
        )

    def owners(self) -> Tensor:
        """The item of each category, int64 ``[n]``."""
        return torch.arange(len(self.known)).repeat_interleave(self.offsets.diff())


BUFFERS = ("dense", "categories", "weights", "offsets", "known")


class FeaturedItems(nn.Module):
    """From embeddings of ids to rows of the item table.

    Args:
        given: features of all items.
        width: of a row.
        device: of the parameters and of the features.
        dtype: of the parameters and of the features' numbers.

    Attributes:
        columns: what the features are.
        id_dropout: share of the ids that are left out in training mode, other ones at every call.
    """

    dense: Tensor
    categories: Tensor
    weights: Tensor
    offsets: Tensor
    known: Tensor

    def __init__(
        self, given: ItemFeatures, width: int, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.columns, self.id_dropout = given.columns, given.id_dropout
        factory: Any = {"device": device, "dtype": dtype}
        components, values = given.dense.shape[1], given.num_values
        self.projection = nn.Linear(components, width, bias=False, **factory) if components else None
        self.values = nn.Embedding(values, width, **factory) if values else None
        for name in BUFFERS:
            x: Tensor = getattr(given, name)
            self.register_buffer(name, x.to(device=device, dtype=dtype if x.is_floating_point() else None))
        self._held: list[Tensor] | None = None
        self._kept: tuple[list[tuple[Tensor, int]], Tensor] | None = None  # made of what, as of which version

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own table."""
        return self.__dict__ | {"_held": None, "_kept": None}

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """Rows ``[n, width]`` of items first to first + n - 1, from the embeddings of their ids ``[n, width]``."""
        known = self.known[first : first + ids.shape[0]]
        if self.training and self.id_dropout:
            known = known & (torch.rand(len(known), device=known.device) >= self.id_dropout)
        return self._rows(ids, first, known)

    def _rows(self, ids: Tensor, first: int, counted: Tensor) -> Tensor:
        last = first + len(counted)
        with without_autocast(ids.device.type):
            table = ids * counted.unsqueeze(1).to(ids.dtype)
            if self.projection is not None:
                table = table + self.projection(self.dense[first:last])
            if self.values is not None:
                table = table + self._bags(self.values.weight, first, last)
        return table

    def _bags(self, values: Tensor, first: int, last: int) -> Tensor:
        """The weighted sums of the embeddings of items' values."""
        offsets = self.offsets[first : last + 1]
        part = slice(None) if last - first == len(self.known) else slice(int(offsets[0]), int(offsets[-1]))
        codes, weights = self.categories[part], self.weights[part]
        if transformed():  # embedding_bag has no forward-mode derivative
            owners = torch.arange(last - first, device=offsets.device).repeat_interleave(offsets.diff())
            rows = F.embedding(codes, values) * weights.unsqueeze(1)
            return rows.new_zeros(last - first, rows.shape[1]).index_add(0, owners, rows)
        return F.embedding_bag(
            codes, values, offsets - offsets[0], mode="sum", per_sample_weights=weights, include_last_offset=True
        )

    def table(self, ids: Tensor, first: int = 0) -> Tensor:
        """As ``forward``; within ``held`` the first call's result, and where nothing is differentiated ``served``."""
        if self._held is not None:
            if not self._held:
                self._held.append(self(ids, first))
            return self._held[0]
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (ids, *self.parameters()))
        random = self.training and self.id_dropout > 0
        if recorded or random or len(ids) < len(self.known) or not has_values(ids):
            table: Tensor = self(ids, first)
            return table
        return self.served(ids)

    @torch.no_grad()
    def served(self, ids: Tensor) -> Tensor:
        """Rows of all items from the embeddings of all ids, as in evaluation mode and without a graph.

        They are kept, and made again when something of what they are made of has changed, which is noticed as by
        ``ItemIndex``.
        """
        sources = [ids, *self.parameters(), *self.buffers()]
        if not has_values(ids) or not all(map(_has_version, sources)):
            return self._rows(ids, 0, self.known)
        kept = self._kept
        if kept is None or not all(_is_same(x, *old) for x, old in zip(sources, kept[0], strict=True)):
            count_fused_steps()
            made_of = [(x.detach(), x._version) for x in sources]
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = made_of, self._rows(ids, 0, self.known)
        return kept[1]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it ``table`` is computed once, also where it is differentiated."""
        self._held = []
        try:
            yield
        finally:
            self._held = None

    def given(self) -> ItemFeatures:
        """The features, on the CPU."""
        return ItemFeatures(self.columns, **_taken(self.state_dict()), id_dropout=self.id_dropout)

    def replace(self, given: ItemFeatures) -> None:
        """Take other features of the same columns, perhaps for another number of items."""
        for name in BUFFERS:
            old: Tensor = getattr(self, name)
            setattr(self, name, getattr(given, name).to(old))
        self._kept = None

    @torch.no_grad()
    def learn(self, counts: Tensor) -> None:
        """From now on the ids of items that training sees, ``counts [num_items]`` above 0, count."""
        self.known[1 : len(counts) + 1] |= (counts > 0).to(self.known.device)

    def as_json(self) -> dict[str, Any]:
        """What a file has, next to the weights."""
        return {"columns": [column.as_json() for column in self.columns], "id_dropout": self.id_dropout}

    def fingerprints(self) -> dict[str, str]:
        """A text for each column, and for the id's dropout, that is another one if the column is."""
        texts = {f"column {x.name}": json.dumps(x.as_json()) for x in self.columns}
        digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        return digests | {"id_dropout": repr(self.id_dropout)}


def from_saved(description: dict[str, Any], weights: dict[str, Tensor], prefix: str) -> ItemFeatures:
    """The features that a model was saved with.

    Raises:
        ValueError, TypeError, KeyError: they are damaged.
    """
    columns = tuple(map(FeatureColumn.from_json, description["columns"]))
    return ItemFeatures(columns, **_taken(weights, prefix), id_dropout=description["id_dropout"])


def _taken(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Features among other tensors, on the CPU, by name."""
    return {name: weights[prefix + name].cpu() for name in BUFFERS}


def _is_same(x: Tensor, old: Tensor, version: int) -> bool:
    return x.data_ptr() == old.data_ptr() and x.shape == old.shape and x.dtype == old.dtype and x._version == version


def _has_version(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and not x.is_inference() and not x.is_meta
