"""Both inner loops' kernels and their definition, on inputs alike: outputs and gradients by name."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tests.support.checks import norm_error
from ttt4rec import kernels, reference
from ttt4rec.arguments import Scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
TOKENS = ("q", "k", "v", "inner_lr", "token_scale")
WEIGHTS = {"linear": ("W1", "b1"), "mlp": ("W1", "b1", "W2", "b2")}
LAYER_NORM = ("ln_weight", "ln_bias")
FP32_TOLERANCE = 3e-6  # a few roundings of 6e-8, summed over features, tokens and mini-batches
Inputs = dict[str, Tensor]


def make_inputs(
    inner: str,
    B: int,
    L: int,
    H: int,
    D: int,
    K: int,
    *,
    N: int | None = None,
    hidden: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Random inputs of the kernels; N sequences, by default one per batch row; a hidden layer of 4D by default."""
    generator = torch.Generator().manual_seed(B + 10 * L + 100 * H + 1000 * D + K)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    N, hidden = B if N is None else N, hidden or 4 * D
    inputs = {name: normal(B, L, H, D).to(dtype) for name in "qkv"}
    inputs["inner_lr"] = torch.sigmoid(normal(B, L, H)) / D
    inputs["token_scale"] = (0.5 + torch.rand(K, generator=generator)) / torch.arange(1, K + 1)
    sizes = (D, D) if inner == "linear" else (D, hidden, D)
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes), 1):
        inputs[f"W{layer}"] = 0.02 + normal(N, H, fan_in, fan_out) / (2 * fan_in**0.5)  # rows with a mean
        inputs[f"b{layer}"] = 0.1 + 0.2 * normal(N, H, fan_out)
    inputs["ln_weight"] = 1 + 0.2 * normal(H, D)
    inputs["ln_bias"] = 0.2 * normal(H, D)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def values(inputs: Inputs, names: Sequence[str]) -> list[Tensor]:
    return [inputs[name] for name in names]


def make_gradients(inner: str, inputs: Inputs) -> list[Tensor]:
    """Gradients of o and of the outgoing weights."""
    generator = torch.Generator().manual_seed(7)
    like = values(inputs, ("q", *WEIGHTS[inner]))
    return [torch.randn(x.shape, generator=generator).to(x) for x in like]


def make_scan(
    inner: str, inputs: Inputs, spans: tuple[Tensor | None, Tensor | None] = (None, None), segment: int = 2
) -> Scan:
    weights = tuple(values(inputs, WEIGHTS[inner]))
    return Scan(*values(inputs, TOKENS), weights, *values(inputs, LAYER_NORM), *spans, EPS, segment, inner)


def run_forward(inner: str, scan: Scan) -> tuple[Tensor, ...]:
    """The outputs, the outgoing weights, and what is kept for the backward."""
    return getattr(kernels, f"{inner}_scan")(scan)


def run_kernels(
    inner: str,
    inputs: Inputs,
    gradients: Sequence[Tensor],
    spans: tuple[Tensor | None, Tensor | None] = (None, None),
    segment: int = 2,
) -> dict[str, Tensor]:
    """Outputs by name, and gradients as ``d_<input>``."""
    scan = make_scan(inner, inputs, spans, segment)
    o, *outgoing_and_kept = run_forward(inner, scan)
    num_weights = len(WEIGHTS[inner])
    outgoing, kept = outgoing_and_kept[:num_weights], outgoing_and_kept[num_weights:]
    backward = getattr(kernels, f"{inner}_scan_backward")(scan, tuple(kept), tuple(gradients))
    results = {"o": o} | {f"{name}_out": x for name, x in zip(WEIGHTS[inner], outgoing, strict=True)}
    return results | {f"d_{name}": x for name, x in zip(inputs, backward, strict=True)}


def run_definition(
    inner: str,
    inputs: Inputs,
    gradients: Sequence[Tensor],
    spans: tuple[Tensor | None, Tensor | None] = (None, None),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The same from the reference and autograd, sequence by sequence; no token outside the spans."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    B, L = inputs["q"].shape[:2]
    flat = [leaves[name].flatten(0, 1) for name in TOKENS[:4]]
    starts, lengths = spans
    if starts is None or lengths is None:
        starts, lengths = torch.arange(B) * L, torch.full((B,), L)
    o = torch.zeros(B * L, *inputs["q"].shape[2:], dtype=dtype, device=DEVICE)
    rows = []
    for n, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        mine = tuple(w[n : n + 1] for w in values(leaves, WEIGHTS[inner]))
        if length > 0:
            tokens = [x[None, start : start + length] for x in flat]
            layer_norm = values(leaves, LAYER_NORM)
            out, mine = reference.dual_form(*tokens, leaves["token_scale"], mine, *layer_norm, inner=inner, eps=EPS)
            o = torch.cat((o[:start], out[0], o[start + length :]))
        rows.append(mine)
    results = [o.view(B, L, *o.shape[1:]), *(torch.cat(w) for w in zip(*rows, strict=True))]
    grads = torch.autograd.grad(results, list(leaves.values()), [g.to(dtype) for g in gradients])
    named = dict(zip(("o", *(f"{name}_out" for name in WEIGHTS[inner])), results, strict=True))
    return named | {f"d_{name}": x for name, x in zip(leaves, grads, strict=True)}


def errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """``norm_error`` by name."""
    return {name: norm_error(results[name], x) for name, x in expected.items()}
