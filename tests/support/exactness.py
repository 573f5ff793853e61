"""How far gradients lie from float64, beside the reference's own.

    python -m tests.support.exactness

prints the tables.

The rule: a gradient may be at most twice as far from float64 as the reference's under autograd in the same dtype. One
evaluation of the reference is one draw of its roundings, and a gradient that is the small difference of large terms
scatters from draw to draw. So the reference is evaluated again, on inputs that move by no more than the rounding that
made them; the widest of these errors is the bound that is doubled.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.support.checks import run_inner
from ttt4rec import TTTLayer, TTTState

Values = dict[str, Tensor]
SCALES = (1e-6, 1e-3, 1.0, 10.0, 100.0, 1e3, 1e4, "mixed")
Scale = float | str
FLOOR = 2.0**-24  # one rounding of a result
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def token_sizes(scale: Scale, *shape: int) -> Tensor:
    """The size of each token's input ``[B, L, 1]``: the same for all, or mixed from 1e-6 to 1e4."""
    if scale == "mixed":
        return 10 ** (10 * torch.rand(*shape, 1, dtype=torch.float64) - 6)
    return torch.full((*shape, 1), float(scale), dtype=torch.float64)


def operator_inputs(
    inner: str,
    scale: Scale,
    *,
    B: int = 1,
    L: int = 64,
    H: int = 2,
    D: int = 8,
    K: int = 8,
    weight_scale: float = 0.02,
    constant: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Values:
    """Arguments of the inner loop with weights as a layer is initialised, or larger; a third of the tokens alike."""
    wide, F = torch.promote_types(dtype, torch.float32), 4 * D
    sizes = token_sizes(scale, B, L).unsqueeze(-1)
    values = {name: 0.1 * sizes * torch.randn(B, L, H, D, dtype=torch.float64) for name in "qkv"}
    if constant:
        for x in values.values():
            x[:, L // 3 : 2 * L // 3] = x[:, L // 3 : L // 3 + 1]
    values["inner_lr"] = torch.sigmoid(torch.randn(B, L, H, dtype=torch.float64)) / D
    values["token_scale"] = 1 / torch.arange(1, K + 1, dtype=torch.float64)
    shapes = {"W1": (H, D, D), "b1": (H, D)}
    if inner == "mlp":
        shapes = {"W1": (H, D, F), "b1": (H, F), "W2": (H, F, D), "b2": (H, D)}
    for name, shape in shapes.items():
        values[name] = weight_scale * torch.randn(shape, dtype=torch.float64) * name.startswith("W")
    values["ln_weight"] = torch.ones(H, D, dtype=torch.float64)
    values["ln_bias"] = torch.zeros(H, D, dtype=torch.float64)
    return {name: x.to(dtype if name in "qkv" else wide) for name, x in values.items()}


def operator_results(
    inner: str, inputs: Values, dtype: torch.dtype | None = None, state: TTTState | None = None, **options: Any
) -> Values:
    """Outputs, and gradients of a fixed combination of outputs and outgoing weights.

    Inputs named ``"state 0"`` and so on take the place of the weights of a given state.
    """
    leaves = {
        name: (x if dtype is None else x.to(dtype)).detach().clone().requires_grad_() for name, x in inputs.items()
    }
    if state is not None:
        weights = tuple(x for name, x in leaves.items() if name.startswith("state"))
        wide = weights[0].dtype
        pending = (x.to(wide) for x in (state.pending_k, state.pending_v, state.pending_lr))
        state = TTTState(weights, *pending, state.position)
    arguments = {name: x for name, x in leaves.items() if not name.startswith("state")}
    o, state = run_inner(inner, arguments, state=state, **options)
    generator = torch.Generator().manual_seed(1)
    outputs = (o, *state.weights)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    graded = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    return {"o": o.detach(), **graded}


def layer_results(
    layer: TTTLayer, x: Tensor, dtype: torch.dtype, backend: str, move: Callable[[Tensor], Tensor] | None = None
) -> Values:
    """Output, and gradients of the input and all parameters, which ``move`` may change before."""
    layer = copy.deepcopy(layer).to(dtype)
    layer.backend = backend
    x = x.to(dtype)
    if move is not None:
        x = move(x)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(move(p))
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    named = {"x": x, **dict(layer.named_parameters())}
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(y, list(named.values()), dy)
    return {"y": y.detach(), **dict(zip(named, found, strict=True))}


def distances(values: Values, exact: Values) -> dict[str, float]:
    """Norm of each error over the norm of what is exact."""
    found = {}
    for name, x in exact.items():
        error, size = (values[name].double() - x.double()).norm().item(), x.double().norm().item()
        found[name] = (error if error == error else float("inf")) / (size or 1.0)
    return found


def nudged(x: Tensor, generator: torch.Generator) -> Tensor:
    """X, each number moved by at most half a unit in its last place and rounded again."""
    move = HALF_ULP[x.dtype] * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)
    return (x.double() * (1 + move.to(x.device))).to(x.dtype)


def reference_errors(
    evaluate: Callable[[Callable[[Tensor], Tensor]], Values], exact: Values
) -> Iterator[dict[str, float]]:
    """The reference's errors: as given, then on moved inputs, again and again. ``evaluate(move)`` moves its inputs."""
    yield distances(evaluate(lambda x: x), exact)
    generator = torch.Generator().manual_seed(2)
    while True:
        yield distances(evaluate(lambda x: nudged(x, generator)), exact)


def excess(errors: dict[str, float], references: Iterator[dict[str, float]], draws: int = 40) -> dict[str, float]:
    """What exceeds twice the widest of the reference's errors, over as many draws as it takes, as a ratio to it."""
    widest = dict.fromkeys(errors, FLOOR)
    for _, reference in zip(range(draws), references, strict=False):
        widest = {name: max(widest[name], reference[name]) for name in errors}
        over = {name: error / widest[name] for name, error in errors.items() if error > 2 * widest[name]}
        if not over:
            break
    return over


def layer_row(
    inner: str, length: int, scale: Scale, backends: list[str], draws: int
) -> tuple[float, list[tuple[float, int]]]:
    """Of layers and inputs drawn anew: the reference's error; of each backend, the error and how many gradients exceed.

    An error is the median over the draws of the worst parameter's.
    """
    plain, found = list[float](), {backend: ([], []) for backend in backends}
    for seed in range(draws):
        torch.manual_seed(seed)
        layer = TTTLayer(32, 4, inner=inner, mini_batch_size=8)
        x = (token_sizes(scale, 1, length) * torch.randn(1, length, 32)).float()
        exact = layer_results(layer, x, torch.float64, "reference")
        evaluate = partial(layer_results, layer, x, torch.float32, "reference")
        plain.append(worst_parameter(distances(evaluate(), exact)))
        references = reference_errors(evaluate, exact)
        for backend, (worst, over) in found.items():
            errors = distances(layer_results(layer, x, torch.float32, backend), exact)
            worst.append(worst_parameter(errors))
            over += excess(errors, references)
    return statistics.median(plain), [(statistics.median(worst), len(over)) for worst, over in found.values()]


def worst_parameter(errors: dict[str, float]) -> float:
    """The largest error of a parameter's gradient."""
    return max(error for name, error in errors.items() if name not in ("x", "y"))


def main() -> None:
    """Print the errors of a layer as initialised, by length and by scale of the input."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--length", type=int, nargs="+", default=[64])
    parser.add_argument("--draws", type=int, default=9)
    parser.add_argument("--backend", nargs="+", default=["native", "eager"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"Relative errors in float32, medians of {given.draws} draws; in brackets how many gradients of all exceed.\n"
    )
    print("| inner model | L | scale of x | reference | " + " | ".join(given.backend) + " |")
    print("|---" * (4 + len(given.backend)) + "|")
    for length in given.length:
        for inner in ("linear", "mlp"):
            for scale in SCALES:
                plain, others = layer_row(inner, length, scale, given.backend, given.draws)
                cells = [f"{plain:.1e}", *(f"{error:.1e} ({over})" for error, over in others)]
                size = scale if isinstance(scale, str) else f"{scale:g}"
                print(f"| {inner} | {length:,} | {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
