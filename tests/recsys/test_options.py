"""Options of the command line are the fields of the classes, and described where these are."""

import dataclasses
import re

import pytest

from ttt4rec.cli import _add_fields, _Parser, main, make_parser
from ttt4rec.fields import choice, descriptions
from ttt4rec.inner_models import INNER_MODELS
from ttt4rec.models.config import TTT4RecConfig
from ttt4rec.models.losses import LOSSES
from ttt4rec.models.mixers import MIXERS
from ttt4rec.options import DataOptions, TrainOptions


def commands_of(parser):
    """The parsers of the commands by their names."""
    (commands,) = (action for action in parser._actions if action.dest == "command")
    return commands.choices


def integer_options():
    """Every option of every command that takes whole numbers, but for those that may have 63 bits."""
    for name, parser in commands_of(make_parser()).items():
        for action in parser._actions:
            first = action.default[0] if isinstance(action.default, list) else action.default
            if action.dest == "threads" or (action.dest not in ("seed", "pool_bytes") and type(first) is int):
                yield name, action.option_strings[-1]


@pytest.mark.parametrize(("command", "option"), list(integer_options()))
@pytest.mark.parametrize("value", [str(10**20), str(2**31), "1.5", "many"])
def test_numbers_that_are_no_sizes_are_one_line(capsys, command, option, value):
    required = {
        "train": ["ring.inter", "--out", "run"],
        "recommend": ["run", "--user", "u1"],
        "similar": ["run", "i1"],
        "evaluate": ["run"],
        "serve": ["run"],
    }
    assert main([command, *required[command], option, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ttt4rec: error: ")
    assert error.count("\n") == 1
    assert f"{option}: must be a whole number below 2**31; given '{value}'" in error


NOT_ON_THE_COMMAND_LINE = {
    "num_items",
    "rope_theta",
    "base_lr",
    "conv_kernel",
    "block_conv",
}  # num_items: from the data


@pytest.mark.parametrize("target", [TTT4RecConfig, TrainOptions, DataOptions])
def test_the_options_of_training_are_the_fields_of_the_classes(target):
    options = {action.dest: action for action in commands_of(make_parser())["train"]._actions}
    fields = {field.name: field.default for field in dataclasses.fields(target)}
    assert set(fields) - set(options) == NOT_ON_THE_COMMAND_LINE & set(fields)
    common = set(fields) & set(options)
    assert {name: options[name].default for name in common} == {name: fields[name] for name in common}
    for name in common:
        assert options[name].option_strings == ["--" + name.replace("_", "-")]


@pytest.mark.parametrize(("option", "registry"), [("mixer", MIXERS), ("loss", LOSSES), ("inner", INNER_MODELS)])
def test_everything_may_be_chosen(monkeypatch, option, registry):
    """Also what is registered later."""
    monkeypatch.setitem(registry, "toy", next(iter(registry.values())))
    assert tuple(option_of("train", option).choices) == tuple(registry)
    assert getattr(make_parser().parse_args(["train", "x", "--out", "y", f"--{option}", "toy"]), option) == "toy"


def option_of(command, name):
    (found,) = (action for action in commands_of(make_parser())[command]._actions if action.dest == name)
    return found


OPTIONS_OF_TRAIN = {
    "out": None, "warm_start": None, "user_field": "user_id", "item_field": "item_id", "time_field": "timestamp",
    "min_user": 5, "min_item": 5, "split_by": "ratio", "split": "3:2:5", "exclude_seen": False, "mixer": "ttt",
    "hide_rate": 0.2, "inner": "mlp", "backbone": "transformer", "width": 64, "num_heads": 4, "num_blocks": 1,
    "mini_batch_size": 8, "max_inner_step": None, "max_len": 50, "dropout": 0.2, "norm": "rms", "ffn": "swiglu",
    "ffn_width": 256, "epochs": 300, "patience": 5, "learning_rate": 0.001, "targets_per_batch": 2048, "clip_norm": 5.0,
    "inner_lr_warmup": 0, "loss": "softmax", "num_negatives": 256, "popularity": 0.0, "calibration": 0.75,
    "accumulate": 1, "autocast": False, "deterministic": False, "seed": 0, "device": "auto", "threads": None,
}  # fmt: skip
CHOICES_OF_TRAIN = {
    "split_by": ["ratio", "last", "time"],
    "mixer": ["ttt", "attention", "gru", "narm", "mamba", "bidirectional", "hstu"],
    "inner": ["linear", "mlp"],
    "backbone": ["transformer", "mamba"],
    "norm": ["rms", "layer"],
    "ffn": ["swiglu", "gelu"],
    "loss": ["softmax", "sampled", "gbce", "bpr"],
}


def test_the_options_of_training_are_those_that_commands_were_written_with():
    """None is renamed or lost, and each keeps its default, what it takes and what may be chosen."""
    parse = make_parser().parse_args
    given = vars(parse(["train", "x", "--out", "y"]))
    for name, default in OPTIONS_OF_TRAIN.items():
        if name != "out":
            assert given[name] == default, name
            assert type(given[name]) is type(default), name
        assert option_of("train", name).option_strings == [f"--{name.replace('_', '-')}"]
        if default is False:
            assert getattr(parse(["train", "x", "--out", "y", f"--{name.replace('_', '-')}"]), name) is True
        elif type(default) in (int, float):
            read = getattr(parse(["train", "x", "--out", "y", f"--{name.replace('_', '-')}", "7"]), name)
            assert (read, type(read)) == (7, type(default))
    for name, old in CHOICES_OF_TRAIN.items():
        assert list(option_of("train", name).choices)[: len(old)] == old
    assert parse(["train", "x", "--out", "y", "--max-inner-step", "0.5"]).max_inner_step == 0.5


@pytest.mark.parametrize("target", [TTT4RecConfig, TrainOptions, DataOptions])
def test_every_field_is_described_where_it_is_and_the_help_repeats_it(target, capsys):
    about = descriptions(target)
    assert list(about) == [field.name for field in dataclasses.fields(target)]
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = "".join(capsys.readouterr().out.split())  # whose lines are broken where the terminal ends
    for name in set(about) & set(OPTIONS_OF_TRAIN):
        assert "".join(about[name].split()) in printed
    assert "gru:GRU4Rec's" in printed
    assert "bpr:pairsoftargetandnegative" in printed


def test_an_option_follows_from_its_field():
    @dataclasses.dataclass
    class Settings:
        """Of a toy.

        Attributes:
            speed: in ``m/s``, of which
                100 % is light's.
            colour: of the toy.
            loud: whether it makes noise.
            seed: of it.
        """

        speed: float | None = None
        colour: str = choice("red", ("red", "blue"))
        loud: bool = False
        seed: int = 3
        secret: int = 5

    parser = _Parser()
    parser.set_defaults(given=[])
    _add_fields(parser.add_argument_group("toy"), Settings, leave_out=["secret"])
    assert vars(parser.parse_args([])) == {"speed": None, "colour": "red", "loud": False, "seed": 3, "given": []}
    given = parser.parse_args(["--loud", "--speed", "2", "--seed", str(2**40)])
    assert (given.speed, given.loud, given.seed, given.given) == (2.0, True, 2**40, ["loud", "speed", "seed"])
    with pytest.raises(ValueError, match="argument --colour: invalid choice: 'green'"):
        parser.parse_args(["--colour", "green"])
    assert "in m/s, of which 100 % is light's (default: none)" in " ".join(parser.format_help().split())
    assert list(descriptions(Settings)) == ["speed", "colour", "loud", "seed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--segments", "runs/x"], "'runs/x': write DIR before options of several names"),
        (["evaluate", "--segments", "history", "runs/x"], "must be of history, popularity, users; given 'runs/x'"),
        (["train", "--out", "x", "--track", "wandb", "a.csv"], "'a.csv': write DATA before options of several names"),
    ],
)
def test_what_an_option_of_several_names_takes_for_one_belongs_before_it(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_parser().parse_args(words)
    assert make_parser().parse_args(["evaluate", "runs/x", "--segments"]).segments == []
