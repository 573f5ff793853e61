"""The kernels of both inner loops against their definition in float64; interpreted where there is no GPU."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.support.checks import INNERS
from tests.support.exactness import distances, excess, reference_errors
from tests.support.inner_loop_kernels import (
    DEVICE,
    FP32_TOLERANCE,
    WEIGHTS,
    Inputs,
    errors,
    make_gradients,
    make_inputs,
    make_scan,
    remember_states,
    run_definition,
    run_forward,
    run_kernels,
)
from ttt4rec.kernels import launch
from ttt4rec.kernels.hidden_layer import gelu
from ttt4rec.kernels.primitives import program_place

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
both = pytest.mark.parametrize("inner", INNERS)


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    wrong = {name: error for name, error in errors(results, expected).items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def assert_matches(inner: str, inputs: Inputs) -> None:
    """Outputs and gradients are those of the definition, to float32's rounding."""
    gradients = make_gradients(inner, inputs)
    assert_close(run_kernels(inner, inputs, gradients), run_definition(inner, inputs, gradients), FP32_TOLERANCE)


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


MLP_SHAPES = [
    (1, 11, 3, 16, 8),
    (1, 9, 1, 16, 4),
    (1, 5, 1, 16, 1),
    (1, 35, 1, 16, 16),
    (1, 18, 2, 20, 8),
    (1, 37, 1, 32, 16),
    (1, 20, 1, 64, 16),
    (1, 33, 1, 16, 32),
    (1, 9, 1, 128, 8),
]


@pytest.mark.parametrize(
    ("inner", "B", "L", "H", "D", "K"),
    [("linear", *shape) for shape in SHAPES]
    + [pytest.param("mlp", *shape, marks=pytest.mark.slow if shape[3] > 64 else ()) for shape in MLP_SHAPES],
)
def test_matches_definition(inner: str, B: int, L: int, H: int, D: int, K: int) -> None:
    assert_matches(inner, make_inputs(inner, B, L, H, D, K))


@both
@pytest.mark.parametrize("heads", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 4])
def test_any_number_of_heads_in_a_program(inner: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(num_warps=1, num_stages=1, heads=heads))
    assert_matches(inner, make_inputs(inner, 2, 10, 5, 16, 4))


LOW_PRECISION = [
    pytest.param(*shape, dtype, marks=pytest.mark.compiled if shape[3] == 16 and dtype == torch.bfloat16 else ())
    for shape in ((2, 36, 2, 16, 8), (1, 51, 1, 32, 16))
    for dtype in (torch.bfloat16, torch.float16)
]


@both
@pytest.mark.parametrize(("B", "L", "H", "D", "K", "dtype"), LOW_PRECISION)
def test_low_precision_is_no_worse_than_torch(
    inner: str, B: int, L: int, H: int, D: int, K: int, dtype: torch.dtype
) -> None:
    """At most twice the error of the reference run in the same dtype, and results in the inputs' dtype."""
    inputs = make_inputs(inner, B, L, H, D, K, dtype=dtype)
    gradients = make_gradients(inner, inputs)
    results, exact = run_kernels(inner, inputs, gradients), run_definition(inner, inputs, gradients)
    torch_errors = errors(run_definition(inner, inputs, gradients, dtype=dtype), exact)
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
QUICKLY_PACKED = [("unequal", torch.int32), ("first and last empty", torch.int64)]


@both
@pytest.mark.parametrize(
    ("lengths", "index_dtype"),
    [
        pytest.param(
            lengths,
            dtype,
            id=f"{name}-{str(dtype)[6:]}",
            marks=() if (name, dtype) in QUICKLY_PACKED else pytest.mark.slow,
        )
        for dtype in (torch.int32, torch.int64)
        for name, lengths in PACKED.items()
    ],
)
def test_packed_sequences(inner: str, lengths: list[int], index_dtype: torch.dtype) -> None:
    inputs = make_inputs(inner, 1, sum(lengths), 3, 16, 8, N=len(lengths))
    gradients = make_gradients(inner, inputs)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    spans = (cu_seqlens[:-1].to(index_dtype), cu_seqlens.diff().to(index_dtype))
    expected = run_definition(inner, inputs, gradients, spans)
    assert_close(run_kernels(inner, inputs, gradients, spans), expected, FP32_TOLERANCE)


