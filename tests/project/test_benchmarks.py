"""The benchmark suite but for the timings: contestants, turns, budgets, reports."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import closing

import pytest
import torch

from benchmarks import catalogue, long_mini_batches, measure, online, report, serving, sides, small_calls
from benchmarks.best_items import BestItemsContest, best_items_contests
from benchmarks.catalogue import LossContest, loss_contests
from benchmarks.contests import FORWARD, PREFILL, STEP, TRAINING, MixerContest, mixer_contests
from benchmarks.mixers import TTT, Attention
from benchmarks.plots import of_equal_tokens, plot, plot_for_readme
from benchmarks.recommenders import EVALUATION, MODELS, TRAINING_STEP, RecommenderContest, recommender_contests
from tools.documents import ROOT, number
from ttt4rec.recsys.online import SQLiteEventLog

WIDTH = 16
PRESENT = sides.present("cpu")


@pytest.fixture(params=PRESENT, ids=str)
def mixer(request):
    torch.manual_seed(1)
    return PRESENT[request.param](WIDTH)


def test_mixers_are_causal_and_go_on_where_they_stopped(mixer):
    x = torch.randn(2, 19, WIDTH)
    y = mixer.eval()(x)
    changed = x.clone()
    changed[:, 12:] += 1
    torch.testing.assert_close(mixer(changed)[:, :12], y[:, :12])
    assert not torch.allclose(mixer(changed)[:, 12:], y[:, 12:], atol=1e-4)
    with torch.no_grad():
        last = mixer.step(x[:, -1:], mixer.prefill(x[:, :-1]))
    torch.testing.assert_close(last, y[:, -1:])


def test_mixers_train(mixer):
    x = torch.randn(2, 19, WIDTH, requires_grad=True)
    mixer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()


@pytest.mark.parametrize("width", [64, 256])
def test_mixers_are_of_like_size(width):
    counts = {label: sum(p.numel() for p in make(width).parameters()) / width**2 for label, make in PRESENT.items()}
    assert min(counts.values()) >= 4
    assert max(counts.values()) <= 8


def test_whoever_does_not_take_part_is_named_with_a_reason():
    for device in ("cpu", "cuda"):
        absent = sides.absences(device)
        assert set(absent) | set(sides.present(device)) == set(sides.side_makers())
        assert all(absent.values())
    on_cpu = MixerContest(FORWARD, 64, 1, 50).absent("cpu")
    assert on_cpu["Mamba-2, Triton kernels of mamba-ssm"] == "absent: its kernels need a GPU"


def test_a_package_that_is_missing_or_broken_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_competitor.py").write_text("raise RuntimeError('no driver\\nsecond line')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert sides.import_failure("json.decoder") == ""
    assert sides.import_failure("no_such_competitor.layers") == "the package no_such_competitor is not installed"
    assert sides.import_failure("broken_competitor") == "broken_competitor cannot be imported: no driver"


def test_flops_are_those_of_the_recurrence():
    layer = TTT(64, "linear", "transformer")  # four projections, the rates' weight, and four heads of 16 by 16
    assert layer.flops(50) == layer.flops(5000) == 2 * (4 * 64 * 64 + 4 * 64) + 4 * 6 * 16 * 16
    grown = Attention(64).flops(200) - Attention(64).flops(100)
    assert grown == 2 * 64 * 100


def test_every_operation_can_be_called():
    for operation in (FORWARD, TRAINING, PREFILL, STEP):
        contest, info = MixerContest(operation, WIDTH, 2, 9), {}
        contest.prepare("TTT-Linear (Mamba)", "cpu", info)()
        assert info["tokens"] == (2 if operation == STEP else 18)
        assert info["bytes"] > 0


@pytest.mark.parametrize(
    "side", [pytest.param(name, marks=pytest.mark.slow if "MLP" in name else ()) for name in MODELS]
)
def test_recommenders_train_and_rank(side):
    info = {}
    loss = RecommenderContest(TRAINING_STEP, 20, 2).prepare(side, "cpu", info)()
    assert loss.isfinite()
    assert info["tokens"] == 60  # thirty of each user
    metrics = RecommenderContest(EVALUATION, 20, 1).prepare(side, "cpu", info)()
    assert metrics["HR@50"] == 1  # there are fewer items


def test_sides_of_best_items_agree():
    contest = BestItemsContest(3, 2000)
    (scores, items), (own_scores, own_items) = (contest.prepare(side, "cpu", {})() for side in contest.sides("cpu"))
    torch.testing.assert_close(own_scores, scores)
    assert torch.equal(own_items, items)


def test_the_ways_to_a_loss_agree():
    values = {side: LossContest(9, 20).prepare(side, "cpu", {})() for side in catalogue.LOSSES}
    for gradients in values.values():
        for given, expected in zip(gradients, values["all scores"], strict=True):
            torch.testing.assert_close(given, expected)


def test_names_and_columns_are_unique():
    for size in ("small", "full"):
        contests = [
            *mixer_contests(size), *recommender_contests(size), *loss_contests(size), *best_items_contests(size),
        ]  # fmt: skip
        assert len({c.name for c in contests}) == len(contests)
        assert len({(c.size["table"], c.size["column"]) for c in contests}) == len(contests)


def test_state_bytes_count_every_tensor_once():
    layer = TTT(WIDTH, "mlp", "mamba")
    pool, slots = layer.prefill(torch.randn(3, 11, WIDTH))
    assert measure.tensor_bytes((pool, slots)) == pool.nbytes + slots.nbytes  # and not the layer's parameters
    x = torch.ones(10)
    assert measure.tensor_bytes({"a": [x, (x, torch.ones(2))], "b": 3}) == 48


def test_peak_memory_is_what_is_held_at_once():
    x = torch.randn(1000)

    def call():
        a = x + 1
        b = a * 2  # two at once
        del a
        return b.sum()

    assert 8000 <= measure.peak_memory(call, "cpu") < 8000 + 512


def raising(error):
    def make():
        raise error

    return make


def test_sides_take_turns():
    calls = []
    makers = {name: lambda name=name: lambda: calls.append(name) or time.sleep(3e-3) for name in "abc"}
    outcomes = measure.take_turns(makers, "cpu", 10.0)
    assert [len(o.seconds) for o in outcomes.values()] == [measure.MAX_ROUNDS] * 3
    rounds = calls[6:-3]  # between the warm-up and the measurement of memory
    orders = {"".join(rounds[i : i + 3]) for i in range(0, len(rounds), 3)}
    assert len(orders) == 3
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_who_cannot_be_measured_does_not_stop_the_others():
    failure = RuntimeError("no kernel image")
    makers = {
        "fine": lambda: lambda: None,
        "slow": lambda: lambda: time.sleep(0.5),
        "large": raising(torch.OutOfMemoryError()),
        "stepless": raising(measure.NotMeasurableError("no step")),
        "broken": raising(failure),
    }
    outcomes = measure.take_turns(makers, "cpu", 1.0)
    assert len(outcomes["fine"].seconds) >= measure.MIN_ROUNDS
    told = re.fullmatch(r"out of time, (\S+) s a call", outcomes["slow"].why_not)
    assert 0.5 <= float(told[1]) < 2  # on a busy machine it is called late
    assert outcomes["large"].why_not == "out of memory"
    assert outcomes["stepless"].why_not == "no step"
    assert outcomes["broken"].error is failure
    assert not any(o.seconds for name, o in outcomes.items() if name != "fine")


def made_up_result(path, seconds, not_measured):
    """A file as the suite saves it, of one contest; seconds per round, by side."""
    where = {"table": "forward, width 64", "column": "2 × 50"}
    known = {"operation": "forward", "width": 64, "length": 50, "tokens": 100, "dtype": "float32", "bytes": 1e6}
    known |= {"flops": 1e6, "parameters": 5, "peak_bytes": 2**20}
    benchmarks = [
        {
            "extra_info": {"side": side, **where, **known},
            "stats": {"median": data[1], "data": data, "iqr": 0.002, "q1": data[0], "q3": data[2], "rounds": 3},
        }
        for side, data in seconds.items()
    ]
    machine = {"device": "Abacus", "memory_gib": 1, "driver": "", "threads": 1, "python": "3", "versions": {}}
    own = {"device_type": "cpu", "note": "Shared.", "load_average": [0.1, 0.2], "roofs": {"float32": {}}}
    own["roofs"]["float32"] = {"copy": 1e9, "matmul": 1e10}
    own |= {"not_measured": [where | row for row in not_measured], "contests": [list(where.values())]}
    own["sides"] = [*seconds, *(row["side"] for row in not_measured)]
    commit = {"id": "0123456789abc", "dirty": False}
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps(
            {"machine_info": machine, "commit_info": commit, "datetime": "2026-01-02T03:04:05"}
            | {"benchmarks": benchmarks, "ttt4rec": own}
        )
    )
    return report.Result(path)


def test_numbers_have_the_digits_that_mean_something():
    assert [number(x) for x in (0.012345, 9.999, 45.67, 1234.5)] == ["0.0123", "10.0", "45.7", "1,234"]
    assert [number(x, 2) for x in (0.1, 9.99, 12.3)] == ["0.10", "10", "12"]


def test_report_names_winners_losers_and_the_absent(tmp_path):
    times = {"TTT-MLP (Mamba)": [0.03, 0.04, 0.08], "attention": [0.01, 0.02, 0.04]}
    absent = [{"side": "Mamba-2", "why": "absent: its kernels need a GPU"}, {"side": "GRU", "why": "out of memory"}]
    result = made_up_result(tmp_path / "abacus" / report.JSON_FILE, times, absent)
    (tmp_path / "abacus" / "notes.md").write_text("Attention wins, since it is short.\n")
    (tmp_path / "abacus" / "parity.log").write_text("....\n4 passed in 1.00s\n")
    text = report.report(result)
    assert "| TTT-MLP (Mamba) | 40.0 ± 1.0 |" in text
    assert "| attention | **20.0 ± 1.0** |" in text
    assert "| Mamba-2 | absent: its kernels need a GPU |" in text
    assert "| GRU | not measured: out of memory |" in text
    assert "attention of those measured; TTT-MLP (Mamba) takes 2.00 × |" in text  # of the rounds' ratios 3, 2, 2
    assert "| attention | 20.0 | 10.0 to 40.0 | 3 | 1.00 × | 5,000 | 1.0 | 5.0% | 0.5% | 5 |" in text
    assert "Abacus" in text
    assert "Shared." in text
    assert "since it is short" in text
    assert "4 passed" in text
    for run in result.runs:  # as of a loss, which has no model
        del run.info["parameters"]
    assert "| attention | 20.0 | 10.0 to 40.0 | 3 | 1.00 × | 5,000 | 1.0 | 5.0% | 0.5% | none |" in report.report(
        result
    )


def test_performance_section_says_what_was_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    result = made_up_result(tmp_path / "abacus" / report.JSON_FILE, {"GRU": [0.1, 0.1, 0.1]}, [])
    text = report.performance_section([result])
    assert text.startswith("### On a GPU\n\nNot measured.\n\n### On a CPU\n\nAbacus")
    assert "One-token step, width 64:\n\nNot measured." in text


def test_plots_are_written_and_compare_equal_numbers_of_tokens(tmp_path):
    result = made_up_result(tmp_path / "abacus" / report.JSON_FILE, {"GRU": [0.1, 0.1, 0.1]}, [])
    shapes = [(50, 100), (50, 6400), (200, 6400), (50, 9000)]
    runs = [report.Run(result.runs[0].info | {"length": n, "tokens": t}, result.runs[0].stats) for n, t in shapes]
    assert [run.info["tokens"] for run in of_equal_tokens(runs)] == [6400, 6400]
    result.runs = runs
    plot(result, tmp_path)
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("time", "memory", "roofline"))


def test_performance_and_reports_are_what_the_committed_results_give():
    results = report.committed()
    expected = report.performance_section(results)
    stale = "stale: run `python -m benchmarks.report --documents`"
    assert report.SECTION.findall(report.DOCUMENT.read_text()) == [expected], stale
    for result in results:
        assert (result.path.parent / report.REPORT_FILE).read_text() == report.report(result)


def test_the_readmes_plot_is_made_of_a_committed_result(tmp_path):
    result = report.committed()[0]
    plot_for_readme(result, tmp_path / "plot.png")
    result.runs = [run for run in result.runs if not run.side.startswith("Mamba")]  # whose package was not installed
    plot_for_readme(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_results_are_saved_and_compared_by_pytest_benchmark(tmp_path):
    saved = tmp_path / "benchmark.json"
    chosen = "one-token_step-w64-b1-l50 and (attention or GRU)"
    command = [sys.executable, "-m", "pytest", "benchmarks/test_mixers.py", "--benchmark-only", "-k", chosen]
    command += ["--size=small", "--budget=5", "--note=a test", f"--benchmark-json={saved}", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=report.ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "one-token step, width 64, 1 × after 50: 3 of 3 sides measured" in run.stdout
    compare = [sys.executable, "-m", "pytest_benchmark", "compare", str(saved)]
    comparison = subprocess.run(compare, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "attention" in comparison
    assert "GRU" in comparison
    result = report.Result(saved)
    assert [run.side for run in result.runs] == ["attention", "attention without rotation", "GRU"]
    assert all(run.stats["rounds"] == measure.MAX_ROUNDS for run in result.runs)
    assert result.runs[0].stats["data"] != result.runs[1].stats["data"]
    assert "a test" in report.report(result)
    missing = {row["side"] for row in result.own["not_measured"]}
    assert missing == set(sides.absences(sides.default_device()))


@pytest.mark.slow
def test_requests_to_a_service(tmp_path):
    serving.write_folder(tmp_path, users=20, num_items=30)
    measured = serving.measure(tmp_path, 3, recommendations=0.5, events=40, options=["--pool-bytes", "2000000"])
    assert measured["answers"] == {"200": 40}
    assert measured["cpu_ms"] > 0
    assert measured["p50_ms"] <= measured["p99_ms"]


@pytest.mark.parametrize("flush", [True, False])
def test_threads_that_append(tmp_path, flush):
    measured = online.appends(tmp_path / "log.db", 3, flush=flush, rounds=10)
    assert (measured["threads"], measured["flush"]) == (3, flush)
    assert 1 <= measured["events_per_write"] <= 10
    with closing(SQLiteEventLog(tmp_path / "log.db")) as log:
        assert sum(tail.length for tail in log.read(log.users(), [[]] * len(log.users()))) == 10


def test_requests_to_an_online_recommender(tmp_path):
    online.write_histories(tmp_path / "log.db", 20, num_items=30)
    sizes = {"num_items": 30, "rounds": 4}
    kept = online.measure(tmp_path / "log.db", "linear", 20, 1.0, **sizes)
    rebuilt = online.measure(tmp_path / "log.db", "linear", 20, 0.2, **sizes)
    assert (kept["slots"], rebuilt["slots"]) == (20, 4)
    assert kept["share_rebuilt"] == 0 < rebuilt["share_rebuilt"]
    assert kept["requests_of_20"]["both"]["p50_ms"] > 0
    compared = online.compare(tmp_path / "log.db", "linear", 20, 2, **sizes)
    assert compared["observe"]["ratio"] > 0


def test_small_calls_stand_beside_their_rivals():
    steps = small_calls.mixers(STEP, 1, 9, 20.0)
    assert steps.keys() == {*small_calls.OURS, "GRU"}
    assert all(row["ms"] >= row["least_ms"] > 0 and len(row) == 4 for row in steps.values())
    assert steps["GRU"][small_calls.OURS[0]] > 0
    assert small_calls.model_steps(10.0)["mlp"]["ms"] > 0
    shares = small_calls.share_of_peak(small_calls.OURS[0])
    assert 0 < shares["share"] < 1


@pytest.mark.slow
def test_another_checkout_takes_its_turns(tmp_path):
    """Here this one once more."""
    there = small_calls.training_steps(ROOT, 1, 20.0, 1000)
    assert all(row["here"]["there"] > 0 for row in there.values())
    with pytest.raises(RuntimeError, match="must be a checkout"):
        small_calls.caller(tmp_path, 1, "training_step-n1000", "nobody")


@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
def test_long_mini_batches_run(backend):
    long_mini_batches.inner_loop("linear", 70, 1, 8, 66, backend)()
