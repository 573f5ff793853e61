"""Studies: grids that stop and go on, and what is written of them."""

import dataclasses
import gzip
import re
import sys
from pathlib import Path

import pytest

from studies import costs, knobs, report
from studies.__main__ import main
from studies.grid import STUDIES
from studies.models import BEST_RATES, STOPPED_TOO_SOON, UNTRIED
from studies.runner import find, keep, load_split, read_results, run_all, time_left, train
from studies.study import LEAVE_ONE_OUT, TEMPORAL, Data, Study
from ttt4rec.recsys.data import DataError

TINY = {"width": 8, "num_heads": 2, "ffn_width": 8, "max_len": 6, "epochs": 2}
TOY = Data("toy")
STUDY = Study(
    "Toy", datasets=(TOY,), variants={"GRU": {"mixer": "gru"}, "TTT": {"inner": "linear"}}, seeds=(0, 1), common=TINY
)


def test_a_killed_study_goes_on_where_it_stopped(data: Path) -> None:
    path = data / "results" / "runs.jsonl"

    def killed_in_the_third(line: str) -> None:
        if line.startswith("[3/4]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(STUDY.runs(), data, path, killed_in_the_third)
    before = path.read_text()
    assert before.count("\n") == 2
    run_all(STUDY.runs(), data, path, print)
    assert path.read_text().startswith(before)
    results = read_results(path)
    assert [find(results, run) for run in STUDY.runs()] == results
    said: list[str] = []
    run_all(STUDY.runs(), data, path, said.append)
    assert said == [f"4 of 4 trainings are in {path} already; those of another file (--results) would be new"]


def test_a_line_that_a_kill_left_unfinished_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    keep(path, {"seed": 0})
    path.write_text(path.read_text() + '{"seed": ')
    assert read_results(path) == [{"seed": 0}]
    keep(path, {"seed": 1})
    assert read_results(path) == [{"seed": 0}, {"seed": 1}]


def test_a_selection_of_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["studies", "run", "table-2", "--data", str(tmp_path), "--variants", "SASREC"])
    with pytest.raises(SystemExit):
        main()
    assert "no training of these studies is of the given" in capsys.readouterr().err


