"""The benchmark of the field's protocols: what is run, resumed and written of it."""

import sys
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest

from studies.benchmark import __main__ as command
from studies.benchmark import checks, curves, design, report
from studies.benchmark.design import DATASETS, METHODS, ML_1M, Plan, Published
from studies.benchmark.pool import Pool, time_left
from studies.benchmark.training import LONGER, name, train, work
from studies.runner import keep, load_split, read_results
from studies.study import FEW_TRAIN, LEAVE_ONE_OUT, TEMPORAL, Data
from ttt4rec.recsys.data import DataError

TINY = {"width": 8, "num_heads": 2, "ffn_width": 8, "max_len": 6, "epochs": 2, "targets_per_batch": 64}
TOY = Data("toy", LEAVE_ONE_OUT)
PLAN = Plan((TOY,), {"GRU": {"mixer": "gru"}, "HSTU": {"mixer": "hstu"}}, rates=(1e-3, 1e-2), seeds=(0, 1), frame=TINY)


class Listener:
    """Hears what a training tells; it may stop listening at an epoch."""

    def __init__(self, until: int | None = None) -> None:
        self.heard: list[tuple[str, object]] = []
        self.until = until

    def send(self, told: tuple[str, object]) -> None:
        if told[0] == "epoch" and told[1][0] == self.until:  # type: ignore[index]
            raise BrokenPipeError
        self.heard.append(told)


def part(first: int, ndcg: float, targets: int = 30) -> dict:
    return {"from": first, "targets": targets, "HR@10": 2 * ndcg, "NDCG@10": ndcg}


def result(run, validation: float, seconds: float = 3600.0, new: float | None = 0.5) -> dict:
    test = {"HR@10": 0.3, "NDCG@10": 0.2}
    return run.key | {
        "data": {"users": 3, "items": 1_234}, "validation": [0.01, validation], "cpu_seconds": seconds,
        "wall_seconds": seconds, "peak_mib": 1_234, "test": test,
        "test, new items": None if new is None else dict.fromkeys(test, new),
        "by history": [part(0, 0.1), part(50, 0.2 if new is None else new), part(100, 1.0, 29)],
    }  # fmt: skip


def test_every_method_tries_all_rates_and_runs_its_best_with_all_seeds() -> None:
    assert PLAN.total == 2 * (2 + 1)
    trials = list(PLAN.missing([]))
    assert [(run.variant, run.settings["learning_rate"], run.seed) for run in trials] == [
        ("GRU", 1e-3, 0), ("GRU", 1e-2, 0), ("HSTU", 1e-3, 0), ("HSTU", 1e-2, 0)
    ]  # fmt: skip
    results = [result(trials[0], 0.1)]
    assert list(PLAN.missing(results)) == trials[1:]
    assert PLAN.best_rate(TOY, "GRU", results) is None
    results.append(result(trials[1], 0.2))
    *others, last = PLAN.missing(results)
    assert others == trials[2:]
    assert (last.variant, last.settings["learning_rate"], last.seed) == ("GRU", 1e-2, 1)
    results += [result(run, 0.1) for run in (*others, last)]
    (final,) = PLAN.missing(results)
    assert (final.variant, final.settings["learning_rate"], final.seed) == ("HSTU", 1e-3, 1)
    assert not list(PLAN.missing([*results, result(final, 0.1)]))


def test_on_large_data_rates_are_compared_after_few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(design, "LARGE", ("toy",))
    monkeypatch.setattr(design, "TRIAL_EPOCHS", 1)
    plan = replace(PLAN, methods={"GRU": {"mixer": "gru"}, "preset": {"mixer": "gru", "learning_rate": 4e-3}})
    assert plan.total == (2 + 2) + 2
    trials = [run for run in plan.missing([]) if run.variant == "GRU"]
    assert [(run.settings["learning_rate"], run.settings["epochs"]) for run in trials] == [(1e-3, 1), (1e-2, 1)]
    results = [result(trials[0], 0.1), result(trials[1], 0.2)]
    assert len(plan.done(TOY, "GRU", results)) == 2
    assert plan.finished(TOY, "GRU", results) == []  # a short training is no result
    seeds = [run for run in plan.missing(results) if run.variant == "GRU"]
    assert [(run.settings["learning_rate"], run.settings["epochs"], run.seed) for run in seeds] == [
        (1e-2, 2, 0), (1e-2, 2, 1)
    ]  # fmt: skip
    results += [result(run, 0.3) for run in seeds]
    assert len(plan.finished(TOY, "GRU", results)) == 2
    assert len(plan.done(TOY, "GRU", results)) == plan.runs_of(TOY, "GRU")


