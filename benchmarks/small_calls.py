"""What small calls take on a CPU, beside their rivals: python -m benchmarks.small_calls FILE.json

A layer's step beside a GRU's, a whole model's step, a layer forwards and back beside attention, one that forgets beside
one that does not, TTT-MLP's share of the machine's peak, a request to an online recommender; and, with
``--against FOLDER``, a training step beside that of another checkout of this repository. Sides take turns; a ratio is
the median of the rounds' ratios.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tools.environment import environment, load_average
from ttt4rec import TTTLayer
from ttt4rec.heap import keep_freed_memory
from ttt4rec.layers.forgetting import GATES
from ttt4rec.native import build, whole_layer
from ttt4rec.native.calls import run

from . import online
from .another_checkout import caller
from .contests import STEP, TRAINING, MixerContest
from .measure import Call, take_turns, timed
from .recommenders import TRAINING_STEP, RecommenderContest

OURS = ("TTT-Linear (Transformer)", "TTT-MLP (Transformer)")
RIVALS = {STEP: ("GRU",), TRAINING: ("attention", "attention without rotation")}
SHAPES = {STEP: ((1, 50), (32, 50)), TRAINING: ((1, 50), (32, 50))}
PAPER = (256, 50)
"""Sequences and tokens of the shape at which the share of the peak is told."""
USERS = 10_000


def turns(sides: Mapping[str, Callable[[], Call]], seconds: float) -> dict[str, Any]:
    """Milliseconds of each side, and its ratio to each of the others."""
    outcomes = take_turns(sides, "cpu", seconds)
    for outcome in outcomes.values():
        if outcome.error is not None:
            raise outcome.error
    times = {label: outcome.seconds for label, outcome in outcomes.items() if outcome.seconds}
    result: dict[str, Any] = {label: outcome.why_not for label, outcome in outcomes.items() if not outcome.seconds}
    for label, own in times.items():
        ratios = {
            other: round(statistics.median(a / b for a, b in zip(own, theirs, strict=True)), 3)
            for other, theirs in times.items()
            if other != label
        }
        result[label] = {"ms": round(1e3 * statistics.median(own), 4), "least_ms": round(1e3 * min(own), 4)} | ratios
    return result


def mixers(operation: str, batch: int, length: int, seconds: float) -> dict[str, Any]:
    """A contest of layers of width 64."""
    contest = MixerContest(operation, 64, batch, length)
    sides = (*OURS, *RIVALS[operation])
    return turns({side: partial(contest.prepare, side, "cpu", {}) for side in sides}, seconds)


def decays(inner: str, batch: int, length: int, seconds: float) -> dict[str, Any]:
    """Forward and backward of a layer of width 64 that forgets, beside one that does not."""

    def prepare(forget: str) -> Call:
        layer = TTTLayer(64, 4, inner=inner, mini_batch_size=8, forget=forget)
        x, dy = torch.randn(batch, length, 64, requires_grad=True), torch.randn(batch, length, 64)
        inputs = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), inputs, dy)

    return turns({forget: partial(prepare, forget) for forget in GATES}, seconds)


def model_steps(seconds: float) -> dict[str, Any]:
    """One event of one user through the whole published model."""

    def prepare(inner: str) -> Call:
        model = online.make_model(inner, 1000).eval()
        pools, slots, ids = model.make_pools(1), torch.zeros(1, dtype=torch.int64), torch.tensor([7])
        return torch.no_grad()(partial(model.step, ids, pools, slots))

    return turns({inner: partial(prepare, inner) for inner in ("linear", "mlp")}, seconds)


def peak_flops() -> float:
    """FLOPs a second that one core's multiply-adds reach, by a product whose right side stays in its first cache."""
    rows, size, repeats = 512, 64, 200
    a, b, out = torch.rand(rows, size), torch.rand(size, size), torch.empty(rows, size)
    call = whole_layer.ProductCall(rows, size, size, size, 1, size, size, *(x.data_ptr() for x in (a, b, out)))
    multiply = build.library("linear", 16, 0, "float", build.PASS).ttt_product
    work = partial(run, multiply, call, rows // whole_layer.GROUP_OF_ROWS, 0)
    return 2 * rows * size**2 / min(timed(work, "cpu", repeats) for _ in range(20))


def share_of_peak(side: str) -> dict[str, float]:
    """Of a layer's forward and backward by one thread, its FLOPs being those that PyTorch's counter is told."""
    call = MixerContest(TRAINING, 64, *PAPER).prepare(side, "cpu", {})
    with FlopCounterMode(display=False) as counter:
        call()
    call()
    rounds = [(timed(call, "cpu"), peak_flops()) for _ in range(9)]
    shares = [counter.get_total_flops() / seconds / peak for seconds, peak in rounds]
    return {
        "share": round(statistics.median(shares), 3),
        "ms": round(1e3 * statistics.median(seconds for seconds, _ in rounds), 2),
        "peak_gflops": round(statistics.median(peak for _, peak in rounds) / 1e9, 1),
    }


def requests(users: int = USERS, num_items: int = online.NUM_ITEMS, rounds: int = 300) -> list[dict[str, Any]]:
    """An event and recommendations, of one and of 64 users a request."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.db"
        online.write_histories(log, users, num_items)
        return [
            online.measure(log, inner, users, 1.0, num_items=num_items, rounds=rounds) for inner in ("mlp", "linear")
        ]


def training_steps(folder: Path, threads: int, seconds: float, items: int = 10_000) -> dict[str, Any]:
    """Of this checkout and of another one."""
    contest, result = RecommenderContest(TRAINING_STEP, items, 80), {}
    for side in ("TTT4Rec, TTT-MLP", "TTT4Rec, TTT-Linear"):
        both = {"here": partial(contest.prepare, side, "cpu", {})}
        both["there"] = partial(caller, folder, threads, contest.name, side)
        result[side] = turns(both, seconds)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each contest; default: 10")
    parser.add_argument("--against", type=Path, help="another checkout, whose training step to compare")
    args = parser.parse_args(argv)
    keep_freed_memory()
    found: dict[str, Any] = {"environment": environment("cpu"), "load_average": [load_average()]}

    def note(name: str, value: Any) -> None:
        found[name] = value
        print(name, json.dumps(value, indent=1), flush=True)

    for threads in args.threads:
        torch.set_num_threads(threads)
        for operation, shapes in SHAPES.items():
            for shape in shapes:
                measured = mixers(operation, *shape, args.seconds)
                note(f"{operation}, {shape[0]} x {shape[1]}, {threads} threads", measured)
        for inner, shape in product(("linear", "mlp"), SHAPES[TRAINING]):
            measured = decays(inner, *shape, args.seconds)
            note(f"decays, {inner}, {shape[0]} x {shape[1]}, {threads} threads", measured)
        note(f"model step, {threads} threads", model_steps(args.seconds))
        if args.against is not None:
            note(f"training step, {threads} threads", training_steps(args.against, threads, args.seconds))
    torch.set_num_threads(1)
    note("share of peak", {side: share_of_peak(side) for side in OURS})
    note("requests", requests())
    found["load_average"].append(load_average())
    args.file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
