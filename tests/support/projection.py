"""What comes before the inner loop: inputs, the definitions in float64, and backends' results."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt4rec import eager, kernels, reference
from ttt4rec.arguments import Convolution, Projection
from ttt4rec.layers.projection import Rope, causal_convolutions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE_LR = 1.3


def make_rope(B: int, L: int, D: int, K: int, positions: str, dtype: torch.dtype = torch.float64) -> Rope:
    table = reference.rotation(torch.arange(K, device=DEVICE), D, 100.0, dtype)
    shared = torch.arange(L, device=DEVICE) % K
    return Rope(*table, shared if positions == "shared" else torch.randint(0, K, (B, L), device=DEVICE))


def make_inputs(B: int, L: int, H: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, three weights, w_lr, b_lr, and gradients of the three views and the rates."""
    C = H * D
    shapes = [(B, L, C), *[(C, C)] * 3, (H, C), (H,), *[(B, L, H, D)] * 3]
    tensors = [(torch.randn(shape) / (C**0.5 if len(shape) == 2 else 1)).to(DEVICE, dtype) for shape in shapes]
    return [*tensors, torch.randn(B, L, H).to(DEVICE, torch.promote_types(dtype, torch.float32))]


def definition(
    x: Tensor, weights: Sequence[Tensor], w_lr: Tensor, b_lr: Tensor, rope: Rope, rotated: int
) -> list[Tensor]:
    """Views and rates as the mathematics has them."""
    angles = rope.cos[rope.positions], rope.sin[rope.positions]
    views = [(x @ w.t()).unflatten(-1, (w_lr.shape[0], -1)) for w in weights]
    views[:rotated] = [reference.rotate(view, *angles) for view in views[:rotated]]
    return [*views, reference.inner_learning_rate(x, w_lr, b_lr, BASE_LR, 2 * rope.cos.shape[1])]


def defined_results(inputs: Sequence[Tensor], rope: Rope, rotated: int) -> list[Tensor]:
    """Views, rates and the gradients of x, the weights, w_lr and b_lr, in float64."""
    x, W0, W1, W2, w_lr, b_lr, *grads = (t.double() for t in inputs)
    leaves = [t.requires_grad_() for t in (x, W0, W1, W2, w_lr, b_lr)]
    rope = Rope(rope.cos.double(), rope.sin.double(), rope.positions)
    results = definition(x, [W0, W1, W2], w_lr, b_lr, rope, rotated)
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, grads)]


def convolution_results(path, dtype, with_rope, B, L, C, taps, lead, count):
    """Outputs and all gradients of ``path``, and of the definition in float64, of the same numbers."""
    torch.manual_seed(0)
    shapes = [(B, lead + L, C), *[(C, taps)] * count, *[(C,)] * count, *[(B, L, C)] * count]
    tensors = [torch.randn(s).to(DEVICE, dtype) for s in shapes]
    x, weights, biases, grads = tensors[0], tensors[1 : count + 1], tensors[count + 1 : -count], tensors[-count:]
    rope = make_rope(B, L, C // 3, 5, "per row", torch.float32) if with_rope else None
    offsets = torch.arange(L, device=DEVICE).remainder(7).expand(B, L) if with_rope else None  # sequences of 7
    given = Convolution(x, tuple(weights), tuple(biases), *(rope or (None, None, None)), offsets, lead)
    actual = [*path.convolution(given), *path.convolution_backward(given, (), tuple(grads))]
    leaves = [t.double().requires_grad_() for t in (x, *weights, *biases)]
    double = rope and Rope(rope.cos.double(), rope.sin.double(), rope.positions)
    parameters = leaves[1 : count + 1], leaves[count + 1 :]
    outputs = causal_convolutions(leaves[0], *parameters, double, offsets, lead, "reference")
    gradients = torch.autograd.grad(outputs, leaves, [g.double() for g in grads], allow_unused=True)
    exact = [t.detach() for t in outputs]
    exact += [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
    return actual, exact


def run_kernels(inputs, rope, rotated, dtype):
    return run(kernels, inputs, rope, rotated, dtype)


def run_eager(inputs, rope, rotated, dtype):
    return run(eager, inputs, rope, rotated, dtype)


def run(path, inputs, rope, rotated, dtype):
    """Views, rates, and gradients as ``defined_results`` orders them."""
    x, *weights, w_lr, b_lr = inputs[:6]
    given = Projection(x, tuple(weights), w_lr, b_lr, *rope, rotated, BASE_LR, dtype)
    results = path.projection(given)
    grads = (*(g.to(dtype) for g in inputs[6:9]), inputs[9])
    return [*results, *path.projection_backward(given, (results[-1],), grads)]
