"""How many FLOPs the operators take, for ``torch.utils.flop_counter``: products alone, two for each multiply-add.

That module imports triton, which ``import ttt4rec`` is not to do. So the formulas are registered when it is loaded,
before or after.

T tokens in mini-batches of at most K take, per head, with S the sum of the squares of the mini-batches' sizes::

                    forward                          backward
    TTT-Linear      6 T D² + 4 S D                   18 T D² + 12 S D
    TTT-MLP         14 T D F + 4 S (D + F)           40 T D F + 12 S (D + F)

Forward, that are the products of the dual form: k W, q W and the update, and for every layer Q Kᵀ and its product with
G. A backward takes two products for each, and computes again what the forward did not keep. In mini-batches of more
than a block S is the blocks', and every layer has a product more, with the sums of the blocks before.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..arguments import MAX_MINI_BATCH_SIZE, Convolution, FullSoftmax, Output, Projection, Scan, TokenStep
from ..inner_models import INNER_MODELS
from . import (
    CONVOLUTIONS,
    FORGETTING_SCANS,
    SCANS,
    forgetting_token_step,
    full_softmax_nll,
    full_softmax_total_nll,
    output,
    projection,
    token_step,
)
from .operator import Operator
from .transforms import has_values

COUNTER = "torch.utils.flop_counter"
FORWARD = {"linear": (6, 4), "mlp": (14, 4)}
"""The numbers of the table: of T times the first layer's weights, and of S times all layers' outputs."""
BACKWARD = {"linear": (18, 12), "mlp": (40, 12)}


def register() -> None:
    """Tell PyTorch's counter the formulas, now or when it is loaded; the operators are there."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenLoaded())


class _WhenLoaded(importlib.abc.MetaPathFinder):
    """Leaves the loading of the counter to those who know how, and has the formulas registered behind it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(counter: ModuleType) -> None:
    for operator, forward, backward, count in _FORMULAS:
        register = counter.register_flop_formula
        register(operator.overloads, get_raw=True)(partial(_count, operator, forward, count))
        if operator.backward_overloads is not None:
            register(operator.backward_overloads, get_raw=True)(partial(_count, operator, backward, count))


def _count(operator: Operator[Any], factors: Any, count: Callable[[Any, Any], int], *flat: Any, **_: Any) -> int:
    return count(operator.pack(flat[: len(operator.slots)]), factors)


def _scan(scan: Scan, factors: tuple[int, int]) -> int:
    """Of an inner loop: FLOPs by tokens times weights, and by pairs of tokens times features."""
    by_weights, by_pairs = factors
    (B, L, H, D), K, lengths = scan.q.shape, scan.token_scale.shape[0], scan.lengths
    tokens = [L] * B if lengths is None or not has_values(lengths) else lengths.tolist()
    pairs = sum(n // K * _squares(K) + _squares(n % K) for n in tokens)
    features = scan.model.kept_widths(D, scan.hidden)
    if K > MAX_MINI_BATCH_SIZE:
        by_weights += by_pairs // 2 * len(features)  # as many products with sums as with pairs' steps
    return int(H * (by_weights * sum(tokens) * D * features[0] + by_pairs * pairs * sum(features)))


def _squares(tokens: int) -> int:
    """Pairs of a mini-batch's tokens that stand in one block."""
    n = MAX_MINI_BATCH_SIZE
    return tokens // n * n**2 + (tokens % n) ** 2


def _step(step: TokenStep, _: None) -> int:
    """Of one token of B streams: as in a forward, with as many tokens before it as there may be."""
    (B, H, D), K, (by_weights, by_pairs) = step.q.shape, step.token_scale.shape[0], FORWARD[step.inner]
    features = INNER_MODELS[step.inner].kept_widths(D, step.hidden)
    return int(B * H * (by_weights * D * features[0] + by_pairs * K * sum(features)))


def _projection(given: Projection, each: int) -> int:
    tokens, C = given.x.shape[:2].numel(), given.x.shape[2]
    return int(each * tokens * C * (len(given.weights) * C + given.lr_weight.shape[0]))


def _convolution(given: Convolution, each: int) -> int:
    (B, L, C), weights = given.x.shape, given.weights
    return int(each * B * (L - given.lead) * C * len(weights) * weights[0].shape[1])


def _output(given: Output, each: int) -> int:
    B, L, H, D = given.o.shape
    return int(each * B * L * (H * D) ** 2)


def _full_softmax(given: FullSoftmax, each: int) -> int:
    return int(each * given.h.shape[0] * given.h.shape[1] * (given.table.shape[0] - 1))


_FORMULAS: list[tuple[Operator[Any], Any, Any, Callable[[Any, Any], int]]] = [
    *((scans[name], FORWARD[name], BACKWARD[name], _scan) for scans in (SCANS, FORGETTING_SCANS) for name in FORWARD),
    (token_step, None, None, _step),
    (forgetting_token_step, None, None, _step),
    (projection, 2, 4, _projection),
    *((operator, 2, 4, _convolution) for operator in CONVOLUTIONS.values()),
    (output, 2, 4, _output),
    (full_softmax_nll, 2, 6, _full_softmax),
    (full_softmax_total_nll, 6, 0, _full_softmax),  # whose backward only scales gradients
]
