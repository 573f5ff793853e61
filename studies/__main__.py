"""``python -m studies run NAME --data FOLDER``, ``costs`` and ``report``."""

import argparse
from functools import partial
from pathlib import Path

import torch

from ttt4rec.malloc import keep_freed_memory

from . import costs, report
from .grid import STUDIES
from .runner import run_all
from .study import Run


def main() -> None:
    """Run a study, or as much of it as is missing, or write up what there is."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train whatever of the studies has no result yet")
    run.add_argument("studies", nargs="+", choices=STUDIES)
    run.add_argument("--data", type=Path, required=True, help="folder with NAME/NAME.inter.gz, or the publisher's file")
    run.add_argument("--datasets", nargs="+", help="only these")
    run.add_argument("--splits", nargs="+", help="only these")
    run.add_argument("--variants", nargs="+", help="only these rows of the tables")
    run.add_argument("--seeds", type=int, nargs="+", help="only these")
    run.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    run.add_argument(
        "--results", type=Path, default=report.RUNS_FILE, help="where results are kept (default: the repository's file)"
    )
    commands.add_parser("costs", help="measure what the losses cost by the size of the catalogue")
    commands.add_parser("report", help="write the tables of docs/studies.md and docs/paper.md")
    given = parser.parse_args()
    wanted = [[r for r in STUDIES[name].runs() if _wanted(r, given)] for name in getattr(given, "studies", [])]
    if given.command == "run" and not any(wanted):
        parser.error("no training of these studies is of the given datasets, splits, variants and seeds")
    keep_freed_memory()
    torch.set_num_threads(1)  # so that CPU time is what one core would need
    say = partial(print, flush=True)
    if given.command == "report":
        report.write()
    elif given.command == "costs":
        costs.write(report.COSTS_FILE, say)
    else:
        for runs in wanted:
            run_all(runs, given.data, given.results, say, given.device)


def _wanted(run: Run, given: argparse.Namespace) -> bool:
    wanted = {
        run.data.name: given.datasets,
        run.data.split: given.splits,
        run.variant: given.variants,
        run.seed: given.seeds,
    }
    return all(only is None or value in only for value, only in wanted.items())


if __name__ == "__main__":
    main()
