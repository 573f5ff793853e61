"""The operators: each is declared once, and computed by the backends that the registry names.

``torch.library`` operators, rather than bare autograd Functions, so that ``torch.compile`` takes each as one node and
``opcheck`` can hold them to their contract.
"""

from typing import Any

from .backends import Backend, check_backend, choose_backend
from .convolution import CONVOLUTIONS
from .full_softmax import full_softmax_nll, full_softmax_total_nll
from .inner_loop import SCANS
from .operator import Operator
from .output import output
from .projection import projection
from .step import token_step

_ALL: tuple[Operator[Any], ...] = (
    *SCANS.values(),
    *CONVOLUTIONS.values(),
    projection,
    output,
    token_step,
    full_softmax_nll,
    full_softmax_total_nll,
)
OPERATORS = {operator.name: operator for operator in _ALL}

__all__ = [
    "CONVOLUTIONS",
    "OPERATORS",
    "SCANS",
    "Backend",
    "Operator",
    "check_backend",
    "choose_backend",
    "full_softmax_nll",
    "full_softmax_total_nll",
    "output",
    "projection",
    "token_step",
]
