"""Norm, gate and output projection behind the inner loop: the operator against plain PyTorch in float64."""

import sys

import pytest
import torch
from torch import nn

from tests.support.checks import BACKBONES, INNERS, assert_close, gradients, make_layer, norm_errors
from tests.support.output import DEVICE, EPS, defined_results, make_inputs, run
from ttt4rec import TTTLayer, eager, kernels
from ttt4rec.arguments import Output
from ttt4rec.kernels import launch
from ttt4rec.operators import output

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KERNEL_CHOICE = sys.modules["ttt4rec.kernels.output"]  # the package has the function of that name
HALVES = [pytest.param(torch.bfloat16, marks=pytest.mark.compiled), torch.float16]
FP32_TOLERANCE = 2e-6  # some roundings of 1e-7, in norm
GATED = (True, False)
FUSED = {"everything": 1 << 31, "nothing": 0}
SHAPES = [  # B, L, H, D
    (2, 21, 4, 16),
    (2, 21, 3, 6),  # width 18, padded to 32
    (1, 1, 2, 8),  # a single token
    (1, 70, 5, 26),  # width 130: a last chunk of 2 output features
    (3, 0, 2, 8),  # no token
]


def choose_kernels(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Fuse up to this width, with the blocks of the narrowest table entry for all.

    Compiled, what is wider than the launch code fuses would not fit: then everything is what it fuses itself.
    """
    if width and not launch.interpreted():
        return
    for name in ("FUSED_WIDTH", "FUSED_WIDTH_SINGLE"):
        monkeypatch.setattr(KERNEL_CHOICE, name, {"forward": width, "backward": width})
    monkeypatch.setattr(KERNEL_CHOICE, "FUSED_WIDTH_BY_ARCHITECTURE", {})
    table = {op: {1 << 31: next(iter(entry.values()))} for op, entry in KERNEL_CHOICE.TABLE.items()}
    monkeypatch.setattr(KERNEL_CHOICE, "TABLE", table)


@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("masked", [True, False])
def test_the_eager_output_is_its_definition(masked, gated):
    inputs = make_inputs(2, 5, 2, 4, gated, masked)
    for actual, expected in zip(run(eager, inputs), defined_results(inputs), strict=True):
        assert_close(actual, expected, 1e-13)
    *arguments, _ = inputs
    arguments = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in arguments]
    assert torch.autograd.gradcheck(lambda *given: output(Output(*given, EPS), "eager"), arguments)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("gated", GATED)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_match_definition(shape, gated, fused, monkeypatch):
    choose_kernels(monkeypatch, FUSED[fused])
    inputs = make_inputs(*shape, gated, dtype=torch.float32)
    actual = run(kernels, inputs)
    assert max(norm_errors(actual, defined_results(inputs))) <= FP32_TOLERANCE
    assert not actual[0][~inputs[2]].any()


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_in_low_precision_are_no_worse_than_torch(dtype, fused, monkeypatch):
    choose_kernels(monkeypatch, FUSED[fused])
    inputs = make_inputs(2, 40, 4, 16, True, dtype=dtype)
    inputs[3:5] = [x.float() for x in inputs[3:5]]  # parameters as under autocast
    exact = defined_results(inputs)
    actual, eager_results = run(kernels, inputs), run(eager, inputs)
    assert [a.dtype for a in actual] == [e.dtype for e in eager_results]
    errors, eager_errors = norm_errors(actual, exact), norm_errors(eager_results, exact)
    rounding = 2 * torch.finfo(dtype).eps  # the interpreter truncates
    wrong = [(e, r) for e, r in zip(errors, eager_errors, strict=True) if not e <= 2 * r + rounding]
    assert not wrong


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("path", [eager, kernels])
def test_what_padding_holds_stays_out(path, fused, monkeypatch):
    choose_kernels(monkeypatch, FUSED[fused])
    inputs = make_inputs(2, 9, 2, 8, True, dtype=torch.float32)
    clean = run(path, inputs)
    inputs[-1] = inputs[-1].masked_fill(~inputs[2].unsqueeze(-1), float("nan"))
    dirty = run(path, inputs)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("fused", FUSED)
def test_kernels_give_the_same_bits_twice_whatever_the_strides(fused, monkeypatch):
    choose_kernels(monkeypatch, FUSED[fused])
    inputs = make_inputs(2, 40, 2, 16, True, dtype=torch.float32)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    first, second = run(kernels, inputs), run(kernels, strided)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("fused", FUSED)
def test_more_blocks_than_partial_sums(fused, monkeypatch):
    choose_kernels(monkeypatch, FUSED[fused])
    monkeypatch.setattr(KERNEL_CHOICE, "PARTIAL_SUMS", dict.fromkeys(KERNEL_CHOICE.PARTIAL_SUMS, 2))
    inputs = make_inputs(2, 150, 2, 16, True, dtype=torch.float32)
    assert max(norm_errors(run(kernels, inputs), defined_results(inputs))) <= FP32_TOLERANCE


def test_kernels_refuse_float64():
    with pytest.raises(ValueError, match="float64"):
        run(kernels, make_inputs(1, 2, 1, 4, True))


def as_rows(layer, x):
    """Outputs of two rows, the second padded in front."""
    mask = torch.tensor([[True] * x.shape[1], [False] * 4 + [True] * (x.shape[1] - 4)], device=x.device)
    return [layer(x, mask=mask)]


def as_packed(layer, x):
    """Outputs of three sequences in one row."""
    cu_seqlens = torch.tensor([0, 5, 6, 2 * x.shape[1]], device=x.device)
    return [layer(x.flatten(0, 1)[None], cu_seqlens=cu_seqlens)]


def as_streams(layer, x):
    """Outputs of two calls one after the other."""
    first, state = layer(x[:, :6], return_state=True)
    return [first, layer(x[:, 6:], state=state)]


LAYERS = [
    pytest.param(inner, backbone, call, marks=pytest.mark.slow if slow else ())
    for inner in INNERS
    for backbone in BACKBONES
    for call in (as_rows, as_packed, as_streams)
    for slow in [inner == "mlp"]
]


@pytest.mark.parametrize(("inner", "backbone", "call"), LAYERS)
def test_a_layer_on_the_kernels(inner, backbone, call):
    """All of it, projections and convolutions too, in float32 beside the reference in float64."""
    layer = make_layer(inner, backbone, width=32).float().to(DEVICE)
    x, results = torch.randn(2, 11, 32, device=DEVICE), []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        layer.backend = backend
        leaf = x.to(dtype).requires_grad_()
        outputs = call(layer.to(dtype), leaf)
        results.append([*outputs, *gradients(outputs, [leaf, *layer.parameters()])])
    ours, plain, exact = results
    assert max(norm_errors(ours, exact)) <= 3 * max(norm_errors(plain, exact))


def test_a_layer_calls_modules_that_something_was_done_to():
    layer, x = TTTLayer(16, 2, mini_batch_size=4), torch.randn(2, 9, 16)
    y, seen = layer(x), []
    hook = layer.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_close(layer(x), y, 1e-5)
    assert len(seen) == 1
    hook.remove()
    layer.output = nn.Sequential(layer.output, nn.Linear(16, 16))
    assert_close(layer(x), layer.output[1](y), 1e-5)
    layer.norm = nn.Identity()
    assert layer(x).isfinite().all()
    narrow = TTTLayer(16, 2, mini_batch_size=4)
    narrow.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert narrow(x).dtype == torch.bfloat16
    assert seen[-1] == torch.float32  # of its weight
