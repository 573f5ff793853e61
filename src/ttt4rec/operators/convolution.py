"""The causal convolutions in front of the inner loop, rotated or not, and a block's."""

from torch import Tensor

from ..arguments import Convolution
from .operator import Gradients, Operator, numbered
from .samples import Draw, Sizes, angles


def _declare_convolution(count: int) -> Operator[Convolution]:
    """``count`` outputs ``[B, L, C]`` in x's dtype."""

    def fake(given: Convolution, _: str) -> tuple[Tensor, ...]:
        B, L, C = given.x.shape
        return tuple(given.x.new_empty(B, L - given.lead, C) for _ in given.weights)

    def sample(sizes: Sizes, draw: Draw, *, taps: int = 4, lead: int = 0, plain: bool = False) -> Convolution:
        """Of rows that hold sequences of K tokens, rotated; plain: of one, and not rotated."""
        B, L, H, D, K = sizes
        C, places = H * D, draw.places(K, B, L)
        weights = tuple(draw.weight(C, taps, fan=taps) for _ in range(count))
        x, biases = draw.normal(B, lead + L, C), tuple(draw.normal(C) for _ in range(count))
        if plain:
            return Convolution(x, weights, biases, None, None, None, None, lead)
        return Convolution(x, weights, biases, *angles(sizes, draw), places, places, lead)

    return Operator(
        f"convolution_{count}",
        Convolution,
        numbered("y", count),
        fake,
        sample,
        function="convolution",
        groups={"weights": numbered("weight", count), "biases": numbered("bias", count)},
        gradients=Gradients(("x", "weights", "biases"), differentiable=count),
    )


CONVOLUTIONS = {count: _declare_convolution(count) for count in (1, 2)}
"""By how many there are, since schemas are flat: a block's own, or the queries' and keys'."""
