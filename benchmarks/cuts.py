"""Pairs of cuts of a kernel, timed on a GPU beside what the cycle model predicts of them.

``python -m benchmarks.cuts FILE`` takes about two minutes on a GPU. It times both cuts of every pair in turn, prints
the ratio of their times beside the predicted one, and writes both to a JSON file with device, versions, date and
commit. Predictions are those of ``cut_predictions.json``; ``--predict`` makes them anew with the installed Triton,
which needs no GPU.
"""

import argparse
import contextlib
import datetime
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

Blocks = tuple[int, int, int, int]
"""Warps, stages, heads and chunks."""
PREDICTIONS = Path(__file__).parent / "cut_predictions.json"
ARCHITECTURE, PROCESSORS, DTYPE = "sm_90", 132, "bf16"
"""Predictions are for an H200."""
SURE = 1.1
"""Of predicted ratios nearer to one the order is not counted: the model errs by more."""
ROUNDS = 9
Timer = Callable[[Callable[[], None]], float]
"""How long a call takes, in seconds."""


class Pair(NamedTuple):
    """A kernel, and the cuts that the launch table had and has for it."""

    op: str
    head_dim: int
    mini_batch_size: int
    before: Blocks
    after: Blocks

    @property
    def shape(self) -> str:
        """As ``tools.tune`` names it."""
        return f"{self.op}:{ARCHITECTURE}:{self.head_dim}:{self.mini_batch_size}:{DTYPE}"


PAIRS = (  # the least sure first: where the model and the older count of instructions disagree most
    Pair("linear_backward", 64, 16, (8, 1, 1, 1), (4, 3, 1, 1)),
    Pair("linear_backward", 32, 16, (4, 1, 1, 1), (2, 3, 1, 1)),
    Pair("linear_backward", 16, 8, (1, 1, 2, 1), (1, 3, 2, 1)),
    Pair("linear_backward", 16, 16, (1, 1, 1, 1), (1, 3, 1, 1)),
    Pair("linear_forward", 64, 16, (4, 2, 1, 1), (4, 3, 1, 1)),
    Pair("linear_forward", 16, 8, (1, 2, 2, 1), (1, 3, 2, 1)),
    Pair("linear_forward", 32, 8, (2, 2, 2, 1), (1, 3, 2, 1)),
    Pair("mlp_forward", 16, 8, (4, 2, 2, 1), (2, 3, 2, 1)),
    Pair("mlp_forward", 32, 16, (8, 2, 1, 1), (4, 2, 1, 1)),
    Pair("mlp_backward", 16, 8, (4, 1, 2, 1), (2, 2, 2, 1)),
    Pair("mlp_backward", 32, 16, (8, 1, 1, 1), (4, 2, 1, 1)),
    Pair("mlp_backward", 64, 16, (4, 1, 1, 8), (4, 2, 1, 4)),
)


class Filling(NamedTuple):
    """How many sequences of how many tokens, of four heads, are read at once."""

    name: str
    sequences: int
    tokens: int
    heads: int = 4


