"""A side of a contest as another checkout of this repository has it, in a process of its own that takes its turns.

    python benchmarks/another_checkout.py FOLDER THREADS training_step-n10000 "TTT4Rec, TTT-MLP"

calls it once for each line that comes in, and answers with a line. It is a file by itself, since the other checkout
may not have it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path


def caller(folder: Path, threads: int, contest: str, side: str) -> Callable[[], None]:
    """What makes the other process call its side; it is built and warmed up already, and ends with this one."""
    command = [sys.executable, __file__, str(folder), str(threads), contest, side]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    if process.stdout is None or process.stdin is None or process.stdout.readline() != "ready\n":
        raise RuntimeError(f"{folder} must be a checkout with the contest {contest} and the side {side}")
    return partial(_ask, process)


def _ask(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    if not process.stdout.readline():
        raise RuntimeError("the other checkout's process has ended")


def main(folder: str, threads: str, name: str, side: str) -> None:
    """The other process."""
    sys.path[:1] = [f"{folder}/src", folder]
    import torch

    plain = torch.optim.Adam
    torch.optim.Adam = lambda *given, **options: plain(*given, **options | {"fused": True})  # as ``fit`` has it

    from benchmarks.recommenders import recommender_contests

    torch.set_num_threads(int(threads))
    (contest,) = (contest for contest in recommender_contests("small") if contest.name == name)
    call = contest.prepare(side, "cpu", {})
    for _ in range(3):
        call()
    print("ready", flush=True)
    for _ in sys.stdin:
        call()
        print(flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
