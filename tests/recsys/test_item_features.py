"""Items by features, from a file or a frame to what is offered: also items that training never saw."""

import asyncio
import dataclasses
import json
import uuid

import httpx
import numpy as np
import pandas
import polars
import pyarrow
import pytest
import torch
from pyarrow import parquet

from tests.support.checks import ROUNDING
from tests.support.featured import (
    COLOURS,
    OF_A_COLOUR,
    colour_of,
    colourful_rows,
    colourful_split,
    feature_columns,
    featured_model,
    items_of,
    trained_on_colours,
)
from tests.support.online_data import MemoryEventLog
from tests.support.processes import together
from ttt4rec import TTT4Rec
from ttt4rec.cli import main
from ttt4rec.recsys import (
    DataError,
    OnlineRecommender,
    Recommender,
    TrainOptions,
    build_histories,
    fit,
    load_interactions,
    split_by_ratio,
)
from ttt4rec.recsys.data.feature_table import read_item_features
from ttt4rec.recsys.data.item_features import item_features
from ttt4rec.recsys.serving.app import Service
from ttt4rec.recsys.training.train import _given

COLD = [item for colour in range(COLOURS) for item in items_of(colour, cold=True)]
FRAME = {
    "item_id": ["a", "b", "c"],
    "price": [1.5, 2.0, None],
    "brand": ["x", None, "y"],
    "tags": [["p", "q"], [], ["q"]],
    "text": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
}


def as_csv(path):
    path.write_text('item_id,price,brand,tags,text\na,1.5,x,p|q,"[1, 2]"\nb,2,,,"[3, 4]"\nc,,y,q,"[5, 6]"\n')
    return path


def as_item(path):
    header = "item_id:token\tprice:float\tbrand:token\ttags:token_seq\ttext:float_seq"
    path.write_text(f"{header}\na\t1.5\tx\tp q\t1 2\nb\t2.0\t\t\t3 4\nc\t\ty\tq\t5 6\n")
    return path