@both
def test_tokens_outside_the_spans_are_zero(inner: str) -> None:
    """Left and right padding in a batch of rows."""
    inputs = make_inputs(inner, 3, 13, 2, 16, 8)
    gradients = make_gradients(inner, inputs)
    starts, lengths = torch.tensor([[4, 9], [13, 8], [26, 0]], device=DEVICE).unbind(1)  # not contiguous
    spans = (starts, lengths)
    results, expected = run_kernels(inner, inputs, gradients, spans), run_definition(inner, inputs, gradients, spans)
    assert_close(results, expected, FP32_TOLERANCE)
    for name in ("o", "d_q", "d_k", "d_v", "d_inner_lr"):
        flat = results[name].flatten(0, 1)
        assert all((flat[part] == 0).all() for part in (slice(0, 4), slice(21, 39))), name


@both
@pytest.mark.compiled
def test_any_strides(inner: str) -> None:
    """Tokens first, features not last, one storage for q and k, initial weights shared by all sequences."""
    B, L, H, D, K = 2, 19, 2, 16, 8
    inputs = make_inputs(inner, B, L, H, D, K, dtype=torch.bfloat16)
    inputs |= {name: inputs[name][:1].expand(B, *inputs[name].shape[1:]) for name in WEIGHTS[inner]}
    contiguous = {name: x.contiguous() for name, x in inputs.items()}
    strided = dict(inputs)
    strided["q"], strided["k"] = torch.stack((inputs["q"], inputs["k"]), dim=-1).unbind(-1)
    strided["v"] = inputs["v"].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    strided["inner_lr"] = inputs["inner_lr"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["token_scale"] = torch.stack((inputs["token_scale"],) * 2, 1)[:, 0]
    strided["ln_weight"] = inputs["ln_weight"].t().contiguous().t()
    grad_o, *grad_weights = make_gradients(inner, inputs)
    grad_weights = [g.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1) if g.dim() == 4 else g for g in grad_weights]
    strided_gradients = (grad_o.sum(1, keepdim=True).expand_as(grad_o), *grad_weights)
    expected = run_kernels(inner, contiguous, [x.contiguous() for x in strided_gradients])
    results = run_kernels(inner, strided, strided_gradients)
    for name, x in expected.items():
        assert torch.equal(results[name], x), name


