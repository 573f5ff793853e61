"""Training, evaluating and recommending by models that read the times of events."""

import dataclasses
import math
import random
import re

import numpy as np
import pytest
import torch

from tests.support.recsys_data import SMALL, make_model
from ttt4rec.cli import main
from ttt4rec.recsys.data import DataError, build_histories, read_interactions
from ttt4rec.recsys.data.split import split_by_ratio
from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.recommend import Recommender
from ttt4rec.recsys.training.evaluate import evaluate, packed
from ttt4rec.recsys.training.lists import evaluate_lists
from ttt4rec.recsys.training.train import TrainOptions, fit

OPTIONS = TrainOptions(epochs=2, targets_per_batch=128, learning_rate=1e-2)
PAUSE = 10_000


def write_sessions(path, users=40, seed=0):
    """Users walk round a ring of items, one step on within a session, seven after a pause."""
    rng = random.Random(seed)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(users):
        item, time = rng.randrange(24), rng.randrange(10**6)
        for _ in range(rng.randrange(8, 30)):
            lines.append(f"u{user}\ti{item}\t{time}")
            pause = rng.random() < 0.5
            time += PAUSE + rng.randrange(1000) if pause else rng.randrange(1, 9)
            item = (item + (7 if pause else 1)) % 24
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("times")
    data = write_sessions(folder / "sessions.inter")
    command = ["train", str(data), "--out", str(folder / "run"), "--epochs", "1", "--times", "query", *SMALL]
    assert main(command) == 0
    return folder


@pytest.fixture
def split(run):
    return split_by_ratio(build_histories(read_interactions(run / "sessions.inter")), (3, 2, 5))


@pytest.mark.slow
def test_times_are_learned_from(tmp_path, split):
    found = {}
    for times, epochs in (("gap", 20), ("query", 60)):
        options = TrainOptions(epochs=epochs, patience=epochs, targets_per_batch=64, learning_rate=1e-2)
        reports = fit(make_model(split, times=times), split, tmp_path / times, options)
        found[times] = max(report.metrics["MRR@10"] for report in reports)
    assert found["gap"] < 0.8  # which of two items comes is decided by a coin: 0.75 if both are known
    assert found["query"] > 0.9  # 0.98 here


def test_a_run_is_resumed_and_knows_its_times(tmp_path, split):
    whole, stopped = make_model(split, times="gap"), make_model(split, times="gap")
    expected = fit(whole, split, tmp_path / "whole", OPTIONS)
    fit(stopped, split, tmp_path / "run", dataclasses.replace(OPTIONS, epochs=1))
    resumed = fit(stopped, split, tmp_path / "run", OPTIONS)
    assert [report.loss for report in resumed] == [report.loss for report in expected]
    assert all(map(torch.equal, whole.state_dict().values(), stopped.state_dict().values()))
    assert stopped.event_times.gap.abs().amax(1).gt(0).sum() > 3
    later = dataclasses.replace(split.histories, times=split.histories.times * 2)
    with pytest.raises(ValueError, match="it has other data"):
        fit(stopped, dataclasses.replace(split, histories=later), tmp_path / "run", OPTIONS)


def test_times_change_nothing_of_a_model_without_them(tmp_path, split):
    other = dataclasses.replace(split, histories=dataclasses.replace(split.histories, times=split.histories.times * 2))
    fit(make_model(split), split, tmp_path / "run", dataclasses.replace(OPTIONS, epochs=1))
    fit(make_model(split), other, tmp_path / "run", OPTIONS)  # which goes on, as it is the same run


def test_users_are_recommended_to_as_evaluation_ranks(run, split):
    recommender = Recommender.load(run / "run")
    model, histories = recommender.model, recommender.histories
    windows = evaluation_prefixes(split, "test", max_len=model.config.max_len)
    last = torch.tensor([int((windows.begins == begin).nonzero()[-1]) for begin in windows.begins.unique()[:3]])
    with torch.no_grad():
        hidden, items = model.predict(*packed(model, windows, last))
    scores = model.scores(hidden[items.cumsum(0) > 0])
    row = int(windows.targets_per_window[last].cumsum(0)[0]) - 1
    place = int(windows.target_places(last[:1])[-1])
    begin = int(windows.begins[last[0]])
    names = [histories.item_ids[code - 1] for code in histories.items[begin:place]]
    times, at = histories.times[begin:place].tolist(), histories.times[place].item()
    asked = {"k": 24, "exclude_seen": False}
    best = recommender.recommend(history=names, times=times, at=at, **asked)
    assert [score for _, score in best.items] == pytest.approx(sorted(scores[row].tolist(), reverse=True), rel=1e-5)
    assert recommender.recommend_batch([names], times=[times], at=at, **asked) == [best]
    assert recommender.recommend(history=names, times=times, at=at + PAUSE, **asked) != best
    now = recommender.recommend(history=names, times=times, **asked)
    assert now == recommender.recommend(history=names, times=times, at=times[-1] - 5, **asked)
    with_strangers = recommender.recommend(
        history=[names[0], "stranger", *names[1:]], times=[times[0], 0, *times[1:]], at=at, **asked
    )
    assert (with_strangers.items, with_strangers.unknown) == (best.items, ("stranger",))
    user = histories.user_ids[0]
    assert recommender.recommend(user, at=at) == recommender.recommend(users=[user], at=at)[0]
    assert evaluate_lists(recommender, split, samples=0)["HR@10"].value > 0


