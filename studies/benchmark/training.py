"""One training of the benchmark, in a process of its own."""

import resource
import shutil
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.environment import environment
from ttt4rec import TTT4Rec
from ttt4rec.atomic_files import json_checksum, read_json, write_json
from ttt4rec.malloc import keep_freed_memory
from ttt4rec.recsys.data import DataError
from ttt4rec.recsys.data.split import Split
from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.training.evaluate import evaluate
from ttt4rec.recsys.training.report import describe_data
from ttt4rec.recsys.training.segments import Targets, evaluate_segments
from ttt4rec.recsys.training.train import EpochReport, fit

from ..runner import Result, load_split
from ..study import Run

LONGER = (20, 50, 100, 200, 500, 1000)
"""From how many items on a history is of a longer kind."""
SECONDS_FILE = "cpu_seconds.json"


def work(run: Run, data: Path, models: Path, told: Connection) -> None:
    """Train with one thread and tell of it: pairs of a kind and a value.

    ``data`` (their description), ``epoch`` (number and validation NDCG@10) again and again, at last ``done`` (the
    result). Or ``absent`` (why there are no data) or ``failed`` (why). If nobody listens any more, it ends.
    """
    try:
        torch.set_num_threads(1)
        keep_freed_memory()
        try:
            split = load_split(data, run.data)
        except DataError as error:
            told.send(("absent", str(error)))
            return
        told.send(("data", describe_data(split)))
        told.send(("done", train(run, split, models / name(run), told)))
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)
    except Exception as error:
        told.send(("failed", f"{type(error).__name__}: {error}"))


def name(run: Run) -> str:
    """A folder's name, of which every run has its own."""
    return f"{run.data.name}-{run.seed}-{json_checksum(run.key)[:12]}"


def train(run: Run, split: Split, folder: Path, told: Connection) -> Result:
    """Train, or go on where a kill stopped it; rank the test targets among all items and among new ones.

    Seconds are of the CPU, for fitting with its validations, those before an interruption with them.
    """
    torch.manual_seed(run.seed)
    model = TTT4Rec(run.config(split.histories.num_items))
    seconds = _earlier(folder)
    begin = time.process_time()

    def report(epoch: EpochReport) -> None:
        nonlocal begin
        begin, before = time.process_time(), begin
        seconds.append(begin - before)
        write_json(folder / SECONDS_FILE, {"seconds": seconds}, [])
        told.send(("epoch", (epoch.epoch, epoch.metrics["NDCG@10"])))

    epochs = fit(model, split, folder, run.options(), report=report)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    curve = [round(epoch.metrics["NDCG@10"], 6) for epoch in epochs]
    windows = evaluation_prefixes(split, "test", max_len=model.config.max_len)
    has_new = split.num_new_targets("test") > 0
    return run.key | {
        "data": describe_data(split),
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": curve,
        "best_epoch": curve.index(max(curve)),
        # a kill between an epoch's end and its note leaves one out
        "cpu_seconds": round(sum(seconds) / max(1, len(seconds)) * len(epochs), 2),
        "wall_seconds": round(sum(epoch.train_seconds + epoch.valid_seconds for epoch in epochs), 2),
        "peak_mib": round(peak),
        "test": evaluate(model, windows),
        "test, new items": evaluate(model, windows, exclude_seen=True) if has_new else None,
        "by history": by_history(model, split, exclude_seen=has_new),
        "environment": environment("cpu"),
    }


def by_history(model: TTT4Rec, split: Split, exclude_seen: bool) -> list[dict[str, Any]]:
    """Test metrics apart for short and long histories: from how many items on, targets, HR@10 and NDCG@10."""
    firsts = [0, *LONGER]

    def segmentation(_: Split, targets: Targets) -> tuple[list[str], Any]:
        return [*map(str, firsts)], np.searchsorted(LONGER, targets.positions, side="right")

    found = evaluate_segments(model, split, by={"history": segmentation}, cutoffs=(10,), exclude_seen=exclude_seen)
    return [
        {"from": int(part.name), "targets": part.targets}
        | {name: round(part.metrics[name].value, 6) for name in ("HR@10", "NDCG@10")}
        for part in found
    ]


def _earlier(folder: Path) -> list[float]:
    """Seconds of the epochs before an interruption."""
    path = folder / SECONDS_FILE
    found: list[Any] = read_json(path)["seconds"] if path.exists() else []
    return [float(x) for x in found]


def forget(run: Run, models: Path) -> None:
    """Remove the checkpoint of a run that has its result."""
    shutil.rmtree(models / name(run), ignore_errors=True)
