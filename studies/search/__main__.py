"""``python -m studies.search run --data FOLDER --models FOLDER``, and ``table``."""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from .report import table, write
from .trials import JOURNAL, found, run_all


def main() -> int:
    """Search, or print what was found so far."""
    parser = argparse.ArgumentParser(prog="python -m studies.search", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="try recipes on validation, then write the table")
    run.add_argument("--data", type=Path, required=True, help="folder with NAME/NAME.inter.gz")
    run.add_argument("--models", type=Path, required=True, help="folder for checkpoints; a killed trial goes on there")
    run.add_argument("--trials", type=int, default=40, help="of the whole search, earlier ones with them")
    run.add_argument("--processes", type=int, default=os.cpu_count(), help="trials at once (default: one a core)")
    run.add_argument("--journal", type=Path, default=JOURNAL, help="Optuna's log (default: the repository's)")
    commands.add_parser("table", help="print the best trials")
    given = parser.parse_args()
    if given.command == "table":
        if not JOURNAL.is_file():
            parser.error(f"table must come after run, which writes {JOURNAL}; there is no such file")
        print(table(found(JOURNAL)), end="")
        return 0
    run_all(given.journal, given.data, given.models, given.trials, given.processes, partial(print, flush=True))
    if given.journal == JOURNAL:
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
