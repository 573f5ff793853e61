"""Recommending by a trained model."""

from ttt4rec.recsys.recommend.candidates import best_items
from ttt4rec.recsys.recommend.folder import HISTORIES_FILE, IDS_FILE
from ttt4rec.recsys.recommend.recommender import Recommendations, Recommender
from ttt4rec.recsys.recommend.rerank import MaximalMarginalRelevance

__all__ = ["HISTORIES_FILE", "IDS_FILE", "MaximalMarginalRelevance", "Recommendations", "Recommender", "best_items"]
