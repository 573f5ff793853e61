"""Presets: what they are made of, small data, and the command line."""

import dataclasses
import json
import math

import pytest
import torch

from tests.project.test_readme import python_blocks
from tests.support.recsys_data import SMALL, make_split, write_events
from tools.documents import ROOT
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.cli import main, make_parser
from ttt4rec.models.presets import PRESETS
from ttt4rec.recsys import TrainOptions, build_histories, fit, read_interactions, split_leave_one_out
from ttt4rec.recsys.commands.training import _take_preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_model_and_its_training(name):
    config, options = TTT4RecConfig.from_preset(name, 9), TrainOptions.from_preset(name)
    assert PRESETS[name].model.items() <= dataclasses.asdict(config).items()
    assert PRESETS[name].training.items() <= dataclasses.asdict(options).items()
    assert (config.num_items, options.targets_per_batch) == (9, 2048)
    changed = TTT4RecConfig.from_preset(name, 9, mixer="gru"), TrainOptions.from_preset(name, epochs=7)
    assert changed == (dataclasses.replace(config, mixer="gru"), dataclasses.replace(options, epochs=7))


def test_the_papers_preset_is_the_default():
    assert TTT4RecConfig.from_preset("paper", 9) == TTT4RecConfig(9)
    assert TrainOptions.from_preset("paper", 1000) == TrainOptions()


def test_small_data_get_smaller_steps():
    def steps(num_targets, **given):
        options = TrainOptions.from_preset("best", num_targets, **given)
        return options.targets_per_batch, pytest.approx(options.learning_rate)

    assert steps(980_000) == (2048, 3e-3)
    assert steps(51_200) == (512, 1.5e-3)
    assert steps(100) == (128, 0.75e-3)
    assert steps(51_200, targets_per_batch=2048) == (2048, 3e-3)
    assert steps(51_200, targets_per_batch=8192) == (8192, 3e-3)
    assert steps(51_200, learning_rate=0.01) == (512, 0.01)


def test_an_unknown_preset_is_refused():
    for make in (TTT4RecConfig.from_preset, TrainOptions.from_preset):
        with pytest.raises(ValueError, match="preset must be one of best, paper, fast; given 'quick'"):
            make("quick", 9)
    with pytest.raises(ValueError, match="dropout must be"):
        TTT4RecConfig.from_preset("best", 9, dropout=2)


def test_the_page_tells_what_the_presets_are():
    page = (ROOT / "docs" / "presets.md").read_text()
    for line, source in python_blocks(page):
        exec(compile("\n" * line + source, "presets.md", "exec"), {})
    table = page.partition("## The search")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table if line[:1] == "|"]
    told = {
        name: dict(zip((row[0] for row in rows[1:]), column, strict=True)) for name, *column in zip(*rows, strict=True)
    }
    assert list(told)[1:] == [f"`{name}`" for name in PRESETS]
    for name, preset in PRESETS.items():
        config, options = TTT4RecConfig.from_preset(name, 9), TrainOptions.from_preset(name)
        warmup, reach = options.learning_rate_warmup, options.average_over
        expected = {
            "inner model": {"mlp": "TTT-MLP", "linear": "TTT-Linear"}[config.inner],
            "backbone": config.backbone.capitalize(),
            "width, blocks, heads, mini-batch":
                f"{config.width}, {config.num_blocks}, {config.num_heads}, {config.mini_batch_size}",
            "items of history": f"{config.max_len}",
            "dropout": f"{config.dropout}",
            "loss": "softmax over all" if options.loss == "softmax" else f"softmax over {options.num_negatives}",
            "learning rate": f"{preset.training['learning_rate']}",
            "its warm-up": f"{warmup} steps" if warmup else "none",
            "weights": f"averaged over the newest {reach:.0%}" if reach else "as they are",
            "targets in a step": "2,048, less" if preset.smaller_steps else "2,048",
            "weight decay, forgetting": "none" if not options.weight_decay and config.forget == "none" else "some",
            "epochs, patience": f"{options.epochs}, {options.patience}",
            "users kept": "of 5 or more; 20" if preset.as_published else "of 5 or more",
        }  # fmt: skip
        assert {row: told[f"`{name}`"][row][: len(text)] for row, text in expected.items()} == expected
        assert len(expected) == len(rows) - 2


@pytest.mark.parametrize("name", ["best", "fast"])
def test_three_epochs_of_small_data_learn(tmp_path, name):
    """400 users on a ring of 24 items, 6,351 targets: four of the paper's steps in an epoch, which teach little."""
    split = split_leave_one_out(build_histories(read_interactions(write_events(tmp_path / "ring.inter", users=400))))

    def losses(preset):
        torch.manual_seed(0)
        model = TTT4Rec(TTT4RecConfig.from_preset(preset, split.histories.num_items))
        options = TrainOptions.from_preset(preset, split.num_targets("train"), epochs=3)
        return [report.loss for report in fit(model, split, tmp_path / preset, options)]

    found = losses(name)
    assert found[0] > found[1] > found[2]
    assert found[2] < math.log(24) / 2  # of the loss before anything is learned; the best possible is 0.33
    assert losses("paper")[2] > 0.8 * math.log(24)