FEW = Filling("few", PROCESSORS // 4, 1024)
"""A head on each multiprocessor: what binds is the chain of mini-batches."""
FULL = Filling("full", 8 * PROCESSORS, 512)
"""32 heads a multiprocessor, as many as fit or more."""


class Timed(NamedTuple):
    """Both cuts of a pair at one filling: times of one before over one after, predicted and measured."""

    shape: str
    filling: str
    before: Blocks
    after: Blocks
    predicted: float
    measured: float
    seconds_before: float  # median of a call
    seconds_after: float

    @property
    def sure(self) -> bool:
        """Whether the model's order counts."""
        return max(self.predicted, 1 / self.predicted) >= SURE

    @property
    def right(self) -> bool:
        """Whether the order is the predicted one."""
        return (self.predicted > 1) == (self.measured > 1)

    def __str__(self) -> str:
        cuts = " → ".join("×".join(map(str, cut)) for cut in (self.before, self.after))
        order = ("right" if self.right else "WRONG") if self.sure else "-"
        return f"{self.shape:34} {self.filling:5} {cuts:20} {self.predicted:9.2f} {self.measured:9.2f}  {order}"


def launch_of(pair: Pair, cut: Blocks, filling: Filling, device: str) -> Callable[[], None]:
    """What runs a kernel, cut like this, on random tokens."""
    from tools.aot import DTYPES, KERNELS, cut_as
    from ttt4rec.kernels import launch
    from ttt4rec.operators.samples import Sizes

    operator, prepare, options = KERNELS[pair.op]
    sizes = Sizes(filling.sequences, filling.tokens, filling.heads, pair.head_dim, pair.mini_batch_size)
    given = operator.sample(sizes, DTYPES[DTYPE], device, **options)
    with cut_as(launch.Blocks(*cut)):
        if not pair.op.endswith("backward"):
            return prepare(given)[-1].run  # type: ignore[no-any-return]
        forward = KERNELS[pair.op.replace("backward", "forward")][1]
    results, prepared = forward(given)
    prepared.run()
    kept, grads = operator.backward_sample(results)
    with cut_as(launch.Blocks(*cut)):
        return prepare(given, kept, grads)[-1].run  # type: ignore[no-any-return]


def measure(
    pairs: Sequence[Pair],
    fillings: Sequence[Filling],
    predicted: dict[str, Any],
    timer: Timer,
    make: Callable[[Pair, Blocks, Filling], Callable[[], None]],
) -> Iterator[Timed]:
    """Time both cuts of every pair in turn, round after round; a ratio is the median of the rounds' ratios."""
    for pair in pairs:
        for filling in fillings:
            before, after = (make(pair, cut, filling) for cut in (pair.before, pair.after))
            for call in (before, after):
                timer(call)
            times = [(timer(before), timer(after)) for _ in range(ROUNDS)]
            ratio = prediction(predicted, pair.shape, pair.before, filling) / prediction(
                predicted, pair.shape, pair.after, filling
            )
            seconds = (statistics.median(column) for column in zip(*times, strict=True))
            measured = statistics.median(a / b for a, b in times)
            yield Timed(pair.shape, filling.name, pair.before, pair.after, ratio, measured, *seconds)
            del before, after  # and their tokens, before those of the next


def prediction(predicted: dict[str, Any], shape: str, cut: Blocks, filling: Filling) -> float:
    """What is predicted for a cut: ns a token of a sequence if few run, else ps a token and head."""
    return float(predicted[f"{shape} {'×'.join(map(str, cut))}"][filling.name])


def on_gpu(call: Callable[[], None]) -> float:
    """Seconds between two events around a call, the device idle before."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def predictions(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Of every cut of all pairs, by the installed Triton; no GPU is needed."""
    from tools.aot import cut_as
    from tools.tune import cut_of
    from ttt4rec.kernels import launch

    found = {}
    for pair in pairs:
        for cut in (pair.before, pair.after):
            with cut_as(launch.Blocks(*cut)):
                of = cut_of(pair.shape, launch.Blocks(*cut))
            if of is None:
                raise ValueError(f"a program of every cut must fit a multiprocessor; given {pair.shape} {cut}")
            found[f"{pair.shape} {'×'.join(map(str, cut))}"] = {"few": round(of.few, 1), "full": round(of.full, 1)}
    return found


def score(timed: Sequence[Timed]) -> str:
    """How often the model was right, in a sentence."""
    sure = [t for t in timed if t.sure]
    right = sum(t.right for t in sure)
    off = statistics.median(abs(math.log(t.measured / t.predicted)) for t in timed)
    return (
        f"The predicted order was right in {right} of {len(sure)} pairs predicted to differ by {SURE - 1:.0%} or more; "
        f"ratios were off by a factor of {math.exp(off):.2f} (median of {len(timed)})."
    )


def result(timed: Sequence[Timed], triton: str, beside: str) -> dict[str, Any]:
    """What is written: where, when, of what, and every pair; ``beside`` is the Triton whose code was predicted."""
    root = Path(__file__).parents[1]
    described = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton,
        "predicted with triton": beside,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": subprocess.run(described, cwd=root, capture_output=True, text=True, check=False).stdout.strip(),
        "score": score(timed),
        "pairs": [{**t._asdict(), "sure": t.sure, "right": t.right} for t in timed],
    }


def compile_all(pairs: Sequence[Pair], workers: int) -> None:
    """Fill Triton's cache, so that the timing waits for no compiler: each pair in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cuts", "--compile"]
    with ThreadPoolExecutor(workers) as pool:
        runs = pool.map(lambda i: subprocess.run([*command, str(i)], check=False), range(len(pairs)))
        failed = [pair.shape for pair, run in zip(pairs, runs, strict=True) if run.returncode]
    if failed:
        print(f"could not be compiled beforehand: {', '.join(failed)}", file=sys.stderr)


def known_predictions(triton: str) -> tuple[str, dict[str, Any]]:
    """Those of the installed Triton, or of the newest there is, and of which they are."""
    every = json.loads(PREDICTIONS.read_text())
    version = triton if triton in every else max(every, key=lambda v: tuple(map(int, v.split("."))))
    return version, every[version]


def main() -> None:
    """Predict, compile, or time."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="the JSON file to write")
    parser.add_argument("--predict", action="store_true", help="make the predictions of the installed Triton anew")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)  # the number of a pair
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    given = parser.parse_args()
    if given.predict:
        every = json.loads(PREDICTIONS.read_text()) if PREDICTIONS.exists() else {}
        every[triton.__version__] = predictions(PAIRS)
        PREDICTIONS.write_text(json.dumps(every, indent=1, ensure_ascii=False) + "\n")
        return
    if not torch.cuda.is_available():
        parser.error("timing needs a GPU; --predict does not")
    if given.compile is not None:
        pair = PAIRS[given.compile]
        for cut in (pair.before, pair.after):
            launch_of(pair, cut, FEW._replace(sequences=1), "cuda")()
        return
    version, predicted = known_predictions(triton.__version__)
    compile_all(PAIRS, given.workers)
    print(f"{'kernel':34} {'':5} {'before → after':20} {'predicted':>9} {'measured':>9}  order")
    timed = []
    with contextlib.suppress(KeyboardInterrupt):
        for each in measure(PAIRS, (FEW, FULL), predicted, on_gpu, lambda *of: launch_of(*of, "cuda")):
            print(each, flush=True)
            timed.append(each)
            if given.file is not None:
                written = result(timed, triton.__version__, version)
                given.file.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    print(score(timed))


if __name__ == "__main__":
    main()
