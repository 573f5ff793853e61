"""The pieces both inner models are made of, on one mini-batch: operands ``[R, K, D]``, weights ``[R, in, out]``.

Names follow the mathematics: Z is an inner model's output on the keys, G the inner loss's gradient at it, and
``η[i, j] = s_i lr_j`` for i >= j. The prefix ``d`` marks the gradient of the outer loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_native_backward = torch.ops.aten.native_layer_norm_backward


class Normalised:
    """The layer norm of z without its affine part: ``x_hat``, and products with its Jacobian."""

    def __init__(self, z: Tensor, eps: float) -> None:
        self._z = z
        self.x_hat, self._mean, self.inverse_std = torch.native_layer_norm(z, (z.shape[-1],), None, None, eps)

    def jacobian_product(self, grad: Tensor) -> Tensor:
        """r (grad - mean(grad) - x̂ mean(grad ∘ x̂)); the Jacobian is symmetric, so this serves both directions."""
        shape, mask = (grad.shape[-1],), (True, False, False)
        result: Tensor = _native_backward(grad, self._z, shape, self._mean, self.inverse_std, None, None, mask)[0]
        return result


class InnerGradient:
    """G, the gradient of ``½‖LN(Z) - (v - k)‖²`` at Z, and the derivative of that gradient."""

    def __init__(self, Z: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> None:
        self._norm = Normalised(Z, eps)
        self._gamma = gamma
        self._error = torch.addcmul(beta, gamma, self._norm.x_hat).add_(k).sub_(v)  # LN(Z) - (v - k)
        self._y = self._error * gamma

    def value(self) -> Tensor:
        """G = r (y - mean(y) - x̂ mean(y ∘ x̂)), y = γ ∘ (LN(Z) - (v - k))."""
        return self._norm.jacobian_product(self._y)

    def backward(self, dG: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return dZ, d(LN(Z) - (v - k)), and this mini-batch's dγ and dβ before their sums over rows.

        ::

            dy = J dG                                  J the Jacobian of the layer norm
            de = γ ∘ dy
            dx̂ = γ ∘ de - r (dG mean(y ∘ x̂) + y mean(dG ∘ x̂))
            dZ = J dx̂ - r x̂ mean(dG ∘ G)               the last term through r
        """
        x_hat, r = self._norm.x_hat, self._norm.inverse_std
        dy = self._norm.jacobian_product(dG)
        de = dy * self._gamma
        mean_y, mean_dG = _mean_of_product(self._y, x_hat), _mean_of_product(dG, x_hat)
        dx_hat = (de * self._gamma).sub_((dG * mean_y).addcmul_(self._y, mean_dG).mul_(r))
        dZ = self._norm.jacobian_product(dx_hat).sub_(x_hat * (r * _mean_of_product(dG, G)))
        dgamma = dy.mul_(self._error).addcmul_(de, x_hat)
        return dZ, de, dgamma.sum(1), de.sum(1)


def _mean_of_product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean(-1, keepdim=True)


@dataclass
class Rates:
    """η of one mini-batch, and the gradients that its uses leave behind."""

    lr: Tensor  # [R, K]
    scale: Tensor  # [K, K]: s_i for i >= j, else 0
    complete: int  # rows whose mini-batch is complete; only these are updated

    def __post_init__(self) -> None:
        self.eta = self.lr.unsqueeze(1) * self.scale  # [R, K, K]
        self.last = self.eta[:, -1].clone()  # η_last
        self.last[self.complete :] = 0
        self.d_eta: Tensor | None = None
        self.d_last: Tensor | None = None

    def accumulate(self, d_eta: Tensor, d_last: Tensor) -> None:
        """Add what one inner layer contributes."""
        self.d_eta = d_eta if self.d_eta is None else self.d_eta.add_(d_eta)
        self.d_last = d_last if self.d_last is None else self.d_last.add_(d_last)

    def backward(self) -> tuple[Tensor, Tensor]:
        """Return d lr ``[R, K]`` and d s ``[K]``."""
        assert self.d_eta is not None
        assert self.d_last is not None
        self.d_last[self.complete :] = 0
        self.d_eta[:, -1] += self.d_last
        lower = self.d_eta.tril_()
        return (lower * self.scale).sum(1), torch.einsum("rij,rj->i", lower, self.lr)


def dual_output(queries: Tensor, keys: Tensor, G: Tensor, W: Tensor, b: Tensor, rates: Rates) -> Tensor:
    """queries W + b - (tril(η) ∘ (queries keysᵀ + 1)) G."""
    A = torch.baddbmm(queries.new_ones(1), queries, keys.mT).mul_(rates.eta)
    return torch.baddbmm(b.unsqueeze(1), queries, W).baddbmm_(A, G, alpha=-1)


def update(W: Tensor, b: Tensor, keys: Tensor, G: Tensor, rates: Rates, sign: int) -> None:
    """In place W += sign (η_last ∘ keys)ᵀ G, b += sign η_last G: -1 walks forward, +1 back."""
    W.baddbmm_((keys * rates.last.unsqueeze(-1)).mT, G, alpha=sign)
    b.unsqueeze(1).baddbmm_(rates.last.unsqueeze(1), G, alpha=sign)


def dual_backward(
    d_out: Tensor, queries: Tensor, keys: Tensor, G: Tensor, W: Tensor, dW: Tensor, db: Tensor, rates: Rates
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of ``dual_output`` and ``update`` together; returns d queries, d keys, dG.

    dW and db come in as gradients of the updated weights and leave, in place, as those of the weights before.
    """
    S = torch.baddbmm(queries.new_ones(1), queries, keys.mT)
    dA = -(d_out @ G.mT)
    dS = dA * rates.eta
    last = rates.last.unsqueeze(-1)
    G_dW = G @ dW.mT
    rates.accumulate(dA.mul_(S), -((keys * G_dW).sum(-1) + (G @ db.unsqueeze(-1)).squeeze(-1)))
    dG = torch.baddbmm(db.unsqueeze(1), keys, dW).mul_(last).baddbmm_(S.mul_(rates.eta).mT, d_out).neg_()
    d_keys = G_dW.mul_(last).neg_().baddbmm_(dS.mT, queries)
    d_queries = torch.bmm(d_out, W.mT).baddbmm_(dS, keys)
    linear_backward_(d_out, queries, dW, db)
    return d_queries, d_keys, dG


def linear_backward_(d_out: Tensor, x: Tensor, dW: Tensor, db: Tensor) -> None:
    """Add the gradients of ``x W + b`` to dW and db in place."""
    dW.baddbmm_(x.mT, d_out)
    db.add_(d_out.sum(1))
