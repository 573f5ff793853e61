"""Sequential recommendation with TTT layers: data, splits, training, evaluation and recommendations.

The modules hold the rest: ``windows`` (histories cut for training and evaluation), ``metrics``, ``datasets``, ``plot``.
"""

from ttt4rec.extras import missing

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
    from ttt4rec.recsys.datasets import load_interactions
    from ttt4rec.recsys.evaluate import evaluate
    from ttt4rec.recsys.events import Event, EventLog, SQLiteEventLog
    from ttt4rec.recsys.online import OnlineRecommender
    from ttt4rec.recsys.recommend import Recommendations, Recommender
    from ttt4rec.recsys.split import Split, split_by_ratio, split_by_time, split_leave_one_out
    from ttt4rec.recsys.train import EpochReport, TrainOptions, fit
    from ttt4rec.recsys.windows import evaluation_prefixes
except ModuleNotFoundError as error:
    raise missing("ttt4rec.recsys", error) from error

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
