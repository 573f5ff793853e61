"""The operators: each is declared once, and computed by the backends that the registry names.

``torch.library`` operators, rather than bare autograd Functions, so that ``torch.compile`` takes each as one node and
``opcheck`` can hold them to their contract.
"""

from typing import Any

from ..inner_models import INNER_MODELS, InnerModel
from .backends import Backend, check_backend, choose_backend
from .convolution import CONVOLUTIONS
from .full_softmax import full_softmax_nll, full_softmax_total_nll
from .inner_loop import FORGETTING_SCANS, SCANS, declare_scan
from .operator import Operator
from .output import output
from .projection import projection
from .step import forgetting_token_step, token_step

_ALL: tuple[Operator[Any], ...] = (
    *SCANS.values(),
    *FORGETTING_SCANS.values(),
    *CONVOLUTIONS.values(),
    projection,
    output,
    token_step,
    forgetting_token_step,
    full_softmax_nll,
    full_softmax_total_nll,
)
OPERATORS = {operator.name: operator for operator in _ALL}


def register_inner_model(model: InnerModel) -> None:
    """Add an inner model of another package, and declare its scan; ours are rows of ``inner_models``.

    Raises:
        ValueError: there is one of that name.
    """
    if model.name in INNER_MODELS:
        raise ValueError(f"name must be new, not one of {', '.join(INNER_MODELS)}; given {model.name!r}")
    INNER_MODELS[model.name], SCANS[model.name] = model, declare_scan(model)
    FORGETTING_SCANS[model.name] = declare_scan(model, forgets=True)
    OPERATORS.update({scan.name: scan for scan in (SCANS[model.name], FORGETTING_SCANS[model.name])})


__all__ = [
    "CONVOLUTIONS",
    "FORGETTING_SCANS",
    "OPERATORS",
    "SCANS",
    "Backend",
    "Operator",
    "check_backend",
    "choose_backend",
    "forgetting_token_step",
    "full_softmax_nll",
    "full_softmax_total_nll",
    "output",
    "projection",
    "register_inner_model",
    "token_step",
]
