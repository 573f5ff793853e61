"""What is measured: contests, each one operation at one size, in which all sides take turns."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .measure import Call, NotMeasurableError, tensor_bytes
from .sides import absences, present, side_makers

FORWARD, TRAINING, PREFILL, STEP = "forward", "forward and backward", "prefill", "one-token step"


class Contest(Protocol):
    """One operation at one size."""

    @property
    def name(self) -> str:
        """Part of the test's name."""
        ...

    @property
    def size(self) -> dict[str, Any]:
        """What the report groups by: ``operation``, and what ``column`` of which ``table`` it is."""
        ...

    @property
    def weight(self) -> int:
        """Its share of the time, relative to the others'."""
        ...

    def sides(self, device: str) -> list[str]:
        """Labels of those that take part."""
        ...

    def absent(self, device: str) -> dict[str, str]:
        """Labels of those that do not, and why."""
        ...

    def prepare(self, side: str, device: str, info: dict[str, Any]) -> Call:
        """Build a side's module and data; write what is known about its cost into info."""
        ...


@dataclass(frozen=True)
class MixerContest:
    """One operation of sequence mixers: ``batch`` sequences of ``length`` tokens; a step comes after ``length``."""

    operation: str
    width: int
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.operation.replace(' ', '_')}-w{self.width}-b{self.batch}-l{self.length}"

    @property
    def size(self) -> dict[str, Any]:
        after = "after " if self.operation == STEP else ""
        column = f"{self.batch} × {after}{self.length:,}"
        return {"table": f"{self.operation}, width {self.width}", "column": column} | vars(self)

    @property
    def weight(self) -> int:
        return {STEP: 1, PREFILL: 1, FORWARD: 2, TRAINING: 4}[self.operation]

    def sides(self, device: str) -> list[str]:
        return list(present(device))

    def absent(self, device: str) -> dict[str, str]:
        return {side: f"absent: {why}" for side, why in absences(device).items()}

    def prepare(self, side: str, device: str, info: dict[str, Any]) -> Call:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        mixer = side_makers()[side](self.width).to(device, dtype)
        x = torch.randn(self.batch, self.length, self.width, device=device, dtype=dtype)
        parameters = sum(p.numel() for p in mixer.parameters())
        tokens = self.batch * (1 if self.operation == STEP else self.length)
        passes, activations, weights = (3, 5, 3) if self.operation == TRAINING else (1, 2, 1)
        info |= {
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "parameters": parameters,
            "flops": passes * tokens * mixer.flops(self.length),
            # Read and written at least once: x and y and their gradients, x again in the backward; weights likewise.
            "bytes": (activations * tokens * self.width + weights * parameters) * x.element_size(),
        }
        if self.operation == TRAINING:
            x.requires_grad_()
            return partial(_forward_backward, mixer, x, torch.randn_like(x))
        mixer.eval()
        if self.operation == FORWARD:
            return partial(_without_gradients, mixer, x)
        if mixer.no_stream:
            raise NotMeasurableError(mixer.no_stream)
        if self.operation == PREFILL:
            return partial(_without_gradients, mixer.prefill, x)
        state = _without_gradients(mixer.prefill, x)
        info["state_bytes"] = tensor_bytes(state)
        info["bytes"] += info["state_bytes"]
        return partial(_without_gradients, mixer.step, torch.randn_like(x[:, :1]), state)


def _without_gradients(function: Any, *arguments: Any) -> Any:
    with torch.no_grad():
        return function(*arguments)


def _forward_backward(mixer: torch.nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    mixer.zero_grad()
    x.grad = None
    y = mixer(x)
    y.backward(grad)
    return y


def mixer_contests(size: str) -> list[MixerContest]:
    """The contests of ``"small"``, for a CPU, or ``"full"``, for a GPU."""
    shapes = SMALL if size == "small" else FULL
    return [MixerContest(operation, *shape) for operation, group in shapes.items() for shape in group]


# Width, batch, length. Rows of equal width and tokens show growth with the length; of equal length, with the batch.
# What is quick comes first and leaves its time to what follows.
_SMALL_PASSES = [
    (64, 1, 50), (64, 32, 50), (64, 128, 50), (64, 8, 200), (64, 1, 1600),
    (768, 1, 256), (2048, 1, 64),
]  # fmt: skip
SMALL = {
    STEP: [(64, 1, 50), (64, 1, 1600), (64, 32, 50), (768, 1, 256), (2048, 1, 64)],
    PREFILL: [(64, 1, 50), (64, 1, 1600), (768, 1, 256)],
    FORWARD: _SMALL_PASSES,
    TRAINING: _SMALL_PASSES,
}
_FULL_PASSES = [
    (64, 1, 50), (64, 64, 50), (64, 2048, 50), (64, 8192, 50),
    (64, 512, 200), (64, 100, 1024), (64, 12, 8192), (64, 3, 32768),
    (768, 64, 512), (768, 16, 2048), (768, 4, 8192), (768, 1, 32768),
    (2048, 8, 2048), (2048, 1, 16384),
]  # fmt: skip
FULL = {
    STEP: [(64, 1, 50), (64, 2048, 50), (768, 1, 2048), (768, 1, 32768), (768, 64, 2048), (2048, 1, 2048)],
    PREFILL: [(64, 1, 50), (768, 1, 2048), (768, 1, 8192), (768, 1, 32768), (2048, 1, 2048)],
    FORWARD: _FULL_PASSES,
    TRAINING: _FULL_PASSES,
}