def test_a_method_with_a_rate_of_its_own_tries_no_other() -> None:
    plan = replace(PLAN, methods={"preset": {"mixer": "gru", "learning_rate": 4e-3}}, frame={"targets_per_batch": 512})
    assert plan.total == 2
    rates = [run.settings["learning_rate"] for run in plan.missing([])]
    assert rates == [2e-3]  # steps of 512 targets, a quarter of the 2,048 that presets' rates are for
    large = replace(plan, frame={"targets_per_batch": 4096})
    assert [run.settings["learning_rate"] for run in large.missing([])] == [4e-3]


def test_the_benchmark_is_of_runs_that_can_be_made() -> None:
    runs = list(Plan().missing([]))
    assert len({(run.data, run.variant) for run in runs}) == len(DATASETS) * len(METHODS) - 2 * 2
    timed = {run.data.name for run in runs if run.config(100).times == "query"}
    assert timed == {"gowalla-1k", "ml-100k"}  # the two others have no real times, for two methods
    assert len({name(run) for run in runs}) == len(runs)
    for run in runs:
        config, options = run.config(100), run.options()
        assert run.settings.keys() <= vars(config).keys() | vars(options).keys()
        assert (config.max_len, options.learning_rate_warmup, options.average_over) == (200, 50, 0.1)
    assert {data.split for data in DATASETS} == {LEAVE_ONE_OUT, TEMPORAL}
    assert set(design.PUBLISHED) <= set(DATASETS)


def test_a_training_goes_on_where_it_was_stopped(data: Path, tmp_path: Path) -> None:
    run, split = next(PLAN.missing([])), load_split(data, TOY)
    whole = train(run, split, tmp_path / "whole", Listener())
    stopped, again = Listener(until=0), Listener()
    with pytest.raises(BrokenPipeError):
        train(run, split, tmp_path / "parts", stopped)
    parts = train(run, split, tmp_path / "parts", again)
    assert [told[1][0] for told in again.heard] == [1]
    assert [parts[key] for key in ("validation", "test", "test, new items")] == [
        whole[key] for key in ("validation", "test", "test, new items")
    ]
    assert whole["test"] != whole["test, new items"]
    assert parts["cpu_seconds"] > 0
    assert parts["peak_mib"] > 50


def test_what_comes_of_a_training_is_told(data: Path, tmp_path: Path) -> None:
    run = next(PLAN.missing([]))
    told = Listener()
    work(run, data, tmp_path / "models", told)
    assert [kind for kind, _ in told.heard] == ["data", "epoch", "epoch", "done"]
    told = Listener()
    work(replace(run, data=Data("absent")), data, tmp_path / "models", told)
    assert [kind for kind, _ in told.heard] == ["absent"]
    told = Listener()
    work(replace(run, settings=run.settings | {"mixer": "none"}), data, tmp_path / "models", told)
    assert told.heard[-1][0] == "failed"
    assert "mixer must be one of" in told.heard[-1][1]


def test_a_training_ends_when_nobody_listens(data: Path, tmp_path: Path) -> None:
    ours, theirs = Pipe(duplex=False)
    ours.close()
    with pytest.raises(SystemExit):
        work(next(PLAN.missing([])), data, tmp_path / "models", theirs)


@pytest.mark.slow
def test_a_killed_benchmark_goes_on(data: Path, tmp_path: Path) -> None:
    plan = replace(PLAN, datasets=(Data("absent"), TOY), methods={"GRU": {"mixer": "gru"}})
    path, models, said = tmp_path / "results" / "runs.jsonl", tmp_path / "models", list[str]()

    def killed(line: str) -> None:
        said.append(line)
        if ": done; 1 of 6 are done" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pool(plan, data, models, path, 2, killed).run_all()
    before = path.read_text()
    assert before.count("\n") == 1
    assert not Pool(plan, data, models, path, 2, said.append).run_all()
    assert path.read_text().startswith(before)
    assert len(read_results(path)) == 3
    assert any(line.startswith("passed over: ") and "absent" in line for line in said)
    assert not list(models.iterdir())
    with pytest.raises(DataError):
        load_split(data, Data("absent"))


