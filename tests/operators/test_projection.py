"""What surrounds the inner loop, views, rates and convolutions: the operators against plain PyTorch in float64."""

import copy
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.support.checks import BACKBONES, INNERS, assert_close, gradients, make_layer, norm_errors, relative_error
from tests.support.projection import (
    BASE_LR,
    DEVICE,
    convolution_results,
    defined_results,
    definition,
    make_inputs,
    make_rope,
    run_eager,
    run_kernels,
)
from ttt4rec import TTTLayer, eager, kernels
from ttt4rec.arguments import Projection
from ttt4rec.kernels import launch
from ttt4rec.layers.projection import Rope, causal_convolutions
from ttt4rec.models import blocks
from ttt4rec.models.blocks import Block
from ttt4rec.operators import projection

pytestmark = pytest.mark.usefixtures("poisoned_memory")
KERNEL_CHOICE = sys.modules["ttt4rec.kernels.projection"]  # the package has the function of that name
HALVES = [pytest.param(torch.bfloat16, marks=pytest.mark.compiled), torch.float16]
FP32_TOLERANCE = 2e-6
POSITIONS = ("shared", "per row")


def project(x: Tensor, *parameters: Tensor, rope: Rope, rotated: int) -> tuple[Tensor, ...]:
    """By the operator, on the path without a kernel."""
    *weights, w_lr, b_lr = parameters
    given = Projection(x, tuple(weights), w_lr, b_lr, *rope, rotated, BASE_LR, x.dtype)
    return projection(given, "eager")


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("rotated", [0, 2])
def test_the_eager_projection_is_its_definition(positions, rotated):
    rope = make_rope(2, 5, 4, 3, positions)
    x, *weights, w_lr, b_lr = (t.requires_grad_() for t in make_inputs(2, 5, 2, 4)[:6])
    results = project(x, *weights, w_lr, b_lr, rope=rope, rotated=rotated)
    for actual, expected in zip(results, definition(x, weights, w_lr, b_lr, rope, rotated), strict=True):
        assert_close(actual, expected, 1e-14)
    assert torch.autograd.gradcheck(partial(project, rope=rope, rotated=rotated), (x, *weights, w_lr, b_lr))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("lead", [0, 1, 3])
def test_the_eager_convolution_is_its_definition(positions, lead):
    offsets = torch.tensor([[0, 1, 0, 1, 2, 3]] * 2) if positions == "per row" else None
    rope = make_rope(2, 6, 4, 3, positions)
    make = [(2, lead + 6, 8), (8, 4), (8, 4), (8,), (8,)]
    x, *parameters = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in make)
    for with_rope in (rope, None):

        def function(x, *p, rope=with_rope, backend="auto"):
            return tuple(causal_convolutions(x, p[:2], p[2:], rope, offsets, lead, backend))

        expected = function(x, *parameters, backend="reference")
        for actual, y in zip(function(x, *parameters), expected, strict=True):
            assert_close(actual, y, 1e-14)
        assert torch.autograd.gradcheck(function, (x, *parameters))


def test_a_convolution_longer_than_the_sequence():
    x, w, b = torch.randn(2, 2, 4), torch.randn(4, 5), torch.randn(4)
    results = (causal_convolutions(x, [w], [b], None, None, 0, backend) for backend in ("auto", "reference"))
    (actual,), (expected,) = results
    assert_close(actual, expected, 1e-6)


CONVOLUTIONS = [  # B, L, C, taps, lead, how many
    (2, 21, 18, 4, 0, 2),  # features padded to 32
    (2, 90, 78, 4, 0, 2),  # a last chunk of 14 features, and more than one block of tokens
    (3, 5, 18, 4, 3, 2),
    (3, 1, 18, 4, 3, 2),  # a step
    (2, 3, 6, 5, 1, 1),  # more taps than tokens
    (2, 0, 6, 4, 3, 2),  # no token
]


@pytest.mark.parametrize("with_rope", [True, False])
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_convolution_kernels_match_definition(shape, with_rope):
    actual, exact = convolution_results(kernels, torch.float32, with_rope, *shape)
    assert [a.shape for a in actual] == [e.shape for e in exact]
    assert max(norm_errors(actual, exact)) <= FP32_TOLERANCE
    again, _ = convolution_results(kernels, torch.float32, with_rope, *shape)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def test_a_block_with_a_convolution_on_the_kernels(monkeypatch):
    block, h = (
        Block(8, TTTLayer(8, 2, mini_batch_size=4), conv_kernel=4).to(DEVICE),
        torch.randn(2, 9, 8, device=DEVICE),
    )
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setattr(blocks, "choose_backend", lambda *_, backend=backend: backend)
        y = block(h.requires_grad_())
        results.append([y, *gradients([y], [h, block.conv.weight, block.conv.bias])])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, FP32_TOLERANCE)


