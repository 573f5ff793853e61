"""Options from files, and options that would have no effect."""

import itertools
import json
import logging
import sys
from contextlib import nullcontext

import pytest

from tests.support.recsys_data import SMALL, write_events
from ttt4rec.cli import main, make_parser
from ttt4rec.native import build
from ttt4rec.recsys.data.datasets import NAMED
from ttt4rec.recsys.training.checkpoint import load_checkpoint
from ttt4rec.recsys.training.train import CHECKPOINT_FILE
from ttt4rec.settings import check_effects


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    write_events(folder / "ring.inter", users=20)
    command = ["train", str(folder / "ring.inter"), "--out", str(folder / "run"), "--epochs", "1", *SMALL]
    assert main([*command, "--split", "4:1:1", "--exclude-seen"]) == 0
    return folder


def settings_of(folder):
    return json.loads((folder / "run.json").read_text())["settings"]


def test_a_run_is_repeated_from_its_record(run, tmp_path, capsys):
    assert main(["train", "--config", str(run / "run" / "run.json"), "--out", str(tmp_path / "again")]) == 0
    assert settings_of(tmp_path / "again") == settings_of(run / "run") | {"out": str(tmp_path / "again")}
    before, after = (load_checkpoint(folder / CHECKPOINT_FILE) for folder in (run / "run", tmp_path / "again"))
    assert before[1]["run"] == after[1]["run"]
    assert all(x.equal(after[0][name]) for name, x in before[0].items())
    capsys.readouterr()
    assert main(["train", "--config", str(run / "run" / "run.json")]) == 2
    assert "the following arguments are required: --out (see" in capsys.readouterr().err


def test_the_command_line_comes_before_the_file_and_the_file_before_the_preset(run, tmp_path):
    content = {"data": str(run / "ring.inter"), "out": str(tmp_path / "run"), "max-len": 7, "epochs": 9, "width": 16}
    content |= {"min_user": 3, "num_heads": 2, "preset": "fast", "exclude_seen": True, "max_inner_step": None}
    (tmp_path / "own.json").write_text(json.dumps(content))
    assert main(["train", "--config", str(tmp_path / "own.json"), "--epochs", "1", "--width", "8"]) == 0
    found = settings_of(tmp_path / "run")
    assert (found["max_len"], found["epochs"], found["width"], found["num_heads"]) == (7, 1, 8, 2)
    assert (found["min_user"], found["loss"], found["inner"]) == (3, "sampled", "linear")
    assert found["exclude_seen"] is True


