"""From a table of what is known of items to the features that a model takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ttt4rec.models.item_features import CATEGORIES, DENSE, FeatureColumn, ItemFeatures
from ttt4rec.recsys.data.feature_table import Categories, Dense, FeatureTable, read_item_features
from ttt4rec.recsys.data.ids import Id, all_as_kind, kind_of
from ttt4rec.recsys.data.interactions import IntArray
from ttt4rec.recsys.data.split import Split
from ttt4rec.recsys.data.text import DataError

_LEAST_ITEMS = 2  # with a value: what one item alone has says nothing of others
_FARTHEST = 5.0  # standard deviations; beyond, a number counts as this far
_LEAST, _MOST = float(np.finfo(np.float64).tiny), float(np.finfo(np.float64).max)


def item_features(source: object, split: Split, *, id_dropout: float = 0.1, **options: Any) -> ItemFeatures:
    """Features for ``TTT4Rec(config, features=...)``, encoded by what the items of the training part have.

    A number, or each component of a vector, is taken less its mean and divided by its standard deviation, and a vector
    moreover by the root of its length. Values of categories count if at least two items of training have them; an
    item's values share a weight of one. Columns that tell no items apart are left out. An item of the data that the
    table lacks, or that has a missing value, has nothing in its place, and its id's embedding alone.

    Args:
        source: a table, or what ``read_item_features`` reads.
        split: the data; other items of the table are passed over, see ``Recommender.add_items``.
        id_dropout: share of the ids that are left out in each training step, so that features learn to stand alone.
        options: for ``read_item_features``.

    Raises:
        DataError: the source cannot be read, has none of the data's items, or no column that tells them apart.
        ValueError: id_dropout is out of range.
    """
    table = source if isinstance(source, FeatureTable) else read_item_features(source, **options)
    item_ids, counts = split.histories.item_ids, split.train_counts()
    rows = find_rows(table, item_ids)
    known = rows[(rows >= 0) & (counts > 0)]
    if not len(known):
        raise DataError(
            f"{table.name} must have features of items that training sees, such as {item_ids[0]!r}; given "
            f"{', '.join(map(repr, table.ids[:3]))}, ...: name the column of items' ids by item_field (--item-field)"
        )
    fitted = [_fitted(name, values, known) for name, values in table.columns.items()]
    columns = tuple(column for column in fitted if column is not None)
    if not columns:
        given = ", ".join(map(repr, table.columns)) or "none"
        raise DataError(f"{table.name} must have a column in which items differ and share values; given {given}")
    seen = torch.from_numpy(np.concatenate([[False], counts > 0]))
    return encode(table, columns, rows, seen, id_dropout)


def ids_like(table: FeatureTable, item_ids: Sequence[Id]) -> tuple[Id, ...]:
    """A table's ids in the type of other ones; DataError if one cannot be, or two are one then, as a UUID's texts."""
    ids = all_as_kind(table.ids, kind_of(item_ids))
    if len(set(ids)) < len(ids):
        twice = next(item for item, count in Counter(ids).items() if count > 1)
        raise DataError(f"{table.name} must have one row for each item; given several for {str(twice)!r}")
    return ids


def find_rows(table: FeatureTable, item_ids: Sequence[Id]) -> IntArray:
    """Rows of a table for items, int64; -1 where it has none. DataError as ``ids_like``."""
    places = {item: row for row, item in enumerate(ids_like(table, item_ids))}
    return np.array([places.get(item, -1) for item in item_ids], dtype=np.int64)


def encode(
    table: FeatureTable,
    columns: Sequence[FeatureColumn],
    rows: IntArray,
    known: torch.Tensor | None = None,
    id_dropout: float = 0.0,
) -> ItemFeatures:
    """Features of some items, each in a row of the table, or in none (-1); DataError if a column is not as it was."""
    dense: list[Dense] = []
    owners, values, weights = [], [], []
    first = 0
    for column in columns:
        given = table.columns.get(column.name)
        if given is None:
            raise DataError(
                f"{table.name} must have the column {column.name!r}, which the model learned from; given "
                f"{', '.join(map(repr, table.columns))}"
            )
        if isinstance(given, list) != (column.kind == CATEGORIES) and not _is_blank(given):
            wanted = "numbers" if column.kind == DENSE else "texts"
            raise DataError(f"{table.name} must have {wanted} in {column.name!r}, as when the model was trained")
        if column.kind == DENSE:
            dense.append(_standardised(table.name, column, given, rows))
        elif isinstance(given, list):
            codes = {value: first + place for place, value in enumerate(column.values)}
            found = [[codes[x] for x in given[row] if x in codes] if row >= 0 else [] for row in rows.tolist()]
            counts = np.array([len(one) for one in found], dtype=np.int64)
            owners.append(np.repeat(np.arange(1, len(rows) + 1), counts))
            values.append(np.array([code for one in found for code in one], dtype=np.int64))
            weights.append(np.repeat(1 / np.maximum(counts, 1), counts))
        first += len(column.values)
    owner = np.concatenate([np.empty(0, dtype=np.int64), *owners])
    order = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=len(rows) + 1)
    numbers = np.concatenate([np.empty((len(rows), 0)), *dense], axis=1)
    return ItemFeatures(
        tuple(columns),
        torch.from_numpy(np.concatenate([np.zeros((1, numbers.shape[1])), numbers])).float(),
        torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *values])[order]),
        torch.from_numpy(np.concatenate([np.empty(0), *weights])[order]).float(),
        torch.from_numpy(np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])),
        torch.zeros(len(rows) + 1, dtype=torch.bool) if known is None else known,
        id_dropout,
    )


def encode_again(table: FeatureTable, given: ItemFeatures, item_ids: Sequence[Id]) -> ItemFeatures:
    """Features that a model has, with a table's for the items that it has; DataError if a column is not as it was."""
    rows = find_rows(table, item_ids)
    there = np.flatnonzero(rows >= 0)
    return given.updated(torch.from_numpy(there + 1), encode(table, given.columns, rows[there]))


