"""Recommending to many users: lists of what may be offered, cold users, likeness, diversity, tables and titles."""

import csv
import json
import os

import numpy as np
import pandas
import pyarrow as arrow
import pytest
import torch
from pyarrow import parquet

from tests.support.recsys_data import NUM_ITEMS, make_model, make_split
from ttt4rec.cli import main
from ttt4rec.recsys import Recommender, load_interactions
from ttt4rec.recsys.data import DataError, Histories
from ttt4rec.recsys.recommend.offers import table
from ttt4rec.recsys.recommend.rerank import MaximalMarginalRelevance
from ttt4rec.recsys.recommend.titles import read_titles

EVERYTHING = {"k": 1000, "exclude_seen": False}


@pytest.fixture(scope="module")
def recommender(tmp_path_factory):
    split = make_split(tmp_path_factory.mktemp("offers"))
    return Recommender(make_model(split), split.histories)


@pytest.fixture(scope="module")
def folder(recommender, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    recommender.save(folder)
    return folder


def ids(result):
    return [item for item, _ in result.items]


def test_many_users_are_served_as_each_is_alone(recommender, monkeypatch):
    monkeypatch.setattr("ttt4rec.recsys.recommend.recommender._HISTORIES_AT_ONCE", 7)
    users = [*recommender.histories.user_ids[::-1], "stranger"]
    results = recommender.recommend(users=users, k=4)
    for user, result in zip(users[:-1], results, strict=False):
        alone = recommender.recommend(user, k=4)
        assert ids(result) == ids(alone)
        np.testing.assert_allclose([s for _, s in result.items], [s for _, s in alone.items], rtol=1e-5, atol=1e-6)
        assert not set(ids(result)) & {recommender.histories.item_ids[c - 1] for c in seen_by(recommender, user)}
    assert results[-1].items == []
    assert recommender.recommend(users=[]) == []
    with pytest.raises(DataError, match="users must be a sequence of user ids; given the string 'u1'"):
        recommender.recommend(users="u1")


def seen_by(recommender, user):
    return recommender.histories.history(recommender.histories.user_code(user))


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_lists_choose_among_all_items_without_changing_a_score(recommender, exclude_seen):
    users = recommender.histories.user_ids[:9]
    allow, deny = [f"i{n}" for n in range(3, 20)] + ["unknown"], ["i5", "i7", "never heard of"]
    everything = recommender.recommend(users=users, k=1000, exclude_seen=exclude_seen)
    for lists in ({"allow": allow}, {"deny": deny}, {"allow": set(allow), "deny": tuple(deny)}):
        results = recommender.recommend(users=users, k=5, exclude_seen=exclude_seen, **lists)
        for result, whole in zip(results, everything, strict=True):
            kept = [
                pair
                for pair in whole.items
                if pair[0] in lists.get("allow", ids(whole)) and pair[0] not in lists.get("deny", ())
            ]
            assert result.items == kept[:5]
    (alone,) = recommender.recommend_batch([["i1", "i2"]], allow=["i2", "i9", "i1"], exclude_seen=exclude_seen)
    assert set(ids(alone)) == ({"i9"} if exclude_seen else {"i1", "i2", "i9"})


def test_lists_that_leave_nothing(recommender):
    for lists in ({"allow": []}, {"allow": ["x"]}, {"allow": ["i1"], "deny": ["i1"]}):
        with pytest.raises(DataError, match="allow and deny must leave at least one item"):
            recommender.recommend("u1", **lists)
    with pytest.raises(DataError, match="allow must be a collection of item ids; given 'i1'"):
        recommender.recommend("u1", allow="i1")


def test_the_lowest_score(recommender):
    everything = recommender.recommend("u1", **EVERYTHING).items
    middle = everything[9][1]
    assert recommender.recommend("u1", min_score=middle, **EVERYTHING).items == everything[:10]
    assert recommender.recommend("u1", min_score=1e9, **EVERYTHING).items == []
    for bad in (float("nan"), "1"):
        with pytest.raises(ValueError, match="min_score must be a number"):
            recommender.recommend("u1", min_score=bad)


def test_scores_are_logits(recommender):
    """Differences are those of the logarithms of the probabilities by the model."""
    everything = dict(recommender.recommend("u1", **EVERYTHING).items)
    codes = torch.from_numpy(seen_by(recommender, "u1")[-8:].copy())
    with torch.no_grad():
        hidden = recommender.model.eval()(codes[None])[:, -1]
        nll = [float(recommender.model.nll(hidden, torch.tensor([code]))[0]) for code in (3, 4)]
    first, second = (everything[recommender.histories.item_ids[code - 1]] for code in (3, 4))
    assert first - second == pytest.approx(nll[1] - nll[0], abs=1e-5)


def shop():
    """Item 0 was popular once, item 2 is of late."""
    items = [0] * 50 + [1] * 30 + [2] * 12 + [3] * 6 + [1] * 2
    return load_interactions([(f"u{place % 10}", f"i{item}", place) for place, item in enumerate(items)])


def popular_shop():
    from ttt4rec.recsys import build_histories

    histories = build_histories(shop())
    model = make_model(type("Split", (), {"histories": histories}))
    return Recommender(model, histories)


def test_cold_users_get_what_is_popular_of_late_and_are_told_so():
    recommender = popular_shop()
    assert recommender.popular_items(window=0.2) == [("i2", 12), ("i3", 6), ("i1", 2)]
    assert recommender.popular_items(2, window=1) == [("i0", 50), ("i1", 32)]
    known, cold = recommender.recommend(users=["u1", "stranger"], k=2, popular=True, exclude_seen=False)
    assert (known.source, cold.source) == ("model", "popular")
    assert cold.items == [("i3", 6.0), ("i1", 2.0)]
    assert recommender.recommend("stranger", popular=True, k=1, deny=["i3"], min_score=99).items == [("i1", 2.0)]
    assert recommender.recommend(history=["x"], popular=True, k=1).items == [("i3", 6.0)]
    first, second = recommender.recommend_batch([["x", "y"], ["i0"]], popular=True, exclude_seen=False)
    assert (first.source, first.unknown, second.source) == ("popular", ("x", "y"), "model")
    for bad in (0, 1.5, -1):
        with pytest.raises(ValueError, match="window must be above 0 and at most 1"):
            recommender.popular_items(window=bad)
    empty = Histories(
        *(np.empty(0, np.int64), np.zeros(2, np.int64), np.empty(0, np.int64)), ("u",), ("i0", "i1", "i2", "i3")
    )
    assert Recommender(recommender.model, empty).popular_items() == []


def test_similar_items_are_those_of_the_largest_cosine(recommender):
    table = recommender.model.embedding.weight.detach().double()[1:]
    names = recommender.histories.item_ids
    code = names.index("i5")
    cosines = torch.nn.functional.cosine_similarity(table, table[code : code + 1])
    order = [place for place in torch.argsort(-cosines).tolist() if place != code]
    found = recommender.similar_items("i5", k=1000)
    assert [item for item, _ in found] == [names[place] for place in order]
    np.testing.assert_allclose([score for _, score in found], cosines[order], rtol=0, atol=1e-6)
    assert recommender.similar_items("i5", k=3) == found[:3]
    with pytest.raises(DataError, match="item_id must be one of the data's 24 items; given 'x'"):
        recommender.similar_items("x")
    with pytest.raises(ValueError, match="k must be an integer of at least 1; given 0"):
        recommender.similar_items("i5", k=0)


def plain_mmr(table, items, scores, k, diversity):
    """As its definition says, one comparison after the other."""
    directions = table / np.linalg.norm(table, axis=1, keepdims=True)
    relevance = (scores - scores.min()) / (scores.max() - scores.min())
    chosen = [int(np.argmax(scores))]
    while len(chosen) < k:
        values = {
            place: (1 - diversity) * relevance[place]
            - diversity * max(directions[items[place]] @ directions[items[other]] for other in chosen)
            for place in range(len(items))
            if place not in chosen
        }
        chosen.append(max(values, key=values.__getitem__))
    return chosen


@pytest.mark.parametrize("diversity", [0.0, 0.4, 1.0])
def test_maximal_marginal_relevance(diversity):
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(31, 6))
    items, scores = rng.permutation(np.arange(1, 31))[:20], np.sort(rng.normal(size=20))[::-1]
    rerank = MaximalMarginalRelevance(torch.from_numpy(rows), diversity)
    found = rerank(items, scores, 8).tolist()
    assert found == plain_mmr(rows, items, scores, 8, diversity)
    assert (found == list(range(8))) == (diversity == 0)
    assert rerank(items[:3], scores[:3], 8).tolist()[0] == 0
    assert len(rerank(items[:3], scores[:3], 8)) == 3
    assert rerank(items[:0], scores[:0], 8).tolist() == []


