"""``python -m studies.adaptation run [STUDY ...] --data FOLDER --models FOLDER`` and ``... report``."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.training.evaluate import evaluate
from ttt4rec.recsys.training.segments import evaluate_segments

from ..runner import keep, load_split
from ..study import Data
from . import habits as remembering
from .ablation import MODES, ablated
from .drift import SEGMENTATIONS
from .report import RUNS_FILE, read, write
from .switches import Population, best_possible, gains, joined
from .training import DRIFTING, MIXERS, TIMED, trained

SEEDS = (0, 1, 2)
SPLITS = ("3:2:5", "6:2:2")
MAX_LEN, BEFORE = 50, 20  # of a window; items of the other user before the switch, where real users are joined
TRAINED_ON, TESTED_ON, SWITCH = 1500, 4000, 30  # made-up users, and the event at which those of the test switch
HABITUAL, REMEMBERED = 600, 100  # users with habits to train on, and of the test

Study = Callable[[Path, Path], Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]]
"""From the folders of data and of models: what tells a run apart, and what makes its result."""


def ablation(data, models):
    """TTT-MLP on MovieLens-100K, trained with and without adapting; tested live, frozen and off."""
    for name in SPLITS:
        split = load_split(data, Data("ml-100k", name))
        for seed in SEEDS:
            for adapt in (True, False):
                key = {"study": "ablation", "split": name, "adapting in training": adapt, "seed": seed}
                folder = models / f"ml-100k-TTT-MLP-{name.replace(':', '')}-{'live' if adapt else 'off'}-{seed}"

                def result(split=split, seed=seed, adapt=adapt, folder=folder):
                    model = trained("TTT-MLP", split, folder, seed, max_len=MAX_LEN, adapt=adapt)
                    modes = {mode: ablated(model, split, mode) for mode in (MODES if adapt else ("off",))}
                    if adapt:
                        windows = evaluation_prefixes(split, "test", max_len=MAX_LEN)
                        modes["live, windows of 50"] = evaluate(model, windows)
                    return {"test": modes}

                yield key, result


def made_up(_, models):
    """Made-up users who switch."""
    population = Population()
    taken, chances = population.users(TESTED_ON, SWITCH, seed=1000)
    best, test = best_possible(chances), torch.from_numpy(taken + 1)
    for seed in SEEDS:
        for mixer in MIXERS:

            def result(seed=seed, mixer=mixer):
                split, folder = population.split(TRAINED_ON, seed), models / f"made-up-{mixer}-{seed}"
                model = trained(mixer, split, folder, seed, max_len=population.length)
                return {"curve": gains(model, test).tolist(), "best possible": best, "switch": SWITCH}

            yield {"study": "made-up", "mixer": mixer, "seed": seed}, result


def pairs(data, models):
    """Real users joined in pairs."""
    split = load_split(data, Data("ml-100k"))
    rows, alone = joined(split, BEFORE, MAX_LEN - BEFORE, pairs=4000, seed=0)
    for seed in SEEDS:
        for mixer in MIXERS:

            def result(seed=seed, mixer=mixer):
                folder = models / f"ml-100k-{mixer}-325-live-{seed}"
                model = trained(mixer, split, folder, seed, max_len=MAX_LEN)
                return {"curve": gains(model, rows).tolist(), "alone": gains(model, alone).tolist(), "switch": BEFORE}

            yield {"study": "joined", "mixer": mixer, "seed": seed}, result


def accuracy(data, models):
    """The models of the joined users by the published protocol, windows of 50."""
    split = load_split(data, Data("ml-100k"))
    for seed in SEEDS:
        for mixer in MIXERS:

            def result(seed=seed, mixer=mixer):
                model = trained(mixer, split, models / f"ml-100k-{mixer}-325-live-{seed}", seed, max_len=MAX_LEN)
                return {"test": evaluate(model, evaluation_prefixes(split, "test", max_len=MAX_LEN))}

            yield {"study": "accuracy", "mixer": mixer, "seed": seed}, result


def drift(data, models):
    """Users of Gowalla: targets by how much their histories have changed, and by the time before them."""
    split = load_split(data, Data("gowalla-1k"))
    for seed in SEEDS:
        for mixer in (*DRIFTING, *TIMED):

            def result(seed=seed, mixer=mixer):
                model = trained(mixer, split, models / f"gowalla-1k-{mixer}-325-live-{seed}", seed, max_len=MAX_LEN)
                found = evaluate_segments(model, split, by=SEGMENTATIONS, cutoffs=(10,))
                rows = [{"by": x.by, "segment": x.name, "targets": x.targets} | _means(x.metrics) for x in found]
                return {"segments": rows}

            yield {"study": "drift", "mixer": mixer, "seed": seed}, result


def habits(_, models):
    """Made-up users with habits of their own; tested on histories four times as long as those of training."""
    population = remembering.Habits()
    taken = population.streams(REMEMBERED, remembering.PLACES[-1], seed=1000)
    best = remembering.by_place(population.best(taken))
    for seed in SEEDS:
        for mixer in remembering.MIXERS:

            def result(seed=seed, mixer=mixer):
                split = population.split(HABITUAL, seed)
                model = remembering.trained(mixer, split, models / f"habits-{mixer}-{seed}", seed, population.length)
                found = remembering.by_place(gains(model, torch.from_numpy(taken)))
                return {"curve": found, "best possible": best}

            yield {"study": "habits", "mixer": mixer, "seed": seed}, result


def _means(metrics):
    return {name: estimate.value for name, estimate in metrics.items()}


STUDIES: dict[str, Study] = {
    "ablation": ablation,
    "made-up": made_up,
    "joined": pairs,
    "accuracy": accuracy,
    "drift": drift,
    "habits": habits,
}


def main() -> None:
    """Run whatever of the studies has no result yet, or write up what there is."""
    parser = argparse.ArgumentParser(prog="python -m studies.adaptation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)}; all if none is named")
    run.add_argument("--data", type=Path, required=True, help="folder with ml-100k/ml-100k.inter.gz")
    run.add_argument("--models", type=Path, required=True, help="folder for trained models; a killed run goes on there")
    commands.add_parser("report", help="write docs/adaptation.md's tables and plots")
    given = parser.parse_args()
    if given.command == "report":
        write()
        return
    torch.set_num_threads(1)
    for name in given.studies or STUDIES:
        for key, make in STUDIES[name](given.data, given.models):
            if any(key.items() <= done.items() for done in read()):
                continue
            print(key, flush=True)
            keep(RUNS_FILE, key | make())


if __name__ == "__main__":
    main()
