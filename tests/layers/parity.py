"""Errors of whole layers against float64 by gate and backend, as a table; kernels on a GPU or interpreted.

python -m tests.layers.parity
"""

import copy
import os

import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from tests.support.checks import INNERS, make_layer, relative_error
from ttt4rec import TTTLayer
from ttt4rec.layers.forgetting import GATES

BACKENDS = ("reference", "eager", "native", "triton")
BATCH, LENGTH, WIDTH, HEADS, K = 2, 44, 64, 4, 8
PARTS = {
    "output": lambda name: name == "y",
    "state": lambda name: name.startswith("state"),
    "d_x": lambda name: name == "d_x",
    "of gates": lambda name: "forget" in name,
    "of initial weights": lambda name: name in ("d_W1", "d_b1", "d_W2", "d_b2"),
}
"""Columns: which of the results each has the worst of."""


def results(layer: TTTLayer, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, the weights of the state behind it, and the gradients of ``(y · dy)`` by name."""
    x = x.clone().requires_grad_()
    y, state = layer(x, return_state=True)
    named = dict(layer.named_parameters())
    gradients = torch.autograd.grad((y * dy).sum(), (x, *named.values()))
    names = ("d_x", *(f"d_{name}" for name in named))
    weights = {f"state {i}": w for i, w in enumerate(state.weights)}
    return {"y": y, **weights, **dict(zip(names, gradients, strict=True))}


def row(layer: TTTLayer, exact: dict[str, torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> list[str]:
    """The worst error of each part; a gate that a layer has not has none."""
    found = results(layer, x, dy)
    cells = []
    for belongs in PARTS.values():
        errors = [relative_error(found[name], exact[name]) for name in exact if belongs(name)]
        cells.append(f"{max(errors):.1e}" if errors else "")
    return cells


def main() -> None:
    """Print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"
    print(f"Norm of the error in float32 relative to float64's reference; kernels on {where}.\n")
    print(f"| inner model | gate | backend | {' | '.join(PARTS)} |\n|{'---|' * (3 + len(PARTS))}")
    for inner in INNERS:
        for gate in GATES:
            torch.manual_seed(0)
            layer = make_layer(inner, "mamba", width=WIDTH, num_heads=HEADS, mini_batch_size=K, forget=gate)
            layer = layer.to(device).float()  # the numbers that all compute with
            x, dy = (torch.randn(BATCH, LENGTH, WIDTH, device=device) for _ in range(2))
            layer.backend = "reference"
            exact = results(copy.deepcopy(layer).double(), x.double(), dy.double())
            for backend in BACKENDS:
                layer.backend = backend
                cells = row(layer, exact, x, dy)
                print(f"| {inner} | {gate} | {backend} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
