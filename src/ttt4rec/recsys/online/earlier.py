"""Earlier states of long histories: where a late event is read from, instead of from the history's beginning."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ttt4rec.recsys.online.events import Known

LONG = 1024
"""Items that are read again as a whole: they cost a few calls of the model, and a state is kept after them."""
_NEAREST, _RATIO, _CUTS = 16, 4, 3  # distances from the end: 16, 64, 256


@dataclass
class Earlier:
    """The state after a beginning of a history, as ``Streams.export`` gives it."""

    known: Known
    tensors: dict[str, Tensor]


class EarlierStates:
    """For some users copies of their states after beginnings of their histories.

    They lie the closer together the nearer they are to the history's end, by powers of four, so that they are few. An
    event that comes d places before the end is read from a state at most some sixteen times as far away.

    Args:
        num_users: of how many users states are kept; the last ones who had one made.
    """

    def __init__(self, num_users: int) -> None:
        self.num_users = num_users
        self._kept: OrderedDict[str, list[Earlier]] = OrderedDict()  # each list from the longest beginning on

    def known(self, user: str) -> Iterator[Known]:
        """What was read for each state, the longest beginning first."""
        return (earlier.known for earlier in self._kept.get(user, ()))

    def go_back(self, user: str, length: int) -> Earlier:
        """The state after ``length`` items; the later ones are of another history now and dropped."""
        self._kept[user] = [earlier for earlier in self._kept[user] if earlier.known.length <= length]
        return self._kept[user][0]

    def cuts(self, user: str, start: int, stop: int, total: int) -> list[int]:
        """Where to stop, for a state or at last, when items ``start`` to ``stop`` are read of ``total``."""
        cuts = []
        if total > LONG:
            bands = {_band(total - known.length) for known in self.known(user)}
            wanted = [(band, total - _NEAREST * _RATIO**band) for band in reversed(range(_CUTS))]
            cuts = [place for band, place in wanted if start < place < stop and band not in bands]
        return [*cuts, stop]

    def is_due(self, user: str, length: int) -> bool:
        """Whether the last state was kept ``LONG`` items ago."""
        return length - next(self.known(user), Known(0, 0)).length >= LONG

    def keep(self, user: str, earlier: Earlier, total: int) -> None:
        """Keep one more state, of a longer beginning than the others, and of each distance only the nearest."""
        bands, kept = set(), []
        for one in [earlier, *self._kept.pop(user, ())]:
            band = _band(total - one.known.length)
            if band not in bands:
                bands.add(band)
                kept.append(one)
        self._kept[user] = kept
        while len(self._kept) > self.num_users:
            self._kept.popitem(last=False)

    def drop(self, user: str) -> None:
        """Forget a user's states."""
        self._kept.pop(user, None)


def _band(distance: int) -> int:
    """The power of four that a distance from the end belongs to; -1 for the nearest."""
    band = -1
    while distance >= _NEAREST * _RATIO ** (band + 1):
        band += 1
    return band
