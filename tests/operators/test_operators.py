"""The operators keep their contract on every backend, others can be added, and layers compile without a graph break."""

import importlib
import subprocess
import sys

import pytest
import torch

from tests.support.checks import INNERS, assert_close, assert_states_close, gradients, make_layer
from ttt4rec.eager import walk
from ttt4rec.operators import OPERATORS, backends
from ttt4rec.operators.samples import Sizes

OPTIONS = {  # of the samples, beside the usual
    "scan": [{}, {"packed": True}],
    "projection": [{}, {"by_row": True}],
    "convolution": [{}, {"plain": True, "lead": 2}],
    "output": [{}, {"gated": False, "masked": False}],
    "step": [{}, {"inner": "mlp"}],
    "full_softmax": [{}],
}
WITHOUT_KERNELS = {"full_softmax_nll", "full_softmax_total_nll"}


def marks(operator, backend, number):
    """On the kernels scans are slow but for the simplest; what has the mark of a GPU also runs there."""
    if "forgetting" in operator.name and (backend != "eager" or operator.name.startswith("mlp")):
        return pytest.mark.slow
    if backend != "triton":
        return ()
    slow = "scan" in operator.name and (number or operator.name.startswith("mlp"))
    return (pytest.mark.gpu, pytest.mark.slow) if slow else pytest.mark.gpu


def has(backend, function):
    return hasattr(importlib.import_module(backends.PACKAGES[backend]), function)


CASES = [
    pytest.param(
        operator, backend, options, id=f"{operator.name}-{backend}-{number}", marks=marks(operator, backend, number)
    )
    for operator in OPERATORS.values()
    for backend in backends.PACKAGES
    if has(backend, operator.function)
    for kind, choices in OPTIONS.items()
    if kind in operator.name
    for number, options in enumerate(choices)
]
layers = pytest.mark.parametrize(  # each takes seconds, and in the first two are both inner models and both backbones
    ("inner", "backbone"),
    [
        ("linear", "mamba"),
        ("mlp", "transformer"),
        pytest.param("linear", "transformer", marks=pytest.mark.slow),
        pytest.param("mlp", "mamba", marks=pytest.mark.slow),
    ],
)
DIFFERENTIABLE = [case for case in CASES if case.values[0].backward_op is not None]


def test_every_operator_is_held_to_its_contract_on_every_backend_that_has_it():
    assert {case.values[0].name for case in CASES} == OPERATORS.keys()
    for operator in OPERATORS.values():
        for backend in ("eager",) if operator.name in WITHOUT_KERNELS else ("eager", "triton"):
            assert has(backend, operator.function), operator.name
            assert operator.backward_op is None or has(backend, f"{operator.function}_backward")


def test_fresh_memory_in_the_eager_path_is_poisoned():
    assert walk.torch.empty(3).isnan().all()
    assert walk.torch.empty_like(torch.ones(3)).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()


def draw(operator, backend, options, dtype=None):
    """A sample; kernels and the compiled softmax know no float64."""
    narrow = backend == "triton" or (backend == "native" and operator.name in WITHOUT_KERNELS)
    dtype = dtype or (torch.float32 if narrow else torch.float64)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return operator.sample(dtype=dtype, device=device, **options)


@pytest.mark.parametrize(("operator", "backend", "options"), CASES)
def test_opcheck_forward(operator, backend, options):
    flat = operator.flatten(draw(operator, backend, options))
    if operator.backward_op is not None:
        flat = [x.requires_grad_() if is_differentiable(x) else x for x in flat]
    torch.library.opcheck(operator.op, (*flat, backend))


@pytest.mark.parametrize(("operator", "backend", "options"), DIFFERENTIABLE)
def test_opcheck_backward(operator, backend, options):
    given = draw(operator, backend, options)
    kept, grads = operator.backward_sample(operator(given, backend))
    torch.library.opcheck(operator.backward_op, (*operator.flatten(given), *kept, *grads, backend))


@pytest.mark.parametrize(("operator", "backend", "options"), CASES)
def test_fake_tensors_predict_shapes_dtypes_and_strides(operator, backend, options):
    flat = (*operator.flatten(draw(operator, backend, options, torch.bfloat16)), backend)
    real = assert_predicted(operator.op, flat)
    if operator.backward_op is not None:
        kept, grads = operator.backward_sample(real)
        assert_predicted(operator.backward_op, (*flat[:-1], *kept, *grads, backend))


def assert_predicted(op, flat):
    """What the operator returns, which is like what it returns of fake tensors."""
    real = op(*flat)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in flat))
    real, fake = ((x,) if isinstance(x, torch.Tensor) else x for x in (real, fake))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
    return real


