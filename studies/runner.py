"""Runs of a study, one after the other; each leaves one line of JSON, and what has its line is not run again."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.environment import environment
from ttt4rec import TTT4Rec
from ttt4rec.atomic_files import json_checksum
from ttt4rec.recsys import build_histories, filter_k_core, load_interactions
from ttt4rec.recsys.data import DataError
from ttt4rec.recsys.data.public import PUBLIC, load_public
from ttt4rec.recsys.data.split import Split, split_by_ratio, split_by_time, split_leave_one_out
from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.training.evaluate import evaluate
from ttt4rec.recsys.training.report import describe_data
from ttt4rec.recsys.training.train import EpochReport, fit

from .study import FEW_TRAIN, LEAVE_ONE_OUT, TEMPORAL, Data, Run

Result = dict[str, Any]


@cache
def load_split(folder: Path, data: Data) -> Split:
    """``FOLDER/NAME/NAME.inter.gz``, or else the publisher's file in that folder, filtered and split.

    Raises:
        DataError: there is neither.
    """
    path = folder / data.name / f"{data.name}.inter.gz"
    if data.name in PUBLIC and not path.exists():
        interactions = load_public(data.name, path.parent)
    else:
        interactions = load_interactions(path)
    least = {"min_user": data.min_user, "min_item": 5}
    if data.split == TEMPORAL:
        return split_by_time(interactions, (8, 1, 1), **least)[0]
    histories = build_histories(filter_k_core(interactions, **least))
    if data.split == LEAVE_ONE_OUT:
        return split_leave_one_out(histories)
    if found := re.fullmatch(FEW_TRAIN.format(r"(\d+)"), data.split):
        return few_train(split_leave_one_out(histories), int(found[1]))
    train, valid, test = map(int, data.split.split(":"))
    return split_by_ratio(histories, (train, valid, test))


def few_train(split: Split, percent: int) -> Split:
    """A split of which a random part of the users trains, always the same ones; all validate and test.

    The users of a smaller part are among those of a larger one.
    """
    count = max(1, split.histories.num_users * percent // 100)
    trains = np.zeros(split.histories.num_users, dtype=bool)
    trains[np.random.default_rng(0).permutation(len(trains))[:count]] = True
    return replace(split, train_begin=np.where(trains, split.train_begin, split.train_end))


def read_results(path: Path) -> list[Result]:
    """The results that a file holds so far, none if there is no file; a line that a kill left unfinished is none.

    Raises:
        ValueError: a line is damaged.
    """
    lines = _finished(path).splitlines() if path.exists() else []
    return [_result(path, number, line) for number, line in enumerate(lines, start=1)]


def _result(path: Path, number: int, line: bytes) -> Result:
    """What stands in a line; those of older versions have no checksum."""
    try:
        result = json.loads(line)
        checksum = result.pop("checksum", None)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} line {number} is damaged: {error}") from error
    if checksum is not None and checksum != json_checksum(result):
        raise ValueError(f"{path} line {number} is damaged: its checksum is wrong; delete it to run it again")
    return result


def keep(path: Path, result: Result) -> None:
    """Add a result to a file's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(len(_finished(path)))
        marked = result | {"checksum": json_checksum(result)}
        file.write(f"{json.dumps(marked)}\n".encode())


def _finished(path: Path) -> bytes:
    """A file's finished lines."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def find(results: Iterable[Result], run: Run) -> Result | None:
    """A run's result, if there is one."""
    key = run.key
    return next((result for result in results if key.items() <= result.items()), None)


def run_all(runs: Iterable[Run], folder: Path, path: Path, say: Callable[[str], None], device: str = "cpu") -> None:
    """Run what has no result yet; a kill loses no more than the run in progress. What has no data is passed over.

    Raises:
        ValueError: results of the same name were of other data.
    """
    runs, without_data = list(runs), set[str]()
    if known := sum(find(read_results(path), run) is not None for run in runs):
        say(f"{known} of {len(runs)} trainings are in {path} already; those of another file (--results) would be new")
    for number, run in enumerate(runs, start=1):
        done = read_results(path)
        if run.data.name in without_data or find(done, run) is not None:
            continue
        try:
            split = load_split(folder, run.data)
        except DataError as error:
            without_data.add(run.data.name)
            say(f"passed over: {error}")
            continue
        check_same_data(done, run, split)
        left = [other for other in runs[number - 1 :] if find(done, other) is None]
        say(f"[{number}/{len(runs)}] {run.data.title}, {run.variant}, seed {run.seed}; {time_left(left, done)}")
        keep(path, train(run, split, say, device))


def check_same_data(done: Iterable[Result], run: Run, split: Split) -> None:
    """Refuse to add to a table what was trained on other data than its rows: ValueError."""
    check_same_description(done, run, describe_data(split))


def check_same_description(done: Iterable[Result], run: Run, given: dict[str, Any]) -> None:
    """The same, of the data's description."""
    for result in done:
        if run.data.key.items() <= result.items() and not result["data"].items() <= given.items():
            raise ValueError(
                f"{run.data.title}: data must be those of the results so far, {result['data']}; given {given}; "
                "give --results another file"
            )


def train(run: Run, split: Split, say: Callable[[str], None], device: str = "cpu") -> Result:
    """Train once and rank the test targets; times are of fitting alone, with its validations."""
    torch.manual_seed(run.seed)
    model = TTT4Rec(run.config(split.histories.num_items)).to(device)
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
        "environment": environment(device),
    }


def time_left(left: list[Run], done: list[Result]) -> str:
    """What the runs still to come will take, going by those of the same data and settings, or of the same data."""
    seconds, unknown = 0.0, 0
    for run in left:
        same_data = [r for r in done if (r["dataset"], r["split"]) == (run.data.name, run.data.split)]
        like = [result for result in same_data if result["settings"] == run.key["settings"]] or same_data
        unknown += not like
        seconds += sum(result["wall_seconds"] for result in like) / max(1, len(like))
    rest = f" and {unknown} more of which nothing is known yet" if unknown else ""
    return f"{len(left)} to go, about {seconds / 60:.0f} min for {len(left) - unknown} of them{rest}"
