"""The studies of adaptation: their made-up users, what frozen means, and what is measured."""

import dataclasses

import numpy as np
import pytest
import torch

from studies.adaptation import __main__ as runner
from studies.adaptation import drift, habits, report
from studies.adaptation.ablation import ablated, read
from studies.adaptation.switches import Population, best_possible, discounted, gains, joined
from studies.adaptation.training import MIXERS, adapting
from tests.support.checks import assert_close
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.data.split import split_by_ratio
from ttt4rec.recsys.training.segments import Targets

NUMBERS = {"ablation": 4, "drift": len(runner.DRIFTING) + len(runner.TIMED), "habits": len(habits.MIXERS)}
SMALL = Population(items=30, length=12, dimensions=3)


def make_model(num_items, **options):
    torch.manual_seed(0)
    config = TTT4RecConfig(num_items=num_items, width=16, num_heads=2, ffn_width=16, mini_batch_size=2, **options)
    return TTT4Rec(config).double().eval()


def make_split(*lengths, num_items=30):
    """Random histories of these lengths, split 3:2:5."""
    total, names = sum(lengths), tuple(map(str, range(num_items)))
    items = np.random.default_rng(0).integers(1, num_items + 1, total)
    users = tuple(f"u{n}" for n in range(len(lengths)))
    return split_by_ratio(Histories(items, np.cumsum([0, *lengths]), np.arange(total), users, names), (3, 2, 5))


def test_made_up_users_are_those_of_their_seed():
    first, chances = SMALL.users(5, 6, seed=1)
    again, _ = SMALL.users(5, 6, seed=1)
    other, _ = SMALL.users(5, 6, seed=2)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.min() >= 0
    assert first.max() < 30
    assert np.allclose(chances.sum(1), 1)


def test_items_follow_the_interest_behind_the_switch():
    population = dataclasses.replace(SMALL, length=2000)
    (taken,), (chances,) = population.users(1, 1000, seed=0)
    before, after = (np.bincount(part, minlength=30) / 1000 for part in (taken[:1000], taken[1000:]))
    noise = 4 * np.sqrt(chances / 1000) + 0.004
    assert (abs(after - chances) < noise).all()
    assert (abs(before - chances) > noise).any()


def test_the_best_possible_gain_is_that_of_the_true_probabilities():
    _, chances = SMALL.users(1, 6, seed=0)
    order = np.argsort(-chances[0])[:10]
    assert best_possible(chances) == pytest.approx(sum(chances[0][i] / np.log2(2 + n) for n, i in enumerate(order)))


def test_gains_stand_where_their_items_do():
    model, sequences = make_model(30), torch.randint(1, 31, (5, 12))
    ranks = torch.stack([model.ranks(model(rows[None, :7])[0, -1:], rows[7:8])[0] for rows in sequences])
    assert_close(gains(model, sequences)[6], discounted(ranks).mean())


def test_joined_users_meet_at_the_switch():
    split = make_split(40, 50, 60)
    rows, alone = joined(split, 5, 8, pairs=6, seed=0)
    assert rows.shape == alone.shape == (6, 13)
    assert torch.equal(rows[:, 5:], alone[:, 5:])
    assert not torch.equal(rows[:, :5], alone[:, :5])


def test_a_frozen_stream_is_live_until_then_and_knows_the_last_item_alone_afterwards():
    model, items = make_model(30), torch.randint(1, 31, (9,))
    items[6] = items[4]  # at the same place of their mini-batches
    live, frozen, off = (read(model, items, n) for n in (9, 4, 0))
    assert_close(frozen[:4], live[:4])
    assert_close(frozen[6], frozen[4])
    assert not torch.allclose(live[6], live[4])
    with adapting(model, False):
        assert_close(off, model(items[None])[0])
    assert not torch.allclose(frozen[4], off[4])


def test_the_ablation_ranks_every_test_target():
    split = make_split(12, 15, 3)
    model = make_model(split.histories.num_items)
    first, end = split.bounds("test")
    ranks = []
    for user in range(3):
        items = torch.from_numpy(split.histories.history(user))
        ranks += [model.ranks(model(items[None, :p])[0, -1:], items[p : p + 1]) for p in range(first[user], end[user])]
    assert ablated(model, split, "live")["NDCG@10"] == pytest.approx(float(discounted(torch.cat(ranks)).mean()))


