"""Behind the inner loop: layer norm over the width, gate and output projection."""

from ..arguments import Output
from .operator import Gradients, Operator
from .samples import Draw, Sizes


def _sample(sizes: Sizes, draw: Draw, *, gated: bool = True, masked: bool = True) -> Output:
    B, L, H, D, _ = sizes
    C = H * D
    gate, mask = draw.normal(B, L, C) if gated else None, draw.places(2, B, L).bool() if masked else None
    return Output(draw.normal(B, L, H, D), gate, mask, draw.normal(C), draw.normal(C), draw.weight(C, C, fan=C), 1e-6)


output = Operator(
    "output",
    Output,
    ("y",),
    lambda given, _: (given.o.new_empty(*given.o.shape[:2], given.o.shape[2] * given.o.shape[3]),),
    _sample,
    gradients=Gradients(("o", "gate", "norm_weight", "norm_bias", "weight"), differentiable=1),
)
"""y ``[B, L, C]`` in o's dtype, in which the product is taken; the arithmetic before is float32 at least."""
