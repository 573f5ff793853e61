"""The host's side of launches that are executed, to be run by ``pytest --emulate``; test_host.py does.

A layer's forward, backward and step: nothing is compiled or kept for a second call, nobody looks at values, and
``torch.compile`` makes the same launches.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt4rec import StatePool, TTTLayer
from ttt4rec.kernels import launch
from ttt4rec.layers import validation

LOOKS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
K = 8


class Watched(TorchDispatchMode):
    """Changes nothing; but under a mode no tables are kept from call to call, as they are for a CPU alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[launch.Launch]:
    """Every launch, with its tensors, which live as long as it."""
    made: list[launch.Launch] = []
    run = launch.Launch.run

    def noted(own: launch.Launch) -> None:
        made.append(own)
        run(own)

    monkeypatch.setattr(launch.Launch, "run", noted)
    return made


@pytest.fixture
def loaded() -> Iterator[list[str]]:
    """Names of kernels that Triton loads, compiled now or before."""
    names: list[str] = []

    def note(module: object, function: object, name: str, metadata_group: object, key: str) -> None:
        names.append(name)

    triton.knobs.runtime.kernel_load_start_hook.add(note)
    yield names
    triton.knobs.runtime.kernel_load_start_hook.remove(note)


@pytest.fixture
def layer() -> TTTLayer:
    return TTTLayer(32, 2, mini_batch_size=K, backend="triton")


def train(layer: Any, x: Tensor, bounds: Tensor | None = None) -> list[Tensor]:
    """Outputs and gradients, under autocast; of packed sequences where bounds are given."""
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x) if bounds is None else layer(x.flatten(0, 1)[None], cu_seqlens=bounds)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]


def step(layer: TTTLayer, x: Tensor, pool: StatePool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer.step(x[:, 0].detach(), pool, torch.arange(len(x)))


def pointers(made: list[launch.Launch]) -> set[int]:
    return {x.data_ptr() for own in made for x in tree_leaves(own.arguments) if isinstance(x, Tensor) and x.numel()}


def outline(made: list[launch.Launch]) -> list[Any]:
    """Kernels, grids and arguments, without their numbers."""
    return [
        (own.kernel, own.grid, [x.shape if isinstance(x, Tensor) else x for x in tree_leaves(own.arguments)])
        for own in made
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_a_second_call_finds_everything_compiled_and_keeps_nothing(packed, layer, launches, loaded, monkeypatch):
    """As a CUDA graph needs it: whatever the values, the same launches, in memory of the call's own."""
    inputs = [torch.randn(2, 21, 32, requires_grad=True) for _ in range(2)]
    bounds = [torch.tensor([0, n, 42]) if packed else None for n in (5, 30)]
    pools = [layer.make_pool(4) for _ in inputs]
    with Watched():
        train(layer, inputs[0], bounds[0]), step(layer, inputs[0], pools[0])
    first = list(launches)
    assert len(first) == 9
    launches.clear(), loaded.clear()

    def refuse(*_: Any) -> Any:
        raise AssertionError("a look at a tensor's values, for which a GPU would be waited for")

    with monkeypatch.context() as patch, Watched():
        patch.setattr(validation, "has_values", lambda _: False)  # a CPU's it looks at every time, a GPU's once
        for name in LOOKS:
            patch.setattr(torch.Tensor, name, refuse)
        results = [*train(layer, inputs[1], bounds[1]), step(layer, inputs[1], pools[1])]
    assert all(x.isfinite().all() for x in results)
    assert loaded == []
    assert outline(launches) == outline(first)
    assert pointers(launches) & pointers(first) <= {x.data_ptr() for x in layer.parameters()}


def test_compiled_layers_make_the_same_launches(layer, launches):
    x = torch.randn(2, 21, 32, requires_grad=True)
    expected, eager = train(layer, x), list(launches)
    launches.clear()
    torch._dynamo.reset()
    actual = train(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    assert outline(launches) == outline(eager)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
