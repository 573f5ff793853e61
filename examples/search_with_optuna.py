"""Settings searched by Optuna, which ends trials early that fall behind: pruning through a callback of ``fit``.

    pip install "ttt4rec[recsys]" optuna
    python examples/search_with_optuna.py ml-100k --trials 20

Each trial has a folder of its own, so that the best one can be taken up with more epochs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import optuna
import torch

from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys import EpochReport, Split, TrainOptions, build_histories, fit, load_interactions, split_by_ratio
from ttt4rec.recsys.training.callbacks import Callback


class Pruning(Callback):
    """Reports each epoch to a trial, and ends the run where the trial is to be pruned."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial, self.pruned = trial, False

    def on_epoch(self, report: EpochReport) -> bool:
        self.trial.report(report.metrics["NDCG@10"], report.epoch)
        self.pruned = self.trial.should_prune()
        return self.pruned


def try_out(trial: optuna.Trial, split: Split, folder: Path, epochs: int, width: int) -> float:
    """The best validation NDCG@10 of a run with the trial's settings."""
    config = TTT4RecConfig(
        num_items=split.histories.num_items,
        width=width,
        inner=trial.suggest_categorical("inner", ["linear", "mlp"]),
        dropout=trial.suggest_float("dropout", 0.1, 0.5),
    )
    rate = trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True)
    options = TrainOptions(epochs=epochs, learning_rate=rate, targets_per_batch=256)
    torch.manual_seed(0)
    pruning = Pruning(trial)
    reports = fit(TTT4Rec(config), split, folder / f"trial-{trial.number}", options, callbacks=[pruning])
    if pruning.pruned:
        raise optuna.TrialPruned
    return max(report.metrics["NDCG@10"] for report in reports)


def main(argv: Sequence[str] | None = None) -> optuna.Study:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="ml-100k")
    parser.add_argument("--out", default="runs/search", help="folder of the trials")
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--width", type=int, default=32)
    args = parser.parse_args(argv)

    split = split_by_ratio(build_histories(load_interactions(args.source)), (3, 2, 5))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
    study.optimize(lambda trial: try_out(trial, split, Path(args.out), args.epochs, args.width), n_trials=args.trials)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"best of {len(study.trials)} trials, {pruned} of them pruned: trial {study.best_trial.number}")
    print(f"valid NDCG@10 {study.best_value:.4f} with {study.best_params}")
    return study


if __name__ == "__main__":
    main()
