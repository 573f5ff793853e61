"""The search of a recipe: what a trial trains, what is tried again after a kill, and what is written of it."""

import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from studies.models import RATES
from studies.search import __main__ as search
from studies.search import report, space, trials
from studies.study import LEAVE_ONE_OUT, Data
from ttt4rec.models.presets import PRESETS
from ttt4rec.recsys.training import train

pytestmark = pytest.mark.slow
TINY = {"ffn_width": 8, "num_heads": 2, "max_len": 6, "epochs": 2, "targets_per_batch": 64}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of a tiny model on the data set "toy"."""
    monkeypatch.setattr(space, "DATA", Data("toy", LEAVE_ONE_OUT))
    chosen = space.suggested
    monkeypatch.setattr(space, "suggested", lambda trial: chosen(trial) | TINY)


@pytest.mark.usefixtures("toy")
def test_a_trial_is_a_training_judged_by_its_validation(data: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    value = trials.objective(optuna.trial.FixedTrial(space.FIRST), data, tmp_path / "models", heard.append)
    epochs = [line for line in heard if "epoch" in line]
    assert len(epochs) == TINY["epochs"]
    assert max(float(line.split("NDCG@10 ")[1].split(",")[0]) for line in epochs) == pytest.approx(value, abs=5e-5)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.usefixtures("toy")
def test_a_trial_that_is_given_up_leaves_no_checkpoint(data: Path, tmp_path: Path) -> None:
    class Worse(optuna.trial.FixedTrial):
        def should_prune(self) -> bool:
            return True

    with pytest.raises(optuna.TrialPruned):
        trials.objective(Worse(space.FIRST), data, tmp_path / "models", lambda _: None)
    assert not list((tmp_path / "models").iterdir())


def test_what_a_kill_interrupted_is_tried_again_first(tmp_path: Path) -> None:
    journal = tmp_path / "search" / "journal.jsonl"
    study = trials.opened(journal)
    space.suggested(study.ask())
    trials.run_all(journal, tmp_path, tmp_path, 1, 0, lambda _: None)
    again = trials.opened(journal)
    interrupted, waiting = again.trials
    assert (interrupted.state, waiting.state) == (TrialState.FAIL, TrialState.WAITING)
    assert space.suggested(again.ask()) == space.suggested(optuna.trial.FixedTrial(interrupted.params))


def test_the_first_trial_is_the_preset_before_the_search(tmp_path: Path) -> None:
    trials.run_all(tmp_path / "journal.jsonl", tmp_path, tmp_path, 1, 0, lambda _: None)
    run = space.run_of(trials.opened(tmp_path / "journal.jsonl").ask())
    assert run.settings == {**space.FRAME, **space.suggested(optuna.trial.FixedTrial(space.FIRST))}
    config, options = run.config(100), run.options()
    assert (config.width, config.num_heads, options.learning_rate) == (64, 4, max(RATES))
    assert config.max_len == PRESETS["best"].model["max_len"]
    assert train.TrainOptions is type(options)


def test_there_is_no_table_before_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(search, "JOURNAL", tmp_path / "results" / "journal.jsonl")
    monkeypatch.setattr(sys, "argv", ["search", "table"])
    with pytest.raises(SystemExit):
        search.main()
    assert "table must come after run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_table_leaves_the_journal_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    journal = tmp_path / "journal.jsonl"
    trials.opened(journal)
    before = journal.read_bytes()
    monkeypatch.setattr(search, "JOURNAL", journal)
    monkeypatch.setattr(sys, "argv", ["search", "table"])
    assert search.main() == 0
    assert capsys.readouterr().out.startswith("0 recipes were tried")
    assert journal.read_bytes() == before


def test_the_table_has_the_best_trials_first() -> None:
    study = optuna.create_study()
    distributions = {name: optuna.distributions.CategoricalDistribution([value]) for name, value in space.FIRST.items()}
    for value, state in ((0.1, TrialState.COMPLETE), (0.2, TrialState.COMPLETE), (0.3, TrialState.PRUNED)):
        values = {"params": space.FIRST, "distributions": distributions, "intermediate_values": {0: value}}
        study.add_trial(optuna.trial.create_trial(value=value, state=state, **values))
    text = report.table(study.trials)
    assert text.startswith("3 recipes were tried, 1 of them given up on the way.")
    assert [line.split()[1] for line in text.splitlines()[4:]] == ["0.2000", "0.1000"]
