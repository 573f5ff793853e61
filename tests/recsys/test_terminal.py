"""Ids reach a terminal, a log or an error message with their control characters escaped."""

import json
import logging

import pyarrow as arrow
import pytest
from pyarrow import parquet

from tests.support.recsys_data import NUM_ITEMS, SMALL
from ttt4rec.checks import printable
from ttt4rec.cli import main
from ttt4rec.recsys import DataError, OnlineRecommender, Recommender, SQLiteEventLog, read_interactions
from ttt4rec.recsys.data import Interactions
from ttt4rec.recsys.online.events import Event

EVIL = "\x1b[2J\x07\x9b31m\u202egpj\x7f é"
SHOWN = r"\x1b[2J\x07\x9b31m\u202egpj\x7f é"


def assert_harmless(text, *expected):
    assert all(line.isprintable() for line in text.split("\n")), ascii(text)
    for part in expected:
        assert part in text


def test_printable():
    assert printable(EVIL) == SHOWN
    assert printable("plain é 漢字 😀") == "plain é 漢字 😀"
    assert printable("a\nb\udcff") == r"a\nb\udcff"
    assert printable("abcdef", 3) == "abc..."
    assert printable("abc", 3) == "abc"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Data whose every id is evil, and what was trained on them."""
    folder = tmp_path_factory.mktemp("terminal")
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(30):
        rows += [f"{EVIL}u{user}\t{EVIL}i{(user + k) % NUM_ITEMS}\t{k}" for k in range(12)]
    (folder / "evil.inter").write_text("\n".join(rows) + "\n")
    assert main(["train", str(folder / "evil.inter"), "--out", str(folder / "model"), "--epochs", "1", *SMALL]) == 0
    return folder


def test_the_command_line(run, tmp_path, capsys):
    model = str(run / "model")
    assert main(["train", str(run / "evil.inter"), "--out", model, "--epochs", "2", *SMALL]) == 0
    assert_harmless(capsys.readouterr().out, f"user {SHOWN}u0, whose last items are {SHOWN}i")
    card = (run / "model" / "model_card.md").read_text()
    assert_harmless(card, r'history=["\u001b[2J\u0007\x9b31m')  # escapes of JSON, and others, all of them Python's too
    assert main(["recommend", model, "--user", f"{EVIL}u0"]) == 0
    assert_harmless(capsys.readouterr().out, f"  1  {SHOWN}i")
    assert main(["recommend", model, "--history", f"{EVIL}i1", f"{EVIL}unknown"]) == 0
    assert_harmless(capsys.readouterr().err, f"left out: {SHOWN}unknown")
    assert main(["recommend", model, "--history", f"{EVIL}i1", "--json"]) == 0
    shown = capsys.readouterr().out
    assert_harmless(shown)
    assert json.loads(shown)["items"][0]["item"].startswith(EVIL)
    (tmp_path / "histories").write_text(json.dumps([f"{EVIL}i1", f"{EVIL}unknown"]) + "\n")
    assert main(["recommend", model, "--histories", str(tmp_path / "histories")]) == 0
    assert_harmless(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["recommend", "RUN", "--user", EVIL],
        ["recommend", "RUN", "--history", EVIL],
        ["recommend", EVIL, "--user", "u"],
        ["train", "DATA", "--out", "x", "--user-field", EVIL],
        ["train", f"{EVIL}.csv", "--out", "x"],
        ["train", EVIL, "--out", "x"],
        ["evaluate", "RUN", "--part", EVIL],
        ["report", EVIL, "--out", "x"],
        [EVIL],
    ],
    ids=ascii,
)
def test_errors_on_the_command_line(run, arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(run / "model"), "DATA": str(run / "evil.inter")}
    assert main([places.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert_harmless(error, r"\x1b[2J")


def refusal(path, **options):
    with pytest.raises(DataError) as error:
        read_interactions(path, **options)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < len(str(path)) + 600
    return str(error.value)


def test_what_a_file_holds(tmp_path):
    names, path = f"{EVIL}a,item_id,timestamp", tmp_path / "a.csv"
    path.write_text(f"{names}\nu,i,1\n")
    assert f"given {SHOWN}a" in refusal(path)
    path.write_text(f"{names}{'x' * 10_000}\nu,i,1\n")
    assert "x..." in refusal(path)
    path.write_text(f"user_id,item_id,timestamp\nu,i,{EVIL}\n")
    assert r"given '\x1b[2J" in refusal(path)
    path.write_text(f"user_id,item_id,timestamp\nu,i,{'9' * 10_000}\n")
    assert "given '999" in refusal(path)
    path.write_text(f"user_id,item_id,timestamp\nu,{' ' * 10_000},1\n")
    assert "must be an item id" in refusal(path)
    table = arrow.table({f"{EVIL}a{'x' * 10_000}": ["u"], "item_id": ["i"], "timestamp": [1]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert f"given {SHOWN}a" in refusal(tmp_path / "a.parquet")


def test_recommenders(run, tmp_path, caplog):
    recommender = Recommender.load(run / "model")
    log = SQLiteEventLog(tmp_path / "events.db")
    online = OnlineRecommender(recommender.model, recommender.histories.item_ids, log, pool_bytes=10**6)
    wrong = {
        "an unknown user": lambda: recommender.recommend(EVIL),
        "an unknown item": lambda: recommender.recommend(history=[EVIL]),
        "a text": lambda: recommender.recommend(history=EVIL),
        "unknown items": lambda: online.observe(["u"], [EVIL]),
        "a text of users": lambda: online.recommend(EVIL),
        "no text": lambda: online.recommend([EVIL.encode()]),
        "an event": lambda: Event(EVIL + "\ud800", "i"),
    }
    with caplog.at_level(logging.DEBUG):
        for name, call in wrong.items():
            with pytest.raises(DataError) as error:
                call()
            assert str(error.value).isprintable(), name
            assert r"\x1b[2J" in str(error.value), name
        online.observe([EVIL], [f"{EVIL}i1"])
        assert online.recommend([EVIL])[0]
    log.close()
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert EVIL not in repr(Interactions(*[recommender.histories.items] * 3, (EVIL,), (EVIL,)))
