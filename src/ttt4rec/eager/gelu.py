"""The tanh approximation of gelu with its first two derivatives, by one sigmoid, (14).

Here z, v, s, w and p stand for its x, w, σ, w' and δ.

PyTorch's own gelu and its derivative evaluate a tanh in each call, which takes several times as long as a sigmoid.

Numbers in brackets are equations of docs/mathematics.md.
"""

import torch
from torch import Tensor

_C, _A = 0.7978845608028654, 0.044715  # sqrt(2/π) and the cubic coefficient


class Gelu:
    """Gelu at z ``[..., F]``."""

    def __init__(self, z: Tensor) -> None:
        self._z, self._two_c = z, z.new_full((), 2 * _C)
        self._v = torch.addcmul(self._two_c, z, z, value=2 * _A * _C).mul_(z)
        self._s = self._v.sigmoid()
        self._slope: Tensor | None = None

    def value_with_one(self) -> Tensor:
        """[..., F + 1]: gelu(z), and a last feature that is one."""
        value = self._z.new_ones(*self._z.shape[:-1], self._z.shape[-1] + 1)
        torch.mul(self._z, self._s, out=value[..., :-1])
        return value

    def slope(self) -> Tensor:
        """The first derivative, once."""
        self._w = torch.addcmul(self._two_c, self._z, self._z, value=6 * _A * _C)
        self._p = self._v.neg_().sigmoid_().mul_(self._s)  # where 1 - s would cancel
        self._q = self._p * self._w
        return torch.addcmul(self._s, self._z, self._q)

    def times_slope(self, x: Tensor) -> Tensor:
        """x ∘ gelu'(z)."""
        return x * self._once()

    def times_slope_with_zero(self, x: Tensor) -> Tensor:
        """The same with a last feature that is zero, which makes an E, (26), of dG1."""
        E = x.new_zeros(*x.shape[:-1], x.shape[-1] + 1)
        torch.mul(x, self._once(), out=E[..., :-1])
        return E

    def backward(self, dX: Tensor, dG: Tensor, before: Tensor) -> Tensor:
        """dZ1, (27), from the gradients of X2 and of G1, which are overwritten, and G2_W2."""
        return dX.mul_(self._once()).addcmul_(dG.mul_(before), self.curvature())

    def _once(self) -> Tensor:
        if self._slope is None:
            self._slope = self.slope()
        return self._slope

    def curvature(self) -> Tensor:
        """The second derivative, once after ``slope``."""
        bend = torch.add(self._z.new_ones(()), self._s, alpha=-2).mul_(self._w).mul_(self._z).add_(4)
        return bend.mul_(self._q).sub_(self._p, alpha=4 * _C)
