"""Behind the inner loop: layer norm over the width, gate and output projection."""

from ..arguments import Output
from .operator import Operator

output = Operator(
    "output",
    Output,
    ("y",),
    lambda given, _: (given.o.new_empty(*given.o.shape[:2], given.o.shape[2] * given.o.shape[3]),),
    differentiable=1,
    gradients=("o", "gate", "norm_weight", "norm_bias", "weight"),
)
"""y ``[B, L, C]`` in o's dtype, in which the product is taken; the arithmetic before is float32 at least."""