@both
@pytest.mark.compiled
def test_same_bits_twice(inner: str) -> None:
    inputs = make_inputs(inner, 2, 21, 4, 16, 8, dtype=torch.bfloat16)
    gradients = make_gradients(inner, inputs)
    first, second = (run_kernels(inner, inputs, gradients) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@both
@pytest.mark.parametrize("L", [0, 1, 7])
def test_weights_are_untouched_before_a_complete_mini_batch(inner: str, L: int) -> None:
    inputs = make_inputs(inner, 2, L, 2, 16, 8)
    o, *outgoing = run_forward(inner, make_scan(inner, inputs))
    assert o.shape == inputs["q"].shape
    for name, w in zip(WEIGHTS[inner], outgoing, strict=False):
        assert torch.equal(w, inputs[name]), name


@both
def test_no_sequences(inner: str) -> None:
    inputs = make_inputs(inner, 0, 5, 2, 16, 8)
    results = run_kernels(inner, inputs, make_gradients(inner, inputs))
    assert results["o"].shape == (0, 5, 2, 16)
    assert (results["d_ln_weight"] == 0).all()
    assert (results["d_token_scale"] == 0).all()


@both
def test_segments_change_no_bit(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many mini-batches lie between two checkpoints; sequences of unequal lengths, each from its own state.

    With one cut both ways: products of other shapes may add up in another order.
    """
    monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(num_warps=4, num_stages=1))
    lengths = torch.tensor([21, 0, 3, 13], device=DEVICE)
    spans = (lengths.cumsum(0) - lengths, lengths)
    inputs = make_inputs(inner, 1, 37, 1, 16, 4, N=4)
    gradients = make_gradients(inner, inputs)
    results = run_kernels(inner, inputs, gradients, spans, segment=2)
    assert_close(results, run_definition(inner, inputs, gradients, spans), FP32_TOLERANCE)
    for segment in (1, 3, 16):
        others = run_kernels(inner, inputs, gradients, spans, segment)
        assert all(torch.equal(others[name], x) for name, x in results.items()), segment


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize(("inner", "H", "D", "K"), [("linear", 2, 32, 8), ("linear", 1, 16, 32), ("mlp", 1, 16, 16)])
def test_the_replay_has_the_forwards_weights(
    inner: str, H: int, D: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, before every mini-batch, where both kernels are cut differently; TTT-Linear's W as an operand."""
    inputs = make_inputs(inner, 1, 4 * K, H, D, K, dtype=torch.bfloat16)
    states = remember_states(monkeypatch, "new_linear_states" if inner == "linear" else "new_states")
    run_kernels(inner, inputs, make_gradients(inner, inputs), segment=4)
    *_, checkpoints = run_forward(inner, make_scan(inner, inputs, segment=1))
    if inner == "linear":
        W, b = states[0]
        assert torch.equal(W[1:].flatten(2), checkpoints[:3, :, : D * D].to(W.dtype))
        assert torch.equal(b[1:], checkpoints[:3, :, D * D :])
    else:
        assert torch.equal(states[0][1:], checkpoints[:3])


@both
@pytest.mark.parametrize(
    "scale", [1e-6, "mixed", *(pytest.param(scale, marks=pytest.mark.slow) for scale in (1e-3, 1.0, 1e2, 1e4))]
)
def test_gradients_are_exact_at_every_scale(inner: str, scale: float | str) -> None:
    """By the rule of ``tests.support.exactness``, with weights as a layer initialises them.

    Updates may then be far larger than the weights, or far smaller.
    """
    for L in (18, 19, 20):
        inputs = as_initialised(inner, make_inputs(inner, 1, L, 1, 16, 4))
        powers = torch.linspace(-6, 4, L)[torch.randperm(L, generator=torch.Generator().manual_seed(L))]
        sizes = 10 ** powers[:, None, None].to(DEVICE) if isinstance(scale, str) else scale
        inputs |= {name: 0.1 * sizes * inputs[name] for name in "qkv"}
        gradients = make_gradients(inner, inputs)
        exact = run_definition(inner, inputs, gradients)
        found = distances(run_kernels(inner, inputs, gradients), exact)
        evaluate = partial(moved_definition, inner, inputs, gradients)
        over = excess(found, reference_errors(evaluate, exact))
        assert not over, (L, over)


def moved_definition(
    inner: str, inputs: dict[str, Tensor], gradients: list[Tensor], move: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """PyTorch's results in float32, of inputs that ``move`` changes by their rounding."""
    return run_definition(inner, {name: move(x) for name, x in inputs.items()}, gradients, dtype=torch.float32)


def as_initialised(inner: str, inputs: Inputs) -> Inputs:
    """With the weights of a new layer: small ones, no bias."""
    weights = {name: inputs[name] for name in WEIGHTS[inner]}
    small = {name: 0.05 * x if name.startswith("W") else torch.zeros_like(x) for name, x in weights.items()}
    ones = torch.ones_like(inputs["ln_weight"])
    return inputs | small | {"ln_weight": ones, "ln_bias": torch.zeros_like(ones)}


@both
def test_equal_tokens_are_exact(inner: str) -> None:
    """One token over and over: every update goes the same way."""
    inputs = as_initialised(inner, make_inputs(inner, 1, 19, 1, 16, 4))
    inputs |= {name: inputs[name][:, :1].expand_as(inputs[name]).contiguous() for name in "qkv"}
    gradients = make_gradients(inner, inputs)
    exact = run_definition(inner, inputs, gradients)
    usual = errors(run_definition(inner, inputs, gradients, dtype=torch.float32), exact)
    own = errors(run_kernels(inner, inputs, gradients), exact)
    wrong = {name: (own[name], usual[name]) for name in own if own[name] > 2 * max(FP32_TOLERANCE, usual[name])}
    assert not wrong, wrong


@triton.jit
def first_elements_kernel(starts, lengths, elements, L, H, tile: tl.constexpr):
    """Where every program's sequence begins among the elements of ``[B, L, H, D]``."""
    first = program_place((starts, lengths), L, H, tile)[2]
    tl.store(elements + tl.program_id(0), first * H * tile.head_dim)


@pytest.mark.parametrize("packed", [False, True])
def test_offsets_beyond_32_bits(packed: bool) -> None:
    """Sequences begin more than 2³¹ elements behind the first token, by their number or by their starts."""
    tile = launch.plan("linear_forward", torch.empty(1, 1, 2, 16, dtype=torch.float16), 16)[1]
    L, elements = 1 << 30, torch.empty(6, dtype=torch.int64, device=DEVICE)
    starts = torch.tensor([0, 7, 2**31 - 1], dtype=torch.int32, device=DEVICE) if packed else None
    first_elements_kernel[(6,)](starts, starts, elements, L, 2, tile)
    expected = starts.long().tolist() if starts is not None else [0, L, 2 * L]
    assert elements.tolist() == [first * 2 * 16 for first in expected for _ in range(2)]


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"D": 257}, "head dimension"),
    ],
)
def test_what_the_kernels_cannot_do_is_an_error(inner: str, change: dict[str, object], message: str) -> None:
    shape = {"B": 1, "L": 2, "H": 1, "D": 16, "K": 8} | change
    with pytest.raises(ValueError, match=message):
        run_forward(inner, make_scan(inner, make_inputs(inner, **shape)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("heads", "chunks"), [(2, 2), *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ((1, 2), (1, 4), (2, 4)))]
)
def test_state_in_chunks(heads: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden features one part after the other, their weights in memory."""
    monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(4, 1, heads, chunks))
    inputs = make_inputs("mlp", 1, 13, 3, 16, 4, N=3)
    gradients = make_gradients("mlp", inputs)
    spans = (torch.tensor([0, 9, 10], device=DEVICE), torch.tensor([9, 1, 3], device=DEVICE))
    expected = run_definition("mlp", inputs, gradients, spans)
    assert_close(run_kernels("mlp", inputs, gradients, spans), expected, FP32_TOLERANCE)


@pytest.mark.parametrize("hidden", [10, 48, 100])
def test_any_number_of_hidden_features(hidden: int) -> None:
    """Fewer than 4D, padded ones, and more, which are cut into chunks."""
    assert_matches("mlp", make_inputs("mlp", 1, 9, 2, 16, 4, hidden=hidden))


@triton.jit
def gelu_kernel(x, results, n: tl.constexpr):
    at = tl.arange(0, n)
    value, slope, curve = gelu(tl.load(x + at))
    tl.store(results + at, value)
    tl.store(results + n + at, slope)
    tl.store(results + 2 * n + at, curve)


def test_gelu_and_its_derivatives() -> None:
    """Within a few roundings of the largest value near; the limits far out, where powers of x leave float32."""
    far = torch.tensor([1e1, 1e2, 1e4, 1e6, 1e8])
    x = torch.cat((torch.linspace(-8, 8, 1014), far, -far)).to(DEVICE)
    results = torch.empty(3, x.numel(), device=DEVICE)
    gelu_kernel[(1,)](x, results, x.numel())
    exact, derivatives = x.double().requires_grad_(), []
    derivatives.append(torch.nn.functional.gelu(exact, approximate="tanh"))
    for _ in range(2):
        derivatives += torch.autograd.grad(derivatives[-1].sum(), exact, create_graph=True)
    for actual, expected in zip(results.double(), derivatives, strict=True):
        assert ((actual - expected).abs() <= 1e-6 * (1 + expected.abs())).all()
    value, slope, curve = results.cpu()[:, -10:].double()
    limit = torch.cat((torch.ones(5), torch.zeros(5))).double()
    for actual, expected in ((value, limit * x[-10:].cpu()), (slope, limit), (curve, 0 * limit)):
        assert ((actual - expected).abs() <= 1e-30).all()
