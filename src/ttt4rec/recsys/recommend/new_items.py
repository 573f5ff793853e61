"""A model takes a table's features: for the items that it has, and for those that training never saw."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ttt4rec.models.item_features import FeaturedItems
from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.recsys.data import DataError, Histories
from ttt4rec.recsys.data.feature_table import FeatureTable
from ttt4rec.recsys.data.item_features import describe, encode, encode_again, find_rows, has_features, ids_like


def feature_names(model: TTT4Rec) -> list[str]:
    """The columns that a model takes of a table. ValueError: it was made without features."""
    return [column.name for column in _features_of(model).columns]


def take_features(model: TTT4Rec, table: FeatureTable, histories: Histories) -> str:
    """Give a model a table's features for its items, in the columns that it has, and say which these are.

    Items that the table lacks keep what they have.

    Raises:
        ValueError: the model was made without features. DataError: a column is missing or of another kind than before.
    """
    features = _features_of(model)
    features.replace(encode_again(table, features.given(), histories.item_ids))
    found = has_features(table, features.columns, find_rows(table, histories.item_ids))
    return f"features {describe(features.columns)} of {found.sum():,} of {histories.num_items:,} items"


def with_new_items(
    model: TTT4Rec, histories: Histories, table: FeatureTable, *, leave_out: bool = False
) -> tuple[TTT4Rec, Histories]:
    """A copy of a model that knows a table's other items too, behind its own, and the histories with their ids.

    Args:
        model: with features.
        histories: of its data.
        table: with the columns that it learned from.
        leave_out: pass over new items that have no value that training saw.

    Raises:
        ValueError: the model was made without features. DataError: a column is missing or of another kind than before,
            or a new item has no value that training saw.
    """
    features = _features_of(model)
    ids = ids_like(table, histories.item_ids)
    known = set(histories.item_ids)
    rows = np.array([row for row, item in enumerate(ids) if item not in known], dtype=np.int64)
    encoded = encode(table, features.columns, rows)
    has = has_features(table, features.columns, rows)
    if leave_out:
        rows = rows[has]
        encoded = encode(table, features.columns, rows)
    elif not has.all():
        bare = [ids[row] for row in rows[~has].tolist()]
        shown = ", ".join(map(repr, bare[:5])) + (", ..." if len(bare) > 5 else "")
        raise DataError(
            f"{table.name}: new items must have a value that training saw in one of the columns "
            f"{', '.join(feature_names(model))}; {len(bare)} have none: {shown}; leave them out, "
            "or train with them"
        )
    size = histories.num_items + len(rows)
    with torch.random.fork_rng():  # the ids do not count before a warm start, but are saved
        torch.manual_seed(size)
        larger = model.with_items(size)
    more = _features_of(larger)
    more.replace(more.given().updated(torch.arange(histories.num_items + 1, size + 1), encoded))
    return larger, dataclasses.replace(histories, item_ids=(*histories.item_ids, *(ids[row] for row in rows.tolist())))


def _features_of(model: TTT4Rec) -> FeaturedItems:
    if model.features is None:
        raise ValueError(
            "the model must be made with features of items to know more of them than ids; given one without: train "
            "it with features (--item-features FILE)"
        )
    return model.features
