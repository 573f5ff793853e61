"""Times of events, besides their order: what a model knows of the time between events, and of that until a request.

Let g_t be the time between event t and the user's event before, and e the time from the last event to the request. A
model with ``times="query"`` reads and scores by

    x_t = norm(dropout(E[i_t] + G[b(g_t)])),    y = (1 + S[b(e)]) ⊙ h + Q[b(e)],    scores = E y,

where h is what stands behind the final norm and b(g) = floor(log2(1 + g)) a bucket. With ``times="gap"`` y is h. The
state of a stream depends on gaps alone: an event is read once, for requests of any time.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_shape
from ..layers.initialisation import Device
from ..operators.transforms import has_values

FIRST = 64
"""The bucket of events that have none before them, whose gap is infinite. No times of 64 bits are so far apart."""


class Times(NamedTuple):
    """What a model knows of times.

    Attributes:
        about: for the command line's help.
        gaps: whether it reads the time between events.
        query: whether it is told the time of the request.
    """

    about: str
    gaps: bool = True
    query: bool = False


TIMES = {
    "none": Times("their order alone", gaps=False),
    "gap": Times("the time since the event before"),
    "query": Times("that, and the time from the last event to the request", query=True),
}
"""By the names that ``TTT4RecConfig.times`` takes."""


def time_between(before: Tensor, after: Tensor) -> Tensor:
    """Time from one event or request to another, float64; 0 if it is not later, infinity where before is NaN: none.

    Args:
        before: times of any dtype, broadcast against after. That an event has no time is minus infinity, which is
            before all times.
        after: the same.
    """
    before, after = before.double(), after.double()
    return (after - before).masked_fill(after <= before, 0.0).masked_fill(before.isnan(), torch.inf)


def gaps_of(times: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Gaps ``[B, L]``, float64, of histories from their beginning with times ``[B, L]``: infinity for first events.

    Args:
        times: when events happened, oldest first; padding may have any number and stands on the right.
        cu_seqlens: bounds of packed histories, with times ``[1, total]``, as in ``TTT4Rec.forward``.
    """
    before = torch.roll(times.double(), 1, dims=1)
    firsts = before.new_zeros(before.shape, dtype=torch.bool)
    if cu_seqlens is None:
        firsts[:, :1] = True
    else:
        firsts[0, cu_seqlens[:-1][cu_seqlens.diff() > 0]] = True
    return time_between(before.masked_fill(firsts, torch.nan), times)


def time_since(gaps: Tensor, begin: int = 0) -> Tensor:
    """Time ``[N, L - begin, L]``, float64, from every event to those from ``begin`` on; 0 to what is before it.

    Args:
        gaps: the time since the event before, ``[N, L]``, any dtype. Over an infinite one the time is infinite.
        begin: where the later events begin.
    """
    gaps = F.pad(gaps.double()[:, 1:], (1, 0))  # the first is between no two of them
    unknown = gaps == torch.inf
    times = gaps.clamp_min(0).masked_fill(unknown, 0.0).cumsum(1)
    breaks = unknown.cumsum(1)
    apart = breaks[:, begin:, None] > breaks[:, None, :]
    return (times[:, begin:, None] - times[:, None, :]).clamp_min(0).masked_fill(apart, torch.inf)


def bucket(elapsed: Tensor) -> Tensor:
    """floor(log2(1 + elapsed)), int64. What is negative counts 0; from 2**64 on, all is infinite.

    Args:
        elapsed: times between events, any shape and dtype.
    """
    bounds = torch.arange(1, FIRST + 1, dtype=torch.float64, device=elapsed.device).exp2() - 1
    return torch.bucketize(elapsed.double().contiguous(), bounds, right=True)


class EventTimes(nn.Module):
    """The vectors of buckets; all zero at first, so that a new model is the same as one that knows no times.

    Args:
        width: of the model.
        query: whether there are vectors for the time of a request.
        device: of the parameters.
        dtype: of the parameters.
    """

    gap: nn.Parameter
    scale: nn.Parameter
    shift: nn.Parameter

    def __init__(self, width: int, query: bool, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        names = ("gap", "scale", "shift") if query else ("gap",)
        self.query = query
        factory: Any = {"device": device, "dtype": dtype}
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(FIRST + 1, width, **factory)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def read(self, rows: Tensor, gaps: Tensor) -> Tensor:
        """Rows of items ``[..., width]`` and what their gaps ``[...]`` add."""
        return rows + F.embedding(bucket(gaps), self.gap)

    def asked(self, h: Tensor, elapsed: Tensor) -> Tensor:
        """Hidden states ``[..., width]`` for requests at times ``[...]`` after the last event."""
        place = bucket(elapsed)
        return h + h * F.embedding(place, self.scale) + F.embedding(place, self.shift)


def check_times(name: str, x: Tensor | None, times: str, wanted: bool, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless gaps or elapsed times are there if the model wants them, of the shape, and no NaN.

    Args:
        name: of x.
        x: what is given.
        times: of the model's configuration.
        wanted: whether the model wants them.
        shape: of what they belong to.
    """
    if not wanted:
        if x is not None:
            raise ValueError(f"{name} must be left out, as the model has times={times!r}; given {list(x.shape)}")
        return
    if x is None:
        raise ValueError(f"{name} must be given, as the model has times={times!r}; given None")
    check_shape(name, x, shape, "as ids or hidden states have")
    if x.is_cpu and has_values(x) and bool(x.isnan().any()):
        raise ValueError(f"{name} must be numbers; given NaN")
