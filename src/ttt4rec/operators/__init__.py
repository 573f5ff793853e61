"""The operators: each is declared once, and computed by the backends that the registry names.

``torch.library`` operators, rather than bare autograd Functions, so that ``torch.compile`` takes each as one node and
``opcheck`` can hold them to their contract.
"""

from .backends import Backend, check_backend, choose_backend
from .inner_loop import SCANS
from .output import output
from .projection import CONVOLUTIONS, PROJECTIONS
from .step import token_step

__all__ = [
    "CONVOLUTIONS",
    "PROJECTIONS",
    "SCANS",
    "Backend",
    "check_backend",
    "choose_backend",
    "output",
    "token_step",
]
