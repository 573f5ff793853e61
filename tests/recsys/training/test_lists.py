"""Metrics of lists against their definitions, written out, and the bootstrap against what is known of means."""

import json
import math

import numpy as np
import pytest
import torch

from tests.support.recsys_data import SMALL, make_model, make_split, write_events
from ttt4rec.cli import main
from ttt4rec.recsys import Recommender, evaluate
from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.training import intervals, lists
from ttt4rec.recsys.training.evaluate import evaluate_with_intervals
from ttt4rec.recsys.training.intervals import bootstrap
from ttt4rec.recsys.training.lists import evaluate_lists


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    split = make_split(tmp_path_factory.mktemp("lists"))
    return split, Recommender(make_model(split), split.histories)


def plain(split, recommender, part, k, exclude_seen):
    """One user after the other, as the metrics are defined."""
    histories, names = split.histories, split.histories.item_ids
    first, end = split.bounds(part)
    trained = [names_of(histories, user)[: split.train_end[user]] for user in range(histories.num_users)]
    vectors = dict(zip(names, recommender.model.embedding.weight.detach()[1:], strict=True))
    each, covered = [], set()
    for user in range(histories.num_users):
        history = names_of(histories, user)
        before, relevant = history[: first[user]], set(history[first[user] : end[user]])
        relevant -= set(before) if exclude_seen else set()
        if not relevant:
            continue
        items = [x for x, _ in recommender.recommend(history=before, k=k, exclude_seen=exclude_seen).items]
        hits = [place for place, item in enumerate(items, start=1) if item in relevant]
        pairs = [(a, b) for place, a in enumerate(items) for b in items[:place]]
        owners = {item: sum(item in history for history in trained) for item in items}
        each.append(
            {
                "precision": len(hits) / k,
                "recall": len(hits) / len(relevant),
                "HR": bool(hits),
                "MAP": sum(n / place for n, place in enumerate(hits, start=1)) / len(relevant),
                "NDCG": sum(1 / math.log2(1 + place) for place in hits)
                / sum(1 / math.log2(1 + place) for place in range(1, min(k, len(relevant)) + 1)),
                "novelty": np.mean([-math.log2(max(1, owners[item]) / len(trained)) for item in items])
                if items
                else None,
                "popularity": np.mean([sum(h.count(item) for h in trained) for item in items]) if items else None,
                "diversity": np.mean([1 - float(torch.cosine_similarity(vectors[a], vectors[b], 0)) for a, b in pairs])
                if pairs
                else None,
            }
        )
        covered |= set(items)
    there = {name: [row[name] for row in each if row[name] is not None] for name in each[0]}
    means = {name: np.mean(values) if values else None for name, values in there.items()}
    return means | {"coverage": len(covered) / len(names)}


def names_of(histories, user):
    return [histories.item_ids[code - 1] for code in histories.history(user)]


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("part", ["valid", "test"])
def test_metrics_are_those_of_the_plain_definitions(made, monkeypatch, part, exclude_seen):
    monkeypatch.setattr(lists, "_USERS_AT_ONCE", 7)
    split, recommender = made
    found = evaluate_lists(recommender, split, part, cutoffs=(1, 4, 20), exclude_seen=exclude_seen, samples=20)
    for k in (1, 4, 20):
        for name, value in plain(split, recommender, part, k, exclude_seen).items():
            if (name, k) == ("diversity", 1):  # of one item there is none
                assert "diversity@1" not in found
                continue
            assert found[f"{name}@{k}"].value == pytest.approx(value, abs=1e-6), (name, k)
    assert all(x.low <= x.value <= x.high for name, x in found.items() if "coverage" not in name)
    assert (found["coverage@4"].low, found["coverage@4"].high) == (None, None)
    assert evaluate_lists(recommender, split, part, samples=0)["recall@10"].low is None


def test_a_bootstrap_knows_the_error_of_a_mean(monkeypatch):
    """Of normal numbers, 1.96 standard errors on each side, and the same by the same seed, however many at once."""
    values = np.random.default_rng(1).normal(3, 2, size=(2000, 2))
    ends = bootstrap(values, np.ones_like(values), 4000, seed=5)
    error = values.std(axis=0) / math.sqrt(2000)
    np.testing.assert_allclose(ends, values.mean(axis=0) + np.array([[-1.96], [1.96]]) * error, atol=0.15 * error.max())
    monkeypatch.setattr(intervals, "_WEIGHTS_AT_ONCE", 2000 * 300)
    np.testing.assert_allclose(bootstrap(values, np.ones_like(values), 4000, seed=5), ends, rtol=1e-12)
    assert not np.allclose(bootstrap(values, np.ones_like(values), 4000, seed=6), ends, rtol=1e-9)


def test_a_bootstrap_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(2), 0
    for trial in range(300):
        values = rng.exponential(1.0, size=(80, 1))
        low, high = bootstrap(values, np.ones_like(values), 300, seed=trial)
        covered += bool(low[0] <= 1.0 <= high[0])
    assert 0.88 < covered / 300 < 0.98  # 0.93 or so with 80 of a skewed distribution; three standard errors are 0.044


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_intervals_of_the_papers_metrics_are_over_users(made, exclude_seen):
    split, recommender = made
    windows = evaluation_prefixes(split, "test", max_len=8)
    expected = evaluate(recommender.model, windows, cutoffs=(3, 10), exclude_seen=exclude_seen)
    found = evaluate_with_intervals(recommender.model, windows, cutoffs=(3, 10), exclude_seen=exclude_seen, samples=400)
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(expected, abs=1e-12)
    assert all(metric.low < metric.value < metric.high for metric in found.values())
    twice = evaluate_with_intervals(
        recommender.model,
        windows.take(torch.arange(len(windows)).repeat_interleave(2)),
        cutoffs=(3, 10),
        exclude_seen=exclude_seen,
        samples=400,
    )
    for name, metric in found.items():  # the same users with every target twice: nothing more is known of them
        assert (twice[name].low, twice[name].high) == pytest.approx((metric.low, metric.high), abs=1e-12)


def test_bad_use(made):
    split, recommender = made
    for cutoffs in ((), (0, 3)):
        with pytest.raises(ValueError, match="cutoffs must be one or more of at least 1"):
            evaluate_lists(recommender, split, cutoffs=cutoffs)
    with pytest.raises(ValueError, match="samples must be an integer of at least 0; given -1"):
        evaluate_lists(recommender, split, samples=-1)


def test_the_command_line(tmp_path, capsys):
    data = write_events(tmp_path / "ring.inter")
    assert main(["train", str(data), "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL]) == 0
    capsys.readouterr()
    command = ["evaluate", str(tmp_path / "run"), "--lists", "--cutoffs", "5"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        f"{name}@5"
        for name in ("precision", "recall", "HR", "MAP", "NDCG", "novelty", "popularity", "diversity", "coverage")
    ]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    recall = found["recall@5"]
    assert lines[1].split() == [
        "recall@5",
        f"{recall['value']:.4f}",
        f"[{recall['low']:.4f},",
        f"{recall['high']:.4f}]",
    ]
    assert main([*command, "--include-seen", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recall@5"] != recall
    assert main(["evaluate", str(tmp_path / "run"), "--intervals", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    test = json.loads((tmp_path / "run" / "run.json").read_text())["test"]
    assert {name: metric["value"] for name, metric in found.items()} == pytest.approx(test)
    assert main(["evaluate", str(tmp_path / "run"), "--include-seen"]) == 2
    assert "--include-seen must come with --lists" in capsys.readouterr().err
