"""``backend="triton"`` as users call it: layers and inner loops on the kernels, interpreted where there is no GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.support.checks import (
    INNERS,
    SIMPLE_FIRST,
    assert_close,
    golden_cases,
    gradients,
    inner_inputs,
    layer_of,
    load_golden,
    norm_error,
    run_inner,
)
from ttt4rec import TTTLayer
from ttt4rec.kernels import launch
from ttt4rec.operators import choose_backend

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = 3e-6  # a few roundings of 6e-8, summed over features, tokens and mini-batches


WIDE = {"width": 64, "num_heads": 4, "mini_batch_size": 8}  # in bfloat16 of kernels that other tests compile, too


def make_layer(**options):
    """A layer in float32 whose inner loop changes its outputs visibly."""
    layer = TTTLayer(**{"width": 32, "num_heads": 2, "mini_batch_size": 4, "backend": "triton", **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.to(DEVICE)


QUICK = ("linear_transformer_d16_k8_l50", "linear_mamba_d16_k16_l41")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in golden_cases()]
)
def test_layer_matches_the_release(name):
    """In float32, at most twice as far from the release's float64 numbers as the reference run in float32."""
    case = load_golden(name)
    error = {backend: golden_error(case, backend) for backend in ("reference", "triton")}
    assert error["triton"] <= 2 * error["reference"] < 1e-5


def golden_error(case, backend):
    """Root mean square of the errors over that of the values, averaged over outputs and gradients.

    The largest error is no measure between paths that are equally exact: which numbers come off badly is chance.
    """
    layer = layer_of(case.config, backend).float()
    layer.load_release_state_dict({k: v.float() for k, v in case.part("param.seq_modeling_block.").items()})
    layer.to(DEVICE)
    x = case.tensors["x"].float().to(DEVICE).requires_grad_()
    y = layer(x)
    y.backward(case.tensors["layer.grad_y"].float().to(DEVICE))
    results = {"layer.y": y, "layer.grad_x": x.grad}
    own = layer_of(case.config, backend)
    own.load_release_state_dict(case.part("layer.grad."))  # the gradients, under the names of the parameters
    expected = {"layer.y": case.tensors["layer.y"], "layer.grad_x": case.tensors["layer.grad_x"]}
    for parameter_name, parameter in layer.named_parameters():
        results[parameter_name] = parameter.grad
        expected[parameter_name] = own.get_parameter(parameter_name).detach()
    for found in (results, expected):  # one affine map: alone, its bias' gradient is a sum that cancels a hundredfold
        bias = found.pop("inner_lr_bias")
        found["inner_lr_weight"] = torch.cat((found["inner_lr_weight"], bias[:, None]), dim=1)
    return sum(norm_error(results[key].cpu(), expected[key]) for key in expected) / len(expected)


@pytest.mark.parametrize(("inner", "backbone"), [("linear", "transformer"), ("linear", "mamba"), ("mlp", "mamba")])
def test_a_stream_cut_anywhere_gives_the_same_numbers(inner, backbone):
    layer = make_layer(inner=inner, backbone=backbone)
    x = torch.randn(2, 11, 32, device=DEVICE)
    whole, end = layer(x, return_state=True)
    state, outputs = None, []
    for piece in x.split((1, 5, 2, 3), dim=1):
        y, state = layer(piece, state=state, return_state=True)
        outputs.append(y)
    assert_close(torch.cat(outputs, 1), whole, FP32)
    for w, expected in zip(state.weights, end.weights, strict=True):
        assert_close(w, expected, FP32)


@pytest.mark.parametrize(("inner", "side"), [("linear", "left"), ("linear", "right"), ("mlp", "left")])
def test_padded_rows_get_what_they_get_alone(inner, side):
    layer = make_layer(inner=inner)
    x = torch.randn(2, 9, 32, device=DEVICE)
    real = slice(4, 9) if side == "left" else slice(0, 5)
    mask = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    mask[0], mask[1, real] = True, True
    y = layer(x, mask=mask)
    assert_close(y[1, real], layer(x[1:, real])[0], FP32)
    assert (y[1][~mask[1]] == 0).all()


