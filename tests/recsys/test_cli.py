"""The command line, in process."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow as arrow
import pytest
import torch
from pyarrow import parquet

from tests.support.recsys_data import SMALL, write_events
from ttt4rec import TTT4Rec
from ttt4rec.atomic_files import write_json
from ttt4rec.cli import main
from ttt4rec.recsys.training.checkpoint import load_checkpoint
from ttt4rec.recsys.training.train import CHECKPOINT_FILE


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    data = write_events(folder / "ring.inter")
    assert main(["train", str(data), "--out", str(folder / "run"), "--epochs", "2", *SMALL]) == 0
    return folder


def test_train_prints_and_writes(run, capsys):
    command = ["train", str(run / "ring.inter"), "--out", str(run / "run"), "--epochs", "3", *SMALL]
    assert main(command) == 0  # goes on after the two epochs of the fixture
    out = capsys.readouterr().out
    assert "60 users, 24 items" in out
    assert out.count("epoch ") == 1
    assert "epoch   2" in out
    assert "test  HR@10" in out
    assert "user u0, whose last items are" in out
    written = {path.name for path in (run / "run").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "ids.json",
        "metrics.csv",
        "run.json",
        "report.md",
        "model_card.md",
        "curves.png",
    } <= written


def test_the_model_card(run, capsys, monkeypatch):
    card = (run / "run" / "model_card.md").read_text()
    assert card.startswith("---\nlibrary_name: ttt4rec\n")
    test = json.loads((run / "run" / "run.json").read_text())["test"]
    parameters = sum(p.numel() for p in TTT4Rec.load(run / "run").parameters())
    for part in ("# TTT4Rec on ring.inter", f"{parameters:,} parameters", f"| HR@10 | {test['HR@10']:.4f} |"):
        assert part in card
    assert "| users | 60 |" in card
    assert "{" not in card.replace("{}", "")
    monkeypatch.chdir(run / "run")
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert "('i" in capsys.readouterr().out


def test_evaluate_repeats_the_test_of_training(run, capsys):
    expected = json.loads((run / "run" / "run.json").read_text())["test"]
    assert main(["evaluate", str(run / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected)
    assert main(["evaluate", str(run / "run"), "--part", "valid", "--cutoffs", "1", "5"]) == 0
    assert capsys.readouterr().out.startswith("valid  HR@1 ")


@pytest.mark.parametrize("split", [["--split-by", "last"], ["--split-by", "time", "--split", "6:2:2"]], ids=str)
def test_other_splits(tmp_path, capsys, split):
    data = write_events(tmp_path / "ring.inter")
    command = ["train", str(data), "--out", str(tmp_path / "run"), "--epochs", "1", "--loss", "bpr", *split, *SMALL]
    assert main([*command, "--exclude-seen"]) == 0
    expected = json.loads((tmp_path / "run" / "run.json").read_text())["test"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--exclude-seen"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected)


def test_training_on_a_file_as_people_have_it(tmp_path, capsys):
    """No header, other separators and encoding, American dates, a bad line; ids that are numbers, in Parquet."""
    rows = [line.split("\t") for line in write_events(tmp_path / "ring.inter").read_text().splitlines()[1:]]
    day = [datetime.datetime.fromtimestamp(int(time), datetime.timezone.utc) for _, _, time in rows]
    lines = [f"{u}::{i}::é::{at:%m/%d/%Y %H.%M.%S}" for (u, i, _), at in zip(rows, day, strict=True)]
    (tmp_path / "ratings.dat").write_bytes("\n".join([*lines, "bad"]).encode("latin-1"))
    command = ["train", str(tmp_path / "ratings.dat"), "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL]
    options = ["--columns", "user_id", "item_id", "note", "timestamp", "--encoding", "latin-1"]
    options += ["--date-format", "%m/%d/%Y %H.%M.%S", "--skip-bad-rows", "1"]
    assert main([*command, *options]) == 0
    said = capsys.readouterr()
    assert f"60 users, 24 items, {len(rows):,} interactions" in said.out
    assert "left out 1 of the rows" in said.err
    expected = json.loads((tmp_path / "run" / "run.json").read_text())["test"]
    users, items, times = ([int(x.strip("ui")) for x in column] for column in zip(*rows, strict=True))
    table = arrow.table({"user_id": users, "item_id": items, "timestamp": times})
    parquet.write_table(table, tmp_path / "ring.parquet")
    command[1], command[3] = str(tmp_path / "ring.parquet"), str(tmp_path / "whole")
    assert main(command) == 0
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["test"] == expected
    capsys.readouterr()
    assert main(["recommend", str(tmp_path / "whole"), "--user", "5", "--json"]) == 0
    assert {type(entry["item"]) for entry in json.loads(capsys.readouterr().out)["items"]} == {int}
    assert main(["train", str(tmp_path / "ratings.dat"), "--out", str(tmp_path / "no"), *SMALL]) == 2
    assert "--encoding" in capsys.readouterr().err


def test_the_version_and_the_module(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said == f"ttt4rec {importlib.metadata.version('ttt4rec')}\n"
    run = subprocess.run([sys.executable, "-m", "ttt4rec", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == said


def test_report_of_two_seeds(run, tmp_path, capsys):
    seeds = [tmp_path / "seeds" / str(seed) for seed in range(2)]
    for seed, out in enumerate(seeds):
        command = ["train", str(run / "ring.inter"), "--out", str(out), "--epochs", "2", "--seed", str(seed), *SMALL]
        assert main(command) == 0
    runs = [load_checkpoint(out / CHECKPOINT_FILE)[1]["run"] for out in seeds]
    assert runs[0]["initial"] != runs[1]["initial"]
    assert main(["report", *map(str, seeds), "--out", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "curves.png").stat().st_size > 1000
    text = (tmp_path / "both" / "report.md").read_text()
    values = [json.loads((folder / "run.json").read_text())["test"]["HR@10"] for folder in seeds]
    each = f"| HR@10 | {values[0]:.4f} | {values[1]:.4f} |"
    assert f"{each} {sum(values) / 2:.4f} |" in text
    assert "| users | 60 | 60 |" in text
    assert "| seed | 0 | 1 |" in text
    other = tmp_path / "other" / "0"  # of the first one's name, and with another setting: no mean of the two
    shutil.copytree(seeds[0], other)
    about = json.loads((other / "run.json").read_text())
    about = {name: about[name] for name in ("settings", "data", "test")}
    write_json(other / "run.json", about | {"settings": about["settings"] | {"dropout": 0.9}}, ["metrics.csv"])
    assert main(["report", str(seeds[0]), str(other), "--out", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both" / "report.md").read_text()
    assert "| metric | seeds/0 | other/0 |\n" in text
    assert f"| HR@10 | {values[0]:.4f} | {values[0]:.4f} |\n" in text
    for change in ({}, {"data": {**about["data"], "users": 59}, "settings": about["settings"] | {"seed": 7}}):
        write_json(other / "run.json", about | change, ["metrics.csv"])  # the same seed again, other data
        assert main(["report", str(seeds[0]), str(other), "--out", str(tmp_path / "both")]) == 0
        assert "standard deviation" not in (tmp_path / "both" / "report.md").read_text()
    (seeds[1] / "run.json").write_text("{}")
    assert main(["report", *map(str, seeds), "--out", str(tmp_path / "both")]) == 2
    assert "damaged" in capsys.readouterr().err


def test_recommend(run, capsys):
    assert main(["recommend", str(run / "run"), "--user", "u3", "--k", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    command = ["recommend", str(run / "run"), "--history", "i1", "new", "i2", "--json"]
    assert main(command) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["unknown"] == ["new"]
    assert not {"i1", "i2"} & {entry["item"] for entry in answer["items"]}
    assert "left out: new" in printed.err


def test_recommend_for_a_file_of_histories(run, tmp_path, capsys):
    (tmp_path / "histories.txt").write_text("i1 i2 i3\nnew newer\n\ni5 new\n" + "i7\n" * 600)
    command = ["recommend", str(run / "run"), "--histories", str(tmp_path / "histories.txt"), "--k", "3"]
    assert main(command) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(answer["items"]) for answer in answers] == [3, 0, 0, 3, *[3] * 600]
    assert [answer["unknown"] for answer in answers[:4]] == [[], ["new", "newer"], [], ["new"]]
    assert main(["recommend", str(run / "run"), "--history", "i1", "i2", "i3", "--k", "3", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)["items"]
    assert [entry["item"] for entry in alone] == [entry["item"] for entry in answers[0]["items"]]


@pytest.mark.parametrize("line", ["i1 i2\n", '["i1", "i2"]\n', "\ufeffi1 i2"])
def test_histories_of_every_kind(run, tmp_path, capsys, line):
    (tmp_path / "histories.txt").write_text(line, encoding="utf-8")
    assert main(["recommend", str(run / "run"), "--histories", str(tmp_path / "histories.txt"), "--k", "3"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (len(answer["items"]), answer["unknown"]) == (3, [])


def test_histories_of_numbers_and_of_what_no_id_can_be(run, tmp_path, capsys):
    command = ["recommend", str(run / "run"), "--histories", str(tmp_path / "histories.txt")]
    (tmp_path / "histories.txt").write_text("5\n[5, 12]\n")
    assert main(command) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["unknown"] for answer in answers] == [["5"], ["5", "12"]]
    for line in ('[["i1"]]', "[1.5]", "[null]", "[true]"):
        (tmp_path / "histories.txt").write_text(line)
        assert main(command) == 2
        assert f"strings or whole numbers; given the line {line!r}" in capsys.readouterr().err


def test_new_items_are_added_to_a_trained_model(run, tmp_path, capsys):
    text = (run / "ring.inter").read_text()
    new = "".join(f"v{u}\tnew{(u + t) % 5}\t{t}\n" for u in range(9) for t in range(9))
    (tmp_path / "more.inter").write_text(text + new)
    command = ["train", str(tmp_path / "more.inter"), "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL]
    assert main([*command, "--warm-start", str(run / "run"), "--learning-rate", "1e-9"]) == 0
    old, grown = (json.loads((folder / "ids.json").read_text())["items"] for folder in (run / "run", tmp_path / "run"))
    assert grown[: len(old)] == old
    assert set(grown[len(old) :]) == {f"new{i}" for i in range(5)}
    before, after = (TTT4Rec.load(folder).state_dict() for folder in (run / "run", tmp_path / "run"))
    for name, x in before.items():
        torch.testing.assert_close(after[name][: len(x)], x, rtol=0, atol=1e-6)
    assert main(["recommend", str(tmp_path / "run"), "--history", "new1", "i2"]) == 0


def test_a_warm_start_has_the_shape_of_its_model_and_says_so(run, tmp_path, capsys):
    command = ["train", str(run / "ring.inter"), "--epochs", "1", "--warm-start", str(run / "run")]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    config = dataclasses.asdict(TTT4Rec.load(tmp_path / "run").config)
    assert (config["width"], config["max_len"]) == (16, 8)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert {name: settings[name] for name in config if name in settings} == {
        name: value for name, value in config.items() if name in settings
    }
    assert "| width | 16 |" in (tmp_path / "run" / "report.md").read_text()
    assert "| width | 16 |" in (tmp_path / "run" / "model_card.md").read_text()
    capsys.readouterr()
    for option, value in (("--mixer", "gru"), ("--width", "64"), ("--dropout", "0.4")):  # 64 is the default
        assert main([*command, "--out", str(tmp_path / "other"), option, value]) == 2
        error = capsys.readouterr().err
        assert f"{option} must be left out or " in error
        assert f"given {value}" in error
        assert str(run / "run") in error
    assert main([*command, "--out", str(tmp_path / "other"), "--mixer", "gru", "--width", "64"]) == 2
    error = capsys.readouterr().err
    assert "--mixer must be left out or ttt, --width must be left out or 16, as in " in error
    assert error.endswith("given gru, 64\n")
    assert not (tmp_path / "other").exists()


def test_csv_with_named_columns(tmp_path, capsys):
    rows = [f"c{u},p{(u + t) % 9},{t}" for u in range(12) for t in range(10)]
    (tmp_path / "shop.csv").write_text("\n".join(["customer,product,at", *rows]))
    fields = ["--user-field", "customer", "--item-field", "product", "--time-field", "at"]
    command = ["train", str(tmp_path / "shop.csv"), "--out", str(tmp_path / "run"), "--epochs", "1", *fields, *SMALL]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "12 users, 9 items, 120 interactions" in out
    assert "next none, all items are seen" in out


def test_interruption_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ttt4rec.recsys.commands.training.fit", interrupted)
    data = write_events(tmp_path / "ring.inter")
    assert main(["train", str(data), "--out", str(tmp_path / "run"), *SMALL]) == 130
    assert "same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("question", "lines"),
    [  # the first two are flushed at the end only
        pytest.param(["--user", "u1"], 0, marks=pytest.mark.slow),
        (["--help"], 0),
        (["--histories", "FILE"], 1),
    ],
    ids=str,
)
def test_a_closed_pipe_ends_quietly(run, question, lines):
    (run / "many.txt").write_text("i1 i2\n" * 2000)  # whose answers are more than a pipe holds
    question = [str(run / "many.txt") if word == "FILE" else word for word in question]
    command = [sys.executable, "-m", "ttt4rec.cli", "recommend", str(run / "run"), *question]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        for _ in range(lines):
            assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize(
    "command", [[], ["train"], ["evaluate"], ["recommend"], ["similar"], ["add-items"], ["report"], ["serve"]]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: ttt4rec" in capsys.readouterr().out


BAD_FILES = {
    "empty.csv": "",
    "header.csv": "user_id,item_id,timestamp\n",
    "column.csv": "user,item_id,timestamp\na,b,1\n",
    "fields.csv": "user_id,item_id,timestamp\na,b,1\na,b\n",
    "time.csv": "user_id,item_id,timestamp\na,b,yesterday\n",
    "nan.csv": "user_id,item_id,timestamp\na,b,nan\n",
    "blank.csv": "user_id,item_id,timestamp\na,,1\n",
    "few.csv": "user_id,item_id,timestamp\na,b,1\n",
    "fake.csv.gz": "not gzip",
}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nowhere.csv"], "nowhere.csv"),
        (["ml-100m"], "ml-100m"),
        (["."], "."),
        *(([name], name) for name in BAD_FILES if name != "few.csv"),
        (["few.csv"], "none of 1"),
        (["ring.inter", "--user-field", "who"], "who"),
        (["ring.inter", "--split", "3:2"], "3:2"),
        (["ring.inter", "--split", "a:b:c"], "a:b:c"),
        (["ring.inter", "--split", "0:1:1"], "0"),
        (["ring.inter", "--split", "1:0:1"], "valid"),
        (["ring.inter", "--split-by", "time", "--split", "1:0:1"], "valid"),
        (["ring.inter", "--split-by", "fate"], "fate"),
        (["ring.inter", "--warm-start", "nowhere"], "nowhere"),
        (["ring.inter", "--loss", "hinge"], "hinge"),
        (["ring.inter", "--loss", "gbce", "--calibration", "2"], "2"),
        (["ring.inter", "--loss", "bpr", "--num-negatives", "0"], "0"),
        (["ring.inter", "--accumulate", "0"], "0"),
        (["ring.inter", "--min-item", "100000"], "100000"),
        (["ring.inter", "--min-user", "-5"], "min_user must be an integer of at least 0; given -5"),
        (["ring.inter", "--min-item", "-1"], "min_item must be an integer of at least 0; given -1"),
        (
            ["ring.inter", "--split-by", "time", "--min-item", "-1"],
            "min_item must be an integer of at least 0; given -1",
        ),
        (["ring.inter", "--split", f"{10**20}:1:1"], str(10**20)),
        (["ring.inter", "--seed", str(10**20)], f"seed must be below 2**63; given {10**20}"),
        (["ring.inter", "--threads", "1025"], "--threads must be from 1 to 1024; given 1025"),
        (["ring.inter", "--width", "10", "--num-heads", "4"], "10"),
        (["ring.inter", "--width", "-8"], "-8"),
        (["ring.inter", "--dropout", "1.5"], "1.5"),
        (["ring.inter", "--max-len", "0"], "0"),
        (["ring.inter", "--epochs", "0"], "0"),
        (["ring.inter", "--learning-rate", "nan"], "nan"),
        (["ring.inter", "--mini-batch-size", "0"], "0"),
        (["ring.inter", "--device", "abacus"], "abacus"),
        (["ring.inter", "--device", "mps"], "mps"),
    ],
    ids=str,
)
def test_bad_training_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, names):
    monkeypatch.chdir(tmp_path)
    write_events(tmp_path / "ring.inter", users=8)
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", *arguments, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ttt4rec: error: ")
    assert error.count("\n") == 1
    assert names in error
    assert sorted(tmp_path.rglob("*")) == before


def test_large_numbers_where_there_is_no_limit(run, capsys):
    assert main(["recommend", str(run / "run"), "--user", "u1", "-k", str(2**31 - 1), "--include-seen"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 24
    assert main(["evaluate", str(run / "run"), "--cutoffs", str(2**31 - 1)]) == 0


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("int too large")], ids=repr)
def test_what_is_too_large_is_one_line(run, capsys, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("ttt4rec.recsys.commands.evaluating.write_report", fails)
    assert main(["report", str(run / "run"), "--out", str(run / "both")]) == 2
    assert capsys.readouterr().err == f"ttt4rec: error: {str(error) or 'MemoryError'}\n"


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["evaluate", "nowhere"], "nowhere"),
        (["recommend", "nowhere", "--user", "u1"], "nowhere"),
        (
            ["recommend", "RUN", "--user", "stranger"],
            "given 'stranger'; offer what is popular of late by popular=True "
            "(--popular), or give a history (--history)",
        ),
        (
            ["recommend", "RUN", "--history", "x"],
            "given ['x']; offer what is popular of late by popular=True (--popular)",
        ),
        (["recommend", "RUN", "--histories", "nowhere.txt"], "nowhere.txt"),
        (["recommend", "RUN", "--user", "u1", "--k", "0"], "0"),
        (["evaluate", "RUN", "--cutoffs", "0"], "0"),
        (["report", "RUN", "nowhere", "--out", "RUN"], "nowhere"),
    ],
    ids=str,
)
def test_bad_questions_are_one_line(run, capsys, command, names):
    command = [str(run / "run") if word == "RUN" else word for word in command]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("ttt4rec: error: ")
    assert error.count("\n") == 1
    assert names in error


def test_out_that_cannot_be_written(run, capsys):
    assert main(["train", str(run / "ring.inter"), "--out", str(run / "ring.inter" / "x"), *SMALL]) == 2
    assert capsys.readouterr().err.startswith("ttt4rec: error: ")
