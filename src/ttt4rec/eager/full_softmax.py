"""The full softmax in PyTorch."""

from torch import Tensor

from .. import item_blocks
from ..arguments import FullSoftmax


def full_softmax_nll(given: FullSoftmax) -> tuple[Tensor, ...]:
    """Losses ``[N]``, and the logarithms of the softmax's denominators, float64 ``[N]``."""
    return item_blocks.nll(given, log_sum_exp)


def full_softmax_nll_backward(
    given: FullSoftmax, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of h and table."""
    return item_blocks.nll_backward(given, kept[0], grads[0], to_gradient)


def full_softmax_total_nll(given: FullSoftmax) -> tuple[Tensor, ...]:
    """The sum of the losses, and its gradients of h and table."""
    return item_blocks.total_nll(given, log_sum_exp, to_gradient)


full_softmax_total_nll_backward = item_blocks.total_nll_backward


def log_sum_exp(scores: Tensor) -> Tensor:
    """log Σ exp of every row of a block, as ``item_blocks.LogSumExp``."""
    return scores.logsumexp(1).double()


def to_gradient(scores: Tensor, lse: Tensor, column: Tensor, grad: Tensor) -> None:
    """As ``item_blocks.ToGradient``."""
    scores.sub_(lse.to(scores.dtype).unsqueeze(1)).exp_().mul_(grad.unsqueeze(1))
    column, inside = item_blocks.columns(column, 0, scores)
    scores.scatter_add_(1, column, -grad.unsqueeze(1) * inside)
