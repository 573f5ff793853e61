"""Averages over users, and how far they may be off: intervals by bootstrap over users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WEIGHTS_AT_ONCE = 1 << 22  # numbers

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A metric's value, and the interval that a bootstrap over users gives it, None where there is none.

    Attributes:
        value: of all users.
        low: lower end of the interval that holds the middle 95 % of the resamples.
        high: upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


def estimates(names: Sequence[str], sums: Floats, weights: Floats, samples: int, seed: int) -> dict[str, Estimate]:
    """Ratios of sums over users, by name, with intervals if samples is not 0; none of what nobody has a weight for.

    Args:
        names: M of them.
        sums: ``[U, M]``, of each user.
        weights: ``[U, M]``, what the sums are divided by; of a mean over users all ones.
        samples: how many times users are drawn.
        seed: of the draws.
    """
    there = np.flatnonzero(weights.sum(axis=0) > 0)
    sums, weights = sums[:, there], weights[:, there]
    values = sums.sum(axis=0) / weights.sum(axis=0)
    named = [names[place] for place in there.tolist()]
    if not samples:
        return {name: Estimate(value) for name, value in zip(named, values.tolist(), strict=True)}
    ends = bootstrap(sums, weights, samples, seed)
    return {name: Estimate(*row) for name, row in zip(named, np.stack([values, *ends]).T.tolist(), strict=True)}


def bootstrap(sums: Floats, weights: Floats, samples: int, seed: int) -> Floats:
    """Ends ``[2, M]`` of the middle 95 % of the ratios of sums when users are drawn again, with replacement.

    Args:
        sums: ``[U, M]``, of each user.
        weights: ``[U, M]``, what the sums are divided by.
        samples: how many times.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    users = len(sums)
    ratios = []
    at_once = max(1, _WEIGHTS_AT_ONCE // users)
    for start in range(0, samples, at_once):
        drawn = rng.multinomial(users, np.full(users, 1 / users), size=min(at_once, samples - start)).astype(np.float64)
        ratios.append(drawn @ sums / np.maximum(drawn @ weights, 1e-300))
    ends: Floats = np.quantile(np.concatenate(ratios), [0.025, 0.975], axis=0)
    return ends