@pytest.mark.parametrize("study", runner.STUDIES)
def test_every_study_makes_its_results(study, tmp_path, monkeypatch):
    """At a small size, with a model that is not trained."""
    small = make_split(60, 80, 70, num_items=30)
    monkeypatch.setattr(runner, "load_split", lambda *_: small)
    monkeypatch.setattr(runner, "Population", lambda: SMALL)
    monkeypatch.setattr(runner, "trained", lambda *_, **__: make_model(30))
    monkeypatch.setattr(habits, "trained", lambda *_, **__: make_model(habits.Habits.items))
    monkeypatch.setattr(habits, "PLACES", (1, 5, 20))
    for name, value in {
        "HABITUAL": 2,
        "REMEMBERED": 2,
        "TESTED_ON": 4,
        "TRAINED_ON": 4,
        "SWITCH": 6,
        "MAX_LEN": 10,
        "BEFORE": 5,
    }.items():
        monkeypatch.setattr(runner, name, value)
    runs = list(runner.STUDIES[study](tmp_path, tmp_path))
    assert len({str(key) for key, _ in runs}) == len(runs) == 3 * NUMBERS.get(study, len(MIXERS))
    result = runs[0][1]()
    if study == "ablation":
        assert result["test"].keys() == {"live", "frozen", "off", "live, windows of 50"}
        assert runs[3][1]()["test"].keys() == {"off"}
    elif study == "accuracy":
        assert 0 <= result["test"]["NDCG@10"] <= result["test"]["HR@10"] <= 1
    elif study == "drift":
        timed = next(make for key, make in runs if key["mixer"] == "TTT-MLP, decay by token, with times")()
        for found in (result, timed):
            assert sum(row["targets"] for row in found["segments"]) == 2 * small.num_targets("test")
    elif study == "habits":
        assert len(result["curve"]) == len(result["best possible"]) == 2
    else:
        assert len(result["curve"]) == (11 if study == "made-up" else 9)


def test_targets_are_told_apart_by_what_is_new_and_by_the_time_before():
    split = make_split(80)
    items, times = split.histories.items, split.histories.times
    items[:50] = np.tile(np.arange(1, 11), 5)
    items[45:48] = [20, 21, 22]  # 3 of the 10 before place 50 are not among the 40 before those
    times[50:] += 3600 * 25 - 1
    targets = Targets(np.array([0, 0]), np.array([50, 49]), items[[50, 49]])
    names, number = drift.by_change(split, targets)
    assert [names[n] for n in number] == ["up to 30 % new", "shorter histories"]
    items[44] = 23
    names, number = drift.by_change(split, targets)
    assert names[number[0]] == "30 to 60 % new"
    names, number = drift.by_gap(split, targets)
    assert [names[n] for n in number] == ["within a week", "within an hour"]


def test_users_follow_habits_of_their_own():
    population = habits.Habits(items=5, share=0.8)
    taken = population.streams(2, 4000, seed=0)
    assert np.array_equal(taken, population.streams(2, 4000, seed=0))
    assert (taken.min(), taken.max()) == (1, 5)
    for user in taken:
        counts = np.zeros((6, 6))
        np.add.at(counts, (user[:-1], user[1:]), 1)
        shares = counts[1:, 1:].max(1) / counts[1:].sum(1)
        assert (abs(shares - (0.8 + 0.2 / 5)) < 4 * np.sqrt(0.14 / counts[1:].sum(1))).all()
    split = habits.Habits(items=5, length=20).split(3, seed=0)
    assert split.num_targets("train") + split.num_targets("valid") == 3 * 19


def test_the_best_guess_counts_what_came_after_the_item():
    taken = np.array([[1, 2, 1, 2, 1, 3, 1, 2]])
    found = habits.Habits(items=20).best(taken)
    # 1 is followed by nothing yet, then by 2 and 2, then by 2, 2 and 3; 2 by nothing, then by 1; 3 by nothing
    expected = discounted(torch.tensor([10.5, 10.5, 1.0, 1.0, 11.0, 10.5, 1.0], dtype=torch.float64))
    assert_close(found, expected, 1e-12)


def test_gains_are_averaged_by_how_much_is_known(monkeypatch):
    monkeypatch.setattr(habits, "PLACES", (1, 3, 5))
    assert habits.by_place(torch.tensor([1.0, 2.0, 3.0, 5.0])) == [1.5, 4.0]


def test_tables():
    metrics = {"NDCG@10": 0.5, "HR@10": 0.6}
    key = {"study": "ablation", "split": "3:2:5", "adapting in training": True}
    runs = [{**key, "seed": seed, "test": {"live": metrics}} for seed in (0, 1)]
    assert "| 3:2:5 | adapting | live | 0.5000 ± 0.0000 | 0.6000 ± 0.0000 |" in report.ablation_table(runs)
    runs = [{"study": "accuracy", "mixer": "GRU", "seed": seed, "test": metrics} for seed in (0, 1)]
    assert "| GRU | 0.5000 ± 0.0000 | 0.6000 ± 0.0000 |" in report.accuracy_table(runs)
    segment = {"by": "time", "segment": "later", "targets": 1234, "NDCG@10": 0.5}
    runs = [{"study": "drift", "mixer": "GRU", "seed": seed, "segments": [segment]} for seed in (0, 1)]
    text = report.drift_table(runs)
    assert text.startswith("| time | later: 1,234 |")
    assert "| GRU | **0.5000** ± 0.0000 |" in text
    runs = [{"study": "habits", "mixer": "GRU", "curve": [0.5] * 7, "best possible": [0.75] * 7}] * 2
    text = report.habits_table(runs)
    assert text.startswith("| events known | 1 to 19 | 20 to 49 |")
    assert "| GRU | 0.5000 ± 0.0000 |" in text
    assert "| best possible | 0.7500 |" in text
    curve = [n / 100 for n in range(59)]  # the gain of event n + 1
    text = report.recovery_table([{"study": "made-up", "mixer": "GRU", "curve": curve, "switch": 30}], "made-up")
    assert "| GRU | 0.2600 | 0.3000 | 0.3100 | 0.3300 | 0.3700 | 0.4450 | 0.5400 | 0.4400 |" in text
