"""RecBole's own collector and evaluator on made-up scores; writes ``tests/golden/recbole_metrics.json``.

python -m tests.support.recbole_metrics     # in the environment that scripts/test_adapters.sh makes
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURE = Path(__file__).parents[1] / "golden" / "recbole_metrics.json"
CUTOFFS = (1, 5, 10, 50)
ROWS, ITEMS, PRIME = 500, 97, 10_007


def made_up(steps: int) -> tuple[Tensor, Tensor]:
    """Scores ``[500, 97]`` and targets ``[500]``, the same everywhere: up to ``PRIME`` different scores, or ``steps``.

    A row is a stretch of the multiples of a number modulo a prime, so that with ``steps = PRIME`` no two are alike.
    """
    row, column = torch.arange(ROWS)[:, None], torch.arange(ITEMS)
    multiples = (row * 37 + 11) * (column + 1 + row) % PRIME
    return (multiples * steps // PRIME).float() / steps, torch.arange(ROWS) * 7919 % ITEMS


def recbole(steps: int) -> dict[str, Any]:
    """What RecBole makes of them: metrics over all rows, and the mean rank of each target."""
    from recbole.evaluator import Collector, Evaluator

    np.float, np.bool = float, bool  # names that numpy dropped and RecBole 1.2.1 still uses
    config = {
        "metrics": ["Hit", "NDCG", "MRR", "GAUC"],
        "topk": list(CUTOFFS),
        "metric_decimal_place": 10,
        "eval_args": {"mode": "full"},
        "device": "cpu",
    }
    scores, targets = made_up(steps)
    collector = Collector(config)
    collector.eval_batch_collect(scores, None, torch.arange(ROWS), targets)
    collected = collector.get_data_struct()
    ranks = collected.get("rec.meanrank")[:, 0].tolist()
    return {"metrics": {name: float(x) for name, x in Evaluator(config).evaluate(collected).items()}, "ranks": ranks}


def cases() -> dict[str, dict[str, Any]]:
    """The fixture: once without ties, once with about six items to a score."""
    return {f"{steps} scores": {"steps": steps, **recbole(steps)} for steps in (PRIME, 16)}


if __name__ == "__main__":
    FIXTURE.write_text(json.dumps(cases()) + "\n")
