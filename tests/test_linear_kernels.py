"""The TTT-Linear kernels against their definition in float64, on the GPU where there is one, else interpreted."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ttt4rec import reference
from ttt4rec.kernels import launch, linear_backward, linear_forward

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
NAMES = ("q", "k", "v", "inner_lr", "token_scale", "W1", "b1", "ln_weight", "ln_bias")
FP32_TOLERANCE = 3e-6  # a few roundings of 6e-8, summed over features, tokens and mini-batches

Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that a result that is not written fails."""
    empty = torch.empty

    def poisoned(*shape: int | Sequence[int], **options: object) -> Tensor:
        x = empty(*shape, **options)
        return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

    monkeypatch.setattr(torch, "empty", poisoned)


def make_inputs(
    B: int, L: int, H: int, D: int, K: int, *, N: int | None = None, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Random inputs of the kernels; N sequences, by default one per batch row."""
    generator = torch.Generator().manual_seed(B + 10 * L + 100 * H + 1000 * D + K)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    N = B if N is None else N
    inputs = {name: normal(B, L, H, D).to(dtype) for name in "qkv"}
    inputs["inner_lr"] = torch.sigmoid(normal(B, L, H)) / D
    inputs["token_scale"] = (0.5 + torch.rand(K, generator=generator)) / torch.arange(1, K + 1)
    inputs["W1"] = 0.02 + normal(N, H, D, D) / (2 * D**0.5)  # rows with a mean
    inputs["b1"] = 0.1 + 0.2 * normal(N, H, D)
    inputs["ln_weight"] = 1 + 0.2 * normal(H, D)
    inputs["ln_bias"] = 0.2 * normal(H, D)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def make_gradients(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o and of the outgoing W1 and b1."""
    generator = torch.Generator().manual_seed(7)
    like = (inputs["q"], inputs["W1"], inputs["b1"])
    return tuple(torch.randn(x.shape, generator=generator).to(x) for x in like)  # type: ignore[return-value]


def run_kernels(
    inputs: Inputs, gradients: Sequence[Tensor], spans: tuple[Tensor | None, Tensor | None] = (None, None)
) -> dict[str, Tensor]:
    """Outputs by name, and gradients as ``d_<input>``."""
    W1, b1, layer_norm = inputs["W1"], inputs["b1"], (inputs["ln_weight"], inputs["ln_bias"])
    tokens = tuple(inputs[name] for name in NAMES[:5])
    o, W1_out, b1_out, G = linear_forward(*tokens, W1, b1, *layer_norm, *spans, EPS)
    backward = linear_backward(*gradients, *tokens, W1_out, b1_out, G, *layer_norm, *spans, EPS)
    results = {"o": o, "W1_out": W1_out, "b1_out": b1_out}
    return results | {f"d_{name}": x for name, x in zip(NAMES, backward, strict=True)}


def run_definition(
    inputs: Inputs,
    gradients: Sequence[Tensor],
    spans: tuple[Tensor | None, Tensor | None] = (None, None),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The same from the reference and autograd, sequence by sequence; no token outside the spans."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    B, L = inputs["q"].shape[:2]
    flat = {name: leaves[name].flatten(0, 1) for name in NAMES[:4]}
    starts, lengths = spans
    if starts is None or lengths is None:
        starts, lengths = torch.arange(B) * L, torch.full((B,), L)
    o = torch.zeros(B * L, *inputs["q"].shape[2:], dtype=dtype, device=DEVICE)
    weights = []
    for n, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        mine = (leaves["W1"][n : n + 1], leaves["b1"][n : n + 1])
        if length > 0:
            tokens = (flat[name][None, start : start + length] for name in NAMES[:4])
            layer_norm = (leaves["ln_weight"], leaves["ln_bias"])
            out, mine = reference.dual_form(*tokens, leaves["token_scale"], mine, *layer_norm, eps=EPS)
            o = torch.cat((o[:start], out[0], o[start + length :]))
        weights.append(mine)
    W1_out, b1_out = (torch.cat(w) for w in zip(*weights, strict=True))
    results = (o.view(B, L, *o.shape[1:]), W1_out, b1_out)
    grads = torch.autograd.grad(results, list(leaves.values()), [g.to(dtype) for g in gradients])
    named = dict(zip(("o", "W1_out", "b1_out"), results, strict=True))
    return named | {f"d_{name}": x for name, x in zip(leaves, grads, strict=True)}


def errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference relative to that of what is expected, by name."""
    return {
        name: ((results[name].double() - x.double()).norm() / x.double().norm().clamp_min(1e-9)).item()
        for name, x in expected.items()
    }


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    wrong = {name: error for name, error in errors(results, expected).items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


SHAPES = [  # B, L, H, D, K
    (2, 21, 4, 16, 8),  # two heads a program
    (1, 19, 3, 16, 8),  # an odd head stays alone
    (2, 16, 1, 16, 8),  # no tail
    (1, 9, 5, 16, 4),
    (2, 11, 2, 16, 7),
    (1, 5, 2, 16, 1),
    (1, 1, 2, 16, 8),  # a single token
    (1, 6, 1, 16, 16),  # less than one mini-batch
    (1, 35, 2, 16, 16),
    (2, 18, 3, 20, 8),
    (1, 33, 1, 20, 16),
    (1, 23, 2, 32, 8),
    (1, 37, 1, 32, 16),
    (1, 20, 1, 64, 8),
    (1, 35, 1, 64, 16),
    (1, 33, 2, 48, 11),
    (1, 70, 1, 16, 64),
    (1, 41, 1, 32, 20),
    (1, 17, 1, 128, 16),
]


@pytest.mark.parametrize(("B", "L", "H", "D", "K"), SHAPES)
def test_matches_definition(B: int, L: int, H: int, D: int, K: int) -> None:
    inputs = make_inputs(B, L, H, D, K)
    gradients = make_gradients(inputs)
    assert_close(run_kernels(inputs, gradients), run_definition(inputs, gradients), FP32_TOLERANCE)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_any_number_of_heads_in_a_program(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(num_warps=1, num_stages=1, heads=heads))
    inputs = make_inputs(2, 10, 5, 16, 4)
    gradients = make_gradients(inputs)
    assert_close(run_kernels(inputs, gradients), run_definition(inputs, gradients), FP32_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "L", "H", "D", "K"), [(2, 36, 2, 16, 8), (1, 51, 1, 32, 16)])
def test_low_precision_is_no_worse_than_torch(B: int, L: int, H: int, D: int, K: int, dtype: torch.dtype) -> None:
    """At most twice the error of the reference run in the same dtype, and results in the inputs' dtype."""
    inputs = make_inputs(B, L, H, D, K, dtype=dtype)
    gradients = make_gradients(inputs)
    results, exact = run_kernels(inputs, gradients), run_definition(inputs, gradients)
    torch_errors = errors(run_definition(inputs, gradients, dtype=dtype), exact)
    wrong = {
        name: (error, torch_errors[name])
        for name, error in errors(results, exact).items()
        if not error <= 2 * torch_errors[name]
    }
    assert not wrong, f"errors and those of torch: {wrong}"
    assert {results[name].dtype for name in ("o", "d_q", "d_k", "d_v")} == {dtype}
    assert {results[name].dtype for name in ("W1_out", "b1_out", "d_inner_lr", "d_W1")} == {torch.float32}


PACKED = {
    "unequal": [5, 0, 1, 16, 9],
    "first and last empty": [0, 8, 3, 0],
    "all complete": [8, 16, 8],
}


@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences(lengths: list[int], index_dtype: torch.dtype) -> None:
    inputs = make_inputs(1, sum(lengths), 3, 16, 8, N=len(lengths))
    gradients = make_gradients(inputs)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    spans = (cu_seqlens[:-1].to(index_dtype), cu_seqlens.diff().to(index_dtype))
    expected = run_definition(inputs, gradients, spans)
    assert_close(run_kernels(inputs, gradients, spans), expected, FP32_TOLERANCE)


def test_tokens_outside_the_spans_are_zero() -> None:
    """Left and right padding in a batch of rows."""
    inputs = make_inputs(3, 13, 2, 16, 8)
    gradients = make_gradients(inputs)
    starts, lengths = torch.tensor([[4, 9], [13, 8], [26, 0]], device=DEVICE).unbind(1)  # not contiguous
    spans = (starts, lengths)
    results, expected = run_kernels(inputs, gradients, spans), run_definition(inputs, gradients, spans)
    assert_close(results, expected, FP32_TOLERANCE)
    for name in ("o", "d_q", "d_k", "d_v", "d_inner_lr"):
        flat = results[name].flatten(0, 1)
        assert all((flat[part] == 0).all() for part in (slice(0, 4), slice(21, 39))), name


def test_any_strides() -> None:
    """Tokens first, features not last, one storage for q and k, initial weights shared by all sequences."""
    B, L, H, D, K = 2, 19, 2, 16, 8
    inputs = make_inputs(B, L, H, D, K)
    inputs["W1"], inputs["b1"] = (inputs[name][:1].expand(B, *inputs[name].shape[1:]) for name in ("W1", "b1"))
    contiguous = {name: x.contiguous() for name, x in inputs.items()}
    strided = dict(inputs)
    strided["q"], strided["k"] = torch.stack((inputs["q"], inputs["k"]), dim=-1).unbind(-1)
    strided["v"] = inputs["v"].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    strided["inner_lr"] = inputs["inner_lr"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["token_scale"] = torch.stack((inputs["token_scale"],) * 2, 1)[:, 0]
    strided["ln_weight"] = inputs["ln_weight"].t().contiguous().t()
    grad_o, grad_W1, grad_b1 = make_gradients(inputs)
    strided_gradients = (grad_o.sum(1, keepdim=True).expand_as(grad_o), grad_W1.mT, grad_b1.flip(0))
    expected = run_kernels(contiguous, [x.contiguous() for x in strided_gradients])
    results = run_kernels(strided, strided_gradients)
    for name, x in expected.items():
        assert torch.equal(results[name], x), name


def test_same_bits_twice() -> None:
    inputs = make_inputs(2, 21, 4, 16, 8)
    gradients = make_gradients(inputs)
    first, second = (run_kernels(inputs, gradients) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("L", [0, 1, 7])
def test_weights_are_untouched_before_a_complete_mini_batch(L: int) -> None:
    inputs = make_inputs(2, L, 2, 16, 8)
    o, W1_out, b1_out, _ = linear_forward(*inputs.values(), None, None, EPS)
    assert o.shape == inputs["q"].shape
    assert torch.equal(W1_out, inputs["W1"])
    assert torch.equal(b1_out, inputs["b1"])


def test_no_sequences() -> None:
    inputs = make_inputs(0, 5, 2, 16, 8)
    results = run_kernels(inputs, make_gradients(inputs))
    assert results["o"].shape == (0, 5, 2, 16)
    assert (results["d_ln_weight"] == 0).all()
    assert (results["d_token_scale"] == 0).all()


def test_weights_are_rebuilt_over_a_long_sequence() -> None:
    """64 mini-batches at eight times the usual rate: gradients at the first token are still exact."""
    inputs = make_inputs(1, 256, 1, 16, 4)
    inputs["inner_lr"] *= 8
    gradients = make_gradients(inputs)
    results, expected = run_kernels(inputs, gradients), run_definition(inputs, gradients)
    assert_close(results, expected, 2 * FP32_TOLERANCE)
    first = {name: expected[name][:, :4] for name in ("d_q", "d_k", "d_v")}
    assert_close({name: results[name][:, :4] for name in first}, first, 2 * FP32_TOLERANCE)


def test_offsets_beyond_32_bits() -> None:
    """The second sequence lies more than 2³¹ elements behind the first; few pages of that memory are ever touched."""
    inputs = make_inputs(2, 9, 2, 16, 8, dtype=torch.float16)
    gradients = make_gradients(inputs)
    near = run_kernels(inputs, gradients)
    far = torch.empty_strided(inputs["k"].shape, (2**31, 32, 16, 1), dtype=torch.float16, device=DEVICE)
    far.copy_(inputs["k"])
    results = run_kernels({**inputs, "k": far}, gradients)
    assert all(torch.equal(results[name], near[name]) for name in near)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"K": 65}, "mini_batch_size"),
        ({"D": 257}, "head dimension"),
    ],
)
def test_what_the_kernels_cannot_do_is_an_error(change: dict[str, object], message: str) -> None:
    shape = {"B": 1, "L": 2, "H": 1, "D": 16, "K": 8} | change
    with pytest.raises(ValueError, match=message):
        linear_forward(*make_inputs(**shape).values(), None, None, EPS)  # type: ignore[arg-type]
