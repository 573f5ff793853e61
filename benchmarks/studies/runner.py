"""Runs of a study, one after the other; each leaves one line of JSON, and what has its line is not run again."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ttt4rec import TTT4Rec
from ttt4rec.recsys import build_histories, filter_k_core, load_interactions
from ttt4rec.recsys.evaluate import evaluate
from ttt4rec.recsys.report import describe_data
from ttt4rec.recsys.split import Split, split_by_ratio
from ttt4rec.recsys.train import EpochReport, fit
from ttt4rec.recsys.windows import evaluation_prefixes

from ..environment import environment
from .grid import Run

Result = dict[str, Any]


@cache
def load_split(folder: Path, dataset: str, ratios: tuple[int, int, int] = (3, 2, 5)) -> Split:
    """``FOLDER/NAME/NAME.inter.gz``, users and items with at least five interactions, split per user."""
    interactions = load_interactions(folder / dataset / f"{dataset}.inter.gz")
    return split_by_ratio(build_histories(filter_k_core(interactions, min_user=5, min_item=5)), ratios)


def read_results(path: Path) -> list[Result]:
    """The results that a file holds so far, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(path: Path, result: Result) -> None:
    """Add a result to a file's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def find(results: Iterable[Result], run: Run) -> Result | None:
    """A run's result, if there is one."""
    key = run.key
    return next((result for result in results if key.items() <= result.items()), None)


def run_all(runs: Iterable[Run], data: Path, path: Path, say: Callable[[str], None]) -> None:
    """Run what has no result yet; a kill loses no more than the run in progress."""
    runs = list(runs)
    for number, run in enumerate(runs, start=1):
        done = read_results(path)
        if find(done, run) is not None:
            continue
        left = [other for other in runs[number - 1 :] if find(done, other) is None]
        say(f"[{number}/{len(runs)}] {run.dataset}, {run.variant}, seed {run.seed}; {time_left(left, done)}")
        result = train(run, load_split(data, run.dataset), say)
        keep(path, result)


def train(run: Run, split: Split, say: Callable[[str], None]) -> Result:
    """Train once and rank the test targets; times are of fitting alone, with its validations."""
    torch.manual_seed(run.seed)
    model = TTT4Rec(run.config(split.histories.num_items))
    clocks = {"cpu_seconds": time.process_time, "wall_seconds": time.perf_counter}
    begin = {name: clock() for name, clock in clocks.items()}

    def report(epoch: EpochReport) -> None:
        took = time.perf_counter() - begin["wall_seconds"]
        say(f"  epoch {epoch.epoch}: validation NDCG@10 {epoch.metrics['NDCG@10']:.4f}, {took:.0f} s")

    with tempfile.TemporaryDirectory() as folder:
        epochs = fit(model, split, folder, run.options(), report=report)
    times = {name: round(clock() - begin[name], 2) for name, clock in clocks.items()}
    curve = [round(epoch.metrics["NDCG@10"], 6) for epoch in epochs]
    return run.key | {
        "data": describe_data(split),
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation": curve,
        "best_epoch": curve.index(max(curve)),
        **times,
        "test": evaluate(model, evaluation_prefixes(split, "test", max_len=model.config.max_len)),
        "environment": environment("cpu"),
    }


def time_left(left: list[Run], done: list[Result]) -> str:
    """What the runs still to come will take, going by those of the same data and settings, or of the same data."""
    seconds, unknown = 0.0, 0
    for run in left:
        same_data = [result for result in done if result["dataset"] == run.dataset]
        like = [result for result in same_data if result["settings"] == run.key["settings"]] or same_data
        unknown += not like
        seconds += sum(result["wall_seconds"] for result in like) / max(1, len(like))
    rest = f" and {unknown} more of which nothing is known yet" if unknown else ""
    return f"{len(left)} to go, about {seconds / 60:.0f} min for {len(left) - unknown} of them{rest}"
