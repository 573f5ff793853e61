"""Sequential recommendation with TTT layers: data, splits, training, evaluation and recommendations.

The folders hold the rest: ``data``, ``recommend``, ``training`` and ``online``; the adapters ``recbole`` and
``rectools`` stand next to them.
"""

import sys

from ttt4rec.extras import missing
from ttt4rec.options import TrainOptions

try:
    from ttt4rec.recsys.data import (
        DataError,
        Histories,
        Interactions,
        build_histories,
        filter_k_core,
        keep_item_codes,
        read_interactions,
    )
    from ttt4rec.recsys.data.datasets import load_interactions
    from ttt4rec.recsys.data.split import Split, split_by_ratio, split_by_time, split_leave_one_out
    from ttt4rec.recsys.data.windows import evaluation_prefixes
    from ttt4rec.recsys.online.events import Event, EventLog, SQLiteEventLog
    from ttt4rec.recsys.online.recommender import OnlineRecommender
    from ttt4rec.recsys.recommend import Recommendations, Recommender
    from ttt4rec.recsys.training.callbacks import EpochReport
    from ttt4rec.recsys.training.evaluate import evaluate
    from ttt4rec.recsys.training.train import fit
except ModuleNotFoundError as error:
    raise missing("ttt4rec.recsys", error) from error

_MOVED = {
    "datasets": "data.datasets",
    "split": "data.split",
    "windows": "data.windows",
    "evaluate": "training.evaluate",
    "parallel": "training.parallel",
    "train": "training.train",
    "events": "online.events",
}
"""Modules that once stood here, and where they are; imports from their old places give the same objects."""

for _old, _new in _MOVED.items():
    sys.modules[f"{__name__}.{_old}"] = sys.modules[f"{__name__}.{_new}"]
    globals().setdefault(_old, sys.modules[f"{__name__}.{_new}"])  # ``evaluate`` is the function, as it was

__all__ = [
    "DataError",
    "EpochReport",
    "Event",
    "EventLog",
    "Histories",
    "Interactions",
    "OnlineRecommender",
    "Recommendations",
    "Recommender",
    "SQLiteEventLog",
    "Split",
    "TrainOptions",
    "build_histories",
    "evaluate",
    "evaluation_prefixes",
    "filter_k_core",
    "fit",
    "keep_item_codes",
    "load_interactions",
    "read_interactions",
    "split_by_ratio",
    "split_by_time",
    "split_leave_one_out",
]