def test_reranking_chooses_among_five_times_as_many(recommender):
    asked = []

    def last_first(items, scores, k):
        asked.append((len(items), k))
        assert (np.diff(scores) <= 0).all()
        return range(len(items))[::-1]

    plain = recommender.recommend("u1", k=15, exclude_seen=False).items
    assert recommender.recommend("u1", k=3, exclude_seen=False, rerank=last_first).items == plain[::-1][:3]
    assert asked == [(15, 3)]
    assert recommender.recommend("u1", k=3, rerank=lambda *_: []).items == []
    for wrong in ([0, 15], [-1], [1, 1], [0.5], [[0]], ["i1"], [[1, 2], [3]]):
        with pytest.raises(ValueError, match=r"rerank must return places of its 15 candidates, .* each once; given \["):
            recommender.recommend("u1", k=3, exclude_seen=False, rerank=lambda *_, wrong=wrong: wrong)
    with pytest.raises(ValueError, match="diversity must be from 0 to 1; given 2"):
        MaximalMarginalRelevance(recommender.model.embedding.weight, 2)


def test_a_table_of_recommendations(recommender):
    users = ["u1", "stranger", "u2"]
    results = recommender.recommend(users=users, k=2)
    columns = table(users, results, {"i3": "Three"})
    assert columns["user_id"] == ["u1", "u1", "u2", "u2"]
    assert columns["rank"] == [1, 2, 1, 2]
    assert list(zip(columns["item_id"], columns["score"], strict=True)) == [*results[0].items, *results[2].items]
    assert columns["title"] == ["Three" if item == "i3" else None for item in columns["item_id"]]
    assert set(columns["source"]) == {"model"}
    frame = pandas.DataFrame(table(users, results))
    assert list(frame.columns) == ["user_id", "rank", "item_id", "score", "source"]


