"""Metrics by segments, against a plain count of every target."""

import json

import numpy as np
import pytest

from tests.support.recsys_data import make_model, make_split
from ttt4rec.cli import main
from ttt4rec.recsys import Recommender, build_histories, evaluate, evaluation_prefixes, load_interactions, split_by_time
from ttt4rec.recsys.training.evaluate import evaluate_with_intervals
from ttt4rec.recsys.training.segments import (
    SEGMENTATIONS,
    Targets,
    by_history,
    by_popularity,
    by_users,
    evaluate_segments,
)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return make_split(tmp_path_factory.mktemp("segments"), users=20)


@pytest.fixture(scope="module")
def model(split):
    return make_model(split)


def each(split, user, position):
    """A segment a target, so that the metrics are its own."""
    return {"mine": lambda _, x: (("other", "mine"), ((x.users == user) & (x.positions == position)).astype(int))}


def scores_by_hand(split, model, user, position):
    """HR@1 and MRR of one target, from the model's scores of all items."""
    import torch

    history = torch.from_numpy(split.histories.history(user).copy())
    before = history[max(0, position - model.config.max_len) : position]
    with torch.no_grad():
        scores = model.eval().scores(model(before[None])[0, -1])
    own = scores[history[position] - 1]
    rank = 1 + int((scores > own).sum()) + (int((scores == own).sum()) - 1) / 2
    return float(rank <= 1), 1 / rank


@pytest.mark.parametrize("user", [0, 7, 19])
def test_a_segment_of_one_target_has_its_metrics(split, model, user):
    first, end = (int(edge[user]) for edge in split.bounds("test"))
    for position in {first, end - 1}:
        rows = evaluate_segments(model, split, by=each(split, user, position), cutoffs=[1])
        (mine,) = (row for row in rows if row.name == "mine")
        assert (mine.targets, mine.users) == (1, 1)
        hit, reciprocal = scores_by_hand(split, model, user, position)
        assert mine.metrics["HR@1"].value == hit
        assert mine.metrics["MRR"].value == pytest.approx(reciprocal)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_segments_add_up_to_the_whole(split, model, exclude_seen):
    windows = evaluation_prefixes(split, "test", max_len=model.config.max_len)
    whole = evaluate(model, windows, exclude_seen=exclude_seen)
    rows = evaluate_segments(model, split, exclude_seen=exclude_seen)
    count = split.num_new_targets("test") if exclude_seen else split.num_targets("test")
    for by in SEGMENTATIONS:
        own = [row for row in rows if row.by == by]
        assert sum(row.targets for row in own) == count
        for name, value in whole.items():
            assert sum(row.metrics[name].value * row.targets for row in own) / count == pytest.approx(value)
    assert len({row.name for row in rows if row.by == "history"}) > 1


def test_intervals_are_those_of_the_whole_where_all_is_one_segment(split, model):
    one = {"all": lambda _, x: (["all"], np.zeros(len(x.users), dtype=int))}
    (row,) = evaluate_segments(model, split, by=one, samples=50, seed=3)
    windows = evaluation_prefixes(split, "test", max_len=model.config.max_len)
    assert row.metrics == evaluate_with_intervals(model, windows, samples=50, seed=3)


def targets(users, positions, items):
    return Targets(*(np.array(x) for x in (users, positions, items)))


def test_what_the_segments_are():
    rows = [("a", "x", t) for t in range(6)] + [("b", item, 6 + t) for t, item in enumerate("yyyzzz")]
    rows += [("a", "w", 20), ("a", "y", 21), ("new", "x", 22), ("new", "z", 23), ("b", "x", 24)]
    split, _ = split_by_time(load_interactions(rows), (12, 2, 3))
    codes = {item: code for code, item in enumerate(split.histories.item_ids, start=1)}
    assert "w" not in codes
    of = targets([0, 0, 0], [1, 5, 101], [codes[item] for item in "xyz"])
    names, number = by_history(split, of)
    assert [names[x] for x in number] == ["1 to 5", "1 to 5", "above 100"]
    assert [names[x] for x in by_history(split, targets([0] * 4, [6, 50, 51, 100], [1] * 4))[1]] == [
        "6 to 10",
        "21 to 50",
        "51 to 100",
        "51 to 100",
    ]
    names, number = by_popularity(split, of)
    assert [names[x] for x in number] == ["head", "middle", "middle"]  # y and z have equally many
    users = [split.histories.user_ids.index(user) for user in ("a", "b", "new")]
    names, number = by_users(split, targets(users, [1] * 3, [1] * 3))
    assert [names[x] for x in number] == ["known", "known", "new"]


def test_items_that_training_does_not_have_are_apart(split):
    histories = build_histories(load_interactions([("a", "x", 1), ("a", "x", 2), ("a", "x", 3), ("a", "y", 4)]))
    from ttt4rec.recsys import split_by_ratio

    names, number = by_popularity(split_by_ratio(histories, (1, 1, 1)), targets([0, 0], [2, 3], [1, 2]))
    assert [names[x] for x in number] == ["head", "not in training"]


def test_a_segmentation_that_leaves_targets_out_is_refused(split, model):
    for wrong in (lambda _, x: (["all"], x.users[:1]), lambda _, x: (["all"], x.users * 0 + 1)):
        with pytest.raises(ValueError, match=r"mine must give each of .* targets a number below 1"):
            evaluate_segments(model, split, by={"mine": wrong})


def test_the_table_of_the_command_line(tmp_path, capsys):
    from tests.support.recsys_data import SMALL, write_events

    data = write_events(tmp_path / "ring.inter", users=20)
    assert main(["train", str(data), "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL]) == 0
    capsys.readouterr()
    command = ["evaluate", str(tmp_path / "run"), "--segments"]
    assert main([*command, "history", "users", "--cutoffs", "3"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["by", "segment", "users", "targets", "HR@3", "NDCG@3"]
    assert {row.split()[0] for row in rows} == {"history", "users"}
    assert len({len(row) for row in (head, *rows)}) == 1
    assert main([*command, "--json", "--intervals"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["by"] for row in found} == {"history", "popularity", "users"}
    assert all(row["metrics"]["HR@10"]["low"] <= row["metrics"]["HR@10"]["high"] for row in found)
    model = Recommender.load(tmp_path / "run")
    assert sum(row["users"] for row in found if row["by"] == "users") <= model.histories.num_users
    assert main([*command, "--lists"]) == 2
    assert "--segments must come without --lists" in capsys.readouterr().err
