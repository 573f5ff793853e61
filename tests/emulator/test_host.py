"""What the host does at a launch: on tensors without values, which take a GPU's place, and under the emulator.

On such a device a look at a value is an error, and what is allocated and launched can depend on shapes alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from tests.emulator.test_emulation import emulate
from tests.support.checks import BACKBONES, INNERS
from tools.ptx_emulator.driver import emulated
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer, kernels
from ttt4rec.kernels import launch, segments
from ttt4rec.operators import OPERATORS, SCANS
from ttt4rec.operators.samples import Sizes

GPU = torch.device("meta")
SIZES = Sizes(B=2, L=37, H=2, D=16, K=8)
OPTIONS = {
    "linear_scan": ({}, {"packed": True, "segment": 2}),
    "mlp_scan": ({}, {"packed": True, "segment": 2}),
    "token_step": ({"inner": "linear"}, {"inner": "mlp"}),
    "projection": ({}, {"by_row": True}),
    "output": ({}, {"gated": False, "masked": False}),
}
SAMPLES = [
    (name, options)
    for name in OPERATORS
    if hasattr(kernels, OPERATORS[name].function) and "forgetting" not in name  # those go in blocks, or as in PyTorch
    for options in OPTIONS.get(name, ({},))
]


FORGETTING = [(f"{inner}_forgetting_scan", {}) for inner in INNERS]


class OnlyThere(TorchDispatchMode):
    """Every tensor that an operation takes or gives is on the GPU: nothing is moved there or back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        elsewhere = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor) and x.device != GPU]
        assert not elsewhere, f"{func} of tensors elsewhere: {elsewhere}"
        return result


