"""The pieces both inner models are made of, on one mini-batch of r tokens: operands ``[R, r, D]``.

An inner layer's bias is the last row of its weights, ``W [R, in + 1, out]``, and what goes into it has a last feature
that is one. Names follow the mathematics: Z is an inner model's output on the keys, G the inner loss's gradient at it.
The prefix ``d`` marks the gradient of the outer loss.

Numbers in brackets are equations of docs/mathematics.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_native_backward = torch.ops.aten.native_layer_norm_backward


def affine(x: Tensor, weights: Tensor) -> Tensor:
    """``x W + b`` for x ``[R, n, in]`` and ``[W; b]`` ``[R, in + 1, out]``."""
    return torch.baddbmm(weights[:, -1:], x, weights[:, :-1])


class Normalised:
    """The layer norm of z without its affine part: ``x_hat``, and products with its Jacobian."""

    def __init__(self, z: Tensor, eps: float) -> None:
        self._z = z - z.mean(-1, keepdim=True)  # PyTorch's products with its mean cancel where that is large
        self.x_hat, self._mean, self.inverse_std = torch.native_layer_norm(self._z, (z.shape[-1],), None, None, eps)

    def jacobian_product(self, grad: Tensor) -> Tensor:
        """J grad, (5); the Jacobian is symmetric, so this serves both directions."""
        shape, mask = (grad.shape[-1],), (True, False, False)
        result: Tensor = _native_backward(grad, self._z, shape, self._mean, self.inverse_std, None, None, mask)[0]
        return result


class OutputNorm(Normalised):
    """The layer norm of an inner model's outputs P at the queries."""

    def output(self, q: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """O, (10) or (13); q may have ones behind its features."""
        return torch.addcmul(beta, gamma, self.x_hat).add_(q[..., : self.x_hat.shape[-1]])

    def backward(self, dO: Tensor, gamma: Tensor) -> Tensor:
        """dP, (15)."""
        return self.jacobian_product(dO * gamma)

    def parameters(self, dO: Tensor, dgamma: Tensor, de: Tensor) -> tuple[Tensor, Tensor]:
        """dγ and dβ before their sums over tokens, from the inner gradient's, which are overwritten."""
        return dgamma.addcmul_(dO, self.x_hat), de.add_(dO)


class InnerGradient:
    """G, the inner loss's gradient at Z, and the derivative of that gradient; k may have ones behind its features."""

    def __init__(self, Z: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> None:
        self._norm = Normalised(Z, eps)
        self._gamma = gamma
        # LN(Z) - (v - k); v - k by itself, as both may be larger by far.
        self._error = torch.addcmul(beta, gamma, self._norm.x_hat).sub_(v - k[..., : Z.shape[-1]])
        self._y = self._error * gamma

    def value(self) -> Tensor:
        """G, (6)."""
        return self._norm.jacobian_product(self._y)

    def backward(self, dG: Tensor, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, by (21) and (22), dZ, de, which is dβ before its sum over tokens too, and dγ before its."""
        x_hat, r = self._norm.x_hat, self._norm.inverse_std
        dy = self._norm.jacobian_product(dG)
        de = dy * self._gamma
        mean_y, mean_dG = _mean_of_product(self._y, x_hat), _mean_of_product(dG, x_hat)
        dx_hat = (de * self._gamma).sub_((dG * mean_y).addcmul_(self._y, mean_dG).mul_(r))
        dZ = self._norm.jacobian_product(dx_hat).sub_(x_hat * (r * _mean_of_product(dG, G)))
        return dZ, de, dy.mul_(self._error).addcmul_(de, x_hat)


def _mean_of_product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).mean(-1, keepdim=True)


@dataclass
class Rates:
    """``-η[i, j] = -s_i lr_j`` for i >= j of one mini-batch, and the gradients that its uses leave behind."""

    lr: Tensor  # [R, r]
    scale: Tensor  # [r, r]: -s_i for i >= j, else 0; given as those of a whole mini-batch
    complete: int  # rows whose mini-batch is complete; only these are updated

    @staticmethod
    def scales(token_scale: Tensor) -> Tensor:
        """Scales of a whole mini-batch, from s ``[K]``."""
        return -token_scale[:, None].expand(token_scale.numel(), token_scale.numel()).tril()

    def __post_init__(self) -> None:
        r = self.lr.shape[1]
        self.scale = self.scale[:r, :r]
        self.eta = self.lr.unsqueeze(1) * self.scale  # [R, r, r]
        self.last = self.eta[: self.complete, -1].unsqueeze(-1)  # [complete, r, 1]
        self.d_eta: Tensor | None = None

    def accumulate(self, d_eta: Tensor, d_last: Tensor) -> None:
        """Add what one inner layer contributes."""
        d_eta[: self.complete, -1] += d_last
        self.d_eta = d_eta if self.d_eta is None else self.d_eta.add_(d_eta)

    def backward(self) -> tuple[Tensor, Tensor]:
        """Return d lr ``[R, r]`` and d s ``[r]``."""
        assert self.d_eta is not None
        d_lr = (self.d_eta * self.scale).sum(1)
        return d_lr, self.d_eta.tril_().mul_(self.lr.unsqueeze(1)).sum((0, 2)).neg_()


class InnerWeights:
    """The weights of an inner layer, ``[W; b]`` ``[R, in + 1, out]``, and the products that steps form with them."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.features = value, value.shape[1] - 1

    def affine(self, x: Tensor) -> Tensor:
        """``x W + b`` for x ``[R, r, in + 1]`` with its one."""
        return torch.bmm(x, self.value)

    def back(self, d: Tensor, onto: Tensor | None = None) -> Tensor:
        """``d Wᵀ``, without the one's; in place if onto is given."""
        transposed = self.value[:, :-1].mT
        return torch.bmm(d, transposed) if onto is None else onto.baddbmm_(d, transposed)

    def forth(self, x: Tensor, onto: Tensor) -> Tensor:
        """``onto + x W``, in place, for x with a last feature of zero."""
        return onto.baddbmm_(x[..., :-1], self.value[:, :-1])

    @staticmethod
    def add_outer(total: Tensor, x: Tensor, d: Tensor, other: tuple[Tensor, Tensor] | None = None) -> None:
        """Add ``xᵀ d`` to a gradient of ``[W; b]``, and the same of another pair, the products summed by themselves."""
        product = torch.bmm(x.mT, d)
        total += product if other is None else product.baddbmm_(other[0].mT, other[1])


class DualLayer:
    """One inner layer in one mini-batch: its output at queries in the dual form, and its update.

    ``keys [R, r, in + 1]`` are what went into the layer, G ``[R, r, out]`` is the inner gradient at what came out.
    """

    def __init__(self, keys: Tensor, G: Tensor, weights: InnerWeights, rates: Rates) -> None:
        self._keys, self._G, self._W, self._rates = keys, G, weights.value, rates
        self._step = G[: rates.complete] * rates.last

    def update(self) -> None:
        """(9) in place, the product summed by itself: W, which may be larger, rounds once."""
        c = self._rates.complete
        self._W[:c] += torch.bmm(self._keys[:c].mT, self._step)

    def output(self, queries: Tensor) -> Tensor:
        """(8) at the queries."""
        self._queries = queries
        self._S = torch.baddbmm(queries.new_ones(1), queries[..., :-1], self._keys[..., :-1].mT)
        self._A = self._S * self._rates.eta
        return torch.bmm(queries, self._W).add_(torch.bmm(self._A, self._G))

    def backward(self, d_out: Tensor, dW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backward of ``output`` and ``update`` together, (16) to (20).

        dW comes in as gradient of the updated weights and leaves, in place, as gradient of the weights before. Returns
        d queries and d keys, without their ones, and dG.
        """
        queries, keys, rates, c = self._queries, self._keys, self._rates, self._rates.complete
        dA = torch.bmm(d_out, self._G.mT)
        dS = dA * rates.eta
        keys_dW = torch.bmm(keys[:c], dW[:c])
        rates.accumulate(dA.mul_(self._S), (keys_dW * self._G[:c]).sum(-1))
        dG = torch.bmm(self._A.mT, d_out)
        dG[:c].addcmul_(keys_dW, rates.last)
        d_keys = torch.bmm(dS.mT, queries[..., :-1])
        d_keys[:c].baddbmm_(self._step, dW[:c, :-1].mT)
        d_queries = torch.bmm(d_out, self._W[:, :-1].mT).baddbmm_(dS, keys[..., :-1])
        dW += torch.bmm(queries.mT, d_out)
        return d_queries, d_keys, dG
