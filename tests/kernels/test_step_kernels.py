"""The step kernels, interpreted where there is no GPU, against the reference in float64 and the eager path."""

import pytest
import torch

from tests.support.checks import INNERS, assert_close, assert_states_close, make_layer
from tests.support.steps import forgetting, read_on, step_arguments, tokens
from ttt4rec import TTTLayer, kernels
from ttt4rec.arguments import TokenStep
from ttt4rec.kernels import step
from ttt4rec.operators import forgetting_token_step, token_step

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = 3e-6  # a few roundings of 6e-8, summed over features, tokens and mini-batches


def move(given):
    """Copies of the operator's arguments on the device."""
    return TokenStep(*(x.to(DEVICE, copy=True) if isinstance(x, torch.Tensor) else x for x in given))


def parts_of(given):
    """Weights of the records in the operator's arguments, and the rows' parts but ln a, which kernels do not know."""
    weights, rows = given.record.parts(given.records.cpu())
    return weights, given.record.row_parts(rows)[:-1]


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("head_dim", [6, 16, 64])
@pytest.mark.parametrize("mini_batch_size", [1, 2, 8])
def test_matches_the_eager_path_in_float64(inner, head_dim, mini_batch_size):
    """Outputs, and all of the records that is ever read, also of streams that were not stepped."""
    D, K = head_dim, mini_batch_size
    arguments = step_arguments(inner, torch.float32, D=D, K=K)
    exact = TokenStep(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments))
    given = move(arguments)
    (o,), (expected,) = token_step(given, "triton"), token_step(exact, "eager")
    assert_close(o.cpu(), expected, FP32)
    slots, offset = arguments.slots, arguments.offset
    done, idle = slots[offset == K - 1], [n for n in range(5) if n not in slots]
    (before, _), (weights, rows), (expected_weights, expected_rows) = map(parts_of, (arguments, given, exact))
    for x, y, z in zip(before, weights, expected_weights, strict=True):
        assert_close(y, z, FP32)
        assert not torch.equal(y[done], x[done])
    for x, y in zip(rows, expected_rows, strict=True):
        assert_close(x[:, :, :-1], y[:, :, :-1], FP32)  # the last one is scratch
    assert torch.equal(given.records.cpu()[idle], arguments.records[idle])


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize(
    ("head_dim", "mini_batch_size", "most"),
    [
        (6, 1, 0.3),
        (16, 8, 1e3),
        pytest.param(16, 8, 0.3, marks=[pytest.mark.compiled, pytest.mark.slow]),
        pytest.param(64, 16, 0.3, marks=pytest.mark.slow),
    ],
)
def test_forgetting_matches_the_eager_path_in_float64(inner, head_dim, mini_batch_size, most, monkeypatch):
    """Where a little is lost, and all of it; of TTT-MLP with one chunk of hidden features and with several."""
    D, K = head_dim, mini_batch_size
    if D == 16:
        monkeypatch.setitem(step.MLP_BLOCKS, 16, (32, 2))
    arguments = forgetting(step_arguments(inner, torch.float32, D=D, K=K), most)
    exact = TokenStep(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments))
    exact, given = exact._replace(records=exact.records.clone()), move(arguments)
    (o,), (expected,) = forgetting_token_step(given, "triton"), forgetting_token_step(exact, "eager")
    assert_close(o.cpu(), expected, FP32)
    (weights, rows), (expected_weights, expected_rows) = (x.record.parts(x.records.cpu()) for x in (given, exact))
    for x, y in zip(weights, expected_weights, strict=True):
        assert_close(x, y, FP32)
    for x, y in zip(*(given.record.row_parts(r[:, :, :-1]) for r in (rows, expected_rows)), strict=True):
        assert_close(x, y, FP32)


