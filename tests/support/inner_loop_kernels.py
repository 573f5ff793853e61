"""Both inner loops' kernels and their definition, on inputs alike: outputs and gradients by name."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.checks import norm_error
from ttt4rec import kernels, reference
from ttt4rec.arguments import Scan
from ttt4rec.kernels import copies

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


def with_decays(inner: str, inputs: Inputs, most: float = 0.3) -> Inputs:
    """The same for a layer that forgets: ``ln a`` down to ``-most``, and initial weights other than the incoming."""
    generator = torch.Generator().manual_seed(11)
    log_decay = -most * torch.rand(inputs["inner_lr"].shape, generator=generator)
    initial = {name: 0.1 + 0.3 * torch.randn(inputs[name].shape[1:], generator=generator) for name in WEIGHTS[inner]}
    more = {"log_decay": log_decay} | {f"{name}_initial": w for name, w in initial.items()}
    return inputs | {name: x.to(DEVICE) for name, x in more.items()}


def initial_weights(inner: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """Those of ``with_decays``, or none."""
    return tuple(inputs[f"{name}_initial"] for name in WEIGHTS[inner] if "log_decay" in inputs)


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
    decays = inputs.get("log_decay"), initial_weights(inner, inputs)
    return Scan(*values(inputs, TOKENS), weights, *values(inputs, LAYER_NORM), *spans, EPS, segment, inner, *decays)


def operator_name(scan: Scan) -> str:
    """Of the scan's operator."""
    return f"{scan.inner}_scan" if scan.log_decay is None else f"{scan.inner}_forgetting_scan"


def run_forward(inner: str, scan: Scan) -> tuple[Tensor, ...]:
    """The outputs, the outgoing weights, and what is kept for the backward."""
    return getattr(kernels, operator_name(scan))(scan)  # type: ignore[no-any-return]


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
    backward = getattr(kernels, f"{operator_name(scan)}_backward")(scan, tuple(kept), tuple(gradients))
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
    flat = [leaves[name].flatten(0, 1) if name in leaves else None for name in (*TOKENS[:4], "log_decay")]
    starts, lengths = spans
    if starts is None or lengths is None:
        starts, lengths = torch.arange(B) * L, torch.full((B,), L)
    o = torch.zeros(B * L, *inputs["q"].shape[2:], dtype=dtype, device=DEVICE)
    rows = []
    for n, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        mine = tuple(w[n : n + 1] for w in values(leaves, WEIGHTS[inner]))
        if length > 0:
            *tokens, log_decay = (x if x is None else x[None, start : start + length] for x in flat)
            given = *tokens, leaves["token_scale"], mine, *values(leaves, LAYER_NORM)
            decays = {"log_decay": log_decay, "initial": initial_weights(inner, leaves)}
            out, mine = reference.dual_form(*given, inner=inner, eps=EPS, **decays)
            o = torch.cat((o[:start], out[0], o[start + length :]))
        rows.append(mine)
    results = [o.view(B, L, *o.shape[1:]), *(torch.cat(w) for w in zip(*rows, strict=True))]
    given_gradients = [g.to(dtype) for g in gradients]
    grads = torch.autograd.grad(results, list(leaves.values()), given_gradients, materialize_grads=True)
    named = dict(zip(("o", *(f"{name}_out" for name in WEIGHTS[inner])), results, strict=True))
    return named | {f"d_{name}": x for name, x in zip(leaves, grads, strict=True)}


def errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """``norm_error`` by name."""
    return {name: norm_error(results[name], x) for name, x in expected.items()}


def remember_states(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """The memory for states that a function of ``copies`` will have allocated."""
    states: list[Any] = []
    allocate = getattr(copies, name)

    def remembered(scan: Scan) -> tuple[Any, Tensor | None]:
        memory, first = allocate(scan)
        states.append(memory)
        return memory, first

    monkeypatch.setattr(copies, name, remembered)
    return states