@pytest.mark.parametrize("dtype", HALVES)
def test_convolution_kernels_in_low_precision_are_no_worse_than_torch(dtype):
    shape = (2, 40, 24, 4, 3, 2)
    actual, exact = convolution_results(kernels, dtype, True, *shape)
    plain, _ = convolution_results(eager, dtype, True, *shape)
    assert [a.dtype for a in actual] == [p.dtype for p in plain] == [dtype] * len(plain)
    assert max(norm_errors(actual, exact)) <= 2 * max(norm_errors(plain, exact)) + torch.finfo(dtype).eps


def test_an_output_nobody_uses_has_no_gradient():
    rope = make_rope(2, 5, 4, 3, "shared")
    x, *weights, w_lr, b_lr = (t.requires_grad_() for t in make_inputs(2, 5, 2, 4)[:6])
    *views, _ = project(x, *weights, w_lr, b_lr, rope=rope, rotated=2)
    dx, *d_weights = torch.autograd.grad(views[2].sum(), [x, *weights])
    assert_close(dx, weights[2].sum(0).expand_as(x))
    assert all((d == 0).all() for d in d_weights[:2])


SHAPES = [  # B, L, H, D, rotated
    (2, 21, 4, 16, 2),
    (2, 21, 3, 6, 2),  # width 18, padded to 32
    (1, 70, 2, 24, 0),
    (1, 1, 2, 8, 2),  # a single token
    (1, 70, 4, 24, 2),
    (1, 35, 5, 26, 2),  # a last chunk of 2 features
]
FUSED = {"everything": 1 << 31, "nothing": 0}


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize(("B", "L", "H", "D", "rotated"), SHAPES)
def test_kernels_match_definition(B, L, H, D, rotated, fused, monkeypatch):
    choose_kernels(monkeypatch, FUSED[fused])
    inputs, rope = make_inputs(B, L, H, D, torch.float32), make_rope(B, L, D, 8, "per row", torch.float32)
    actual = run_kernels(inputs, rope, rotated, torch.float32)
    worst = max(norm_errors(actual, defined_results(inputs, rope, rotated)))
    assert worst <= FP32_TOLERANCE


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("input_dtype", ["same", torch.float32])  # float32 as under autocast
@pytest.mark.parametrize("dtype", HALVES)
def test_kernels_in_low_precision_are_no_worse_than_torch(dtype, input_dtype, fused, monkeypatch):
    choose_kernels(monkeypatch, FUSED[fused])
    inputs = make_inputs(2, 40, 4, 16, dtype if input_dtype == "same" else input_dtype)
    rope = make_rope(2, 40, 16, 8, "shared", torch.float32)
    exact = defined_results(inputs, rope, 2)
    actual, eager_results = (run(inputs, rope, 2, dtype) for run in (run_kernels, run_eager))
    assert [a.dtype for a in actual] == [e.dtype for e in eager_results]
    errors, eager_errors = norm_errors(actual, exact), norm_errors(eager_results, exact)
    rounding = 2 * torch.finfo(dtype).eps  # the interpreter truncates; logits' gradients are rounded
    wrong = [(e, r) for e, r in zip(errors, eager_errors, strict=True) if not e <= 2 * r + rounding]
    assert not wrong
    assert errors[3] <= FP32_TOLERANCE  # rates are exact


@pytest.mark.parametrize("fused", FUSED)
def test_kernels_give_the_same_bits_twice_whatever_the_strides(fused, monkeypatch):
    choose_kernels(monkeypatch, FUSED[fused])
    inputs, rope = make_inputs(2, 40, 2, 16, torch.float32), make_rope(2, 40, 16, 8, "per row", torch.float32)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    first, second = (run_kernels(i, rope, 2, torch.float32) for i in (inputs, strided))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, HALVES[0]])  # compiled, float32's backward is not fused
def test_more_blocks_than_partial_sums(dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["ttt4rec.kernels.projection_backward"], "PARTIAL_SUMS", 2)
    choose_kernels(monkeypatch, 1 << 31)
    inputs, rope = make_inputs(2, 100, 2, 16, dtype), make_rope(2, 100, 16, 8, "shared", torch.float32)
    exact = defined_results(inputs, rope, 2)
    errors, usual = (norm_errors(run(inputs, rope, 2, dtype), exact) for run in (run_kernels, run_eager))
    rounding = FP32_TOLERANCE if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert max(errors) <= 2 * max(usual) + rounding


def test_kernels_refuse_float64():
    with pytest.raises(ValueError, match="float64"):
        convolution_results(kernels, torch.float64, False, 1, 2, 6, 4, 0, 1)
    inputs, rope = make_inputs(1, 2, 1, 4), make_rope(1, 2, 4, 2, "shared")
    with pytest.raises(ValueError, match="float64"):
        run_kernels(inputs, rope, 2, torch.float64)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_autocast_gives_what_the_plain_path_gives(inner, backbone):
    """Gradients too, to bfloat16's precision; parameters keep float32 gradients."""
    torch.manual_seed(2)
    layer = make_layer(inner, backbone).float()
    x = torch.randn(2, 10, 8).requires_grad_()
    results = []
    for backend in ("auto", "reference"):
        layer.backend = backend
        with torch.autocast("cpu", torch.bfloat16):
            y, state = layer(x, return_state=True)
        assert state.pending_lr.dtype == torch.float32
        grads = gradients([y], [x, *layer.parameters()])
        assert all(g.dtype == torch.float32 for g in grads)
        results.append((y, *grads))
    exact = layer.double()
    x64 = x.detach().double().requires_grad_()
    y = exact(x64)
    expected = [y, *gradients([y], [x64, *exact.parameters()])]
    for ours, plain, e in zip(*results, expected, strict=True):
        bound = 3 * relative_error(plain, e) + 4 * torch.finfo(torch.bfloat16).eps
        assert relative_error(ours, e) <= bound