@pytest.mark.slow
def test_a_training_that_fails_is_told_and_the_others_go_on(data: Path, tmp_path: Path) -> None:
    methods = {"broken": {"dropout": 2.0}, "GRU": {"mixer": "gru"}}
    plan, said = replace(PLAN, methods=methods, rates=(1e-3,), seeds=(0,)), list[str]()
    (failed,) = Pool(plan, data, tmp_path / "models", tmp_path / "runs.jsonl", 2, said.append).run_all()
    assert failed.variant == "broken"
    assert any("broken" in line and "failed: ValueError: dropout must be" in line for line in said)
    assert len(read_results(tmp_path / "runs.jsonl")) == 1


def test_other_data_are_refused(data: Path, tmp_path: Path) -> None:
    run, path = next(PLAN.missing([])), tmp_path / "runs.jsonl"
    keep(path, result(run, 0.1))
    pool = Pool(PLAN, data, tmp_path, path, 1, print)
    with pytest.raises(ValueError, match="data must be those of the results so far"):
        pool._take("data", {"users": 4, "items": 1_234}, run)


def test_the_rest_is_estimated_by_like_trainings() -> None:
    trials = list(PLAN.missing([]))
    assert (
        time_left(PLAN, [], 2)
        == "0 of 6 are done, 0 may take 0 min with 2 at once, and 6 more of which nothing is known yet"
    )
    results = [result(trials[0], 0.1, 3600)]  # 2 more of its kind, and 3 of another like it
    assert time_left(PLAN, results, 2) == "1 of 6 are done, 5 may take 2.5 h with 2 at once"
    assert time_left(PLAN, results, 8).endswith("5 may take 38 min with 8 at once")
    results.append(result(trials[2], 0.1, 7200))  # 2 of an hour, 2 of two
    assert time_left(PLAN, results, 2) == "2 of 6 are done, 4 may take 3.0 h with 2 at once"


def test_tables_have_published_values_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    published = {TOY: {"GRU": Published(0.25, 0.125, "out", "a page"), "Other": Published(0.5, 0.25, "in", "another")}}
    monkeypatch.setattr(report, "PUBLISHED", published)
    empty = report.tables(PLAN, [])
    assert empty.startswith("### toy, leave-one-out\n")
    assert "| GRU | not run yet |  |  |  |  | 0.2500, 0.1250 (a page) |" in empty
    assert "| Other |  |  |  |  |  | 0.5000, 0.2500 (another; seen items: in) |" in empty
    results: list[dict] = []
    for _ in range(5):
        run = next(PLAN.missing(results))
        results.append(result(run, 0.4, 60.0, new=0.5 if run.variant == "GRU" else None))
    text = report.tables(PLAN, results)
    assert "3 users, 1,234 items" in text
    gru = "| **0.3000** ± 0.0000 | **0.2000** ± 0.0000 | **0.5000** ± 0.0000 | **0.5000** ± 0.0000 |"
    assert f"| GRU | 0.4000 ± 0.0000 {gru} 0.2500, 0.1250 (a page) | 0.001 | 2 | 1.0 | 1,234 |" in text
    assert "| HSTU (1 of 2 seeds) | 0.4000 | **0.3000** | **0.2000** | - | - |  | 0.001 | 2 | 1.0 | 1,234 |" in text
    assert report.state(PLAN, results).startswith("5 of 6 trainings have been run, in 0.1 hours")


def test_curves_show_what_has_been_run(tmp_path: Path) -> None:
    assert curves.tables(PLAN, []) == dict.fromkeys(("little", "lengths", "histories"), "Not run yet.\n")
    assert not curves.pictures(PLAN, [])
    results: list[dict] = []
    for plan in (PLAN, curves.LITTLE, curves.LONG):
        while (run := next(plan.missing(results), None)) is not None:
            results.append(result(run, 0.4, new=0.25))
    found = curves.tables(PLAN, results)
    assert "| items of history, from | 0 | 50 |" in found["histories"]
    assert "| GRU | **0.1000** ± 0.0000 | **0.2500** ± 0.0000 |" in found["histories"]
    assert "| % of the users who train | 5 | 10 | 25 | 50 | 100 |\n" in found["little"]
    assert "| items read | 50 | 200 | 1000 |\n" in found["lengths"]
    for file, panels in curves.pictures(PLAN, results).items():
        curves.plot(panels, tmp_path / file)
        assert (tmp_path / file).stat().st_size > 1000
        assert f"]({file})\n" in "".join(found.values())


