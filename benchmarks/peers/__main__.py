"""``python -m benchmarks.peers run --data FOLDER``: the job by all libraries, each in a process of its own."""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.documents import ROOT
from tools.environment import environment, load_average
from ttt4rec.atomic_files import replacing

from .page import RESULTS_FILE, read, write
from .sides import FOLDER, SIDES, Side

PEERS_PYTHON = ROOT / ".venv-adapters" / "bin" / "python"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # RecBole's checkpoints hold its configuration, an object
}


def measure(side: Side, interactions: Path, epochs: int, python: str) -> dict[str, Any]:
    """Do the job once, with one thread, in an empty folder.

    Raises:
        subprocess.CalledProcessError: it failed; its last lines are on stderr.
    """
    options = json.dumps({"epochs": epochs} | side.options)
    command = [python, str(FOLDER / "timing.py"), str(side.path), str(interactions.resolve()), options]
    load = load_average()
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
        given = os.environ | ENVIRONMENT | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=folder, env=given, stdout=subprocess.PIPE, text=True, check=True)
    known = environment("cpu")
    about = {"device": known["device"], "commit": known["commit"], "date": f"{datetime.date.today()}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"side": side.label, "epochs": epochs, **result, **about, "load_average": load}


def keep(path: Path, run: dict[str, Any]) -> None:
    """Put a run into the file, in the place of an earlier one of the same data, side and epochs."""
    runs = read(path)["runs"]
    key = ("dataset", "side", "epochs")
    others = [other for other in runs if any(other[name] != run[name] for name in key)]
    order = {side.label: place for place, side in enumerate(SIDES)}
    both = sorted([*others, run], key=lambda one: (one["dataset"], order[one["side"]], one["epochs"]))
    with replacing(path) as partial:
        Path(partial).write_text(json.dumps({"runs": both}, indent=1) + "\n")


def main() -> int:
    """Run what was asked for and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the job, one library after the other, then write docs/peers.md")
    run.add_argument("--data", type=Path, required=True, help="folder with NAME/NAME.inter.gz")
    run.add_argument("--datasets", nargs="+", default=["ml-100k"])
    run.add_argument("--epochs", type=int, default=10)
    run.add_argument("--sides", nargs="+", default=[""], help="only those whose labels begin so")
    run.add_argument("--peers-python", default=str(PEERS_PYTHON), help="of an environment with the other libraries")
    run.add_argument("--results", type=Path, default=RESULTS_FILE)
    commands.add_parser("page", help="write docs/peers.md")
    given = parser.parse_args()
    if given.command == "run":
        for name in given.datasets:
            for side in SIDES:
                if side.label.startswith(tuple(given.sides)):
                    python = given.peers_python if side.peer else sys.executable
                    done = measure(side, given.data / name / f"{name}.inter.gz", given.epochs, python)
                    keep(given.results, {"dataset": name} | done)
                    print(f"{name}, {side.label}: {done['cpu_seconds']}, {done['metrics']}", flush=True)
    if given.command == "page" or given.results == RESULTS_FILE:
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
