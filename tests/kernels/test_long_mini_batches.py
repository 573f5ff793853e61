"""Mini-batches longer than a kernel's program: the library's products and kernels between them, beside float64.

Interpreted where there is no GPU.
"""

import pytest
import torch
from torch import Tensor

from tests.support.checks import INNERS, SIMPLE_FIRST, assert_close, inner_inputs, make_layer, run_inner
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
    run_definition,
    run_forward,
    run_kernels,
)
from ttt4rec import kernels
from ttt4rec.kernels import blocks
from ttt4rec.operators import SCANS, choose_backend

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
both = pytest.mark.parametrize("inner", INNERS)
simple_first = pytest.mark.parametrize("inner", SIMPLE_FIRST)
SHAPES = [  # B, L, H, D, K
    (2, 150, 2, 16, 65),  # two blocks, the second nearly empty, and a tail
    (1, 128, 1, 16, 128),  # whole mini-batches alone
    (1, 70, 2, 16, 100),  # less than one mini-batch
    (1, 290, 1, 32, 96),
    (1, 140, 1, 20, 70),
]
LARGE = [(1, 330, 1, 16, 256), (1, 530, 1, 64, 512), (1, 200, 1, 128, 128)]


def deviations(inner: str, inputs: Inputs, spans=(None, None), segment: int = 2) -> dict[str, float]:
    gradients = make_gradients(inner, inputs)
    found = run_kernels(inner, inputs, gradients, spans, segment)
    return errors(found, run_definition(inner, inputs, gradients, spans))


@simple_first
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.slow) for s in LARGE)])
def test_outputs_and_gradients(inner: str, shape: tuple[int, ...]) -> None:
    assert max(deviations(inner, make_inputs(inner, *shape)).values()) <= FP32_TOLERANCE


@both
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, marks=pytest.mark.compiled),
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],
)
def test_half_precision_errs_no_more_than_pytorch(inner: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(inner, 1, 300, 2, 16, 128, dtype=dtype)
    gradients = make_gradients(inner, inputs)
    exact = run_definition(inner, inputs, gradients)
    ours = errors(run_kernels(inner, inputs, gradients), exact)
    plain = errors(run_definition(inner, inputs, gradients, dtype=dtype), exact)
    assert not {name: (ours[name], plain[name]) for name in ours if not ours[name] <= plain[name]}


@both
@pytest.mark.parametrize(("L", "K"), [(300, 128), pytest.param(1100, 1024, marks=pytest.mark.slow)])
def test_gradients_are_twice_as_far_from_float64_as_the_references_at_most(inner: str, L: int, K: int) -> None:
    inputs = make_inputs(inner, 1, L, 1, 16, K)
    gradients = make_gradients(inner, inputs)

    def definition(inputs: Inputs, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return run_definition(inner, inputs, gradients, dtype=dtype)

    exact = definition(inputs, torch.float64)
    references = reference_errors(lambda move: definition({n: move(x) for n, x in inputs.items()}), exact)
    ours = distances(run_kernels(inner, inputs, gradients), exact)
    assert not excess(ours, references)


@simple_first
def test_packed_sequences(inner: str) -> None:
    """Of unequal lengths, one empty, with tokens of none between them."""
    inputs = make_inputs(inner, 1, 330, 2, 16, 70, N=4)
    starts, lengths = torch.tensor([180, 0, 170, 20]), torch.tensor([150, 12, 0, 140])
    assert max(deviations(inner, inputs, (starts.to(DEVICE), lengths.to(DEVICE))).values()) <= FP32_TOLERANCE


@simple_first
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_gives_the_forwards_weights_to_the_last_bit(inner: str, dtype: torch.dtype) -> None:
    """Gradients between segments of one mini-batch, where nothing is replayed, and longer ones are the same bits."""
    inputs = make_inputs(inner, 1, 210, 1, 16, 66, dtype=dtype)
    gradients = make_gradients(inner, inputs)
    one, three = (run_kernels(inner, inputs, gradients, segment=segment) for segment in (1, 3))
    assert all(torch.equal(one[name], three[name]) for name in one)


@both
def test_what_is_kept_is_in_the_tokens_dtype_and_state_in_float32(inner: str) -> None:
    scan = make_scan(inner, make_inputs(inner, 1, 140, 1, 16, 70, dtype=torch.bfloat16))
    o, *rest = run_forward(inner, scan)
    weights, kept, checkpoints = rest[: len(WEIGHTS[inner])], rest[len(WEIGHTS[inner]) : -1], rest[-1]
    assert {x.dtype for x in (o, *kept)} == {torch.bfloat16}
    assert {x.dtype for x in (*weights, checkpoints)} == {torch.float32}


@simple_first
def test_streams_go_on_within_a_mini_batch(inner: str) -> None:
    inputs = {name: x.float().to(DEVICE) for name, x in inner_inputs(inner, 2, 170, 1, 16, 80).items()}
    whole, end = run_inner(inner, inputs, backend="triton")
    tokens = ("q", "k", "v", "inner_lr")
    state, outputs = None, []
    for first, last in ((0, 50), (50, 51), (51, 170)):
        piece = inputs | {name: inputs[name][:, first:last] for name in tokens}
        o, state = run_inner(inner, piece, state=state, backend="triton")
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), whole, FP32_TOLERANCE)
    for ours, expected in zip(state.weights, end.weights, strict=True):
        assert_close(ours, expected, FP32_TOLERANCE)