def test_few_train_and_all_are_tested(data: Path) -> None:
    whole = load_split(data, TOY)
    parts = [load_split(data, Data("toy", FEW_TRAIN.format(percent))) for percent in (50, 25)]
    trained = [np.flatnonzero(split.train_end > split.train_begin) for split in parts]
    users = whole.histories.num_users
    assert [len(x) for x in trained] == [users // 2, users // 4]
    assert set(trained[1]) < set(trained[0])
    for split in parts:
        assert split.num_targets("test") == whole.num_targets("test")
        assert split.num_targets("valid") == whole.num_targets("valid")
        assert 0 < split.num_targets("train") < whole.num_targets("train")


def test_results_tell_short_histories_from_long_ones(data: Path, tmp_path: Path) -> None:
    split = load_split(data, TOY)
    found = train(next(PLAN.missing([])), split, tmp_path, Listener())
    parts = found["by history"]
    assert sum(part["targets"] for part in parts) == split.num_new_targets("test")
    mean = sum(part["targets"] * part["NDCG@10"] for part in parts) / split.num_new_targets("test")
    assert mean == pytest.approx(found["test, new items"]["NDCG@10"], abs=1e-5)
    assert [part["from"] for part in parts] == sorted({0, *LONGER} & {part["from"] for part in parts})


def checked(model: str, rate: float, seed: int, validation: float, value: float, **settings: bool) -> dict:
    test = {"HR@10": value, "NDCG@10": value}
    return TOY.key | {
        "model": model, "rectools": "0.1", "seed": seed, "settings": {"learning_rate": rate, **settings},
        "validation": [validation], "cpu_seconds": 60.0, "peak_mib": 99, "test": test, "test, new items": test,
    }  # fmt: skip


def test_rows_of_another_program_are_those_of_its_best_rate() -> None:
    results = [
        checked("SASRec", 1e-3, 0, 0.3, 0.2),
        checked("SASRec", 1e-2, 0, 0.2, 0.9),  # better in the test alone
        checked("SASRec", 1e-3, 1, 0.1, 0.4),
        checked("HSTU", 1e-3, 0, 0.1, 0.1, relative_time_attention=True),
        checked("HSTU", 1e-3, 0, 0.1, 0.1) | {"dataset": "another"},
    ]
    text = report.tables(PLAN, [], results)
    best = " | ".join(["**0.3000** ± 0.1414"] * 4)
    assert f"| RecTools 0.1 SASRec, run by RecTools | 0.2000 ± 0.1414 | {best} |  | 0.001 | 1 | 1.0 | 99 |" in text
    assert "| RecTools 0.1 HSTU, with times, run by RecTools (1 of 2 seeds) | 0.1000 | 0.1000 |" in text
    assert text.count("HSTU, with times") == 1


def test_the_aim_is_set_beside_what_was_reached() -> None:
    plan = replace(PLAN, datasets=(ML_1M,))
    assert report.state(plan, []).endswith("GRU: not run yet.\n")
    results: list[dict] = []
    for _ in range(6):
        results.append(result(next(plan.missing(results)), 0.4, new=0.335))
    assert "GRU: HR@10 0.3350 (+0%), NDCG@10 0.3350 (+72%); 2 of 2 seeds." in report.state(plan, results)


def test_a_part_of_the_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans = []
    monkeypatch.setattr(Pool, "run_all", lambda self: plans.append(self.plan) or [])
    monkeypatch.setattr(
        sys,
        "argv",
        ["benchmark", "run", "--data", "x", "--models", "y", "--results", str(tmp_path / "r"), "--datasets", "ml-100k",
         "--methods", "TTT4Rec (TTT-MLP)", "HSTU (2 blocks, without", "--splits", TEMPORAL, "--rates", "0.01",
         "--seeds", "5", "--epochs", "3"],
    )  # fmt: skip
    assert command.main() == 0
    (plan,) = plans
    assert plan.total == 2
    assert {run.data.title for run in plan.missing([])} == {f"ml-100k, {TEMPORAL}"}
    assert all(run.settings["epochs"] == 3 and run.seed == 5 for run in plan.missing([]))


def test_a_part_that_is_not_there_is_answered_by_the_parts_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "run", "--data", "x", "--models", "y", "--datasets", "ml-100"])
    with pytest.raises(SystemExit):
        command.main()
    error = capsys.readouterr().err
    assert "datasets: ml-1m, " in error
    assert TEMPORAL in error
    assert "; GRU4Rec (GRU)" in error


def test_the_page_is_up_to_date() -> None:
    document = report.DOCUMENT.read_text()
    written = report.written(document, Plan(), read_results(report.RUNS_FILE), read_results(checks.CHECKS_FILE))
    assert written == document, "stale: run `python -m studies.benchmark page`"
