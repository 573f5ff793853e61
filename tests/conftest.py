"""Every test starts from the same seed, on one thread, and no test may rely on what uninitialised memory holds.

Where there is no GPU, kernels run under Triton's interpreter, which is made faster.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from ttt4rec.eager import walk
from ttt4rec.native import inner_loop, step

settings.register_profile(
    "ttt4rec",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ttt4rec")
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # read when the kernels are imported
pytest_plugins = ("tools.ptx_emulator.plugin",)  # the option --emulate
torch.set_num_threads(1)  # operands are tiny; several threads would only wait for each other


class PoisonedTorch:
    """The module ``torch`` as the paths without a GPU see it in the tests: fresh memory holds NaN."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.empty(*args, **kwargs).fill_(float("nan"))

    @staticmethod
    def empty_like(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.empty_like(*args, **kwargs).fill_(float("nan"))


def interpreting(config: pytest.Config) -> bool:
    return os.environ["TRITON_INTERPRET"] == "1" and config.getoption("--emulate") is None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if interpreting(config):
        compiled = [item for item in items if item.get_closest_marker("compiled")]
        config.hook.pytest_deselected(items=compiled)
        items[:] = [item for item in items if item not in compiled]


@pytest.fixture(autouse=True, scope="session")
def _hasten(pytestconfig: pytest.Config) -> None:
    if interpreting(pytestconfig):
        from tests.support.interpreter import hasten  # imports Triton, which --emulate must come before

        hasten()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _poison() -> Iterator[None]:
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = new_empty(self, *args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "torch", PoisonedTorch())
        patch.setattr(inner_loop, "torch", PoisonedTorch())
        patch.setattr(step, "torch", PoisonedTorch())
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory of kernels, too, holds NaN, so that a result that is not written fails."""
    empty = torch.empty

    def poisoned(*shape: int | Sequence[int], **options: object) -> torch.Tensor:
        x = empty(*shape, **options)
        return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

    monkeypatch.setattr(torch, "empty", poisoned)