@simple_first
def test_a_layer_of_one_mini_batch_a_sequence_steps_as_it_reads(inner: str) -> None:
    layer = make_layer(inner, "transformer", mini_batch_size=80).float().to(DEVICE)
    layer.backend = "triton"
    x = torch.randn(1, 83, 8, device=DEVICE)
    with torch.no_grad():
        y = layer(x)
        pool = layer.make_pool(1)
        slots = torch.arange(1, device=DEVICE)
        stepped = torch.stack([layer.step(x[:, t], pool, slots) for t in range(x.shape[1])], 1)
    assert_close(stepped, y, 10 * FP32_TOLERANCE)


@simple_first
def test_opcheck(inner: str) -> None:
    operator = SCANS[inner]
    inputs = make_inputs(inner, 1, 140, 1, 16, 70)
    scan = make_scan(inner, inputs)
    flat = [
        x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in operator.flatten(scan)
    ]
    torch.library.opcheck(operator.op, (*flat, "triton"))


def test_products_of_half_precision_are_summed_in_float32() -> None:
    a, b = (torch.randn(2, 8, 4096, device=DEVICE).bfloat16() for _ in range(2))
    found = blocks.product(a, b.mT)
    assert found.dtype == torch.float32
    assert_close(found, a.double() @ b.double().mT, 1e-5)
    assert_close(blocks.product(a, b.mT, found.clone()), 2 * (a.double() @ b.double().mT), 1e-5)


@pytest.mark.parametrize("features", [16, 40, 128])
def test_running_sums_both_ways(features: int) -> None:
    sums, last = torch.randn(3, 5, 9, features, device=DEVICE), torch.randn(3, 9, features, device=DEVICE)
    layer = object.__new__(blocks.FusedLayer)
    layer._keys = sums
    before, total = layer.running(sums, None)
    assert_close(total, sums.sum(1), 1e-6)
    assert_close(before.view_as(sums), sums.cumsum(1) - sums, 1e-6)
    after, total = layer.running(sums, last)
    assert_close(total, sums.sum(1) + last, 1e-6)
    assert_close(after.view_as(sums), last[:, None] + sums.flip(1).cumsum(1).flip(1) - sums, 1e-6)


def test_dtypes_and_head_dimensions_that_kernels_do_not_run_are_refused() -> None:
    for shape, dtype in (((1, 70, 1, 16, 70), torch.float64), ((1, 70, 1, 129, 70), torch.float32)):
        scan = make_scan("linear", make_inputs("linear", *shape, dtype=dtype))
        with pytest.raises(ValueError, match=r"kernels' (tokens|head dimension) must be"):
            kernels.linear_scan(scan)


def test_auto_takes_the_kernels_for_mini_batches_of_any_length() -> None:
    class Cuda:
        is_cuda, dtype, device = True, torch.bfloat16, "cuda:0"

    assert choose_backend("auto", Cuda, 64, 2048) == "triton"
