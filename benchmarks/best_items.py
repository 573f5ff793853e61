"""Contests of the ten best items of a catalogue: all of it read at every call, and by its index."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ttt4rec.models import full_softmax
from ttt4rec.models.item_index import ItemIndex

from .measure import Call

EVERY_ITEM, INDEX = "every item", "index"
WIDTH, K, SEEN = 64, 10, 50


@dataclass(frozen=True)
class BestItemsContest:
    """The ten best unseen items for ``users`` hidden states, each of whom has seen fifty of ``items``."""

    users: int
    items: int

    @property
    def name(self) -> str:
        return f"best-n{self.items}-u{self.users}"

    @property
    def size(self) -> dict[str, Any]:
        return {
            "operation": "best items",
            "table": f"best items of {self.items:,}",
            "column": f"{self.users:,} users",
        } | vars(self)

    @property
    def weight(self) -> int:
        return 1

    def sides(self, device: str) -> list[str]:
        return [EVERY_ITEM, INDEX]

    def absent(self, device: str) -> dict[str, str]:
        return {}

    def prepare(self, side: str, device: str, info: dict[str, Any]) -> Call:
        torch.manual_seed(0)
        h, table = (torch.randn(n, WIDTH, device=device) for n in (self.users, self.items + 1))
        rows = torch.arange(self.users, device=device).repeat_interleave(SEEN)
        seen = rows, torch.randint(1, self.items + 1, rows.shape, device=device)
        info |= {"dtype": "float32", "tokens": self.users}
        best = full_softmax.top_k if side == EVERY_ITEM else ItemIndex().top_k
        return partial(best, h, table, K, seen)


def best_items_contests(size: str) -> list[BestItemsContest]:
    """The contests, the same for ``"small"`` and ``"full"``: what one request to a recommender asks."""
    return [BestItemsContest(users, items) for items in (100_000, 1_000_000) for users in (1, 8, 64)]
