"""Loss and ranks over a catalogue: the ways to compute them, contests of losses, and one way in a process of its own.

    python -m benchmarks.catalogue loss blocks 4096 1000000 64

prints seconds, the peak memory beyond what was held before (``extra``, bytes) and numbers that tell the result.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt4rec.models import full_softmax

from .measure import Call, resident

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def _dense_loss(h: Tensor, table: Tensor, items: Tensor) -> Tensor:
    return F.cross_entropy(h @ table[1:].T, items - 1)


def _library_loss(h: Tensor, table: Tensor, items: Tensor) -> Tensor:
    rows = 128 if len(table) < 500_000 else 64  # the fastest of 32, 64, 128 and 256
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return F.linear_cross_entropy(h, table[1:], items - 1, options=options)


def _dense_ranks(h: Tensor, table: Tensor, items: Tensor) -> Tensor:
    scores = h @ table[1:].T
    own = scores.gather(1, items[:, None] - 1)
    return 1 + (scores > own).sum(1).double() + ((scores == own).sum(1) - 1) / 2


LIBRARY = "PyTorch's chunked loss"
LOSSES: dict[str, Way] = {
    "all scores": _dense_loss,
    LIBRARY: _library_loss,
    "blocks": partial(full_softmax.nll, reduction="mean"),
}
RANKS: dict[str, Way] = {"all scores": _dense_ranks, "blocks": full_softmax.ranks}
if not hasattr(torch.nn, "LinearCrossEntropyOptions"):  # before 2.13
    del LOSSES[LIBRARY]


def case(targets: int, items: int, width: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a table and target items, drawn at random."""
    torch.manual_seed(0)
    h, table = torch.randn(targets, width, device=device), torch.randn(items + 1, width, device=device) * 0.3
    return h.requires_grad_(), table.requires_grad_(), torch.randint(1, items + 1, (targets,), device=device)


@dataclass(frozen=True)
class LossContest:
    """The loss and its gradients for ``targets`` hidden states of width 64 and ``items`` items."""

    targets: int
    items: int

    @property
    def name(self) -> str:
        return f"loss-n{self.items}-t{self.targets}"

    @property
    def size(self) -> dict[str, Any]:
        return {
            "operation": "loss",
            "table": f"loss, {self.targets:,} targets",
            "column": f"{self.items:,} items",
        } | vars(self)

    @property
    def weight(self) -> int:
        return 1

    def sides(self, device: str) -> list[str]:
        return list(LOSSES)

    def absent(self, device: str) -> dict[str, str]:
        return {} if LIBRARY in LOSSES else {LIBRARY: f"absent: needs torch 2.13; given {torch.__version__}"}

    def prepare(self, side: str, device: str, info: dict[str, Any]) -> Call:
        h, table, items = case(self.targets, self.items, 64, device)
        info |= {"dtype": "float32", "tokens": self.targets}
        return lambda: torch.autograd.grad(LOSSES[side](h, table, items), (h, table))


def loss_contests(size: str) -> list[LossContest]:
    """The contests of ``"small"``, for a CPU, or ``"full"``, for a GPU."""
    small, full = (
        [(512, 3_416), (512, 10_672), (512, 100_000)],
        [(2_048, 30_000), (4_096, 100_000), (4_096, 1_000_000)],
    )
    return [LossContest(*numbers) for numbers in (small if size == "small" else full)]


@contextmanager
def _peak_memory() -> Iterator[dict[str, int]]:
    """The most memory that the process holds within, beyond what it held before, in bytes."""
    measured, running, before = {"extra": 0}, True, resident()

    def watch() -> None:
        while running:
            measured["extra"] = max(measured["extra"], resident() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield measured
    finally:
        running = False
        watcher.join()


def main(what: str, way: str, targets: int, items: int, width: int) -> None:
    """Measure one way; ``exact`` is the loss of all scores in float64."""
    h, table, wanted = case(targets, items, width)
    if way == "exact":
        h, table = (x.detach().double().requires_grad_() for x in (h, table))
    if what == "ranks":  # whole numbers, whose products are exact, with thousands of ties
        h, table = (x.detach().mul(8).round() for x in (h, table))
    compute = RANKS[way] if what == "ranks" else LOSSES["all scores" if way == "exact" else way]
    with _peak_memory() as memory:
        begin = time.perf_counter()
        value = compute(h, table, wanted)
        if what == "loss":
            value.backward()
        seconds = time.perf_counter() - begin
    check = value.tolist() if what == "ranks" else [value.item()]
    for grad in (h.grad, table.grad) if what == "loss" else ():  # its size, and its shadow in a random direction
        grad = grad.double()
        check += [grad.norm().item(), 1 + (grad * torch.randn(grad.shape)).sum().item() / grad.norm().item()]
    print(json.dumps({"seconds": seconds, "check": check} | memory))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
