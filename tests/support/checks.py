"""What the tests share: error measures, random inputs for both inner models, layers, golden vectors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ttt4rec import TTTLayer, TTTState, ttt_linear, ttt_mlp
from ttt4rec.inner_models import INNER_MODELS
from ttt4rec.layers.functional import Rates, inner_loop

INNERS = tuple(INNER_MODELS)
BACKBONES = ("transformer", "mamba")
FUNCTIONS = {"linear": ttt_linear, "mlp": ttt_mlp}
ROUNDING = 1e-11  # float64 results of the same mathematics in another order
_GOLDEN = Path(__file__).parents[1] / "golden"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute error over the largest absolute expected value; NaN counts as infinite."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    if error != error:
        return float("inf")
    scale = expected.double().abs().max().item()
    return error / scale if scale else error


def norm_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the error relative to that of what is expected; NaN counts as infinite."""
    error = ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9)).item()
    return error if error == error else float("inf")


def norm_errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """That of every tensor."""
    return [norm_error(a, e) for a, e in zip(actual, expected, strict=True)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = ROUNDING, name: str = "value") -> None:
    """Fail, with the error in the message, unless the relative error is within the tolerance."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.2e}"


def assert_states_close(actual: TTTState, expected: TTTState, tolerance: float = ROUNDING) -> None:
    """Compare two states field by field; positions must be equal."""
    assert torch.equal(actual.position, expected.position)
    for i, (a, b) in enumerate(zip(actual.weights, expected.weights, strict=True)):
        assert_close(a, b, tolerance, f"weights.{i}")
    for name in ("pending_k", "pending_v", "pending_lr"):
        assert_close(getattr(actual, name), getattr(expected, name), tolerance, name)
    for name in ("conv", "pending_log_decay"):
        own, other = getattr(actual, name), getattr(expected, name)
        assert (own is None) == (other is None)
        if own is not None:
            assert_close(own, other, tolerance, name)


def assert_states_identical(actual: TTTState, expected: TTTState) -> None:
    """Compare two states bit by bit."""
    names, others = state_tensors(actual), state_tensors(expected)
    assert names.keys() == others.keys()
    for name, x in names.items():
        assert x.dtype == others[name].dtype, name
        assert torch.equal(x, others[name]), name


def state_tensors(state: TTTState) -> dict[str, Tensor]:
    """All tensors of a state by name."""
    named = {f"weights.{i}": w for i, w in enumerate(state.weights)}
    for name in ("pending_k", "pending_v", "pending_lr", "pending_log_decay", "position", "conv"):
        if getattr(state, name) is not None:
            named[name] = getattr(state, name)
    return named


def inner_inputs(
    inner: str, B: int, L: int, H: int, D: int, K: int, *, dtype: torch.dtype = torch.float64, hidden: int | None = None
) -> dict[str, Tensor]:
    """Random arguments of ``ttt_linear`` or ``ttt_mlp`` in their order; q, k, v in ``dtype``, the rest float32 up.

    The rates and weights are large enough that the inner loop changes the outputs visibly; one token scale is zero.
    """
    F = hidden or 4 * D
    wide = torch.promote_types(dtype, torch.float32)
    scale = 1 / torch.arange(1, K + 1, dtype=torch.float64) + 0.1 * torch.rand(K, dtype=torch.float64)
    if K > 2:
        scale[1] = 0  # what the clamp of s_i leaves behind
    shapes = {name: (H, *shape) for name, shape in INNER_MODELS[inner].shapes(D, F).items()}
    inputs = {name: torch.randn(B, L, H, D).to(dtype) for name in "qkv"}
    inputs["inner_lr"] = torch.rand(B, L, H, dtype=torch.float64).div(D).to(wide)
    inputs["token_scale"] = scale.to(wide)
    for name, shape in shapes.items():
        fan = shape[-2] ** -0.5 if name.startswith("W") else 0.2
        inputs[name] = (torch.randn(shape, dtype=torch.float64) * fan).to(wide)
    inputs["ln_weight"] = (1 + 0.2 * torch.randn(H, D, dtype=torch.float64)).to(wide)
    inputs["ln_bias"] = (0.2 * torch.randn(H, D, dtype=torch.float64)).to(wide)
    return inputs


def run_inner(inner: str, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, TTTState]:
    """Call ``ttt_linear``, ``ttt_mlp`` or what is the same of another inner model, with the token scale's K."""
    K = inputs["token_scale"].numel()
    if inner in FUNCTIONS:
        return FUNCTIONS[inner](**inputs, mini_batch_size=K, **options)
    q, k, v, inner_lr, token_scale, *initial, ln_weight, ln_bias = inputs.values()
    usual = {"state": None, "mask": None, "cu_seqlens": None, "eps": 1e-6, "backend": "auto"}
    given = (q, k, v), Rates(inner_lr, token_scale), tuple(initial), (ln_weight, ln_bias), K
    return inner_loop(INNER_MODELS[inner], *given, **(usual | options))


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of a fixed random combination of all outputs; zeros where nothing depends on an input."""
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    graded = [(x, g) for x, g in zip(outputs, cotangents, strict=True) if x.requires_grad and x.numel()]
    found = torch.autograd.grad([x for x, _ in graded], inputs, [g for _, g in graded], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def inner_results(inner: str, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, TTTState, dict[str, Tensor]]:
    """Outputs, state and the gradients of every argument, all of the state included in the loss."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o, state = run_inner(inner, leaves, **options)
    outputs = (o, *state.weights, state.pending_k, state.pending_v, state.pending_lr)
    grads = gradients(outputs, list(leaves.values()))
    return o.detach(), state.detach(), dict(zip(leaves, grads, strict=True))