@pytest.mark.slow
def test_toml(run, tmp_path, capsys):
    lines = [f"data = {json.dumps(str(run / 'ring.inter'))}", "epochs = 1", "width = 16", "num-heads = 2", "seed = 3"]
    (tmp_path / "own.toml").write_text("\n".join([*lines, 'separator = "\\t"', "learning_rate = 1e-2"]))
    code = main(["train", "--config", str(tmp_path / "own.toml"), "--out", str(tmp_path / "run")])
    if sys.version_info < (3, 11):
        assert code == 2
        assert "TOML needs Python 3.11 or newer: write JSON" in capsys.readouterr().err
        return
    found = settings_of(tmp_path / "run")
    assert (found["seed"], found["learning_rate"], found["separator"]) == (3, 0.01, "\t")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.json",
            '{"widht": 16, "depth": 1}',
            "must hold options of ttt4rec train; given widht (is width meant?), depth (see ttt4rec train --help)",
        ),
        ("a.json", '{"width": 1.5}', "argument --width: must be a whole number below 2**31; given '1.5'"),
        ("a.json", '{"mixer": "fate"}', "argument --mixer: invalid choice: 'fate'"),
        ("a.json", '{"gates": "yes"}', "argument --gates: ignored explicit argument 'yes'"),
        ("a.json", "[1]", "must hold options by name; given list"),
        ("a.json", "{", "must hold JSON; given what cannot be read"),
        ("a.json", '{"epochs": [5, 1]}', "argument --epochs: must be a number or a text; given [5, 1]"),
        ("a.json", '{"time_field": true}', "argument --time-field: must be a number or a text; given True"),
        ("a.json", '{"track": [["wandb"]]}', "argument --track: must be a number or a text; given ['wandb']"),
        ("a.json", '{"data": ["a.csv"]}', "must hold a text as data; given ['a.csv']"),
        ("a.json", '{"epochs": 5, "epochs": 1}', "must hold JSON; given what cannot be read (epochs twice)"),
        ("a.json", '{"min-user": 5, "min_user": 1}', "must hold each option once; given min_user twice"),
        ("a.json", '{"config": "b.json"}', "must hold options of ttt4rec train; given config"),
        ("a.toml", "width", "must hold TOML; given what cannot be read"),
        ("a.yaml", "width: 16", "--config must be a .json or .toml file; given "),
    ],
)
def test_a_file_without_options_is_one_line(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert main(["train", "ring.inter", "--out", "run", "--config", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ttt4rec: error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--mixer", "gru", "--inner", "linear"], "--inner with --mixer gru"),
        (
            ["--mixer", "attention", "--backbone", "mamba", "--forget", "token"],
            "--backbone with --mixer attention, --forget with --mixer attention",
        ),
        (["--hide-rate", "0.1"], "--hide-rate with --mixer ttt"),
        (["--loss", "softmax", "--num-negatives", "5"], "--num-negatives with --loss softmax"),
        (["--popularity", "0.5"], "--popularity with --loss softmax"),
        (["--loss", "bpr", "--calibration", "0.5"], "--calibration with --loss bpr"),
        (["--preset", "fast", "--calibration", "0.5"], "--calibration with --loss sampled"),
        (["--ffn", "none", "--ffn-width", "8"], "--ffn-width with --ffn none"),
        (["--split-by", "last", "--split", "3:1:1"], "--split with --split-by last"),
        (["--feature-columns", "kind"], "--feature-columns with no --item-features"),
        (["--row-order", "--date-format", "%Y"], "--date-format with --row-order"),
    ],
    ids=str,
)
def test_an_option_without_effect_is_refused(tmp_path, capsys, options, named):
    command = ["train", "nowhere.csv", "--out", str(tmp_path / "run")]
    assert main([*command, *options]) == 2
    assert f"options must have an effect; given {named}: leave" in capsys.readouterr().err
    content = {word.strip("-"): True for word in options if word.startswith("--")}
    content |= {a.strip("-"): b for a, b in itertools.pairwise(options) if b[0] != "-" and a[0] == "-"}
    (tmp_path / "own.json").write_text(json.dumps(content))
    assert main([*command, "--config", str(tmp_path / "own.json")]) == 2
    assert f"given {named}: leave" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "options", "named"),
    [
        ("a.parquet", ["--encoding", "latin-1"], "--encoding with a Parquet file"),
        ("ml-100k", ["--user-field", "who", "--min-user", "3"], "--user-field with the data ml-100k"),
    ],
)
def test_an_option_that_other_data_would_need_is_refused(tmp_path, capsys, data, options, named):
    assert main(["train", data, "--out", str(tmp_path / "run"), *options]) == 2
    assert f"given {named}: leave" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--mixer", "gru"], ["--preset", "fast", "--num-negatives", "5"], ["--loss", "gbce", "--calibration", "0.5"]],
    ids=str,
)
def test_defaults_without_effect_are_none_and_options_with_one_are_taken(tmp_path, capsys, options):
    assert main(["train", "nowhere.csv", "--out", str(tmp_path / "run"), *options]) == 2
    assert "nowhere.csv must be a data file; it does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_a_preset_does_not_stand_beside_a_record(run, tmp_path, capsys):
    """All options are given there, so that none is left for the preset, which the new record would name."""
    again = ["train", "--config", str(run / "run" / "run.json"), "--out", str(tmp_path / "again")]
    assert main([*again, "--preset", "best"]) == 2
    assert "--preset must be left out with a run's record, which has all options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "features", "options", "refused"),
    [
        ("ml-100k", "no.csv", ["--item-field", "sku", "--encoding", "latin-1"], False),
        ("no.parquet", "no.csv", ["--encoding", "latin-1"], False),
        ("no.parquet", "no.parquet", ["--encoding", "latin-1"], True),
        ("ml-100k", "no.csv", ["--time-field", "when"], True),
    ],
    ids=str,
)
def test_options_of_the_features_file_have_an_effect(data, features, options, refused):
    args = make_parser().parse_args(["train", data, "--out", "run", "--item-features", features, *options])
    with pytest.raises(ValueError, match="options must have an effect") if refused else nullcontext():
        check_effects(args.given, vars(args), NAMED)


def test_a_record_may_hold_what_has_no_effect(run, tmp_path):
    command = ["train", "--config", str(run / "run" / "run.json"), "--out", str(tmp_path / "run"), "--mixer", "gru"]
    assert main(command) == 0
    assert settings_of(tmp_path / "run")["mixer"] == "gru"
    assert main([*command, "--inner", "mlp"]) == 2


def test_what_the_filter_left_out_is_said_in_numbers(tmp_path, capsys):
    rows = [f"u{u},i{(u + t) % 9},{t}" for u in range(12) for t in range(10)] + ["v,i1,1", "u1,rare,50"]
    (tmp_path / "a.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    assert main(["train", str(tmp_path / "a.csv"), "--out", str(tmp_path / "run"), "--epochs", "1", *SMALL]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == ("left out by --min-user 5 and --min-item 5: 1 of 13 users, 1 of 10 items, 2 of 122 interactions")
    assert second == "12 users, 9 items, 120 interactions"


def test_what_the_package_logs_is_shown_at_the_level_asked_for(run, capsys, monkeypatch):
    """One line at the first compilation of a process, which makes the first command wait."""

    def similar(args):
        build._tell_once.cache_clear()
        for name in ("first", "second"):
            with pytest.raises(build.BuildError):
                build._compile(("false",), run / "cache", name)

    monkeypatch.setattr("ttt4rec.recsys.commands.similar", similar)
    command = ["similar", "DIR", "i1"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert (
        said == f"ttt4rec: compiling C++ for this processor, which takes some seconds and is kept in {run / 'cache'}\n"
    )
    assert main([*command, "--log-level", "warning"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*command, "--log-level", "debug"]) == 0
    assert "ttt4rec: compiling second\n" in capsys.readouterr().err
    assert not logging.getLogger("ttt4rec").handlers


def test_the_service_logs_at_the_level_asked_for(monkeypatch):
    from ttt4rec.recsys.serving.command import _loggers

    logger = logging.getLogger("ttt4rec")
    for level, expected in ((logging.NOTSET, logging.INFO), (logging.WARNING, logging.WARNING)):
        monkeypatch.setattr(logger, "level", level)
        assert _loggers()["ttt4rec"]["level"] == expected