@pytest.mark.parametrize("inner", INNERS)
def test_gradients_of_packed_sequences_are_those_of_the_eager_path(inner):
    layer = make_layer(inner=inner)
    x = torch.randn(1, 14, 32, device=DEVICE, requires_grad=True)
    cu_seqlens = torch.tensor([0, 5, 5, 14], device=DEVICE)
    found = {}
    for backend in ("reference", "triton"):
        layer.backend = backend
        y = layer(x, cu_seqlens=cu_seqlens)
        found[backend] = [y, *gradients([y], [x, *layer.parameters()])]
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        assert_close(actual, expected, 2 * FP32)  # both err


@pytest.mark.parametrize("inner", SIMPLE_FIRST)
def test_gradients_of_the_incoming_state(inner):
    inputs = {name: x.float().to(DEVICE).requires_grad_() for name, x in inner_inputs(inner, 2, 7, 2, 16, 4).items()}
    found = {}
    for backend in ("reference", "triton"):
        _, state = run_inner(inner, inputs, backend=backend)
        o, end = run_inner(inner, inputs, state=state, backend=backend)
        found[backend] = [o, *end.weights, *gradients([o, *end.weights], list(inputs.values()))]
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        assert_close(actual, expected, 2 * FP32)  # both err


@pytest.mark.compiled
@pytest.mark.parametrize("inner", SIMPLE_FIRST)
def test_compile_has_no_graph_break_and_does_not_recompile_for_each_length(inner):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = make_layer(inner=inner, **WIDE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for L in (5, 9, 14, 23):
        x = torch.randn(2, L, 64, device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(compiled(x), layer(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one for the first length, one for any


@pytest.mark.compiled
@pytest.mark.parametrize("inner", INNERS)
def test_same_bits_twice(inner):
    layer = make_layer(inner=inner, **WIDE)
    x = torch.randn(2, 21, 64, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        first, second = (gradients([layer(x)], [x, *layer.parameters()]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_autocast_is_that_of_scaled_dot_product_attention(inner, backend):
    """Queries, keys and values are taken in autocast's dtype; the state stays float32."""
    inputs = {name: x.float().to(DEVICE) for name, x in inner_inputs(inner, 1, 6, 2, 16, 4).items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        attention = torch.nn.functional.scaled_dot_product_attention(*(inputs[n].transpose(1, 2) for n in "qkv"))
        o, state = run_inner(inner, inputs, backend=backend)
    assert o.dtype == attention.dtype == torch.bfloat16
    assert {w.dtype for w in state.weights} == {torch.float32}


@pytest.mark.parametrize(
    ("backend", "cuda", "dtype", "chosen"),
    [
        ("auto", False, torch.float32, "auto"),
        ("auto", True, torch.float32, "triton"),
        ("auto", True, torch.bfloat16, "triton"),
        ("auto", True, torch.float64, "auto"),
        ("reference", True, torch.float32, "reference"),
        ("triton", True, torch.float32, "triton"),
    ],
)
def test_auto_takes_the_kernels_on_a_gpu_where_they_can_run(backend, cuda, dtype, chosen):
    q = SimpleNamespace(
        is_cuda=cuda, dtype=dtype, shape=(1, 2, 3, 16), device=torch.device("cuda:0")
    )  # no GPU is needed to choose
    assert choose_backend(backend, q, 16, 8) == chosen


def test_auto_takes_no_kernel_whose_backward_would_be_refused(monkeypatch, caplog):
    monkeypatch.setattr(launch, "architecture", lambda: "sm_100")
    q = SimpleNamespace(is_cuda=True, dtype=torch.float32, shape=(1, 2, 3, 16), device=torch.device("cuda:0"))
    for _ in range(2):
        assert choose_backend("auto", q, 16, 64, "mlp") == "auto"
    assert caplog.text.count("trains TTT-MLP with a mini_batch_size of up to 32; given 64") == 1
    with pytest.raises(RuntimeError, match="'triton' on sm_100 trains TTT-MLP"):
        choose_backend("triton", q, 16, 64, "mlp")
    with torch.no_grad():
        assert choose_backend("auto", q, 16, 64, "mlp") == "triton"


def test_the_tensors_gpu_is_the_current_one_for_a_call(monkeypatch):
    """Triton launches on the current device, whatever the tensors' is."""
    current = []

    @contextmanager
    def device(of):
        current.append(of)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    call = launch.on_its_device(lambda *arguments: list(current))
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    assert call(x, 3) == call([x, x], 3) == [torch.device("cuda:1")]
    assert call(torch.empty(2)) == current == []
