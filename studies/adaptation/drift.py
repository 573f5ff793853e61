"""Real users whose histories change: targets by how new the latest items are, and by the time before the target."""

from collections.abc import Sequence

import numpy as np

from ttt4rec.recsys.data.interactions import IntArray
from ttt4rec.recsys.data.split import Split
from ttt4rec.recsys.training.segments import Segmentation, Targets

LATEST, BEFORE = 10, 40  # items that are compared with items before them
_SHARES = (0.3, 0.6, 0.9)
_HOURS = (1, 24, 7 * 24)


def by_change(split: Split, targets: Targets) -> tuple[Sequence[str], IntArray]:
    """How many of the latest items are not among the items before them."""
    names = ["up to 30 % new", "30 to 60 % new", "60 to 90 % new", "above 90 % new", "shorter histories"]
    histories = split.histories
    share = np.full(len(targets.users), np.inf)
    for number in np.flatnonzero(targets.positions >= LATEST + BEFORE):
        known = histories.history(targets.users[number])[: targets.positions[number]]
        share[number] = np.isin(known[-LATEST:], known[-LATEST - BEFORE : -LATEST], invert=True).mean()
    return names, np.where(np.isinf(share), len(_SHARES) + 1, np.searchsorted(_SHARES, share - 1e-9))


def by_gap(split: Split, targets: Targets) -> tuple[Sequence[str], IntArray]:
    """How long before the target the last known item was."""
    names = ["within an hour", "within a day", "within a week", "later"]
    histories = split.histories
    place = histories.offsets[targets.users] + targets.positions
    hours = (histories.times[place] - histories.times[place - 1]) / 3600
    return names, np.searchsorted(_HOURS, hours)


SEGMENTATIONS: dict[str, Segmentation] = {"latest 10 items": by_change, "time since the last item": by_gap}
