"""One token of many streams, in place; there is no gradient."""

from ..arguments import TokenStep
from .operator import Operator

token_step = Operator(
    "token_step", TokenStep, ("o",), lambda step, _: (step.q.new_empty(step.q.shape),), mutates=("records",)
)