def test_hidden_features_in_chunks(monkeypatch):
    """As where the weights do not fit the registers, and with a hidden size that is no power of two."""
    monkeypatch.setitem(step.MLP_BLOCKS, 16, (32, 1))
    arguments = step_arguments("mlp", torch.float32, D=14)
    plain, chunked = move(arguments), move(arguments)
    assert_close(token_step(chunked, "triton")[0], token_step(plain, "eager")[0], 2 * FP32)  # both err
    (weights, rows), (expected_weights, expected_rows) = map(parts_of, (chunked, plain))
    for x, y in zip(weights, expected_weights, strict=True):
        assert_close(x, y, 2 * FP32)
    for x, y in zip(rows, expected_rows, strict=True):
        assert_close(x[:, :, :-1], y[:, :, :-1], 2 * FP32)


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.compiled), torch.float16])
def test_half_precision_is_rounded_once(dtype, inner):
    """The inputs are exact in float32, the pool is float32, and only the output is rounded."""
    q, k, v, *rest = step_arguments(inner, torch.float32)
    halves = [x.to(dtype) for x in (q, k, v)]
    (o,) = token_step(move([*halves, *rest]), "triton")
    (expected,) = token_step(move([x.float() for x in halves] + rest), "triton")
    assert o.dtype == dtype
    assert ((o - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all()


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("backbone", ["transformer", "mamba"])
def test_layer_steps_are_its_forward(inner, backbone):
    layer = make_layer(inner, backbone, width=32, mini_batch_size=3)
    x = tokens(2, 7, 32)
    exact, end = layer(x, return_state=True)
    layer.float().to(DEVICE)
    layer.backend = "triton"
    pool, slots = layer.make_pool(3), torch.tensor([2, 0], device=DEVICE)
    y = read_on(layer, x.float().to(DEVICE), pool, slots)
    assert_close(y.cpu(), exact, FP32)
    assert_states_close(pool.read(slots).to("cpu"), end.detach(), FP32)


@pytest.mark.parametrize("inner", INNERS)
def test_compile_has_no_graph_break(inner):
    torch._dynamo.reset()
    layer = make_layer(inner, "transformer", width=16, backend="triton").float().to(DEVICE)
    x, slots = tokens(2, 2, 16).float().to(DEVICE), torch.tensor([1, 0], device=DEVICE)
    pool, other = layer.make_pool(2), layer.make_pool(2)
    compiled = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    for t in range(2):
        assert_close(compiled(x[:, t], pool, slots), layer.step(x[:, t], other, slots), FP32)


def test_what_the_kernels_do_not_take():
    layer = TTTLayer(16, 1, backend="triton").double().to(DEVICE)
    pool, slots = layer.make_pool(1), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"takes float32, bfloat16 and float16.*; given torch.float64"):
        layer.step(torch.zeros(1, 16, dtype=torch.float64, device=DEVICE), pool, slots)


def captured(function):
    """What runs the function again: on a GPU a graph of it, which the host cannot look into."""
    if DEVICE == "cpu":
        return function
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@pytest.mark.parametrize("inner", INNERS)
def test_a_captured_step_reads_whatever_is_in_its_buffers(inner):
    layer = make_layer(inner, "mamba", width=16, mini_batch_size=2, backend="triton").float().to(DEVICE)
    pool, event, y = layer.make_pool(4), torch.zeros(2, 16, device=DEVICE), torch.zeros(2, 16, device=DEVICE)
    slots = torch.tensor([3, 1], device=DEVICE)
    replay = captured(lambda: y.copy_(layer.step(event, pool, slots)))
    pool.reset(torch.arange(4, device=DEVICE))
    x = tokens(4, 3, 16).float().to(DEVICE)
    outputs = torch.zeros_like(x)
    for t in range(3):
        for streams in ([3, 1], [0, 2]):
            slots.copy_(torch.tensor(streams))
            event.copy_(x[streams, t])
            replay()
            outputs[streams, t] = y
    layer.backend = "reference"
    assert_close(outputs, layer(x), 2 * FP32)  # both err


def test_an_inner_model_without_a_kernel_is_refused_by_name():
    given = step_arguments("linear", torch.float32)._replace(inner="cubic")
    assert kernels.refusal("token_step", given) == "steps the inner models linear, mlp; given cubic"
