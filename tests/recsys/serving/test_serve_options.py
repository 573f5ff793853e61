"""The options of ``ttt4rec serve``."""

import dataclasses

import pytest

from tests.recsys.test_options import commands_of
from tests.support.recsys_data import make_model, make_split
from ttt4rec.cli import main, make_parser
from ttt4rec.fields import descriptions
from ttt4rec.options import ServeOptions
from ttt4rec.recsys.recommend import Recommender


def test_the_options_of_serving_are_the_fields_of_the_class(capsys):
    parse = make_parser().parse_args
    given = vars(parse(["serve", "x"]))
    assert {name: given[name] for name in ("command", "folder")} == {"command": "serve", "folder": "x"}
    fields = {field.name: field.default for field in dataclasses.fields(ServeOptions)}
    assert {
        name: value for name, value in given.items() if name not in ("command", "folder", "given", "log_level")
    } == fields
    about = descriptions(ServeOptions)
    assert list(about) == list(fields)
    options = {action.dest: action for action in commands_of(make_parser())["serve"]._actions}
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    printed = "".join(capsys.readouterr().out.split())
    for name in fields:
        assert options[name].option_strings == [f"--{name.replace('_', '-')}"]
        assert "".join(about[name].split()) in printed
    words = ["--allowed-host", "a", "b", "--no-flush", "--pool-bytes", str(2**40), "--allowed-host", "*"]
    given = parse(["serve", *words, "--time-unit", "ms", "--max-ahead", "inf", "x"])
    assert (given.allowed_host, given.no_flush, given.pool_bytes) == (("a", "b", "*"), True, 2**40)
    assert (given.time_unit, given.max_ahead) == ("ms", float("inf"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "65536"], "port must be at most 65535; given 65536"),
        (["--port=-1"], "port must be an integer of at least 0; given -1"),
        (["--pool-bytes", "0"], "pool_bytes must be an integer of at least 1; given 0"),
        (["--pool-bytes", "10"], "pool_bytes must be at least"),
        (["--time-unit", "weeks"], "--time-unit: invalid choice: 'weeks'"),
        (["--max-ahead", "nan"], "max_ahead must be a number of seconds; given nan"),
    ],
)
def test_bad_options_of_serving_are_one_line(tmp_path, capsys, options, message):
    split = make_split(tmp_path)
    Recommender(make_model(split), split.histories).save(tmp_path)
    assert main(["serve", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ttt4rec: error: ")
    assert error.count("\n") == 1
    assert message in error