TITLES = {
    "a.item": "item_id:token\tmovie_title:token_seq\nx3\tThree, the\nx4\tFour\n",
    "a.csv": 'year,title,id\n1999,"Three, the",x3\n2000,Four,x4\nbad\n',
    "products.csv": 'price,product,title\n9.5,x3,"Three, the"\n7,x4,Four\n',
    "wares.csv": 'ware,price,title\nx3,9.5,"Three, the"\nx4,7,Four\n',
    "movies.dat": "x3::Three, the::Drama|War\nx4::Four::\n",
    "b.csv": 'x3,"Three, the"\nx4,Four\n',
    "c.tsv": "x3\tThree, the\nx4\tFour\n",
    "d.txt": "x3|Three, the|1999\nx4|Four|\n",
}


@pytest.mark.parametrize("name", TITLES)
def test_titles(tmp_path, name):
    (tmp_path / name).write_text(TITLES[name])
    assert read_titles(tmp_path / name) == {"x3": "Three, the", "x4": "Four"}


def test_titles_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("x3,Caf\u00e9\n".encode("latin-1"))
    assert read_titles(path, "latin-1") == {"x3": "Café"}
    for content, message in [
        (b"x3,Caf\xe9\n", "name its encoding"),
        (b"", "must have a column of items"),
        (b"one\n", "must have a column of items"),
        (b'x,"a"b\n', "must be a whole text file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            read_titles(path)
        assert "\n" not in str(error.value)


def call(folder, *arguments):
    return main(["recommend", str(folder), *arguments])


def test_every_user_into_a_file(recommender, folder, tmp_path, capsys):
    results = recommender.recommend(users=recommender.histories.user_ids, k=3)
    wanted = table(recommender.histories.user_ids, results)
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        out = tmp_path / f"best.{suffix}"
        assert call(folder, "--all-users", "-k", "3", "--out", str(out)) == 0
        served = len(set(wanted["user_id"]))  # others have had everything
        assert capsys.readouterr().out == f"recommendations for {served} of 60 in {out}\n"
        if suffix == "parquet":
            found = parquet.read_table(out).to_pydict()
        elif suffix == "jsonl":
            lines = [json.loads(line) for line in out.read_text().splitlines()]
            assert [line["user"] for line in lines] == list(recommender.histories.user_ids)
            assert [entry["item"] for line in lines for entry in line["items"]] == wanted["item_id"]
            continue
        else:
            with out.open(newline="") as file:
                rows = list(csv.DictReader(file, delimiter="," if suffix == "csv" else "\t"))
            found = {name: [type(wanted[name][0])(row[name]) for row in rows] for name in wanted}
        assert found.keys() == wanted.keys()
        np.testing.assert_allclose(found.pop("score"), wanted["score"], rtol=1e-6)
        assert found == {name: column for name, column in wanted.items() if name != "score"}
    assert not list(tmp_path.glob("*.part"))


def test_users_lists_titles_and_fallback_on_the_command_line(folder, tmp_path, capsys):
    for name, content in [
        ("users", "u3\nstranger\n\nu4\n"),
        ("allow", "i1\ni2\ni3\ni4\ni5\nelsewhere\n"),
        ("deny", "i5\n"),
        ("titles", "item_id,title\ni1,One\ni2,\x1b[2JTwo\ni3,Three\n"),
    ]:
        (tmp_path / name).write_text(content)
    lists = ["--allow", str(tmp_path / "allow"), "--deny", str(tmp_path / "deny"), "--titles", str(tmp_path / "titles")]
    assert call(folder, "--users", str(tmp_path / "users"), *lists, "--popular", "--include-seen") == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [(line["user"], line["source"]) for line in lines] == [
        ("u3", "model"),
        ("stranger", "popular"),
        ("u4", "model"),
    ]
    names = {"i1": "One", "i2": "\x1b[2JTwo", "i3": "Three", "i4": None}
    assert all({x["item"]: x["title"] for x in line["items"]} == names for line in lines)
    assert "what is popular of late for 1" in printed.err
    assert "unknown users, 1 of 3: stranger\n" in printed.err
    assert call(folder, "--user", "u3", *lists, "--include-seen") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"  i2  " in shown
    assert r"\x1b[2JTwo" in shown
    out = tmp_path / "best.csv"
    assert call(folder, "--users", str(tmp_path / "users"), "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("recommendations for 2 of 3 in ")
    assert "nothing for 1: no item was left, or no history with a known item; --popular" in printed.err
    assert call(folder, "--history", "i1", "i2", "-k", "2", "--out", str(out)) == 0
    assert [row.split(",")[:2] for row in out.read_text().splitlines()[1:]] == [["1", "1"], ["1", "2"]]
    assert call(folder, "--user", "stranger", "--popular", "-k", "2") == 0
    assert "popular of late" in capsys.readouterr().err


def test_seen_items_are_left_out_unless_asked_for(folder, capsys):
    history = ["--history", "i1", "i2", "i3", "-k", str(NUM_ITEMS), "--json"]
    assert call(folder, *history) == 0
    unseen = {entry["item"] for entry in json.loads(capsys.readouterr().out)["items"]}
    assert call(folder, *history, "--include-seen") == 0
    assert {entry["item"] for entry in json.loads(capsys.readouterr().out)["items"]} - unseen == {"i1", "i2", "i3"}


def test_one_for_whom_no_item_is_left_is_told_why(folder, tmp_path, capsys):
    everything = ["--history", *(f"i{i}" for i in range(NUM_ITEMS))]
    for arguments, reason in [
        (everything, "all items are in the history (--include-seen offers them too)"),
        ([*everything, "--json"], "all items are in the history (--include-seen offers them too)"),
        (["--user", "u3", "--include-seen", "--min-score", "1e9"], "--min-score leave none"),
        (["--user", "u3", "--min-score", "1e9"], "seen offers them too), or --min-score leave none"),
    ]:
        assert call(folder, *arguments) == 0
        printed = capsys.readouterr()
        assert printed.err.startswith("nothing to recommend: ")
        assert printed.err.endswith(f"{reason}\n")
    assert call(folder, "--user", "u3") == 0
    assert not capsys.readouterr().err


def test_diversity_and_similar_items_on_the_command_line(folder, recommender, tmp_path, capsys):
    assert call(folder, "--user", "u3", "-k", "3", "--diversity", "0.9", "--json") == 0
    found = [entry["item"] for entry in json.loads(capsys.readouterr().out)["items"]]
    mmr = MaximalMarginalRelevance(recommender.model.embedding.weight, 0.9)
    assert found == ids(recommender.recommend("u3", k=3, rerank=mmr)) != ids(recommender.recommend("u3", k=3))
    (tmp_path / "titles.csv").write_text("i4,Four\n")
    assert main(["similar", str(folder), "i5", "-k", "3", "--titles", str(tmp_path / "titles.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [item for item, _ in recommender.similar_items("i5", k=3)]


def test_titles_of_other_items_are_refused(folder, tmp_path, capsys):
    (tmp_path / "titles.csv").write_text("item_id,title\n17,One\n18,Two\n")
    for command in (["recommend", str(folder), "--user", "u3"], ["similar", str(folder), "i5"]):
        assert main([*command, "--titles", str(tmp_path / "titles.csv")]) == 2
        error = capsys.readouterr().err
        assert "must have titles of the model's items, such as 'i" in error
        assert error.endswith("; given titles of '17', '18'\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all-users", "--out", "best.xls"], "--out must end in one of .csv, .tsv, .jsonl, .parquet"),
        (["--user", "u1", "--diversity", "7"], "diversity must be from 0 to 1; given 7.0"),
        (["--user", "u1", "--allow", "nowhere"], "nowhere"),
        (["--user", "u1", "--titles", "nowhere"], "nowhere"),
        (["--user", "u1", "--titles", "config.json", "--encoding", "klingon"], "klingon"),
        (["--all-users", "--out", "nowhere/best.csv"], "in a folder that is there; given 'nowhere/best.csv'"),
        (["--history", "x", "--out", "best.parquet"], "must be .csv, .tsv or .jsonl"),
        (["--user", "u1", "--encoding", "latin-1"], "--encoding must come with the --titles that it is of"),
        (["--user", "u1", "--json", "--out", "best.csv"], "--json must come without --out"),
        (["--history", "i1,i2"], "--history must have ids between blanks; given 'i1,i2': write i1 i2"),
        (["--history", "i3", "i1, new"], "--history must have ids between blanks; given 'i1, new': write i1 new"),
        (["--users", os.devnull], "/dev/null must have at least one user; given an empty file"),
        (["--histories", os.devnull, "--out", "best.csv"], "must have at least one history; given an empty file"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    assert call(folder, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("ttt4rec: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in folder.iterdir()) == before


def test_parquet_of_whole_numbers(recommender, tmp_path):
    whole = arrow.table({"user_id": [1, 1, 2, 2], "item_id": [7, 8, 8, 7], "timestamp": [1, 2, 3, 4]})
    from ttt4rec.recsys import build_histories

    histories = build_histories(load_interactions(whole))
    Recommender(make_model(type("Split", (), {"histories": histories})), histories).save(tmp_path)
    assert call(tmp_path, "--all-users", "--include-seen", "--out", str(tmp_path / "best.parquet")) == 0
    found = parquet.read_table(tmp_path / "best.parquet")
    assert found.schema.field("user_id").type == found.schema.field("item_id").type == arrow.int64()
    assert found.num_rows == 4