def test_rows_of_one_table_are_of_the_same_data(data: Path) -> None:
    path = data / "runs.jsonl"
    one, other = list(STUDY.runs())[:2]
    run_all([one], data, path, print)
    load_split.cache_clear()
    rows = [f"{user}\ti{time % 7}\t{time}" for user in range(20) for time in range(9)]
    with gzip.open(data / "toy" / "toy.inter.gz", "wt") as file:
        file.write("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]))
    with pytest.raises(ValueError, match=r"toy: data must be those of the results so far, .* give --results another"):
        run_all([other], data, path, print)
    assert len(read_results(path)) == 1


def test_a_run_does_not_depend_on_those_before_it(data: Path) -> None:
    first, second = (train(run, load_split(data, TOY), print) for run in [next(STUDY.runs())] * 2)
    assert first["test"] == second["test"]
    assert first["validation"] == second["validation"]
    assert first["cpu_seconds"] > 0
    assert first["best_epoch"] < len(first["validation"]) <= 2


@pytest.mark.parametrize(("split", "test"), [("6:2:2", 2 * 20), (LEAVE_ONE_OUT, 20), (TEMPORAL, 2 * 20)])
def test_splits_by_name(data: Path, split: str, test: int) -> None:
    given = load_split(data, Data("toy", split))
    assert given.num_targets("test") == test
    assert load_split(data, Data("toy", split, min_user=11)).histories.num_users == 20
    with pytest.raises(DataError):
        load_split(data, Data("toy", split, min_user=16))


def test_data_that_are_not_here_are_passed_over(data: Path) -> None:
    study = Study("Toy", datasets=(Data("absent"), TOY), variants={"GRU": {"mixer": "gru"}}, seeds=(0,), common=TINY)
    said: list[str] = []
    run_all(study.runs(), data, data / "runs.jsonl", said.append)
    assert said[0].startswith("passed over: ")
    assert "absent" in said[0]
    assert [result["dataset"] for result in read_results(data / "runs.jsonl")] == ["toy"]


def result(run, ndcg: float, seconds: float = 60.0) -> dict:
    test = dict.fromkeys(report.METRICS, ndcg)
    data = {"users": 3, "items": 1_234, "train targets": 5, "test targets": 9, "test targets of new users": 4}
    return run.key | {
        "test": test, "data": data, "validation": [0.1, 0.2], "cpu_seconds": seconds, "wall_seconds": seconds
    }  # fmt: skip


def test_tables_show_means_spreads_and_what_is_missing(tmp_path: Path) -> None:
    runs = list(STUDY.runs())
    assert report.tables(STUDY, report.finished(STUDY, [])) == "**toy**: not run yet.\n\n"
    gru = report.tables(STUDY, report.finished(STUDY, [result(runs[0], 0.1)]))
    assert "| GRU (1 of 2 seeds) | **0.2000** | **0.1000** |" in gru
    assert "| TTT | not run yet |" in gru
    some = [result(runs[0], 0.1), result(runs[2], 0.3), result(runs[1], 0.25)]
    cells = report.finished(STUDY, some)
    text = report.tables(STUDY, cells)
    assert "5 training targets, 9 test targets (4 of users who are not in training):" in text
    assert text.startswith("**toy**, 3 users, 1,234 items, ")
    assert "| GRU | **0.2000** ± 0.0000 | 0.2000 ± 0.1414 |" in text
    assert "| TTT (1 of 2 seeds) | **0.2000** | **0.2500** |" in text
    assert text.count("| 2 | 30 | 1.0 |") == 2
    report.plot(STUDY, cells, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_published_values_stand_beside_the_means() -> None:
    study = dataclasses.replace(STUDY, published={"toy": {"TTT": (0.2, 0.1, 0.5, 0.25)}})
    cells = report.finished(study, [result(run, 0.25) for run in study.runs()])
    ours = "**0.2500** ± 0.0000"
    beside = [f"{ours} | {text}" for text in ("0.2000 (+25%)", "0.1000 (+150%)", "0.5000 (-50%)", "0.2500 (+0%)")]
    text = report.tables(study, cells)
    assert f"| TTT | **0.2000** ± 0.0000 | {' | '.join(beside)} | 2 |" in text
    assert f"| GRU | **0.2000** ± 0.0000 | {' | '.join([f'{ours} | -'] * 4)} | 2 |" in text


def test_knobs_are_drawn_from_what_there_is(tmp_path: Path) -> None:
    runs = [run for run in knobs.STUDY.runs() if "num_heads" not in run.variant]
    knobs.plot(report.finished(knobs.STUDY, [result(run, 0.1 + run.seed) for run in runs]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_knobs_compare_equal_seeds() -> None:
    a, b, c = ({"seed": seed} for seed in range(3))
    assert knobs._of_equal_seeds({1: [a, b, c], 2: [a], 4: [], 8: [a, c]}) == {1: [a], 2: [a], 8: [a]}
    assert knobs._of_equal_seeds({1: []}) == {}


def test_the_time_left_is_that_of_like_runs() -> None:
    runs = list(STUDY.runs())
    assert time_left(runs, []).endswith("about 0 min for 0 of them and 4 more of which nothing is known yet")
    done = [result(runs[0], 0.1, 60.0), result(runs[1], 0.1, 600.0)]
    assert time_left(runs[2:], done) == "2 to go, about 11 min for 2 of them"


def test_a_study_with_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"known fields; given \['leraning_rate'\]"):
        Study("Typo", datasets=(TOY,), variants={"all": {"leraning_rate": 1}})


def test_costs_of_the_losses() -> None:
    measured = costs.measure([30], 2, print)
    row = costs.table(measured).splitlines()[-1]
    assert re.fullmatch(r"\| 30 \| \d+( \| \d+ \(\d+\.\d\d ×\)){3} \| \d+ \|", row)


@pytest.mark.parametrize("name", ["tuning", "more-tuning", "loss-tuning"])
def test_the_rates_are_the_best_by_validation(name: str) -> None:
    results = read_results(report.RUNS_FILE)
    tried: dict[tuple[str, str], dict[float, float]] = {}
    for run in STUDIES[name].runs():
        kind, rate = run.variant.rsplit(", ", 1)
        if (kind, run.data.name, float(rate)) not in STOPPED_TOO_SOON | UNTRIED:
            found = find(results, run)
            assert found is not None, f"{run.variant} on {run.data.name} was not tried"
            tried.setdefault((kind, run.data.name), {})[float(rate)] = max(found["validation"])
    for (kind, dataset), rates in tried.items():
        assert max(rates, key=rates.__getitem__) == BEST_RATES[kind][dataset], (kind, dataset, rates)


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_the_document_is_up_to_date(path: Path) -> None:
    document = path.read_text()
    stale = "stale: run `python -m studies report`"
    assert report.written(document) == document, stale
