"""What the losses cost by the size of the catalogue: 2,048 targets from hidden states to updated embeddings."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tools.environment import environment
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.models.losses import LOSSES, Loss
from ttt4rec.recsys.training.train import TrainOptions

CATALOGUES = (3_416, 10_000, 30_000, 100_000, 300_000)
TARGETS, HISTORY = 2_048, 64
MODEL = "TTT-MLP without loss"


def measure(catalogues: Sequence[int], rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """CPU seconds of a step of each loss and of the model, all in turn; the first round, a warm-up, is left out."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for num_items in catalogues:
        steps = {name: _step(name, num_items) for name in LOSSES} | {MODEL: _model_step()}
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds + 1):
            for name, step in steps.items():
                begin = time.process_time()
                step()
                taken[name].append(time.process_time() - begin)
        seconds[str(num_items)] = {name: x[1:] for name, x in taken.items()}
        say(f"{num_items:,} items: " + ", ".join(f"{n} {statistics.median(x):.3f} s" for n, x in taken.items()))
    return {"targets": TARGETS, "seconds": seconds, "environment": environment("cpu")}


def _model_step() -> Callable[[], None]:
    """Forward and backward of the default model for as many targets, from item ids to hidden states."""
    model = TTT4Rec(TTT4RecConfig(num_items=1_000))
    ids = torch.randint(1, 1_001, (1, TARGETS))
    cu_seqlens = torch.arange(0, TARGETS + 1, HISTORY)
    return lambda: model(ids, cu_seqlens=cu_seqlens).square().sum().backward()


def _step(name: Any, num_items: int) -> Callable[[], None]:
    """The part of a training step that grows with the catalogue, Adam's part in it included."""
    torch.manual_seed(0)
    model = TTT4Rec(TTT4RecConfig(num_items=num_items))
    options = TrainOptions()
    counts = torch.ones(num_items)
    loss = Loss.make(
        name,
        counts,
        num_negatives=options.num_negatives,
        popularity=options.popularity,
        calibration=options.calibration,
    )
    optimizer = torch.optim.Adam([model.embedding.weight])
    h = torch.randn(TARGETS, model.config.width, requires_grad=True)
    items = torch.randint(1, num_items + 1, (TARGETS,))

    def step() -> None:
        optimizer.zero_grad()
        (loss(model, h, items) / TARGETS).backward()
        optimizer.step()

    return step


def write(path: Path, say: Callable[[str], None]) -> None:
    """Measure, and keep the figures in a file."""
    path.write_text(json.dumps(measure(CATALOGUES, 5, say)) + "\n")


def table(costs: dict[str, Any]) -> str:
    """Markdown: milliseconds of each loss by catalogue and as a part of the full softmax's, and of the model."""
    head = [*LOSSES, MODEL]
    lines = [f"| items | {' | '.join(head)} |\n|{' --- |' * (len(head) + 1)}\n"]
    for num_items, taken in costs["seconds"].items():
        cells = []
        for name in head:
            share = statistics.median(a / b for a, b in zip(taken[name], taken["softmax"], strict=True))
            ratio = "" if name in ("softmax", MODEL) else f" ({share:.2f} ×)"
            cells.append(f"{statistics.median(taken[name]) * 1e3:,.0f}{ratio}")
        lines.append(f"| {int(num_items):,} | {' | '.join(cells)} |\n")
    return "".join(lines)
