"""Choosing among candidates once more: hooks for ``Recommender.recommend(rerank=...)``."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ttt4rec.recsys.data import IntArray
from ttt4rec.recsys.recommend.candidates import Scores


class MaximalMarginalRelevance:
    """Prefers items that are unlike those chosen already.

    One after the other is chosen by ``(1 - diversity) * relevance - diversity * likeness``. Relevance is the score,
    between 0 for the last candidate and 1 for the first; likeness is the largest cosine between the item's embedding
    and one that was chosen before.

    Args:
        table: embeddings ``[num_items + 1, width]``, of item j in row j, such as ``model.served_items()``.
        diversity: from 0, where nothing changes, to 1, where no relevance counts but the first item's.

    Raises:
        ValueError: diversity is out of range.
    """

    def __init__(self, table: Tensor, diversity: float) -> None:
        if not 0 <= diversity <= 1:
            raise ValueError(f"diversity must be from 0 to 1; given {diversity!r}")
        rows = table.detach().cpu().float().numpy()
        self._directions = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        self._diversity = diversity

    def __call__(self, items: IntArray, scores: Scores, k: int) -> IntArray:
        """Places of at most k of the candidates, in the order in which they are to be offered."""
        if not len(items):
            return np.empty(0, dtype=np.int64)
        relevance = (scores - scores.min()) / max(scores.max() - scores.min(), 1e-12)
        directions = self._directions[items]
        likeness = np.full(len(items), -1.0)  # to nothing, which is the same for all
        left = np.ones(len(items), dtype=bool)
        chosen: list[int] = []
        while len(chosen) < min(k, len(items)):
            value = (1 - self._diversity) * relevance - self._diversity * likeness
            best = int(np.argmax(np.where(left, value, -np.inf))) if chosen else int(np.argmax(relevance))
            chosen.append(best)
            left[best] = False
            likeness = np.maximum(likeness, directions @ directions[best])
        return np.array(chosen, dtype=np.int64)
