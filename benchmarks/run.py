"""Everything that a result consists of, into one folder: ``python -m benchmarks.run FOLDER``.

On a GPU the kernels are first held to the reference there. Then the contests are measured in what is left of the time,
and the report is written.
"""

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from tools.documents import ROOT

from .measurements import JSON_FILE, REPORT_FILE

PARITY_SECONDS, RESERVE = 260.0, 40.0
"""At most for the first stage, most of which the compiler takes; and what loading, saving and plotting take."""


class Stages:
    """Runs commands one after the other, shows what they print and keeps it in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.begin = folder, time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the first stage began."""
        return time.monotonic() - self.begin

    def run(self, name: str, module: list[str], seconds: float) -> bool:
        """Whether ``python -m MODULE ...`` succeeded within its time; the last line of its log says if it did not."""
        print(f"[{self.elapsed():4.0f} s] {name}, at most {seconds:.0f} s", flush=True)
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *module], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            watch = threading.Timer(seconds, process.kill)
            watch.start()
            for line in process.stdout or ():
                print(line, end="", flush=True)
                log.write(line)
            good = process.wait() == 0
            if not watch.is_alive():
                log.write(f"stopped after {seconds:.0f} s\n")
            elif not good:
                log.write("failed\n")
            watch.cancel()
        return good


def main() -> int:
    """Run all stages; 1 if the kernels do not agree with the reference or a contestant failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="made if missing")
    parser.add_argument("--seconds", type=float, help="for everything; default: 580 on a GPU, 300 on a CPU")
    parser.add_argument("--note", default="", help="what a reader of the results should know about the machine")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    stages, good = Stages(folder), True
    if gpu:
        good = stages.run("parity", ["pytest", "-q", "-m", "gpu", "tests"], PARITY_SECONDS)
    budget = (given.seconds or (580 if gpu else 300)) - stages.elapsed() - RESERVE
    options = ["--benchmark-only", "--benchmark-quiet", f"--benchmark-json={folder / JSON_FILE}"]
    files = ["benchmarks/test_mixers.py", "benchmarks/test_recommenders.py", "benchmarks/test_catalogue.py::test_loss"]
    measuring = ["pytest", "-q", *files, *options, f"--budget={budget:.0f}", f"--note={given.note}"]
    good &= stages.run("benchmarks", measuring, budget + RESERVE)
    written = stages.run("report", ["benchmarks.report", str(folder)], RESERVE)
    print(f"[{stages.elapsed():4.0f} s] {folder / REPORT_FILE}" if written else "no report", flush=True)
    return int(not (good and written))


if __name__ == "__main__":
    sys.exit(main())
