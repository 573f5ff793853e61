"""What the weights lose at the end of every mini-batch, towards the learned initial weights.

Numbers in brackets are equations of docs/mathematics.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import Scan
from ..inner_models import matrices
from .layout import MiniBatch, by_token


class Forgetting:
    """Of a scan: what is lost of weights ``[R, in + 1, out]``, and the gradients of that; nothing without decays."""

    def __init__(self, scan: Scan) -> None:
        self._initial: list[Tensor] = []
        if scan.log_decay is not None:
            self._log_decay = by_token(scan.log_decay, scan.starts)
            self._initial = [W.to(scan.weights[0].dtype) for W in matrices(scan.initial)]
        self._d_initial = [torch.zeros_like(W) for W in self._initial]

    def lost(self, part: MiniBatch, weights: Sequence[Tensor]) -> list[Tensor]:
        """(1 - A) (W - W̄) of (40), for the rows whose mini-batch is complete."""
        if not self._initial:
            return []
        return lost(self._total(part), [W[: part.complete] for W in weights], self._initial)

    def backward(self, part: MiniBatch, weights: Sequence[Tensor], d_weights: Sequence[Tensor]) -> "Gradients | None":
        """From the weights before a mini-batch, and the gradients of those behind it."""
        if not self._initial:
            return None
        total, to_initial = self._total(part), []
        d_log_decay = total.new_zeros(part.rows)
        own = [[W[: part.complete] for W in every] for every in (weights, d_weights)]
        for W, dW, initial, d_initial in zip(*own, self._initial, self._d_initial, strict=True):
            d_log_decay[: part.complete] += (_distance(W, initial) * dW).sum((1, 2))
            to_initial.append(dW * -total.expm1())
            d_initial += to_initial[-1].unflatten(0, (-1, len(initial))).sum(0)
        d_log_decay[: part.complete] *= total.exp().flatten()
        return Gradients(to_initial, d_log_decay[:, None].expand(-1, part.length))

    def d_initial(self) -> list[Tensor]:
        """Gradients of the initial weights, W and b of every layer."""
        return [part.clone() for W in self._d_initial for part in (W[:, :-1], W[:, -1])]

    def _total(self, part: MiniBatch) -> Tensor:
        """ln A of the complete rows ``[c, 1, 1]``."""
        log_decay = part.read(self._log_decay, self._initial[0].dtype)
        return log_decay[: part.complete].sum(1).view(-1, 1, 1)


class Gradients(NamedTuple):
    """Gradients of one mini-batch, (41)."""

    to_initial: list[Tensor]  # the share of the weights' that goes to the initial ones
    log_decay: Tensor  # of every token


def lost(total: Tensor, weights: Sequence[Tensor], initial: Sequence[Tensor]) -> list[Tensor]:
    """(1 - A) (W - W̄) of (40), of weights ``[R, in + 1, out]`` and ln A ``[R, 1, 1]``."""
    share = -total.expm1()
    return [_distance(W, start).mul_(share) for W, start in zip(weights, initial, strict=True)]


def forget(weights: Sequence[Tensor], lost: Sequence[Tensor]) -> None:
    """Take from weights, in place, what is lost."""
    for W, x in zip(weights, lost, strict=False):
        W[: len(x)] -= x


def _distance(W: Tensor, initial: Tensor) -> Tensor:
    each: Tensor = W.unflatten(0, (-1, len(initial))) - initial
    return each.flatten(0, 1)