def test_wrong_times_are_refused(run):
    recommender = Recommender.load(run / "run")
    with pytest.raises(DataError, match="a history must come with times, which the model reads; given items alone"):
        recommender.recommend(history=["i1"])
    with pytest.raises(DataError, match="times must be one for each of the history's 2 items; given 1"):
        recommender.recommend(history=["i1", "i2"], times=[1])
    with pytest.raises(DataError, match="times must come with the history that they are of"):
        recommender.recommend("u1", times=[1])
    with pytest.raises(DataError, match="times must be given for each of 1 histories; given 2"):
        recommender.recommend_batch([["i1"]], times=[[1], [2]])
    for wrong in (math.nan, math.inf, "1", 10**400, None, [1], [[1], 2]):
        with pytest.raises(DataError, match="times must be finite numbers, in the unit of the data's times; given"):
            recommender.recommend(history=["i1"], times=[wrong])
    for wrong in (math.nan, [1.0, 2.0], [3], "now"):
        with pytest.raises(DataError, match="at must be finite numbers"):
            recommender.recommend("u1", at=wrong)
    best = recommender.recommend("u1", at=5)
    assert recommender.recommend("u1", at=np.array(5)) == recommender.recommend("u1", at=np.int64(5)) == best


def test_the_command_line(run, capsys):
    folder = str(run / "run")
    histories = Recommender.load(folder).histories
    after_a_pause = histories.times[: histories.offsets[histories.user_code("u1") + 1]][-1] + PAUSE
    for at in ([], ["--at", "0"], ["--at", str(after_a_pause)]):
        assert main(["recommend", folder, "--user", "u1", "-k", "24", "--include-seen", *at]) == 0
    now, early, late = np.array_split(capsys.readouterr().out.splitlines(), 3)
    assert now.tolist() == early.tolist() != late.tolist()
    assert main(["evaluate", folder, "--part", "valid"]) == 0
    assert main(["recommend", folder, "--history", "i1"]) == 2
    error = capsys.readouterr().err
    assert "a history must come with times" in error
    data, out = str(run / "sessions.inter"), str(run / "other")
    assert main(["train", data, "--out", out, "--times", "gap", "--row-order", *SMALL]) == 2
    assert "--times with --row-order: leave it out or change the other" in capsys.readouterr().err
    assert main(["train", data, "--out", out, "--warm-start", folder, "--row-order"]) == 2
    assert "--row-order must be left out with --times query, since the model reads times" in capsys.readouterr().err
    assert main(["train", data, "--out", out, "--times", "gap", "--mixer", "bidirectional", *SMALL]) == 2
    assert "times must be none with mixer bidirectional" in capsys.readouterr().err


def test_at_is_a_number_or_a_date_as_in_files(run, capsys):
    ask = ["recommend", str(run / "run"), "--user", "u1", "-k", "24", "--include-seen", "--at"]
    seconds = 1_735_689_600
    for at in (str(seconds), "2025-01-01", "2025-01-01T01:00:00+01:00"):
        assert main([*ask, at]) == 0
    by_number, by_day, by_moment = np.array_split(capsys.readouterr().out.splitlines(), 3)
    assert by_number.tolist() == by_day.tolist() == by_moment.tolist()
    for at in ("tomorrow", "nan"):
        assert main([*ask, at]) == 2
        assert "--at must be a finite number in the unit of the data's times, or a date" in capsys.readouterr().err


def test_the_program_on_the_model_card_gives_times(run, capsys, monkeypatch):
    monkeypatch.chdir(run / "run")
    exec(re.search(r"```python\n(.*?)```", (run / "run" / "model_card.md").read_text(), re.DOTALL)[1], {})
    assert "('i" in capsys.readouterr().out


@pytest.mark.slow
def test_a_warm_start_reads_times_too(run, tmp_path, capsys):
    command = ["train", str(run / "sessions.inter"), "--out", str(tmp_path), "--epochs", "1"]
    assert main([*command, "--warm-start", str(run / "run"), "--times", "none"]) == 2
    assert "--times must be left out or query" in capsys.readouterr().err
    assert main([*command, "--warm-start", str(run / "run")]) == 0
    before, after = (Recommender.load(folder).model for folder in (run / "run", tmp_path))
    assert after.config.times == "query"
    assert not torch.equal(before.event_times.scale, after.event_times.scale)


def test_models_without_times_take_no_at(run, tmp_path, capsys, split):
    recommender = Recommender(make_model(split), split.histories)
    assert recommender.recommend("u1", at=5) == recommender.recommend("u1")
    assert evaluate(recommender.model, evaluation_prefixes(split, "test", max_len=8))
    recommender.save(tmp_path)
    assert main(["recommend", str(tmp_path), "--user", "u1", "--at", "5"]) == 2
    assert "--at must come with a model of --times query; given 5 for one of --times none" in capsys.readouterr().err
