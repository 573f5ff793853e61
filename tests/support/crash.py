"""Training that is killed at random moments, and taken up again until it ends.

    python -m tests.support.crash --kills 100

prints what became of a hundred kills. Children are forked, so that none of them imports torch again.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

from tests.support.recsys_data import make_model, make_split
from ttt4rec.recsys.training.train import METRICS_FILE, TrainOptions, fit

OPTIONS = TrainOptions(epochs=5, patience=5, targets_per_batch=128, learning_rate=1e-2, inner_lr_warmup=7)


def train(split, folder, options=OPTIONS, **config):
    """Train or go on; returns the last word of a run: every epoch's numbers but the seconds, and the final weights."""
    model = make_model(split, **config)
    fit(model, split, folder, options)
    model.save(folder)
    lines = (folder / METRICS_FILE).read_text().splitlines()
    return [line.split(",")[:-2] for line in lines], (folder / "model.safetensors").read_bytes()


def fork(function):
    """Process id of a child that runs the function; its exit code is 0 if the function returns."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    except BaseException:
        os._exit(1)


def wait(child):
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def survive(folder, kills, seed=0):
    """Kill training so many times and compare every run that ends; returns how many did."""
    split = make_split(folder)
    whole = train(split, folder / "whole")
    begin = time.perf_counter()
    assert train(split, folder / "again") == whole
    seconds = time.perf_counter() - begin  # of the second run: the first may import what torch needs
    rng, killed, ended = random.Random(seed), 0, 0
    while killed < kills or not ended:
        child = fork(lambda run=folder / f"run{ended}": train(split, run))
        if killed < kills:
            time.sleep(rng.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        code = wait(child)
        killed += code == -signal.SIGKILL
        if code == 0:
            assert train(split, folder / f"run{ended}") == whole
            ended += 1
        else:
            assert code == -signal.SIGKILL, code
    return ended


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        count = parser.parse_args().kills
        print(f"{count} kills; {survive(Path(place), count)} runs ended, each with the numbers of an undisturbed one")
