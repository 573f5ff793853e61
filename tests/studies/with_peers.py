"""RecTools and RecBole in the comparisons. Run by ``scripts/test_adapters.sh``, which builds the environment."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from benchmarks.peers import timing
from benchmarks.peers.sides import SIDES
from studies.benchmark.rectools_check import MODELS, ranked, settings_of, tables, train
from studies.runner import load_split
from studies.study import LEAVE_ONE_OUT, Data

TOY = Data("toy", LEAVE_ONE_OUT, settings={"targets_per_batch": 26})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning and RecBole write logs where they stand
    monkeypatch.setattr("sys.argv", ["job"])  # which RecBole reads


def test_rectools_has_the_targets_of_the_benchmark(data: Path) -> None:
    split = load_split(data, TOY)
    histories = split.histories
    before, last = tables(split, timed=False)
    assert last["item_id"].tolist() == histories.items[histories.offsets[1:] - 1].tolist()
    for user in range(histories.num_users):
        own = before[before["user_id"] == user].sort_values("datetime")
        assert own["item_id"].tolist() == histories.history(user)[:-1].tolist()
    assert settings_of("SASRec", TOY, split, 1e-3, 2)["batch_size"] == 2  # users of thirteen items, twelve targets


def test_targets_are_ranked_among_all_items_or_new_ones() -> None:
    before = pd.DataFrame({"user_id": [0, 0, 1, 2], "item_id": [5, 6, 5, 5], "weight": 1})
    before["datetime"] = pd.to_datetime(np.arange(4), unit="s")
    last = pd.DataFrame({"user_id": [0, 1, 2], "item_id": [5, 7, 8], "weight": 1})
    last["datetime"] = pd.to_datetime(np.arange(3), unit="s")
    asked = []

    def recommend(users, dataset, k, filter_viewed, context):
        asked.append((list(users), k, filter_viewed, context))
        rows = [(user, item, rank) for user in users for rank, item in enumerate((5, 6, 7), start=1)]
        return pd.DataFrame(rows, columns=["user_id", "item_id", "rank"])

    model = SimpleNamespace(recommend=recommend, require_recommend_context=False)
    assert ranked(model, before, last, new=False) == pytest.approx({"HR@10": 2 / 3, "NDCG@10": (1 + 0.5) / 3})
    assert ranked(model, before, last, new=True) == pytest.approx({"HR@10": 1 / 2, "NDCG@10": 0.5 / 2})
    assert asked == [([0, 1, 2], 10, False, None), ([1, 2], 10, True, None)]


@pytest.mark.parametrize("name", MODELS)
def test_rectools_trains_and_is_evaluated(name: str, data: Path) -> None:
    settings = settings_of(name, TOY, load_split(data, TOY), 1e-3, 2)
    result = train(name, TOY, settings, 0, data)
    assert len(result["validation"]) == 2
    assert result["validation"][result["best_epoch"]] == max(result["validation"]) > 0
    for part in ("test", "test, new items"):
        assert 0 <= result[part]["NDCG@10"] <= result[part]["HR@10"] <= 1
    assert result["test"]["HR@10"] > 0.5  # there are twelve items


@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.label)
def test_every_library_does_the_job(side, data: Path) -> None:
    result = timing.run(side.path, data / "toy" / "toy.inter.gz", {"epochs": 1} | side.options)
    assert result["recommended"]["users"] == 20
    assert result["metrics"]["HR@10"] > 0.5
    assert result["metrics"]["NDCG@10"] < 1
