"""``python -m studies.benchmark run --data FOLDER --models FOLDER``, and ``page``."""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from .curves import LITTLE, LONG
from .design import Plan
from .pool import Pool, time_left
from .report import RUNS_FILE, read_results, write

PLANS = {"page": Plan(), "little": LITTLE, "long": LONG}
"""What is run: the tables, and the two curves."""


def main() -> int:
    """Run the benchmark, or as much of it as is missing, or write its page; 1 if a training failed."""
    parser = argparse.ArgumentParser(prog="python -m studies.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train whatever has no result yet, then write the page")
    run.add_argument("plans", nargs="*", metavar="PLAN", help=f"of {', '.join(PLANS)} (default: page)")
    run.add_argument("--data", type=Path, required=True, help="folder with NAME/NAME.inter.gz, or the publisher's file")
    run.add_argument("--models", type=Path, required=True, help="folder for checkpoints; a killed run goes on there")
    run.add_argument("--datasets", nargs="+", help="only these")
    run.add_argument("--splits", nargs="+", help="only these")
    run.add_argument("--methods", nargs="+", help="only those whose labels begin so")
    run.add_argument("--rates", type=float, nargs="+", help="only these learning rates")
    run.add_argument("--seeds", type=int, nargs="+", help="only these")
    run.add_argument("--epochs", type=int, help="at most so many; such results are no part of the page")
    run.add_argument("--processes", type=int, default=os.cpu_count(), help="trainings at once (default: one a core)")
    run.add_argument(
        "--results", type=Path, default=RUNS_FILE, help="where results are kept (default: the repository's file)"
    )
    commands.add_parser("page", help="write docs/benchmarks.md")
    given = parser.parse_args()
    failed = []
    if given.command == "run":
        if unknown := set(given.plans) - set(PLANS):
            parser.error(f"a plan must be one of {', '.join(PLANS)}; given {', '.join(sorted(unknown))}")
        say = partial(print, flush=True)
        for name in given.plans or ["page"]:
            plan = chosen(given, PLANS[name])
            if not plan.total:
                parser.error(f"no training is of the given datasets, splits and methods; {_choice(PLANS[name])}")
            say(f"{name}: {time_left(plan, read_results(given.results), given.processes)}")
            failed += Pool(plan, given.data, given.models, given.results, given.processes, say).run_all()
    if given.command == "page" or given.results == RUNS_FILE:
        write()
    return 1 if failed else 0


def chosen(given: argparse.Namespace, plan: Plan) -> Plan:
    """The part of a plan that was asked for."""
    datasets = [
        data
        for data in plan.datasets
        if (given.datasets is None or data.name in given.datasets)
        and (given.splits is None or data.split in given.splits)
    ]
    begins = tuple(given.methods or [""])
    methods = {label: settings for label, settings in plan.methods.items() if label.startswith(begins)}
    frame = plan.frame if given.epochs is None else {**plan.frame, "epochs": given.epochs}
    return replace(
        plan,
        datasets=datasets,
        methods=methods,
        rates=given.rates or plan.rates,
        seeds=given.seeds or plan.seeds,
        frame=frame,
    )


def _choice(plan: Plan) -> str:
    """What a plan has."""
    datasets, splits = ([*dict.fromkeys(getattr(data, name) for data in plan.datasets)] for name in ("name", "split"))
    return f"datasets: {', '.join(datasets)}; splits: {'; '.join(splits)}; methods: {'; '.join(plan.methods)}"


if __name__ == "__main__":
    sys.exit(main())
