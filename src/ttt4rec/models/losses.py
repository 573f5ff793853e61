"""Training losses: the softmax over all items, and three over negatives drawn at random.

Negatives are drawn with replacement, once for each piece of a step (see ``TrainOptions.accumulate``; by default a step
is one piece), and shared by all of its targets, so that their scores are one matrix product. A negative that is a
target's own item does not count for that target. Scores and losses are float32 or float64, also under autocast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import without_autocast
from .ttt4rec import TTT4Rec


def sampled_softmax(positive: Tensor, negative: Tensor, own: Tensor, log_expected: Tensor) -> Tensor:
    """Cross-entropy whose denominator is estimated from negatives, with log-Q correction.

    exp(negative) / (expected number of draws) summed over the draws other than the target, plus exp(positive), is an
    unbiased estimate of the full softmax's denominator. (The positive is always in it, so it is not corrected.)

    Args:
        positive: scores of the targets ``[N]``.
        negative: scores of the negatives ``[N, S]``.
        own: bool ``[N, S]``, where a negative is the target itself.
        log_expected: logarithm of how often each negative's item is drawn on average ``[S]``.

    Returns:
        Losses ``[N]``.
    """
    corrected = (negative - log_expected).masked_fill(own, -torch.inf)
    return torch.cat((positive.unsqueeze(1), corrected), 1).logsumexp(1) - positive


def generalised_bce(positive: Tensor, negative: Tensor, own: Tensor, beta: float) -> Tensor:
    """gBCE ``[N]``: binary cross-entropy whose positive probability is raised to the power beta; see ``gbce_beta``."""
    negatives = F.softplus(negative).masked_fill(own, 0).sum(1)
    return (beta * F.softplus(-positive) + negatives) / (negative.shape[1] + 1)


def gbce_beta(num_negatives: int, num_items: int, calibration: float) -> float:
    """gBCE's power: 1 (plain binary cross-entropy) for calibration 0, the sampling rate for calibration 1."""
    rate = min(1.0, num_negatives / max(1, num_items - 1))
    return rate * (calibration * (1 - 1 / rate) + 1 / rate)


def bpr(positive: Tensor, negative: Tensor, own: Tensor) -> Tensor:
    """Bayesian personalised ranking ``[N]``: -log σ(positive - negative), averaged over the negatives."""
    losses = F.softplus(negative - positive.unsqueeze(1)).masked_fill(own, 0)
    return losses.sum(1) / (~own).sum(1).clamp_min(1)


class Draws(NamedTuple):
    """What a loss over negatives is computed of."""

    positive: Tensor  # scores of the targets [N]
    negative: Tensor  # scores of the negatives [N, S]
    own: Tensor  # bool [N, S], where a negative is the target itself
    log_expected: Tensor  # logarithm of how often each negative's item is drawn on average [S]
    num_items: int  # in the catalogue
    calibration: float  # gBCE's t


class LossKind(NamedTuple):
    """A row of the registry of losses."""

    about: str
    compute: Callable[[Draws], Tensor] | None  # losses [N]; None: it needs no negatives, the softmax over all items
    calibrated: bool = True  # whether it may read gBCE's t


def _gbce(given: Draws) -> Tensor:
    beta = gbce_beta(given.negative.shape[1], given.num_items, given.calibration)
    return generalised_bce(*given[:3], beta)


LOSSES = {
    "softmax": LossKind("over all items", None, calibrated=False),
    "sampled": LossKind("softmax over negatives", lambda given: sampled_softmax(*given[:4]), False),
    "gbce": LossKind("calibrated binary cross-entropy over negatives", _gbce),
    "bpr": LossKind("pairs of target and negative", lambda given: bpr(*given[:3]), False),
}
"""By the names that ``TrainOptions.loss`` and the command line take. One more is an entry here."""


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A training loss with what it draws its negatives from.

    Attributes:
        name: one of ``LOSSES``.
        log_probability: float64 ``[num_items]``, how likely a draw is each item; empty for ``"softmax"``.
        num_negatives: draws for a piece of a step.
        calibration: gBCE's t, from 0 to 1.
    """

    name: str
    log_probability: Tensor = dataclasses.field(repr=False)
    num_negatives: int
    calibration: float

    @staticmethod
    def make(name: str, counts: Tensor, *, num_negatives: int, popularity: float, calibration: float) -> Loss:
        """A loss whose negatives are drawn in proportion to (counts + 1) ** popularity, counts ``[num_items]``."""
        weights = popularity * (counts.double() + 1).log()
        draws = LOSSES[name].compute is not None
        return Loss(name, weights[: None if draws else 0].log_softmax(0), num_negatives, calibration)

    def __call__(self, model: TTT4Rec, h: Tensor, items: Tensor) -> Tensor:
        """Sum of the losses of target items, int64 ``[N]`` from 1, for hidden states ``[N, width]``."""
        compute = LOSSES[self.name].compute
        if compute is None:
            return model.nll(h, items, "sum")
        drawn = self.draw()
        with without_autocast(h.device.type):
            dtype = torch.promote_types(h.dtype, torch.float32)
            wide, own_rows, drawn_rows = (x.to(dtype) for x in (h, model.item_rows(items), model.item_rows(drawn)))
            positive = (wide * own_rows).sum(1)
            negative = wide @ drawn_rows.T
        own = drawn == items.unsqueeze(1)
        log_expected = (self.log_probability[drawn - 1] + math.log(self.num_negatives)).to(negative.dtype)
        return compute(Draws(positive, negative, own, log_expected, model.config.num_items, self.calibration)).sum()

    def draw(self) -> Tensor:
        """Items from 1, int64 ``[num_negatives]``, on the device of the probabilities; torch's global generator."""
        device = self.log_probability.device
        bounds = self._bounds
        uniform = torch.rand(self.num_negatives, dtype=torch.float64, device=device) * bounds[-1]
        return torch.searchsorted(bounds, uniform, right=True).clamp_max(len(bounds) - 1) + 1

    @cached_property
    def _bounds(self) -> Tensor:
        return self.log_probability.exp().cumsum(0)
