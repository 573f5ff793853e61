"""How many FLOPs the operators take, for ``torch.utils.flop_counter``: those of products, two for each multiply-add.

That module imports triton, which ``import ttt4rec`` is not to do. So the formulas are registered when it is loaded,
before or after.

T tokens in mini-batches of at most K take, per head, with S the sum of the squares of the mini-batches' sizes::

                    forward                          backward
    TTT-Linear      6 T D² + 4 S D                   18 T D² + 12 S D
    TTT-MLP         14 T D F + 4 S (D + F)           40 T D F + 12 S (D + F)

Forward, that are the products of the dual form: k W, q W and the update, and for every layer Q Kᵀ and its product with
G. A backward takes two products for each, and computes again what the forward did not keep.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from .validation import has_values

COUNTER = "torch.utils.flop_counter"


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
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.ttt4rec, name)
        names = [argument.name for argument in operator.default._schema.arguments]
        counter.register_flop_formula(operator, get_raw=True)(partial(_count, names, formula))


def _count(names: list[str], formula: Callable[[dict[str, Any]], int], *args: Any, **_: Any) -> int:
    return formula(dict(zip(names, args, strict=True)))


def _scan(by_weights: int, by_pairs: int, given: dict[str, Any]) -> int:
    """Of an inner loop: so many FLOPs by tokens times weights, and by pairs of tokens times features."""
    q, K, lengths = given["q"], given["token_scale"].shape[0], given["lengths"]
    B, L, H, D = q.shape
    tokens = [L] * B if lengths is None or not has_values(lengths) else lengths.tolist()
    pairs = sum(n // K * K**2 + (n % K) ** 2 for n in tokens)
    hidden = given["W1" if "W1" in given else "grad_W1"].shape[-1]
    features = D if "b2" not in given and "grad_b2" not in given else D + hidden
    return int(H * (by_weights * sum(tokens) * D * hidden + by_pairs * pairs * features))


def _step(given: dict[str, Any]) -> int:
    """Of one token of B streams: as in a forward, with as many tokens before it as there may be."""
    (B, H, D), K, F = given["q"].shape, given["token_scale"].shape[0], given["hidden"]
    return int(B * H * (14 * D * F + 4 * K * (D + F) if F else 6 * D**2 + 4 * K * D))


def _projection(each: int, given: dict[str, Any]) -> int:
    tokens, C = given["x"].shape[:2].numel(), given["x"].shape[2]
    return int(each * tokens * C * (len(given["weights"]) * C + given["lr_weight"].shape[0]))


def _convolution(each: int, given: dict[str, Any]) -> int:
    (B, L, C), weights = given["x"].shape, given["weights"]
    return int(each * B * (L - given["lead"]) * C * len(weights) * weights[0].shape[1])


def _epilogue(each: int, given: dict[str, Any]) -> int:
    B, L, H, D = given["o"].shape
    return int(each * B * L * (H * D) ** 2)


def _catalogue(each: int, given: dict[str, Any]) -> int:
    h, table = given["h"], given["table"]
    return int(each * h.shape[0] * h.shape[1] * (table.shape[0] - 1))


def _nothing(given: dict[str, Any]) -> int:
    return 0


_FORMULAS: dict[str, Callable[[dict[str, Any]], int]] = {
    "linear_scan": partial(_scan, 6, 4),
    "linear_scan_backward": partial(_scan, 18, 12),
    "mlp_scan": partial(_scan, 14, 4),
    "mlp_scan_backward": partial(_scan, 40, 12),
    "token_step": _step,
    "rope_projection": partial(_projection, 2),
    "rope_projection_backward": partial(_projection, 4),
    "rope_convolution": partial(_convolution, 2),
    "rope_convolution_backward": partial(_convolution, 4),
    "epilogue": partial(_epilogue, 2),
    "epilogue_backward": partial(_epilogue, 4),
    "catalogue_nll": partial(_catalogue, 2),
    "catalogue_nll_backward": partial(_catalogue, 6),
    "catalogue_total_nll": partial(_catalogue, 6),
    "catalogue_total_nll_backward": _nothing,
}
