"""How exact the compiled kernels are: every entry of the launch tables is executed and held to float64's results.

    bash scripts/test.sh --emulate sm_90 tests/emulator/emulated_errors.py

Errors are norms relative to float64's results, the largest over outputs and gradients; beside each stands that of the
same computation in PyTorch in the same dtype. Without ``--emulate`` they are the interpreter's.
"""

import copy
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.support import inner_loop_kernels as inner_loop
from tests.support import output as after
from tests.support import projection as before
from tests.support.checks import INNERS, gradients, make_layer, norm_errors
from tests.support.steps import step_arguments
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer, eager, kernels
from ttt4rec.arguments import TokenStep
from ttt4rec.kernels import launch, limits
from ttt4rec.kernels.step import KERNELS
from ttt4rec.operators import token_step

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEAD_DIMS = (16, 32, 64, 128)
Hold = Callable[..., None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What the tables have for this architecture."""
    if metafunc.function is test_inner_loop:
        architecture = launch.nearest(metafunc.config.getoption("--emulate") or "interpreter")
        metafunc.parametrize(("inner", "D", "K", "dtype"), entries(architecture))


def entries(architecture: str) -> list[tuple[str, int, int, str]]:
    """The inner loops' sizes: the longest mini-batch of every entry of either direction, and those that just fit."""
    found = []
    for dtype, kind in DTYPES.items():
        for inner in INNERS:
            ways = [f"{inner}_{way}" for way in ("forward", "backward")]
            for D in HEAD_DIMS:
                tables = [
                    table
                    for op in ways
                    for table in (launch.choices(op, D, kind, architecture), limits.needed(op, D, kind))
                ]
                sizes = sorted({K for table in tables for K in table})
                found += [
                    (inner, D, K, dtype)
                    for K in sizes
                    if all(limits.scan_refusal(op, D, K, kind) is None for op in ways)
                ]
    return found


@pytest.fixture
def hold(pytestconfig, capsys, record_property) -> Hold:
    """Every result is at most twice as wrong as PyTorch's, or as a rounding that is of another place there.

    The interpreter cuts bfloat16 off where others round, which errs twice as much.
    """
    run = pytestconfig.getoption("--emulate") or "interpreter"
    most = 4 if run == "interpreter" else 2

    def compare(name, dtype, own, plain, exact, rounding=inner_loop.FP32_TOLERANCE):
        errors, usual = norm_errors(own, exact), norm_errors(plain, exact)
        record_property(name, {"dtype": dtype, "error": max(errors), "usual": max(usual)})
        with capsys.disabled():
            print(f"\n| {name} | {dtype} | {run} | {max(errors):.1e} | {max(usual):.1e} | ", end="", flush=True)
        wrong = [(e, u) for e, u in zip(errors, usual, strict=True) if not e <= most * max(u, rounding)]
        assert not wrong, f"errors and those of torch: {wrong}"

    return compare


def test_inner_loop(inner, D, K, dtype, hold):
    """Two mini-batches and a short one, at once and as a stream that goes on.

    float16, which has bfloat16's entries, goes over packed sequences instead.
    """
    kind, ops = DTYPES[dtype], (f"{inner}_forward", f"{inner}_backward")
    heads = max(launch.blocks(op, D, K, kind, launch.architecture(), 4).heads for op in ops)
    lengths = [2 * K + K // 2 + 1] if dtype != "float16" else [K // 2 + 1, 0, 2 * K + K // 4 + 1]
    inputs = inner_loop.make_inputs(inner, 1, sum(lengths), max(2, 2 * heads - 1), D, K, N=len(lengths), dtype=kind)
    each = torch.tensor(lengths)
    spans = (each.cumsum(0) - each, each) if dtype == "float16" else (None, None)
    cotangents = inner_loop.make_gradients(inner, inputs)
    results = inner_loop.run_kernels(inner, inputs, cotangents, spans)
    exact, plain = (inner_loop.run_definition(inner, inputs, cotangents, spans, d) for d in (torch.float64, kind))
    if len(lengths) == 1:
        results["stream"], plain["stream"], exact["stream"] = in_two_calls(inner, inputs, K), plain["o"], exact["o"]
    hold(f"{inner} D {D} K {K}", dtype, *([found[name] for name in exact] for found in (results, plain, exact)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", INNERS)
def test_forgetting(inner, dtype, hold):
    """A layer that forgets, at the size that is its default."""
    kind = DTYPES[dtype]
    inputs = inner_loop.with_decays(inner, inner_loop.make_inputs(inner, 1, 21, 3, 16, 8, dtype=kind))
    cotangents = inner_loop.make_gradients(inner, inputs)
    results = inner_loop.run_kernels(inner, inputs, cotangents)
    exact, plain = (inner_loop.run_definition(inner, inputs, cotangents, dtype=d) for d in (torch.float64, kind))
    found = ([values[name] for name in exact] for values in (results, plain, exact))
    hold(f"{inner} forgetting D 16 K 8", dtype, *found)


def in_two_calls(inner: str, inputs: inner_loop.Inputs, cut: int) -> Tensor:
    """Outputs of a stream whose second call goes on from the weights of the first."""
    outputs, weights = [], {}
    for part in (slice(0, cut), slice(cut, None)):
        tokens = {name: inputs[name][:, part] for name in ("q", "k", "v", "inner_lr")}
        o, *rest = inner_loop.run_forward(inner, inner_loop.make_scan(inner, inputs | tokens | weights))
        weights = dict(zip(inner_loop.WEIGHTS[inner], rest, strict=False))
        outputs.append(o)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("inner", KERNELS)
def test_step(inner, D, dtype, hold):
    q, k, v, *rest = step_arguments(inner, torch.float32, D=D)
    given = TokenStep(*(x.to(DTYPES[dtype]) for x in (q, k, v)), *rest)
    copies = [TokenStep(*(x.clone() if isinstance(x, Tensor) else x for x in given)) for _ in range(2)]
    doubles = TokenStep(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given))
    exact = token_step(doubles, "eager")
    hold(
        f"{inner} step D {D}",
        dtype,
        *(token_step(c, b) for c, b in zip(copies, ("triton", "eager"), strict=True)),
        exact,
    )


def widths(package: str) -> list[int]:
    """Of every entry of a table of fused kernels, and one beyond."""
    fused = sys.modules[f"ttt4rec.kernels.{package}"].TABLE["fused_forward"]
    return [*fused, max(fused) + 64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", widths("projection"))
def test_projection(width, dtype, hold):
    inputs = before.make_inputs(2, 40, 4, width // 4, DTYPES[dtype])
    rope = before.make_rope(2, 40, width // 4, 8, "shared", torch.float32)
    results = (run(inputs, rope, 2, DTYPES[dtype]) for run in (before.run_kernels, before.run_eager))
    exact, rounding = before.defined_results(inputs, rope, 2), torch.finfo(DTYPES[dtype]).eps  # of the rates' gradients
    hold(f"projection, width {width}", dtype, *results, exact, rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", widths("output"))
def test_output(width, dtype, hold):
    given = after.make_inputs(2, 40, 4, width // 4, True, dtype=DTYPES[dtype])
    hold(
        f"output, width {width}", dtype, *(after.run(p, given) for p in (kernels, eager)), after.defined_results(given)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 78])
def test_convolution(width, dtype, hold):
    shape = (2, 40, width, 4, 3, 2)
    own, exact = before.convolution_results(kernels, DTYPES[dtype], True, *shape)
    plain, _ = before.convolution_results(eager, DTYPES[dtype], True, *shape)
    hold(f"convolution, width {width}", dtype, own, plain, exact)


def in_three_ways(
    module: torch.nn.Module, dtype: torch.dtype, results: Callable[..., list[Tensor]]
) -> list[list[Tensor]]:
    """On the kernels and in PyTorch in a dtype, halves under autocast, and in float64."""
    found = []
    for backend, kind in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        own = copy.deepcopy(module).to(torch.float64 if kind == torch.float64 else torch.float32)
        for part in own.modules():
            if isinstance(part, TTTLayer):
                part.backend = backend
        with torch.autocast("cpu", kind, enabled=kind in (torch.bfloat16, torch.float16)):
            found.append(results(own))
    return found


def affine(module: torch.nn.Module, found: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients of all parameters, those of the rates as of one map: alone, its bias' is a sum that cancels."""
    named = {name: x for (name, _), x in zip(module.named_parameters(), found, strict=True) if x is not None}
    for name in [name for name in named if name.endswith("inner_lr_bias")]:
        weight = name.replace("bias", "weight")
        named[weight] = torch.cat((named[weight], named.pop(name)[:, None]), 1)
    return list(named.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "backbone"), [("linear", "mamba"), ("mlp", "transformer")])
def test_training_step_of_a_model(inner, backbone, dtype, hold):
    """The gradients of all parameters, which are not a new model's: there those of the scales nearly cancel."""
    options = {"inner": inner, "backbone": backbone, "dropout": 0.0, "block_conv": backbone == "mamba"}
    model = TTT4Rec(TTT4RecConfig(num_items=30, width=32, num_heads=2, ffn_width=32, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids, targets = torch.randint(1, 31, (2, 18)), torch.randint(1, 31, (36,))
    ids[1, :5] = 0

    def train(own: TTT4Rec) -> list[Tensor]:
        h = own(ids).flatten(0, 1)
        with torch.autocast("cpu", enabled=False):
            loss = own.nll(h.to(own.embedding.weight.dtype), targets, "mean")
            return affine(own, torch.autograd.grad(loss, list(own.parameters()), allow_unused=True))

    hold(f"training step of TTT4Rec, {inner}, {backbone}", dtype, *in_three_ways(model, DTYPES[dtype], train))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "backbone"), [("linear", "transformer"), ("mlp", "mamba")])
def test_training_step_of_a_layer(inner, backbone, dtype, hold):
    """Outputs, and the gradients of the inputs and all parameters, of packed sequences."""
    layer = make_layer(inner, backbone, width=32, mini_batch_size=8)
    x, bounds = torch.randn(1, 40, 32, dtype=torch.float64), torch.tensor([0, 5, 21, 40])

    def train(own: TTTLayer) -> list[Tensor]:
        leaf = x.to(own.output.weight.dtype).requires_grad_()
        y = own(leaf, cu_seqlens=bounds)
        with torch.autocast("cpu", enabled=False):
            d_x, *others = gradients([y], [leaf, *own.parameters()])
        return [y, d_x, *affine(own, others)]

    hold(f"training step of TTTLayer, {inner}, {backbone}", dtype, *in_three_ways(layer, DTYPES[dtype], train))
