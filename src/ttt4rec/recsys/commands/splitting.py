"""How a run splits its data, and how it has done."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ttt4rec.atomic_files import read_json
from ttt4rec.recsys.data import Histories, Interactions, build_histories, filter_k_core
from ttt4rec.recsys.data.split import Split, split_at, split_by_ratio, split_by_time, split_leave_one_out
from ttt4rec.recsys.data.text import DataError
from ttt4rec.recsys.training.report import RUN_FILE


def ratios_of(text: str) -> tuple[int, int, int]:
    """Shares of train, validation and test as ``A:B:C`` says them."""
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() and len(part) <= 6 for part in parts):
        raise ValueError(f"--split must be three whole numbers below 1,000,000, such as 3:2:5; given {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def split_as_asked(
    interactions: Interactions, args: Namespace, ratios: tuple[int, int, int]
) -> tuple[Split, tuple[float, float] | None]:
    """The split that the arguments name, and the moments at which it cuts if it does so by time."""
    smallest = {"min_user": args.min_user, "min_item": args.min_item}
    if args.split_by == "time":
        return split_by_time(interactions, ratios, **smallest)
    histories = build_histories(filter_k_core(interactions, **smallest))
    return split_again(histories, args.split_by, ratios, None), None


def split_again(
    histories: Histories, way: str, ratios: tuple[int, int, int], cuts: tuple[float, float] | None
) -> Split:
    """The split of a way, ratios and moments that a run has recorded."""
    if cuts is not None:
        return split_at(histories, *cuts)
    return split_leave_one_out(histories) if way == "last" else split_by_ratio(histories, ratios)


def split_of_run(folder: Path) -> tuple[str, tuple[int, int, int], tuple[float, float] | None]:
    """How the run that wrote a folder split its data."""
    path = folder / RUN_FILE
    if not path.is_file():
        raise DataError(f"{folder} holds no finished training run: {RUN_FILE} is missing")
    try:
        run = read_json(path)
        cuts = run["cuts"] and (run["cuts"][0], run["cuts"][1])
        return run["settings"]["split_by"], ratios_of(run["settings"]["split"]), cuts
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is damaged; it must hold the settings of a training run ({error})") from error
