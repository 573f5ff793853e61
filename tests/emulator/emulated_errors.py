"""How exact the compiled kernels are, as a table.

    bash scripts/test.sh --emulate sm_90 tests/emulator/emulated_errors.py

Errors are norms relative to float64's results, the largest over outputs and gradients; beside each stands that of the
same computation in PyTorch in the same dtype.
"""

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from tests.support import inner_loop_kernels as inner_loop
from tests.support import output as after
from tests.support import projection as before
from tests.support.checks import norm_errors
from tests.support.steps import step_arguments
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer, eager, kernels
from ttt4rec.arguments import TokenStep
from ttt4rec.operators import token_step

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
SHAPES = [  # inner model, B, L, H, D, K; the last ones not in float32, whose kernels take minutes to compile
    ("linear", 2, 20, 4, 16, 8),
    ("linear", 2, 100, 4, 16, 64),
    ("linear", 2, 40, 2, 64, 16),
    ("mlp", 2, 20, 4, 16, 8),
    ("linear", 1, 130, 2, 64, 64),
    ("mlp", 1, 20, 2, 64, 16),
]
Row = tuple[str, float, float]


def worst(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(norm_errors(actual, exact))


def inner_loops(dtype: torch.dtype) -> Iterator[Row]:
    for inner, *shape in SHAPES[: 4 if dtype == torch.float32 else None]:
        inputs = inner_loop.make_inputs(inner, *shape, dtype=dtype)
        gradients = inner_loop.make_gradients(inner, inputs)
        exact = inner_loop.run_definition(inner, inputs, gradients)
        plain = inner_loop.errors(inner_loop.run_definition(inner, inputs, gradients, dtype=dtype), exact)
        own = inner_loop.errors(inner_loop.run_kernels(inner, inputs, gradients), exact)
        yield f"{inner} D {shape[3]} K {shape[4]}", max(own.values()), max(plain.values())


def steps(dtype: torch.dtype) -> Iterator[Row]:
    for inner in ("linear", "mlp"):
        q, k, v, *rest = step_arguments(inner, torch.float32, D=16)
        given = TokenStep(*(x.to(dtype) for x in (q, k, v)), *rest)
        copies = [TokenStep(*(x.clone() if isinstance(x, Tensor) else x for x in given)) for _ in range(2)]
        doubles = TokenStep(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given))
        exact = token_step(doubles, "eager")
        own, plain = (token_step(c, b) for c, b in zip(copies, ("triton", "eager"), strict=True))
        yield f"{inner} step D 16", worst(own, exact), worst(plain, exact)


def around(dtype: torch.dtype) -> Iterator[Row]:
    inputs = before.make_inputs(2, 40, 4, 16, dtype)
    rope = before.make_rope(2, 40, 16, 8, "shared", torch.float32)
    exact = before.defined_results(inputs, rope, 2)
    results = (run(inputs, rope, 2, dtype) for run in (before.run_kernels, before.run_eager))
    yield "projection, width 64", *(worst(r, exact) for r in results)
    shape = (2, 40, 24, 4, 3, 2)
    own, exact = before.convolution_results(kernels, dtype, True, *shape)
    plain, _ = before.convolution_results(eager, dtype, True, *shape)
    yield "convolution, width 24", worst(own, exact), worst(plain, exact)
    given = after.make_inputs(2, 40, 4, 16, True, dtype=dtype)
    exact = after.defined_results(given)
    yield "output, width 64", *(worst(after.run(p, given), exact) for p in (kernels, eager))


def training_steps(dtype: torch.dtype) -> Iterator[Row]:
    """The gradients of all parameters of a new TTT4Rec; in half under autocast."""
    for inner, backbone in (("linear", "mamba"), ("mlp", "transformer")):
        torch.manual_seed(0)
        options = {"inner": inner, "backbone": backbone, "dropout": 0.0, "block_conv": backbone == "mamba"}
        model = TTT4Rec(TTT4RecConfig(num_items=30, width=32, num_heads=2, ffn_width=32, **options))
        ids, targets = torch.randint(1, 31, (2, 18)), torch.randint(1, 31, (36,))
        ids[1, :5] = 0
        results = []
        for backend, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
            own = copy.deepcopy(model).to(torch.float64 if kind == torch.float64 else torch.float32)
            for part in own.modules():
                if isinstance(part, TTTLayer):
                    part.backend = backend
            with torch.autocast("cpu", kind, enabled=kind in (torch.bfloat16, torch.float16)):
                h = own(ids).flatten(0, 1)
            loss = own.nll(h.to(own.embedding.weight.dtype), targets, "mean")
            gradients = torch.autograd.grad(loss, list(own.parameters()), allow_unused=True)
            results.append([gradient for gradient in gradients if gradient is not None])
        yield f"training step, {inner}, {backbone}", *(worst(r, results[2]) for r in results[:2])


@pytest.mark.parametrize("part", [inner_loops, steps, around, training_steps])
@pytest.mark.parametrize("dtype", DTYPES)
def test_errors(part, dtype, pytestconfig, capsys, record_property):
    """At most twice PyTorch's, but for what float32's rounding comes to."""
    architecture, wrong = pytestconfig.getoption("--emulate"), []
    for kernel, error, usual in part(DTYPES[dtype]):
        record_property(kernel, {"dtype": dtype, "error": error, "usual": usual})
        with capsys.disabled():
            print(f"\n| {kernel} | {dtype} | {architecture} | {error:.1e} | {usual:.1e} |", end="", flush=True)
        if not error <= 2 * max(usual, inner_loop.FP32_TOLERANCE):
            wrong.append(kernel)
    assert not wrong
