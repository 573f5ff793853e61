"""``python -m benchmarks.studies run NAME --data FOLDER`` and ``python -m benchmarks.studies report``."""

import argparse
from functools import partial
from pathlib import Path

import torch

from ..report import RESULTS
from .grid import STUDIES
from .runner import run_all

RUNS_FILE = RESULTS / "studies" / "runs.jsonl"


def main() -> None:
    """Run a study, or as much of it as is missing, or write up what there is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train whatever of the studies has no result yet")
    run.add_argument("studies", nargs="+", choices=STUDIES)
    run.add_argument("--data", type=Path, required=True, help="folder with NAME/NAME.inter.gz for every data set")
    run.add_argument("--datasets", nargs="+", help="only these")
    run.add_argument("--threads", type=int, default=1, help="CPU threads")
    commands.add_parser("report", help="write docs/studies.md from the results")
    given = parser.parse_args()
    if given.command == "report":
        from .report import write

        write(RUNS_FILE)
        return
    torch.set_num_threads(given.threads)
    for name in given.studies:
        runs = [x for x in STUDIES[name].runs() if given.datasets is None or x.dataset in given.datasets]
        run_all(runs, given.data, RUNS_FILE, partial(print, flush=True))


if __name__ == "__main__":
    main()
