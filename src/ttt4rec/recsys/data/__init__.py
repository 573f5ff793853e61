"""From files to what is trained on: reading, filters, histories, splits and windows."""

from ttt4rec.recsys.data.ids import Id
from ttt4rec.recsys.data.interactions import (
    Histories,
    IntArray,
    Interactions,
    build_histories,
    filter_k_core,
    keep_item_codes,
)
from ttt4rec.recsys.data.reading import read_interactions
from ttt4rec.recsys.data.text import DataError

__all__ = [
    "DataError",
    "Histories",
    "Id",
    "IntArray",
    "Interactions",
    "build_histories",
    "filter_k_core",
    "keep_item_codes",
    "read_interactions",
]