def as_lines(path):
    rows = [dict(zip(FRAME, row, strict=True)) for row in zip(*FRAME.values(), strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def as_parquet(path):
    parquet.write_table(pyarrow.table(FRAME), path)
    return path


VECTORS = pyarrow.array(FRAME["text"], pyarrow.list_(pyarrow.float32(), 2))
SOURCES = {
    "columns": lambda _: FRAME,
    "rows": lambda _: iter([dict(zip(FRAME, row, strict=True)) for row in zip(*FRAME.values(), strict=True)]),
    "pandas": lambda _: pandas.DataFrame(FRAME),
    "polars": lambda _: polars.DataFrame(FRAME),
    "arrow": lambda _: pyarrow.table(FRAME),
    "arrow, fixed sizes": lambda _: pyarrow.table({**FRAME, "text": VECTORS}),
    "series": lambda _: {name: pandas.Series(values, index=[5, 6, 7]) for name, values in FRAME.items()},
    "arrays": lambda _: pandas.DataFrame({**FRAME, "text": [np.array(x) for x in FRAME["text"]]}),
    "csv": lambda folder: as_csv(folder / "items.csv"),
    "item": lambda folder: as_item(folder / "items.item"),
    "jsonl": lambda folder: as_lines(folder / "items.jsonl"),
    "parquet": lambda folder: as_parquet(folder / "items.parquet"),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_source_gives_the_same_table(source, tmp_path):
    table = read_item_features(source(tmp_path))
    assert table.ids == ("a", "b", "c")
    assert table.columns["brand"] == [("x",), (), ("y",)]
    assert table.columns["tags"] == [("p", "q"), (), ("q",)]
    np.testing.assert_equal(table.columns["price"], [[1.5], [2.0], [np.nan]])
    np.testing.assert_equal(table.columns["text"], [[1, 2], [3, 4], [5, 6]])


def test_ids_keep_their_type_and_columns_are_chosen():
    ids = [uuid.UUID(int=number) for number in range(3)]
    assert read_item_features({**FRAME, "item_id": ids}).ids == tuple(ids)
    table = read_item_features(pandas.DataFrame({**FRAME, "sku": [7, 8, 9]}), item_field="sku", columns=["brand"])
    assert table.ids == (7, 8, 9)
    assert list(table.columns) == ["brand"]


BAD = {
    "no id column": ({"sku": ["a"]}, "must have a column 'item_id'; given sku; name the column of items' ids by"),
    "twice": ({"item_id": ["a", "b", "a"]}, "one row for each item; given 'a' in rows 0 and 2"),
    "no id": ({"item_id": ["a", None]}, "row 1 must have an id in 'item_id', a text, whole number or UUID; given None"),
    "ids of two types": ({"item_id": ["a", 1]}, "ids of one type in 'item_id'"),
    "mixed": ({"item_id": ["a", "b"], "x": [1.0, "y"]}, "'x' of item 'b' must be a number, a text, or a list"),
    "date": ({"item_id": ["a"], "x": [pandas.Timestamp(0)]}, "'x' of item 'a' must be a number"),
    "infinite": ({"item_id": ["a", "b"], "x": [1.0, np.inf]}, "'x' of item 'b' must be finite"),
    "vectors of two lengths": (
        {"item_id": ["a", "b"], "x": [[1.0, 2.0], [1.0]]},
        "'x' of item 'b' must have 2 numbers",
    ),
    "columns of two lengths": ({"item_id": ["a", "b"], "x": [1.0]}, "must have columns of one length"),
    "no rows": ({"item_id": []}, "must have rows; given none"),
    "lazy": (polars.LazyFrame(FRAME), "give its .collect()"),
    "no table": (3, "must be a path, a data frame, columns or rows by name; given int"),
    "rows without names": ([("a", 1)], "row 0 must be an item's features by name"),
    "a number without bound": ({"item_id": ["a", "b"], "x": [1, 10**400]}, "'x' of item 'b' must be finite"),
    "complex": ({"item_id": ["a"], "x": np.ones(1, np.complex64)}, "'x' of item 'a' must be a number"),
    "one value as a column": ({"item_id": ["a"], "x": 3}, "must have values of items in 'x'; given 3"),
    "a text as a column": ({"item_id": ["a"], "x": "y"}, "must have values of items in 'x'; given 'y'"),
    "a name twice, pandas": (pandas.DataFrame([["a", 1, 2]], columns=["item_id", "x", "x"]), "each once; given x"),
    "a name twice, arrow": (
        pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["item_id", "x", "x"]),
        "each once; given x",
    ),
    "nothing there": ("nothing.csv", "must be a file of items' features; given nothing"),
}


@pytest.mark.parametrize(("source", "match"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_refused(source, match):
    with pytest.raises(DataError) as refused:
        read_item_features(source)
    assert match in str(refused.value)


def test_options_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(DataError, match="columns must be several names; given the text 'brand'"):
        read_item_features(FRAME, columns="brand")
    with pytest.raises(ValueError, match="encoding must be one that Python knows"):
        read_item_features(as_csv(tmp_path / "items.csv"), encoding="klingon")


def test_a_set_may_hold_what_is_missing():
    table = read_item_features({"item_id": ["a", "b"], "x": [{"q", None, "p"}, set()]})
    assert table.columns["x"] == [("p", "q"), ()]


def test_what_is_not_asked_for_is_not_judged(tmp_path):
    """A column that is left out may hold anything, at training and when items are added."""
    path = tmp_path / "items.csv"
    path.write_text("item_id,note,brand\na,[Rec],x\nb,[1],y\n")
    assert read_item_features(path, columns=["brand"]).columns == {"brand": [("x",), ("y",)]}
    new = {"item_id": ["new"], "colour": ["colour 1"], "price": [1.0], "text": [None], "since": [pandas.Timestamp(0)]}
    assert trained_on_colours().add_items(new).histories.item_ids[-1] == "new"


BAD_TEXTS = {
    "mostly numbers": ("item_id,x\na,1\nb,2\nc,dear\n", "'x' must be a number, as in most rows; given 'dear'"),
    "no JSON": ("item_id,x\na,\"['p']\"\n", "'x' must have lists as JSON has them, or values as in a|b"),
    "short row": ("item_id,x\na,1\nb\n", "line 3: a row must have 2 fields; given 1"),
    "column twice": ("item_id,x,x\n", "line 1 must name columns, each once"),
    "latin-1": (b"item_id,x\na,\xe9\n", "must be utf-8 text; name its encoding"),
}


@pytest.mark.parametrize(("text", "match"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_bad_text_file_is_refused(text, match, tmp_path):
    path = tmp_path / "items.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as refused:
        read_item_features(path)
    assert match in str(refused.value)


def test_what_is_encoded_is_what_training_sees():
    """Means and values are those of items in training; what tells none apart is left out."""
    split = colourful_split()
    frame = feature_columns() | {"same": ["x"] * (COLOURS * OF_A_COLOUR), "level": [3] * (COLOURS * OF_A_COLOUR)}
    frame["price"][-1] = 1e9  # of an item that training does not see
    given = item_features(frame, split)
    assert [column.name for column in given.columns] == ["colour", "price", "text"]
    known = [frame["item_id"].index(item) for item in split.histories.item_ids]
    prices = np.array(frame["price"])[known]
    dense = given.dense[1:].numpy()
    np.testing.assert_allclose(dense[:, 0], (prices - prices.mean()) / prices.std(), rtol=1e-6)
    texts = np.array(frame["text"])[known]
    standardised = ((texts - texts.mean(0)) / texts.std(0) / np.sqrt(3)).clip(-5 / np.sqrt(3), 5 / np.sqrt(3))
    np.testing.assert_allclose(dense[:, 1:], standardised, rtol=1e-5, atol=1e-7)
    names = [given.columns[0].values[code] for code in given.categories.tolist()]
    assert names == [f"colour {colour_of(item)}" for item in split.histories.item_ids]
    assert given.known.tolist() == [False, *(split.train_counts() > 0).tolist()]


@pytest.mark.parametrize("unit", [0.1, 1e-200, 1e200, 3e306])
def test_numbers_of_every_size_are_standardised(unit):
    """What is the same for all items tells nothing, however it is rounded; what differs does, at any size."""
    split = colourful_split()
    items = feature_columns()["item_id"]
    steps = [float(number % 7) for number in range(len(items))]
    frame = {"item_id": items, "same": [unit] * len(items), "half": [[unit, step] for step in steps]}
    given = item_features({**frame, "steps": [unit * step for step in steps]}, split)
    assert [column.name for column in given.columns] == ["half", "steps"]
    known = np.array([steps[items.index(item)] for item in split.histories.item_ids])
    expected = (known - known.mean()) / known.std()
    dense = given.dense[1:].numpy()
    np.testing.assert_allclose(dense[:, 0], 0, atol=1e-7)
    np.testing.assert_allclose(dense[:, 1] * np.sqrt(2), expected, rtol=1e-6)
    np.testing.assert_allclose(dense[:, 2], expected, rtol=1e-6)


def test_one_item_under_two_texts_of_its_id_is_refused():
    split = split_by_ratio(
        build_histories(load_interactions([(u, uuid.UUID(int=t), t) for u in "ab" for t in range(5)]))
    )
    twice = [str(uuid.UUID(int=10)), str(uuid.UUID(int=10)).upper()]
    with pytest.raises(DataError, match="must have one row for each item; given several for '00000000-0000"):
        item_features({"item_id": twice, "x": ["p", "q"]}, split)


def test_items_without_features_have_their_ids_alone():
    split = colourful_split()
    given = item_features({"item_id": ["i0", "i1", "i8"], "kind": ["a", "a", None]}, split)
    assert int(given.offsets[-1]) == 2
    with pytest.raises(DataError, match=r"must have features of items that training sees, such as 'i\d+'; given 'k'"):
        item_features({"item_id": ["k"], "kind": ["a"]}, split)
    with pytest.raises(DataError, match="must have a column in which items differ and share values; given 'kind'"):
        item_features({"item_id": ["i0", "i1"], "kind": ["a", "b"]}, split)


def test_cold_items_are_ranked_by_their_features():
    """Chance would put the two right ones of twelve at places 5.5 on average, and first in a sixth of the lists."""
    recommender = trained_on_colours().add_items(feature_columns())
    assert recommender.histories.num_items == COLOURS * OF_A_COLOUR
    places, first = [], 0
    for number in range(36):
        start = number % COLOURS
        history = [items_of((start + t) % COLOURS)[number // COLOURS] for t in range(5)]
        best = [item for item, _ in recommender.recommend(history=history, k=12, allow=COLD).items]
        right = items_of((start + 5) % COLOURS, cold=True)
        places += [best.index(item) for item in right]
        first += best[0] in right
    assert np.mean(places) < 2
    assert first > 18


def test_new_items_change_nothing_for_others_and_stay(tmp_path):
    warm = trained_on_colours()
    larger = warm.add_items({name: values[::-1] for name, values in feature_columns().items()})
    known = list(warm.histories.item_ids)
    assert list(larger.histories.item_ids[: len(known)]) == known
    for user in ("u0", "u1"):
        expected = dict(warm.recommend(user, k=100).items)
        found = dict(larger.recommend(user, k=100, allow=known).items)
        assert found.keys() == expected.keys()
        assert all(abs(found[item] - score) <= 1e-5 for item, score in expected.items())
    larger.save(tmp_path)
    loaded = Recommender.load(tmp_path)
    assert loaded.recommend("u3", k=48) == larger.recommend("u3", k=48)
    assert loaded.similar_items("i0", k=3) == larger.similar_items("i0", k=3)
    again = loaded.add_items({"item_id": ["i999"], "colour": ["colour 2"], "price": [None], "text": [None]})
    assert again.recommend(history=["i999"], k=1, exclude_seen=False).items


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"colour": None}, "must have a column 'colour'; given item_id, price, text"),
        ({"colour": [1.0]}, "must have texts in 'colour', as when the model was trained"),
        ({"price": ["dear"]}, "must have numbers in 'price', as when the model was trained"),
        ({"text": [[1.0]]}, "must have 3 numbers in 'text', as in training; given 1"),
        (
            {"colour": ["none"], "price": [None], "text": [None]},
            "new items must have a value that training saw in one of the columns colour, price, text; 1 have none",
        ),
    ],
)
def test_new_items_that_cannot_be_scored_are_refused(changes, match):
    given = {"item_id": ["new"], "colour": ["colour 1"], "price": [1.0], "text": [[0.0, 0.0, 0.0]]} | changes
    with pytest.raises(DataError) as refused:
        trained_on_colours().add_items({name: values for name, values in given.items() if values is not None})
    assert match in str(refused.value)


def test_adding_items_is_the_same_each_time_and_draws_nothing():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, other = (trained_on_colours().add_items(feature_columns()).model.state_dict() for _ in range(2))
    assert all(x.equal(other[name]) for name, x in one.items())
    assert state.equal(torch.get_rng_state())


def test_new_items_need_a_model_with_features():
    plain = trained_on_colours()
    model = TTT4Rec(plain.model.config)
    with pytest.raises(ValueError, match="must be made with features of items"):
        Recommender(model, plain.histories).add_items(feature_columns())


def test_training_goes_on_from_a_checkpoint_with_features(tmp_path):
    split, options = colourful_split(), TrainOptions(epochs=2, targets_per_batch=128)
    whole, parts = featured_model(split), featured_model(split)
    fit(whole, split, tmp_path / "whole", options)
    fit(parts, split, tmp_path / "parts", dataclasses.replace(options, epochs=1))
    parts = featured_model(split)
    fit(parts, split, tmp_path / "parts", options)
    for name, x in whole.state_dict().items():
        assert torch.equal(x, parts.state_dict()[name]), name


@pytest.mark.parametrize("changed", ["id_dropout", "column colour", "column price"])
def test_a_checkpoint_is_not_taken_up_with_other_features(changed, tmp_path):
    """Nor do processes train with several, also if what is encoded is the same: the columns are saved at the end."""
    split, options = colourful_split(), TrainOptions(epochs=1, targets_per_batch=512)
    fit(featured_model(split), split, tmp_path, options)
    frame = feature_columns()
    if changed == "column colour":
        frame["colour"] = [value.upper() for value in frame["colour"]]
    if changed == "column price":
        frame["price"] = [2 * price for price in frame["price"]]
    given = item_features(frame, split, id_dropout=0.2 if changed == "id_dropout" else 0.1)
    assert _given(featured_model(split), split, options) != _given(
        featured_model(split, features=given), split, options
    )
    with pytest.raises(ValueError, match=f"given another's: it has other features of items: {changed};"):
        fit(featured_model(split, features=given), split, tmp_path, options)


def test_ids_that_training_never_sees_do_not_count(tmp_path):
    """An item in nobody's training part is scored by its features, as if it were new."""
    rows = [*colourful_rows(), ("u0", COLD[0], 99)]
    split = split_by_ratio(build_histories(load_interactions(rows)), (3, 1, 1))
    model = featured_model(split)
    code = int(split.histories.item_codes([COLD[0]])[0][0])
    fit(model, split, tmp_path, TrainOptions(epochs=1, targets_per_batch=128))
    row = model.served_items()[code].clone()
    with torch.no_grad():
        model.embedding.weight[code] += 1
    assert torch.equal(model.served_items()[code], row)
    assert not model.features.known[code]


@pytest.mark.slow
def test_several_processes_train_features_as_one_does(tmp_path):
    split = colourful_split()
    features = dataclasses.replace(item_features(feature_columns(), split), id_dropout=0.0)
    options = TrainOptions(epochs=1, targets_per_batch=128)

    def run(folder):
        model = featured_model(split, features=features, dtype=torch.float64, dropout=0.0)
        reports = fit(model, split, tmp_path / folder, options)
        return reports[0].loss, {name: x.tolist() for name, x in model.state_dict().items()}

    one, several = run("one"), together(2, lambda: run("several"))
    assert several[0] == several[1]
    assert several[0][0] == pytest.approx(one[0], rel=ROUNDING)
    for name, x in one[1].items():
        torch.testing.assert_close(torch.tensor(several[0][1][name]), torch.tensor(x), rtol=0, atol=1e-8, msg=name)


def make_online(recommender, **options):
    return OnlineRecommender(
        recommender.model, recommender.histories.item_ids, MemoryEventLog(), pool_bytes=200_000, **options
    )


def assert_alike(online, recommender, user, history):
    (found,) = online.recommend([user], k=100)
    expected = recommender.recommend(history=history, k=100).items
    assert dict(found).keys() == dict(expected).keys()
    scale = max(abs(score) for _, score in expected)
    assert all(abs(dict(found)[item] - score) <= 1e-5 * scale for item, score in expected)


def test_the_online_recommender_takes_new_items_in_a_refresh(tmp_path):
    warm = trained_on_colours()
    online = make_online(warm, snapshot=tmp_path / "states")
    online.observe(["u"], ["i0"])
    assert_alike(online, warm, "u", ["i0"])
    with pytest.raises(DataError, match=f"1 unknown: '{COLD[2]}'"):
        online.observe(["u"], [COLD[2]])
    larger = warm.add_items(feature_columns())
    online.refresh(larger.model, larger.histories.item_ids)
    online.observe(["u", "v"], [COLD[2], COLD[0]])
    assert_alike(online, larger, "u", ["i0", COLD[2]])
    assert_alike(online, larger, "v", [COLD[0]])
    online.save_snapshot()
    again = OnlineRecommender(
        larger.model, larger.histories.item_ids, online.log, pool_bytes=200_000, snapshot=tmp_path / "states"
    )
    assert again.stats()["users"] == 2
    assert again.recommend(["u"]) == online.recommend(["u"])


def test_cold_items_over_http():
    larger = trained_on_colours().add_items(feature_columns())
    online = make_online(larger)

    async def asking():
        transport = httpx.ASGITransport(Service(online))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            seen = await client.post("/events", json={"events": [{"user_id": "u", "item_id": COLD[0]}]})
            return seen, await client.post("/recommendations", json={"user_ids": ["u"], "k": 100})

    seen, best = asyncio.run(asking())
    assert seen.status_code == best.status_code == 200
    assert set(COLD[1:]) < set(best.text.replace('"', " ").split())


SHAPE = ["--width", "16", "--num-heads", "2", "--ffn-width", "16", "--max-len", "8", "--inner", "linear"]
FEW = ["--targets-per-batch", "128", "--epochs", "1", "--split", "3:1:1"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    pandas.DataFrame(colourful_rows(), columns=["user_id", "item_id", "timestamp"]).to_csv(
        folder / "events.csv", index=False
    )
    frame = pandas.DataFrame(feature_columns())
    frame.loc[len(frame)] = ["bare", "no such colour", None, None, "Bare"]
    frame.to_json(folder / "items.jsonl", orient="records", lines=True)
    return folder


def test_the_command_line_trains_with_features_and_offers_all_items(shop, capsys):
    wanted = ["--item-features", str(shop / "items.jsonl")]
    train = ["train", str(shop / "events.csv"), *FEW]
    assert main([*train, *SHAPE, *wanted, "--feature-columns", "colour", "price", "--out", str(shop / "run")]) == 0
    out = capsys.readouterr().out
    assert "features colour (6 values), price (a number) of 36 of 36 items" in out
    assert f"12 items of {shop / 'items.jsonl'} without an interaction are offered by their features" in out
    first = json.loads((shop / "run" / "run.json").read_text())["test"]
    assert main(["evaluate", str(shop / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(first)
    assert main(["recommend", str(shop / "run"), "--user", "u0", "-k", "48", "--json"]) == 0
    assert set(COLD) < {entry["item"] for entry in json.loads(capsys.readouterr().out)["items"]}
    assert main([*train, "--warm-start", str(shop / "run"), *wanted, "--out", str(shop / "next")]) == 0
    assert "without an interaction" not in capsys.readouterr().out
    assert Recommender.load(shop / "next").histories.num_items == 48


def test_the_command_line_adds_items(shop, capsys):
    trained_on_colours().save(shop / "small")
    frame = pandas.DataFrame({"sku": ["i1", "i999"], "colour": ["none", "colour 2"], "price": [0.0, 1.0], "text": None})
    frame.to_json(shop / "new.jsonl", orient="records", lines=True)
    add = ["add-items", str(shop / "small"), str(shop / "new.jsonl"), "--item-field", "sku"]
    for count in ("1 new item", "0 new items"):
        assert main(add) == 0
        assert f"{count} of" in capsys.readouterr().out
    (shop / "small" / "run.json").write_text('{"settings": {"item_field": "sku"}}')  # as train leaves it
    assert main(add[:-2]) == 0
    assert "0 new items of" in capsys.readouterr().out
    assert main([*add[:-1], "item_id"]) == 2
    assert "new.jsonl must have a column 'item_id'" in capsys.readouterr().err
    (shop / "small" / "run.json").write_text("[]")
    assert main(add[:-2]) == 2
    assert "run.json is damaged" in capsys.readouterr().err
    assert main(["similar", str(shop / "small"), "i999", "-k", "6"]) == 0
    similar = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert {colour_of(item) for item in similar} == {2}


def test_the_command_line_refuses_what_does_not_fit(shop, capsys):
    train = ["train", str(shop / "events.csv"), *FEW]
    assert main([*train, *SHAPE, "--item-features", str(shop / "no.csv"), "--out", str(shop / "no")]) == 2
    assert "no.csv must be a file of items' features; given nothing" in capsys.readouterr().err
    trained = trained_on_colours()
    Recommender(TTT4Rec(trained.model.config), trained.histories).save(shop / "plain")
    wanted = ["--item-features", str(shop / "items.jsonl"), "--warm-start", str(shop / "plain")]
    assert main([*train, *wanted, "--out", str(shop / "no")]) == 2
    assert "--item-features must be left out, as in" in capsys.readouterr().err
