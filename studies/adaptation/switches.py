"""Users whose interests switch at a known event: made up, or real users joined in pairs."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ttt4rec import TTT4Rec
from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.data.split import Split, split_by_ratio

CUTOFF = 10


@dataclass(frozen=True)
class Population:
    """How users are made up.

    Items and interests are directions in a space of ``dimensions``. A user takes item i with probability proportional
    to ``exp(sharpness · interest · item_i)``, independently of what was taken before: what recommends is the average
    of the history, and after a switch the history before it misleads. Interests are drawn anew for every user.
    """

    items: int = 1000
    length: int = 60
    dimensions: int = 8
    sharpness: float = 9.0
    seed: int = 0

    def directions(self) -> np.ndarray:
        """Of the items, [items, dimensions]."""
        return _directions(np.random.default_rng(self.seed), self.items, self.dimensions)

    def users(self, count: int, switch: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Items taken, int64 [count, length] from 0 on, and the probabilities of the interests after the switch.

        Args:
            count: how many.
            switch: number of the first event under the second interest; None: another one for each user, anywhere.
            seed: of the users; the items' directions stay.
        """
        rng, items = np.random.default_rng([self.seed, 1 + seed]), self.directions()
        moments = rng.integers(1, self.length, count) if switch is None else np.full(count, switch)
        taken, chances = np.empty((count, self.length), dtype=np.int64), np.empty((count, self.items))
        for user, moment in enumerate(moments):
            before, after = (_chances(rng, items, self.sharpness) for _ in range(2))
            taken[user, :moment] = rng.choice(self.items, moment, p=before)
            taken[user, moment:] = rng.choice(self.items, self.length - moment, p=after)
            chances[user] = after
        return taken, chances

    def split(self, count: int, seed: int) -> Split:
        """Users to train on, who switch anywhere: a fifth of their events for validation."""
        taken, _ = self.users(count, None, seed)
        return made_up_split(taken + 1, self.items, (4, 1, 0))


def made_up_split(codes: np.ndarray, items: int, ratios: tuple[int, int, int]) -> Split:
    """Users with item codes [count, length], an event a moment, split by ratios."""
    count, length = codes.shape
    offsets, times = np.arange(count + 1) * length, np.tile(np.arange(length), count)
    users, names = tuple(map(str, range(count))), tuple(map(str, range(items)))
    return split_by_ratio(Histories(codes.ravel(), offsets, times, users, names), ratios)


def _directions(rng: np.random.Generator, count: int, dimensions: int) -> np.ndarray:
    x = rng.standard_normal((count, dimensions))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _chances(rng: np.random.Generator, items: np.ndarray, sharpness: float) -> np.ndarray:
    p = np.exp(sharpness * items @ _directions(rng, 1, items.shape[1])[0])
    return p / p.sum()


def joined(split: Split, before: int, after: int, pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two users' test parts joined, and the second's alone, both int64 [pairs, before + after].

    Row by row: ``before`` items of one user, then ``after`` items of another; and the items that really came before
    those, then the same. All are of test parts.
    """
    first, end = split.bounds("test")
    long_enough = np.flatnonzero(end - first >= before + after)
    rng = np.random.default_rng(seed)
    rows, alone = [], []
    for _ in range(pairs):
        one, other = rng.choice(long_enough, 2, replace=False)
        own = split.histories.history(other)[first[other] :][: before + after]
        rows.append(np.concatenate([split.histories.history(one)[first[one] :][:before], own[before:]]))
        alone.append(own)
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(alone))


@torch.inference_mode()
def gains(model: TTT4Rec, sequences: Tensor) -> Tensor:
    """NDCG@10 of every item but the first, [L - 1], averaged over sequences ``[N, L]`` of item codes."""
    gained = []
    for rows in sequences.split(256):
        hidden = model(rows[:, :-1])
        ranks = model.ranks(hidden.flatten(0, 1), rows[:, 1:].flatten()).view(len(rows), -1)
        gained.append(discounted(ranks))
    return torch.cat(gained).mean(0)


def best_possible(chances: np.ndarray) -> float:
    """NDCG@10 of ranking by the true probabilities ``[N, items]`` of what comes next."""
    top = -np.sort(-chances, axis=1)[:, :CUTOFF]
    return float((top / np.log2(np.arange(2, CUTOFF + 2))).sum(1).mean())


def discounted(ranks: Tensor) -> Tensor:
    """1 / log2(1 + rank) up to the cutoff."""
    return (1 + ranks).log2().reciprocal() * (ranks <= CUTOFF)
