"""Recommending to known and new users, and keeping a recommender in a folder."""

import copy
import dataclasses
import json
import uuid

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.recsys_data import NUM_ITEMS, make_model, make_split
from ttt4rec.models import full_softmax
from ttt4rec.recsys.online import OnlineRecommender, SQLiteEventLog
from ttt4rec.recsys.recommend import Recommendations, Recommender
from ttt4rec.recsys.training.train import TrainOptions, fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recommender")
    split = make_split(folder)
    model = make_model(split)
    fit(model, split, folder / "run", TrainOptions(epochs=20, targets_per_batch=64, learning_rate=1e-2))
    return Recommender(model, split.histories)


def test_it_recommends_what_comes_next(trained):
    result = trained.recommend(history=["i3", "i4", "i5", "i6"], k=2)
    assert {item for item, _ in result.items} == {"i7", "i8"}
    assert result.items[0][1] >= result.items[1][1]
    assert result.unknown == ()


def test_a_known_user_is_a_history(trained):
    user = trained.histories.user_ids[3]
    history = [trained.histories.item_ids[code - 1] for code in trained.histories.history(3)]
    assert trained.recommend(user, k=6) == trained.recommend(history=history, k=6)
    short = trained.recommend(history=history[-8:], k=6, exclude_seen=False)  # max_len
    assert trained.recommend(user, k=6, exclude_seen=False) == short


def test_seen_items_and_large_k(trained):
    history = ["i1", "i2", "i3", "i4"]
    everything = trained.recommend(history=history, k=1000, exclude_seen=False).items
    assert len({item for item, _ in everything}) == len(everything) == NUM_ITEMS
    unseen = trained.recommend(history=history, k=1000).items
    assert unseen == [entry for entry in everything if entry[0] not in history]


def test_ties_keep_the_catalogues_order(tmp_path):
    split = make_split(tmp_path)
    model = make_model(split)
    torch.nn.init.zeros_(model.embedding.weight)
    items = Recommender(model, split.histories).recommend(history=["i1"], k=5, exclude_seen=False).items
    assert [item for item, _ in items] == list(split.histories.item_ids[:5])


def test_items_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    split = make_split(tmp_path)
    recommender = Recommender(make_model(split), split.histories)
    monkeypatch.setattr(full_softmax, "top_k", None)  # the way without an index
    histories = [["i1", "i2"], ["i3"], ["i4", "i5", "i6"]]
    before = recommender.recommend_batch(histories, exclude_seen=True)
    made = recommender._index._made
    assert recommender.recommend_batch(histories, exclude_seen=True) == before
    assert recommender._index._made is made
    recommender.model.load_state_dict(make_model(split, seed=1).state_dict())
    after = recommender.recommend_batch(histories, exclude_seen=True)
    assert after == Recommender(make_model(split, seed=1), split.histories).recommend_batch(
        histories, exclude_seen=True
    )
    assert after != before
    for other in (copy.deepcopy(recommender), dataclasses.replace(recommender, model=recommender.model)):
        assert other._index is not recommender._index
        assert other.recommend_batch(histories, exclude_seen=True) == after


def test_unknown_items_are_reported(trained):
    result = trained.recommend(history=["i3", "new", "i4", "newer"])
    assert result.unknown == ("new", "newer")
    assert result.items == trained.recommend(history=["i3", "i4"]).items


def test_a_batch_with_histories_that_hold_no_known_item(trained):
    histories = [["x", "y"], ["i3", "new", "i4"], [], ["i5"], ["z"]]
    results = trained.recommend_batch(histories, k=3)
    assert [result.unknown for result in results] == [("x", "y"), ("new",), (), (), ("z",)]
    assert [len(result.items) for result in results] == [0, 3, 0, 3, 0]
    for history, result in zip(histories, results, strict=True):
        if result.items:
            alone = trained.recommend(history=history, k=3).items
            assert [item for item, _ in result.items] == [item for item, _ in alone]
    assert trained.recommend_batch([["x"]]) == [Recommendations([], ("x",))]
    assert trained.recommend_batch([]) == []
    with pytest.raises(ValueError, match="k must be at least 1; given 0"):
        trained.recommend_batch([["x"]], k=0)
    with pytest.raises(ValueError, match="given the string 'i1'"):
        trained.recommend_batch([["i1"], "i1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "given none of them"),
        ({"user_id": "u1", "history": ["i1"]}, "given user_id and history"),
        ({"user_id": "stranger"}, "user_id must be one of the data's 60 users; given 'stranger'"),
        ({"history": []}, "at least one known item"),
        ({"history": ["x", "y"]}, "at least one known item"),
        ({"history": ["i1"], "k": 0}, "k must be at least 1; given 0"),
    ],
)
def test_bad_requests(trained, arguments, message):
    with pytest.raises(ValueError, match=message):
        trained.recommend(**arguments)


