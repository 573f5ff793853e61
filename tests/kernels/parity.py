"""Errors of the inner-loop kernels against float64, as a table, on a GPU or interpreted.

python -m tests.kernels.parity
"""

import os

import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from tests.support import inner_loop_kernels as kernels
from tests.support.checks import INNERS

SHAPES = [(2, 26, 2, 16, 8), (1, 51, 2, 16, 16), (1, 51, 1, 32, 16), (1, 35, 1, 64, 16), (1, 19, 1, 128, 8)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def row(inner: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[str]:
    """The outputs' error and PyTorch's in the same dtype; the worst gradient's, its name, and PyTorch's for it."""
    inputs = kernels.make_inputs(inner, *shape, dtype=dtype)
    gradients = kernels.make_gradients(inner, inputs)
    exact = kernels.run_definition(inner, inputs, gradients)
    ours = kernels.errors(kernels.run_kernels(inner, inputs, gradients), exact)
    plain = kernels.errors(kernels.run_definition(inner, inputs, gradients, dtype=dtype), exact)
    worst = max((name for name in ours if name.startswith("d_")), key=lambda name: ours[name])
    return [f"{ours['o']:.1e} ({plain['o']:.1e})", worst, f"{ours[worst]:.1e} ({plain[worst]:.1e})"]


def main() -> None:
    """Print the table."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
    print(
        f"Norm of the error relative to the exact value's, on {where}; in brackets the reference in the same dtype.\n"
    )
    print("| inner model | D, K | dtype | outputs | worst gradient | its error |\n|---|---|---|---|---|---|")
    for inner in INNERS:
        for shape in SHAPES:
            for name, dtype in DTYPES.items():
                cells = [inner, f"{shape[3]}, {shape[4]}", name, *row(inner, shape, dtype)]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
