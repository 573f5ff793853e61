"""Trials in processes of one thread each, which share a journal; a killed one is tried again where it stopped."""

import multiprocessing
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ttt4rec import TTT4Rec
from ttt4rec.malloc import keep_freed_memory
from ttt4rec.recsys.training.train import EpochReport, fit

from ..benchmark.training import name
from ..runner import load_split
from .space import FIRST, run_of

JOURNAL = Path(__file__).parents[1] / "results" / "search" / "journal.jsonl"
NAME = "recipe"
BEFORE_PRUNING = 4
"""Trials that are finished, and epochs of a trial that are over, before one may be given up."""


def opened(journal: Path, seed: int = 0) -> optuna.Study:
    """The study that a journal holds, a new one if there is none."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=NAME,
        storage=JournalStorage(JournalFileBackend(str(journal))),
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=8),
        pruner=optuna.pruners.MedianPruner(BEFORE_PRUNING, BEFORE_PRUNING),
        load_if_exists=True,
    )


def found(journal: Path) -> list[FrozenTrial]:
    """The trials in a journal, which is only read."""
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.load_study(study_name=NAME, storage=storage).trials


def run_all(journal: Path, data: Path, models: Path, trials: int, processes: int, say: Callable[[str], None]) -> None:
    """Run trials until so many have ended; what a kill interrupted comes first."""
    study = opened(journal)
    if not study.trials:
        study.enqueue_trial(FIRST)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=work, args=(journal, data, models, trials, number, say), daemon=True)
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def work(journal: Path, data: Path, models: Path, trials: int, number: int, say: Callable[[str], None]) -> None:
    """Take trials one after the other until the journal has so many that ended."""
    torch.set_num_threads(1)
    keep_freed_memory()
    study = opened(journal, seed=number)
    enough = optuna.study.MaxTrialsCallback(trials, (TrialState.COMPLETE, TrialState.PRUNED))
    study.optimize(partial(objective, data=data, models=models, say=say), callbacks=[enough])


def objective(trial: optuna.Trial, data: Path, models: Path, say: Callable[[str], None]) -> float:
    """The best validation NDCG@10 of a training; the test part is not looked at.

    Raises:
        TrialPruned: after as many epochs, half of the other trials were better.
    """
    run = run_of(trial)
    split = load_split(data, run.data)
    torch.manual_seed(run.seed)
    model = TTT4Rec(run.config(split.histories.num_items))
    folder = models / name(run)
    say(f"trial {trial.number}: {trial.params}")

    def report(epoch: EpochReport) -> None:
        ndcg = epoch.metrics["NDCG@10"]
        say(f"trial {trial.number}: epoch {epoch.epoch}, validation NDCG@10 {ndcg:.4f}, {epoch.train_seconds:.0f} s")
        trial.report(ndcg, epoch.epoch)
        if trial.should_prune():
            shutil.rmtree(folder, ignore_errors=True)
            raise optuna.TrialPruned

    epochs = fit(model, split, folder, run.options(), report=report)
    trial.set_user_attr("seconds", sum(epoch.train_seconds + epoch.valid_seconds for epoch in epochs))
    shutil.rmtree(folder, ignore_errors=True)
    return max(epoch.metrics["NDCG@10"] for epoch in epochs)