def test_recommending_leaves_the_models_mode(trained):
    for training in (True, False):
        trained.model.train(training)
        trained.recommend(history=["i3"])
        assert trained.model.training == trained.model.blocks[0].training == training


def test_histories_with_items_that_have_no_name_are_refused(trained, tmp_path):
    for item in (0, 25):
        items = trained.histories.items.copy()
        items[5] = item
        Recommender(trained.model, dataclasses.replace(trained.histories, items=items)).save(tmp_path)
        with pytest.raises(ValueError, match="do not belong together"):
            Recommender.load(tmp_path)


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path)
    loaded = Recommender.load(tmp_path)
    assert loaded.recommend("u5", k=20) == trained.recommend("u5", k=20)
    assert loaded.histories.times.dtype == trained.histories.times.dtype
    assert not list(tmp_path.glob("*.part"))


IDS = {"int": lambda text: int(text[1:]), "uuid": lambda text: uuid.UUID(int=int(text[1:]) + 5)}


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_other_types_are_kept_and_come_back(trained, tmp_path, kind):
    of = IDS[kind]
    ids = {what: tuple(map(of, getattr(trained.histories, what))) for what in ("user_ids", "item_ids")}
    typed = Recommender(trained.model, dataclasses.replace(trained.histories, **ids))
    typed.save(tmp_path)
    loaded = Recommender.load(tmp_path)
    assert loaded.histories.user_ids == typed.histories.user_ids
    expected = [(of(item), score) for item, score in trained.recommend("u5", k=20).items]
    assert loaded.recommend(of("u5"), k=20).items == loaded.recommend(str(of("u5")), k=20).items == expected
    history = [of("i3"), str(of("i4")), "i5", of("i600")]
    result = loaded.recommend(history=history, k=3)
    assert result.unknown == ("i5", of("i600"))
    assert result.items == typed.recommend(history=[of("i3"), of("i4")], k=3).items
    log = SQLiteEventLog(tmp_path / "events.db")
    log.begin(loaded.histories)
    online = OnlineRecommender(loaded.model, loaded.histories.item_ids, log, pool_bytes=10_000_000)
    (best,) = online.recommend([str(of("u5"))], k=3)
    offline = typed.recommend(of("u5"), k=3, exclude_seen=True).items
    assert [item for item, _ in best] == [str(item) for item, _ in offline]
    ids = json.loads((tmp_path / "ids.json").read_text())
    (tmp_path / "ids.json").write_text(json.dumps(ids | {"items": ["x", *ids["items"][1:]]}))
    with pytest.raises(ValueError, match="do not belong together"):
        Recommender.load(tmp_path)


def test_a_damaged_folder_is_a_clear_error(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no saved recommender: config\.json is missing; Recommender"):
        Recommender.load(tmp_path)
    trained.save(tmp_path)
    ids = json.loads((tmp_path / "ids.json").read_text())
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")  # as if saved alone
    (tmp_path / "ids.json").write_text(json.dumps(ids | {"items": ids["items"][1:]}))
    with pytest.raises(ValueError, match="24 items and the histories 23"):
        Recommender.load(tmp_path)
    (tmp_path / "ids.json").write_text(json.dumps(ids | {"users": ids["users"][1:]}))
    with pytest.raises(ValueError, match="do not belong together"):
        Recommender.load(tmp_path)
    (tmp_path / "ids.json").write_text("{}")
    with pytest.raises(ValueError, match="that can be read"):
        Recommender.load(tmp_path)
    (tmp_path / "ids.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"ids\.json is missing"):
        Recommender.load(tmp_path)
