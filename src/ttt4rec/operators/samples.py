"""What samples of operators' arguments are made of: small random ones, of any size, dtype and device.

They serve whatever calls an operator without caring for its numbers: ``opcheck``, compilation ahead of time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Device = torch.device | str


class Sizes(NamedTuple):
    """Sizes that all operators share; see ``arguments``."""

    B: int = 2
    L: int = 5
    H: int = 2
    D: int = 8
    K: int = 3


SMALL = Sizes()


class Draw(NamedTuple):
    """Random numbers of a dtype on a device, which may be ``"meta"``."""

    dtype: torch.dtype
    device: Device

    @property
    def wide(self) -> "Draw":
        """The same in float32 at least."""
        return self._replace(dtype=torch.promote_types(self.dtype, torch.float32))

    def normal(self, *shape: int) -> Tensor:
        """From N(0, 1)."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def weight(self, *shape: int, fan: int) -> Tensor:
        """From N(0, 1 / fan)."""
        scaled: Tensor = torch.randn(shape, device=self.device) * fan**-0.5
        return scaled.to(self.dtype)

    def rate(self, *shape: int) -> Tensor:
        """From U(0, 1)."""
        return torch.rand(shape, device=self.device).to(self.dtype)

    def places(self, K: int, *shape: int) -> Tensor:
        """Integers from 0 to K - 1."""
        return torch.randint(0, K, shape, device=self.device)


def angles(sizes: Sizes, draw: Draw) -> tuple[Tensor, Tensor]:
    """The cos and sin of any angles."""
    turns = draw.wide.normal(sizes.K, sizes.D // 2)
    return turns.cos(), turns.sin()