def test_the_learning_rate_warms_up(tmp_path):
    split = make_split(tmp_path)
    model, sizes = small_model(split), []
    weight = model.blocks[0].mixer.query.weight
    before = weight.detach().clone()

    def step_size(*_):
        nonlocal before
        sizes.append(float((weight.detach() - before).abs().max()))
        before = weight.detach().clone()

    model.blocks[0].register_forward_pre_hook(lambda *_: step_size() if model.training else None)
    options = TrainOptions(epochs=1, targets_per_batch=32, learning_rate=1e-3, learning_rate_warmup=4)
    fit(model, split, tmp_path / "run", options)
    assert sizes[0] == 0
    # Adam's first step is its rate, and no later one of so few is larger than about that
    assert sizes[1] == pytest.approx(1e-3 / 4, rel=0.02)
    assert sizes[2] <= 1.1 * 1e-3 / 2
    assert max(sizes[4:]) > 1e-3 / 2


def small_model(split):
    torch.manual_seed(0)
    return TTT4Rec(TTT4RecConfig(split.histories.num_items, 16, 1, 2, ffn_width=32, max_len=8, dropout=0.0))


def test_weights_of_linear_maps_and_items_decay(tmp_path):
    split = make_split(tmp_path)
    ends = []
    for decay in (0.0, 0.5):
        model = small_model(split)
        # so small a rate that the loss moves nothing, and so large a decay that it does
        options = TrainOptions(epochs=1, targets_per_batch=10**6, learning_rate=1e-6, weight_decay=decay * 1e6)
        fit(model, split, tmp_path / str(decay), options)
        ends.append(dict(model.named_parameters()))
    for name, kept in ends[0].items():
        linear = name.endswith((".query.weight", ".key.weight", ".value.weight", ".output.weight", "embedding.weight"))
        share = 0.5 if linear or ".ffn." in name else 1
        torch.testing.assert_close(ends[1][name], share * kept, rtol=0, atol=3e-6, msg=name)


def test_a_run_that_warms_up_goes_on_after_an_interruption(tmp_path):
    split = make_split(tmp_path)
    options = TrainOptions(epochs=2, targets_per_batch=64, learning_rate_warmup=40, weight_decay=0.1)
    whole = fit(small_model(split), split, tmp_path / "whole", options)
    fit(small_model(split), split, tmp_path / "parts", dataclasses.replace(options, epochs=1))
    parts = fit(small_model(split), split, tmp_path / "parts", options)
    assert [report.loss for report in parts] == [report.loss for report in whole]


def test_a_preset_on_the_command_line(tmp_path, capsys):
    data = write_events(tmp_path / "ring.inter")
    given = ["--preset", "fast", "--epochs", "1", "--dropout", "0.4", "--width", "16", "--num-heads", "2"]
    assert main(["train", str(data), "--out", str(tmp_path / "run"), *given]) == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    expected = {"preset": "fast", "inner": "linear", "loss": "sampled", "patience": 2, "targets_per_batch": 128}
    expected |= {"epochs": 1, "dropout": 0.4, "width": 16, "learning_rate": pytest.approx(0.75e-3)}
    assert {name: settings[name] for name in expected} == expected
    assert "error" not in capsys.readouterr().err
    assert main(["train", str(data), "--out", str(tmp_path / "more"), "--preset", "best", "--epochs", "1",
                 "--warm-start", str(tmp_path / "run")]) == 0  # fmt: skip
    settings = json.loads((tmp_path / "more" / "run.json").read_text())["settings"]
    assert (settings["inner"], settings["width"], settings["loss"]) == ("linear", 16, "softmax")
    assert main(["train", str(data), "--out", str(tmp_path / "x"), "--preset", "slow", *SMALL]) == 2
    assert "invalid choice: 'slow'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "advised"),
    [
        ([], True),
        (["--targets-per-batch", "2048"], False),
        (["--preset", "paper"], False),
        (["--preset", "best"], False),
    ],
    ids=str,
)
def test_few_steps_in_an_epoch_are_pointed_out(tmp_path, capsys, given, advised):
    data = write_events(tmp_path / "ring.inter")
    assert main(["train", str(data), "--out", str(tmp_path / "run"), "--epochs", "1", *given]) == 0
    said = "an epoch has about 1 step: --preset best or --targets-per-batch N makes smaller ones"
    assert (said in capsys.readouterr().err) == advised


@pytest.mark.parametrize(("given", "expected"), [([], (20, 100)), (["--min-user", "7", "--max-len", "30"], (7, 30))])
def test_the_papers_preset_has_the_papers_filter_on_its_data(given, expected):
    args = make_parser().parse_args(["train", "gowalla", "--out", "x", "--preset", "paper", *given])
    _take_preset(args)
    assert (args.min_user, args.max_len) == expected
    args = make_parser().parse_args(["train", "gowalla", "--out", "x", "--preset", "best"])
    _take_preset(args)
    assert (args.min_user, args.max_len) == (5, 200)