def make_layer(
    inner: str, backbone: str, *, width: int = 8, num_heads: int = 2, mini_batch_size: int = 4, **options: Any
) -> TTTLayer:
    """A float64 layer with parameters large enough that every part of it matters to the outputs."""
    layer = TTTLayer(
        width, num_heads, inner=inner, backbone=backbone, mini_batch_size=mini_batch_size, **options
    ).double()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            fan = 0.1 if p.dim() == 1 or "bias" in name or name in ("b1", "b2") else p.shape[-1] ** -0.5
            centre = 1.0 if name in ("norm.weight", "inner_norm_weight") else 0.0
            p.copy_(centre + fan * torch.randn(p.shape, dtype=torch.float64))
        if mini_batch_size > 2:
            layer.token_offset[1] = -2.0  # a token scale clamped at zero
    return layer


SIMPLE_FIRST = ["linear", pytest.param("mlp", marks=pytest.mark.slow)]
"""The inner models, where one takes the compiler or the interpreter seconds and the other shows nearly as much."""


class Golden(NamedTuple):
    """One case of the original release: its options, and its float64 tensors by name."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with the prefix, without it."""
        return {name[len(prefix) :]: x for name, x in self.tensors.items() if name.startswith(prefix)}


def golden_cases() -> list[str]:
    """Names of the golden cases."""
    return sorted(path.stem for path in _GOLDEN.glob("*.safetensors"))


GOLDEN_CASES = [pytest.param(name, marks=() if "_d16_" in name else pytest.mark.slow) for name in golden_cases()]
"""The golden cases for ``parametrize``; those of wide heads take the compiler seconds."""


def load_golden(name: str) -> Golden:
    """Read a golden case: ``x``, ``param.*``, and ``y``, ``grad_*`` and ``grad.*`` of ``layer`` and ``block``."""
    with safe_open(_GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        return Golden(config, {key: file.get_tensor(key).double() for key in file.keys()})  # noqa: SIM118


def flat(results):
    """Outputs, outgoing weights and gradients under one roof."""
    o, state, grads = results
    named = {"o": o} | {f"weights.{i}": w for i, w in enumerate(state.weights)}
    return named | {f"grad {name}": g for name, g in grads.items()}


def check_gradients(function, tensors):
    """gradcheck of two random combinations of all outputs; every input element is perturbed."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    count = sum(x.numel() for x in function(*leaves))
    mix = torch.randn(count, 2, dtype=torch.float64) / count**0.5

    def mixed(*arguments):
        return torch.cat([x.flatten() for x in function(*arguments)]) @ mix

    assert torch.autograd.gradcheck(mixed, leaves, atol=1e-7, rtol=1e-5)


def layer_of(config: dict[str, Any], backend: str) -> TTTLayer:
    """A layer as that of a golden case."""
    return TTTLayer(
        config["head_dim"] * config["num_heads"],
        config["num_heads"],
        inner=config["inner"],
        backbone="mamba" if config["share_qk"] else "transformer",
        mini_batch_size=config["mini_batch_size"],
        rope_theta=config["rope_theta"],
        base_lr=config["ttt_base_lr"],
        conv_kernel=config["conv_kernel"],
        backend=backend,
    ).double()
