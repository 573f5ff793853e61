"""Studies: grids that stop and go on, and what is written of them."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import costs, report
from benchmarks.studies.grid import MIXERS, STUDIES, TUNED, Study
from benchmarks.studies.runner import find, load_split, read_results, run_all, time_left, train

TINY = {"width": 8, "num_heads": 2, "ffn_width": 8, "max_len": 6, "epochs": 2}
STUDY = Study(
    "Toy", datasets=("toy",), variants={"GRU": {"mixer": "gru"}, "TTT": {"inner": "linear"}}, seeds=(0, 1), common=TINY
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [f"{user}\t{rng.integers(12)}\t{time}" for user in range(20) for time in range(15)]
    (tmp_path / "toy").mkdir()
    with gzip.open(tmp_path / "toy" / "toy.inter.gz", "wt") as file:
        file.write("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]))
    return tmp_path


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
    assert said == []


def test_a_run_does_not_depend_on_those_before_it(data: Path) -> None:
    first, second = (train(run, load_split(data, "toy"), print) for run in [next(STUDY.runs())] * 2)
    assert first["test"] == second["test"]
    assert first["validation"] == second["validation"]
    assert first["cpu_seconds"] > 0
    assert first["best_epoch"] < len(first["validation"]) <= 2


def result(run, ndcg: float, seconds: float = 60.0) -> dict:
    test = dict.fromkeys(report.METRICS, ndcg)
    data = {"users": 3, "items": 1_234, "train targets": 5}
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
    assert "**toy**, 3 users, 1,234 items, 5 training targets:" in text
    assert "| GRU | **0.2000** ± 0.0000 | 0.2000 ± 0.1414 |" in text
    assert "| TTT (1 of 2 seeds) | **0.2000** | **0.2500** |" in text
    assert text.count("| 2 | 30 | 1.0 |") == 2
    report.plot(STUDY, cells, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_time_left_is_that_of_like_runs() -> None:
    runs = list(STUDY.runs())
    assert time_left(runs, []).endswith("about 0 min for 0 of them and 4 more of which nothing is known yet")
    done = [result(runs[0], 0.1, 60.0), result(runs[1], 0.1, 600.0)]
    assert time_left(runs[2:], done) == "2 to go, about 11 min for 2 of them"


def test_a_study_with_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"known fields; given \['leraning_rate'\]"):
        Study("Typo", datasets=("toy",), variants={"all": {"leraning_rate": 1}})


def test_costs_of_the_losses() -> None:
    measured = costs.measure([30], 2, print)
    row = costs.table(measured).splitlines()[-1]
    assert re.fullmatch(r"\| 30 \| \d+( \| \d+ \(\d+\.\d\d ×\)){3} \| \d+ \|", row)


def test_the_rates_are_the_best_by_validation() -> None:
    tuning, results = STUDIES["tuning"], read_results(report.RUNS_FILE)
    best = {run.variant: max(found["validation"]) for run in tuning.runs() if (found := find(results, run))}
    assert len(best) == len(tuning.variants)
    for label in MIXERS:
        own = {variant: value for variant, value in best.items() if variant.startswith(f"{label}, ")}
        assert max(own, key=own.__getitem__) == f"{label}, {TUNED[label]['learning_rate']:g}"


def test_the_document_is_up_to_date() -> None:
    document = report.DOCUMENT.read_text()
    stale = "stale: run `python -m benchmarks.studies report`"
    assert report.written(document) == document, stale
