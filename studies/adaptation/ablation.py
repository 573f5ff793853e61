"""The inner loop live, frozen after the training part, and off, on whole histories read as a stream."""

from typing import Any

import torch
from torch import Tensor

from ttt4rec import TTT4Rec
from ttt4rec.recsys.data.split import Split
from ttt4rec.recsys.training.metrics import RankingMetrics

from .training import adapting

MODES = ("live", "frozen", "off")


@torch.inference_mode()
def ablated(model: TTT4Rec, split: Split, mode: str) -> dict[str, Any]:
    """Metrics of all test targets, each predicted from the user's whole history before it."""
    metrics = RankingMetrics()
    first, end = split.bounds("test")
    for user in range(split.histories.num_users):
        if first[user] == end[user]:
            continue
        items = torch.from_numpy(split.histories.history(user))
        live = {"live": len(items), "frozen": int(split.train_end[user]), "off": 0}[mode]
        hidden = read(model, items[:-1], live)[first[user] - 1 :]
        metrics.update(model.ranks(hidden, items[first[user] :]))
    return metrics.compute()


def read(model: TTT4Rec, items: Tensor, live: int) -> Tensor:
    """Hidden states [L, width] of a history, the inner loops adapting to its first ``live`` items only."""
    outputs, states = [], None
    for part, adapt in ((items[:live], True), (items[live:], False)):
        if part.numel():
            with adapting(model, adapt):
                hidden, states = model(part[None], states=states, return_states=True)
            outputs.append(hidden[0])
    return torch.cat(outputs)