def is_differentiable(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_arguments_survive_the_flat_schema(operator):
    """Also those of a few streams and of sizes that are no defaults."""
    given = operator.sample(Sizes(B=3, L=4, H=1, D=4, K=2))
    flat = operator.flatten(given)
    assert len(flat) == len(operator.slots)
    assert [isinstance(x, torch.Tensor) or x is None for x in flat] == [slot.is_tensor for slot in operator.slots]
    packed = operator.pack(flat)
    assert type(packed) is type(given)
    for a, b in zip(operator.flatten(packed), flat, strict=True):
        assert a is b
    constants = [field for field in given._fields if field not in {slot.field for slot in operator.slots}]
    of_scans = ["inner"] if operator.name.endswith("_scan") else []
    keeps_all = operator.name == "token_step" or (of_scans and "forgetting" not in operator.name)
    assert constants == of_scans + (["log_decay", "initial"] if keeps_all else [])
    assert all(getattr(packed, field) == getattr(given, field) for field in constants)


TOY_BACKEND = """
import ttt4rec.eager


def scaled(given):
    return (given.x * given.factor,)


def scaled_backward(given, kept, grads):
    return (grads[0] * given.factor,)


def linear_scan(scan):
    o, *rest = ttt4rec.eager.linear_scan(scan)
    return 2 * o, *rest


def refusal(name, arguments):
    return "likes no negative factors" if name == "scaled" and arguments.factor < 0 else None
"""
TOY_PROGRAM = """
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.checks import inner_inputs, run_inner
from ttt4rec import TTTLayer
from ttt4rec.operators import Operator, backends
from ttt4rec.operators.operator import Gradients


class Scaled(NamedTuple):
    x: Tensor
    factor: float


def fake(given, backend):
    return (torch.empty_like(given.x),)


def sample(sizes, draw):
    return Scaled(draw.normal(sizes.B, sizes.L), 3.0)


backends.PACKAGES["toy"] = "toy_backend"
scaled = Operator("scaled", Scaled, ("y",), fake, sample, gradients=Gradients(("x",), 1))
given = scaled.sample(dtype=torch.float64)
(y,) = scaled(given, "toy")
assert torch.equal(y, 3 * given.x)
torch.library.opcheck(scaled.op, (given.x.requires_grad_(), 3.0, "toy"))
torch.library.opcheck(scaled.backward_op, (given.x.detach(), 3.0, y, "toy"))
try:
    scaled(given._replace(factor=-1.0), "toy")
except RuntimeError as error:
    assert str(error) == "backend 'toy' likes no negative factors", error
else:
    raise AssertionError("not refused")
try:
    scaled(given, "eager")
except RuntimeError as error:
    assert "must compute scaled; none does" in str(error), error
else:
    raise AssertionError("not refused")

# a layer takes what the backend has from it, and the rest from eager
inputs = inner_inputs("linear", B=2, L=5, H=2, D=4, K=3)
assert torch.equal(run_inner("linear", inputs, backend="toy")[0], 2 * run_inner("linear", inputs, backend="eager")[0])
inputs = inner_inputs("mlp", B=2, L=5, H=2, D=4, K=3)
assert torch.equal(run_inner("mlp", inputs, backend="toy")[0], run_inner("mlp", inputs, backend="eager")[0])
layer = TTTLayer(8, 2, mini_batch_size=4, backend="toy")
layer(torch.randn(2, 6, 8)).sum().backward()
"""


@pytest.mark.slow
def test_a_toy_operator_and_a_toy_backend_are_added(tmp_path, pytestconfig):
    """In a process of its own: operators cannot be taken away again."""
    (tmp_path / "toy_backend.py").write_text(TOY_BACKEND)
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(pytestconfig.rootpath)!r}]\n{TOY_PROGRAM}"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@layers
def test_compile_gives_the_same_numbers_without_a_graph_break(inner, backbone):
    torch._dynamo.reset()
    layer = make_layer(inner, backbone)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    parameters = list(layer.parameters())
    for where in ({}, {"mask": mask}):
        y, y_compiled = layer(x, **where), compiled(x, **where)
        assert_close(y_compiled, y)
        for actual, expected in zip(gradients([y_compiled], parameters), gradients([y], parameters), strict=True):
            assert_close(actual, expected)


@layers
def test_compile_of_a_stream(inner, backbone):
    torch._dynamo.reset()
    layer = make_layer(inner, backbone)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        y, end = layer(x, return_state=True)
        state, outputs = None, []
        for piece in x.split(6, dim=1):
            out, state = compiled(piece, state=state, return_state=True)
            outputs.append(out)
    assert_close(torch.cat(outputs, 1), y)
    assert_states_close(state, end)


@pytest.mark.parametrize("inner", INNERS)
def test_compile_of_packed_sequences(inner):
    torch._dynamo.reset()
    layer = make_layer(inner, "mamba")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, cu_seqlens = torch.randn(1, 9, 8, dtype=torch.float64), torch.tensor([0, 5, 5, 9])
    assert_close(compiled(x, cu_seqlens=cu_seqlens), layer(x, cu_seqlens=cu_seqlens))