def has_features(table: FeatureTable, columns: Sequence[FeatureColumn], rows: IntArray) -> NDArray[np.bool_]:
    """Which of some items, each in a row of the table or in none (-1), have a value that says something."""
    found = np.zeros(len(table.ids) + 1, dtype=bool)  # the last one for -1
    for column in columns:
        given, known = table.columns.get(column.name, []), set(column.values)
        if isinstance(given, list):
            found[: len(given)] |= np.array([not known.isdisjoint(values) for values in given], dtype=bool)
        else:
            found[:-1] |= ~np.isnan(given[:, 0])
    return found[rows]


def describe(columns: Sequence[FeatureColumn]) -> str:
    """What the columns are, in a line."""
    kinds = {
        column.name: f"{len(column.values):,} values"
        if column.kind == CATEGORIES
        else ("a number" if len(column.mean) == 1 else f"a vector of {len(column.mean):,}")
        for column in columns
    }
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def _fitted(name: str, values: Dense | Categories, rows: IntArray) -> FeatureColumn | None:
    """A column by what some of its rows have; None if it tells none apart."""
    if isinstance(values, list):
        counts = Counter(value for row in rows.tolist() for value in values[row])
        shared = sorted(value for value, count in counts.items() if count >= _LEAST_ITEMS)
        everywhere = len(shared) == 1 and counts[shared[0]] == len(rows)
        return FeatureColumn(name, CATEGORIES, values=tuple(shared)) if shared and not everywhere else None
    given = values[rows]
    given = given[~np.isnan(given[:, 0])]
    if not len(given):
        return None
    differ = given.max(0) > given.min(0)  # equal numbers may have a deviation above 0, by the rounding of their mean
    if not differ.any():
        return None
    largest = np.abs(given).max(0)
    largest[largest == 0] = 1.0
    given = given / largest  # so that no square leaves the range of numbers
    with np.errstate(over="ignore", under="ignore"):
        scale = given.std(0) * largest * np.sqrt(given.shape[1])
    scale = np.where(differ, np.clip(scale, _LEAST, _MOST), np.sqrt(given.shape[1]))
    return FeatureColumn(name, DENSE, tuple((given.mean(0) * largest).tolist()), tuple(scale.tolist()))


def _standardised(source: str, column: FeatureColumn, values: Dense | Categories, rows: IntArray) -> Dense:
    width = len(column.mean)
    if isinstance(values, list) or _is_blank(values):
        return np.zeros((len(rows), width))
    if values.shape[1] != width:
        raise DataError(
            f"{source} must have {width} numbers in {column.name!r}, as in training; given {values.shape[1]}"
        )
    given = np.where(rows[:, None] >= 0, values[rows], np.nan)
    far = _FARTHEST / np.sqrt(width)
    with np.errstate(over="ignore"):
        found: Dense = np.nan_to_num(np.clip((given - column.mean) / np.array(column.scale), -far, far))
    return found


def _is_blank(values: Dense | Categories) -> bool:
    return not any(values) if isinstance(values, list) else bool(np.isnan(values).all())