class NoCopies(TorchFunctionMode):
    """No tensor is made of numbers of the host, which for a GPU is a copy that everything waits for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor), func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[launch.Launch, list[torch.device]]]:
    """Launches that were asked for and not made, each with the GPUs that were current ones then."""
    current: list[torch.device] = []
    made: list[tuple[launch.Launch, list[torch.device]]] = []

    @contextmanager
    def device(of: torch.device) -> Iterator[None]:
        current.append(of)
        yield
        current.pop()

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device == GPU))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch, "architecture", lambda: "sm_90")
    monkeypatch.setattr(launch.Launch, "run", lambda own: made.append((own, list(current))))
    return made


def call(name: str, options: dict[str, Any], sizes: Sizes = SIZES, dtype: torch.dtype = torch.bfloat16) -> None:
    """An operator and its backward, by the functions of the kernels."""
    operator = OPERATORS[name]
    given = operator.sample(sizes, dtype, GPU, **options)
    with NoCopies(), OnlyThere():
        results = getattr(kernels, operator.function)(given)
        if operator.backward_op is not None:
            getattr(kernels, f"{operator.function}_backward")(given, *operator.backward_sample(results))


@pytest.mark.parametrize(("name", "options"), SAMPLES)
@pytest.mark.parametrize("D", [16, 128])
def test_launches_depend_on_shapes_and_stay_on_the_device(name, options, D, launches):
    call(name, options, SIZES._replace(D=D))
    made_of = [made.kernel.fn.__name__ for made, _ in launches]
    if (name, D, options) == ("mlp_scan", 128, {}):  # which goes back by segments, as packed sequences do not
        assert set(made_of[1:]) == {f"{op}_kernel" for op in segments.OPS}
    else:
        assert len(made_of) == 1 + (OPERATORS[name].backward_op is not None)
    for made, current in launches:
        assert current == [GPU]
        tensors = [x for x in tree_leaves(made.arguments) if isinstance(x, Tensor)]
        assert tensors
        assert all(x.device == GPU for x in tensors)
        assert all(type(n) is int for n in made.grid)


@pytest.mark.parametrize(("name", "options"), FORGETTING)
def test_what_forgets_is_one_kernel_behind_a_small_one(name, options, launches):
    call(name, options)
    assert [made.kernel.fn.__name__.split("_")[1] for made, _ in launches] == ["forward", "backward"]
    assert {made.first.kernel.fn.__name__ for made, _ in launches} == {"decays_kernel"}


@pytest.mark.parametrize(
    ("dtype", "D", "K", "fused"),
    [
        (torch.bfloat16, 32, 16, True),
        (torch.bfloat16, 32, 17, False),
        (torch.bfloat16, 33, 16, False),
        (torch.float32, 16, 16, True),
        (torch.float32, 17, 16, False),
    ],
)
def test_how_far_mlp_fuses_forgetting(dtype, D, K, fused, launches):
    call("mlp_forgetting_scan", {}, SIZES._replace(D=D, K=K), dtype)
    assert (len(launches) == 2) == fused


def sizes_of_calls(D: int) -> Iterator[Sizes]:
    """Lengths and batches of which some are one and some multiples of 16, as Triton looks for."""
    for B, L in ((1, 1), (1, 37), (2, 16), (3, 33), (16, 48)):
        yield SIZES._replace(B=B, L=L, D=D)


def compilation(made: launch.Launch) -> tuple[str, str]:
    """A kernel, and what Triton tells its compilations by."""
    kernel = made.kernel
    if not isinstance(kernel, JITFunction):  # but an interpreted one
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    *_, binder = kernel.create_binder()
    _, specialization, options = binder(*made.arguments, **made.options(), debug=False)
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}", f"{specialization} {options}"


@pytest.mark.parametrize(("name", "options"), [*SAMPLES, *FORGETTING])
@pytest.mark.parametrize("D", [10, 16])
def test_one_compilation_serves_all_lengths_and_batches(name, options, D, launches):
    for sizes in sizes_of_calls(D):
        call(name, options, sizes)
    with emulated("sm_90"):
        compilations = {compilation(made) for made, _ in launches}
    assert len(compilations) == 1 + (OPERATORS[name].backward_op is not None), compilations


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("D", [10, 16])
@pytest.mark.parametrize("scan", ["scan", "forgetting_scan"])
def test_long_mini_batches_stay_on_the_device_and_compile_once(inner, scan, D, launches):
    """Without spans, which the host reads. What the first call compiles serves all lengths and batches."""
    compilations = []
    for B, L in ((2, 300), (1, 50), (1, 256), (3, 333), (16, 128)):
        launches.clear()
        call(f"{inner}_{scan}", {}, SIZES._replace(B=B, L=L, D=D, K=128))
        assert launches
        assert all(current == [GPU] for _, current in launches)
        with emulated("sm_90"):
            compilations.append({compilation(made) for made, _ in launches})
    assert set().union(*compilations) == compilations[0]


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("D", [10, 16])
def test_one_compilation_serves_initial_weights_states_and_missing_gradients(inner, D, launches):
    """Initial weights are expanded to all sequences, as are the zeros that stand for gradients nobody gave."""
    operator = SCANS[inner]
    for sizes in sizes_of_calls(D):
        scan = operator.sample(sizes, torch.bfloat16, GPU)
        first = scan._replace(weights=tuple(w[0].expand(w.shape) for w in scan.weights))
        for given in (scan, first):
            results = getattr(kernels, operator.function)(given)
            kept, grads = operator.backward_sample(results)
            missing = [x.new_zeros(1, 1, *x.shape[2:]).expand(x.shape) for x in grads]
            of_a_sum = [x.new_zeros(()).expand(x.shape) for x in grads]
            for own in (grads, missing, of_a_sum):
                getattr(kernels, f"{operator.function}_backward")(given, kept, own)
    with emulated("sm_90"):
        assert len({compilation(made) for made, _ in launches}) == 2


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_layers_stay_on_the_device(inner, backbone, launches):
    """Whole rows, padded ones, packed sequences, streams that go on, and single tokens."""
    with GPU:
        layer = TTTLayer(32, 2, inner=inner, backbone=backbone, mini_batch_size=8, backend="triton")
        x, mask = torch.randn(2, 21, 32), torch.ones(2, 21, dtype=torch.bool)
        bounds, slots = torch.arange(4), torch.arange(2)
    with NoCopies(), OnlyThere():
        y, state = layer(x, return_state=True)
        z = layer(x, mask=mask, state=state)
        packed = layer(x.view(1, 42, 32), cu_seqlens=bounds)
        torch.autograd.grad([y.sum() + z.sum() + packed.sum()], list(layer.parameters()), allow_unused=True)
        layer.step(x[:, 0], layer.make_pool(4), slots)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_models_stay_on_the_device(backbone, launches):
    options = {"backbone": backbone, "block_conv": backbone == "mamba", "mini_batch_size": 8, "dropout": 0.1}
    with GPU:
        model = TTT4Rec(TTT4RecConfig(num_items=30, width=32, num_heads=2, ffn_width=32, **options))
        ids, bounds, targets = torch.randint(1, 31, (2, 21)), torch.arange(4), torch.randint(1, 31, (42,))
        slots = torch.arange(2)
    for part in model.modules():
        if isinstance(part, TTTLayer):
            part.backend = "triton"
    with NoCopies(), OnlyThere():
        h, states = model(ids, return_states=True)
        more, packed = model(ids, states=states), model(ids.view(1, 42), cu_seqlens=bounds)
        loss = model.nll(h.flatten(0, 1), targets, "mean") + more.sum() + packed.sum()
        torch.autograd.grad(loss, list(model.parameters()))
        model.eval().step(ids[:, 0], model.make_pools(4), slots)


@pytest.mark.slow
def test_launches_that_are_executed():
    emulate("sm_90", "--emulate-findings", "list", "tests/emulator/emulated_host.py")