def test_a_layer_of_another_dtype_than_its_input_is_named():
    with pytest.raises(TypeError, match=r"x must have the parameters' dtype torch.float32; given torch.bfloat16"):
        TTTLayer(8, 2)(torch.zeros(1, 3, 8, dtype=torch.bfloat16))


def choose_kernels(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Fuse up to this width, with the blocks of the narrowest table entry for all.

    Compiled, what is wider than the launch code fuses would not fit: then everything is what it fuses itself.
    """
    if width and not launch.interpreted():
        return
    for name in ("FUSED_WIDTH", "FUSED_WIDTH_SINGLE"):
        monkeypatch.setattr(KERNEL_CHOICE, name, {"forward": width, "backward": width})
    table = {op: {1 << 31: next(iter(entry.values()))} for op, entry in KERNEL_CHOICE.TABLE.items()}
    rows, _, blocks = table["fused_backward"][1 << 31]
    table["fused_backward"] = {1 << 31: (rows, 1 << 10, blocks)}  # all features at a time
    monkeypatch.setattr(KERNEL_CHOICE, "TABLE", table)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, as fine-tuning libraries put one in its place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


@pytest.mark.parametrize("backbone", ["transformer", "mamba"])
def test_a_replaced_projection_is_called(backbone: str) -> None:
    torch.manual_seed(0)
    layer = TTTLayer(16, 2, backbone=backbone, mini_batch_size=4)
    x = torch.randn(2, 9, 16)
    merged = copy.deepcopy(layer)
    layer.query = Adapted(layer.query)
    with torch.no_grad():
        merged.query.weight += layer.query.up.weight @ layer.query.down.weight
    y = layer(x)
    torch.testing.assert_close(y, merged(x), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert layer.query.down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backbone", ["transformer", "mamba"])
def test_hooks_of_a_projection_fire(backbone: str) -> None:
    layer = TTTLayer(16, 2, backbone=backbone, mini_batch_size=4)
    x = torch.randn(2, 9, 16)
    plain = layer(x)
    seen = []
    hook = layer.query.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1
    hook.remove()
    hook = layer.query.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not torch.allclose(layer(x), plain)
    hook.remove()
    x.requires_grad_()
    for name in ("forward_pre", "full_backward", "full_backward_pre"):
        seen.clear()
        hook = getattr(layer.query, f"register_{name}_hook")(lambda *given: seen.append(given))
        layer(x).sum().backward()
        assert len(seen) == 1, name
        hook.remove()


@pytest.mark.parametrize("backbone", ["transformer", "mamba"])
@pytest.mark.parametrize("name", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_hooks_of_all_modules_see_every_projection(backbone: str, name: str) -> None:
    """And the norm and the output projection."""
    layer, x = TTTLayer(16, 2, mini_batch_size=4, backbone=backbone), torch.randn(2, 9, 16, requires_grad=True)
    plain, seen = layer(x), set()
    hook = getattr(nn.modules.module, f"register_module_{name}_hook")(lambda module, *given: seen.add(module))
    try:
        y = layer(x)
        y.sum().backward()
    finally:
        hook.remove()
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-6)
    called = {module for module in layer.modules() if isinstance(module, nn.Linear | nn.LayerNorm)}
    assert called <= seen
    assert torch.equal(layer(x), plain)


def test_a_projection_whose_forward_was_replaced_is_called() -> None:
    """As accelerate puts its hooks, which fetch weights from elsewhere."""
    layer, x = TTTLayer(16, 2, mini_batch_size=4), torch.randn(2, 9, 16)
    plain, seen, original = layer(x), [], layer.query.forward
    layer.query.forward = lambda x: seen.append(x) or original(x)
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1


class Stored(torch.Tensor):
    """A weight that is no plain matrix, as quantised ones are: the products alone know how to read it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not nn.functional.linear:
            raise NotImplementedError(str(function))
        return function(*(x.as_subclass(torch.Tensor) if isinstance(x, Stored) else x for x in args))


def test_a_weight_of_another_kind_is_left_to_its_module() -> None:
    layer, x = TTTLayer(16, 2, mini_batch_size=4), torch.randn(2, 9, 16)
    plain = layer(x)
    layer.query._parameters["weight"] = layer.query.weight.detach().as_subclass(Stored)
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
