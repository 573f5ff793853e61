"""Training: it learns, repeats itself, and survives being stopped."""

import csv
import dataclasses

import numpy as np
import pytest
import torch

from tests.support.recsys_data import NUM_ITEMS, make_model, make_split
from ttt4rec import TTT4Rec
from ttt4rec.recsys.data import build_histories, read_interactions
from ttt4rec.recsys.data.split import split_by_ratio
from ttt4rec.recsys.data.windows import training_windows
from ttt4rec.recsys.training import progress, train
from ttt4rec.recsys.training.checkpoint import load_checkpoint, save_checkpoint
from ttt4rec.recsys.training.train import CHECKPOINT_FILE, METRICS_FILE, EpochReport, TrainOptions, fit

OPTIONS = TrainOptions(epochs=4, targets_per_batch=64, learning_rate=1e-2)


def without_seconds(reports):
    return [(r.epoch, r.loss, r.metrics) for r in reports]


@pytest.mark.parametrize("mixer", ["ttt", "attention", "gru"])
def test_it_learns_the_pattern(tmp_path, mixer):
    split = make_split(tmp_path)
    options = TrainOptions(epochs=25, targets_per_batch=64, learning_rate=1e-2)
    reports = fit(make_model(split, mixer=mixer), split, tmp_path / "run", options)
    best = max(report.metrics["NDCG@10"] for report in reports)
    assert reports[0].loss > 2.5  # log 24 = 3.2 before the first step
    assert best > 0.9  # 0.19 by chance, 0.96 with the pattern known


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    split = make_split(tmp_path)
    models = [make_model(split) for _ in range(2)]
    runs = [fit(model, split, tmp_path / str(i), OPTIONS) for i, model in enumerate(models)]
    assert without_seconds(runs[0]) == without_seconds(runs[1])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_seed_reaches_the_order_of_the_windows_and_dropout(tmp_path, dropout):
    split = make_split(tmp_path, users=1 if dropout else 60)  # a single window has no order
    seen = []
    for seed in (0, 1):
        model = make_model(split, dropout=dropout).double()
        options = dataclasses.replace(OPTIONS, epochs=1, seed=seed)
        seen.append(fit(model, split, tmp_path / str(seed), options)[0].loss)
    assert abs(seen[0] - seen[1]) > 1e-6  # another order of one sum is a millionth of that


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    split = make_split(tmp_path)
    whole_model = make_model(split)
    whole = fit(whole_model, split, tmp_path / "whole", OPTIONS)

    def stop(report):
        if report.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_model(split), split, tmp_path / "parts", OPTIONS, report=stop)
    model = make_model(split)
    resumed = fit(model, split, tmp_path / "parts", OPTIONS)
    assert without_seconds(resumed) == without_seconds(whole)
    for name, x in whole_model.state_dict().items():
        assert torch.equal(x, model.state_dict()[name]), name


def test_a_finished_run_is_not_trained_again(tmp_path):
    split = make_split(tmp_path)
    first = fit(make_model(split), split, tmp_path / "run", OPTIONS)
    seen = []
    again = fit(make_model(split), split, tmp_path / "run", OPTIONS, report=seen.append)
    assert seen == []
    assert without_seconds(again) == without_seconds(first)


def test_early_stopping_leaves_the_best_weights(tmp_path):
    split = make_split(tmp_path)
    options = TrainOptions(epochs=40, patience=2, targets_per_batch=64, learning_rate=0.2)
    reports = fit(make_model(split), split, tmp_path / "run", options)
    scores = [report.metrics["NDCG@10"] for report in reports]
    best = scores.index(max(scores))
    assert len(reports) == best + 3 < 40


def test_metrics_file(tmp_path):
    split = make_split(tmp_path)
    reports = fit(make_model(split), split, tmp_path / "run", OPTIONS)
    with (tmp_path / "run" / METRICS_FILE).open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [report.loss for report in reports]
    assert float(rows[2]["valid_NDCG@10"]) == reports[2].metrics["NDCG@10"]
    assert {"epoch", "train_seconds", "valid_HR@50"} <= rows[0].keys()


def test_more_patience_goes_on(tmp_path):
    split = make_split(tmp_path)
    options = dataclasses.replace(OPTIONS, epochs=40, patience=2, learning_rate=0.2)
    fewer = fit(make_model(split), split, tmp_path / "run", options)
    more = fit(make_model(split), split, tmp_path / "run", dataclasses.replace(options, patience=3))
    assert len(more) > len(fewer)
    assert without_seconds(more[: len(fewer)]) == without_seconds(fewer)


def test_another_runs_checkpoint_is_refused(tmp_path):
    split = make_split(tmp_path)
    fit(make_model(split), split, tmp_path / "run", OPTIONS)
    before = (tmp_path / "run" / CHECKPOINT_FILE).read_bytes()
    other = TrainOptions(epochs=4, targets_per_batch=32)
    with pytest.raises(ValueError, match=r"another's: learning_rate was .* and is .*; targets_per_batch was 64 and"):
        fit(make_model(split), split, tmp_path / "run", other)
    with pytest.raises(ValueError, match="another's: width was 16 and is 32; choose another folder, or delete"):
        fit(make_model(split, width=32), split, tmp_path / "run", OPTIONS)
    with pytest.raises(ValueError, match="another's: max_len was 8 and is 9; choose another folder, or delete"):
        fit(make_model(split, max_len=9), split, tmp_path / "run", OPTIONS)
    with pytest.raises(ValueError, match="another's: the model's initial weights differ: make it after"):
        fit(make_model(split, seed=9), split, tmp_path / "run", OPTIONS)
    fewer = split_by_ratio(split.histories, (4, 2, 4))
    with pytest.raises(ValueError, match="another's: it has other data, or another filter or split of them; choose"):
        fit(make_model(split), fewer, tmp_path / "run", OPTIONS)
    later = dataclasses.replace(split, valid_end=split.valid_end + (np.diff(split.histories.offsets) > split.valid_end))
    with pytest.raises(ValueError, match="another's: it has other validation data, or another split"):
        fit(make_model(split), later, tmp_path / "run", OPTIONS)
    assert (tmp_path / "run" / CHECKPOINT_FILE).read_bytes() == before


def test_a_run_of_an_earlier_version_goes_on_without_the_options_of_later_ones(tmp_path):
    split, path = make_split(tmp_path, users=20), tmp_path / "run" / CHECKPOINT_FILE
    first = fit(make_model(split), split, path.parent, dataclasses.replace(OPTIONS, epochs=1))
    tensors, progress = load_checkpoint(path)
    del progress["run"]["options"]["average_over"], progress["run"]["config"]["forget"]
    save_checkpoint(path, tensors, progress)
    both = fit(make_model(split), split, path.parent, dataclasses.replace(OPTIONS, epochs=2))
    assert without_seconds(both)[:1] == without_seconds(first)
    save_checkpoint(path, tensors, progress)
    with pytest.raises(ValueError, match=r"average_over was 0\.0 and is 0\.5"):
        fit(make_model(split), split, path.parent, dataclasses.replace(OPTIONS, average_over=0.5))


def test_a_model_that_was_trained_goes_on_with_its_own_run(tmp_path):
    split = make_split(tmp_path)
    whole = fit(make_model(split), split, tmp_path / "whole", OPTIONS)
    model = make_model(split)
    fit(model, split, tmp_path / "run", dataclasses.replace(OPTIONS, epochs=OPTIONS.epochs - 1))
    for _ in range(2):  # the second time there is nothing left to do
        reports = fit(model, split, tmp_path / "run", OPTIONS)
    assert [r.loss for r in reports] == [r.loss for r in whole]


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_checkpoint_is_a_clear_error(tmp_path, content):
    split = make_split(tmp_path)
    fit(make_model(split), split, tmp_path / "run", TrainOptions(epochs=1))
    path = tmp_path / "run" / CHECKPOINT_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match="is damaged"):
        fit(make_model(split), split, tmp_path / "run", TrainOptions(epochs=1))


def test_a_saved_model_is_no_checkpoint(tmp_path):
    split = make_split(tmp_path)
    model = make_model(split)
    model.save(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").rename(tmp_path / "run" / CHECKPOINT_FILE)
    with pytest.raises(ValueError, match="not a training checkpoint"):
        fit(model, split, tmp_path / "run", OPTIONS)


def test_divergence_is_named(tmp_path):
    split = make_split(tmp_path)
    model = make_model(split)
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="training diverged"):
        fit(model, split, tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run" / CHECKPOINT_FILE).exists()


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    split = make_split(tmp_path)
    model = make_model(split)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(model, split, tmp_path / "run", OPTIONS)
    assert torch.equal(torch.rand(3), expected)


def test_inner_rates_warm_up(tmp_path):
    split = make_split(tmp_path)
    model = make_model(split)
    scales = []
    model.blocks[0].mixer.register_forward_pre_hook(lambda layer, _: scales.append(float(layer.inner_lr_scale)))
    fit(model, split, tmp_path / "run", TrainOptions(epochs=2, targets_per_batch=64, inner_lr_warmup=3))
    assert scales[:3] == pytest.approx([0, 1 / 3, 2 / 3])
    assert scales[-1] == 1
    scales.clear()
    fit(model, split, tmp_path / "long", TrainOptions(epochs=1, targets_per_batch=64, inner_lr_warmup=1000))
    assert scales[-1] == 1  # in validation, though the training has not come there yet
    assert float(model.blocks[0].mixer.inner_lr_scale) == 1


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"patience": 0}, {"targets_per_batch": 0}, {"inner_lr_warmup": -1}, {"learning_rate": 0.0},
     {"clip_norm": float("inf")}, {"loss": "hinge"}, {"num_negatives": 0}, {"popularity": -1.0}, {"calibration": 1.5},
     {"accumulate": 0}, {"epochs": 1.5}, {"patience": "5"}, {"targets_per_batch": True}, {"learning_rate": "fast"},
     {"clip_norm": float("nan")}, {"popularity": None}, {"calibration": "high"}, {"seed": -1}, {"seed": None},
     {"autocast": "no"}, {"targets_per_batch": 10**20}, {"average_over": 1.5}, {"average_over": "all"}],
    ids=str,
)  # fmt: skip
def test_wrong_options(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} must .* given '?{value}"):
        TrainOptions(**change)


def test_report_row():
    row = EpochReport(3, 1.5, 2.0, 0.5, {"NDCG@10": 0.25}).row()
    assert row == {"epoch": 3, "loss": 1.5, "valid_NDCG@10": 0.25, "train_seconds": 2.0, "valid_seconds": 0.5}


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    split = make_split(tmp_path)
    fit(make_model(split), split, tmp_path / "run", OPTIONS)
    histories = dataclasses.replace(split.histories, items=split.histories.items[::-1].copy())
    for other in (
        dataclasses.replace(split, histories=histories),
        split_by_ratio(split.histories, (2, 3, 5)),
        split_by_ratio(split.histories, (3, 1, 6)),
    ):
        with pytest.raises(ValueError, match="other data"):
            fit(make_model(split), other, tmp_path / "run", OPTIONS)


@pytest.mark.parametrize("pieces", [3, 1000])
def test_accumulated_gradients_are_those_of_one_piece(tmp_path, pieces):
    split = make_split(tmp_path)
    losses = []
    for name, accumulate in (("one", 1), ("many", pieces)):
        model = make_model(split, dropout=0.0).double()
        reports = fit(model, split, tmp_path / name, dataclasses.replace(OPTIONS, accumulate=accumulate))
        losses.append([report.loss for report in reports])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("loss", ["softmax", "sampled"])
def test_training_under_autocast(tmp_path, loss):
    split = make_split(tmp_path)
    seen = []
    model = make_model(split)
    model.blocks[0].ffn.register_forward_hook(lambda module, args, y: seen.append(y.dtype) if model.training else None)
    options = dataclasses.replace(OPTIONS, epochs=8, patience=8, autocast=True, loss=loss, num_negatives=16)
    reports = fit(model, split, tmp_path / "run", options)
    assert set(seen) == {torch.bfloat16}
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    assert reports[-1].loss < reports[0].loss - 0.5
    plain = fit(make_model(split), split, tmp_path / "plain", dataclasses.replace(options, autocast=False))
    assert [report.loss for report in reports] != [report.loss for report in plain]
    assert reports[0].loss == pytest.approx(plain[0].loss, rel=2**-6)  # bfloat16 keeps 8 bits


def test_deterministic_mode_is_on_in_training_only(tmp_path):
    split = make_split(tmp_path)
    model, seen = make_model(split), []
    model.norm.register_forward_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    for enabled in (True, False):
        options = dataclasses.replace(OPTIONS, epochs=1, deterministic=enabled)
        fit(model, split, tmp_path / str(enabled), options)
        assert set(seen) == {enabled}
        assert not torch.are_deterministic_algorithms_enabled()
        seen.clear()


def test_denormals_are_flushed_while_training_only(tmp_path):
    split, small = make_split(tmp_path), torch.full((1,), 1e-30)
    seen = []
    fit(make_model(split), split, tmp_path, TrainOptions(epochs=1), report=lambda _: seen.append(small * 1e-10))
    assert seen[0] == 0
    assert small * 1e-10 > 0


def test_two_runs_do_not_share_a_folder(tmp_path):
    split = make_split(tmp_path)
    left = tmp_path / f"{CHECKPOINT_FILE}.0123456789abcdef.part"
    left.touch()

    def intrude(report):
        with pytest.raises(ValueError, match="another run is using"):
            fit(make_model(split), split, tmp_path, OPTIONS)

    fit(make_model(split), split, tmp_path, TrainOptions(epochs=1), report=intrude)
    assert not left.exists()
    assert len(fit(make_model(split), split, tmp_path, TrainOptions(epochs=2))) == 2


@pytest.mark.parametrize("part", ["weights", "progress"])
def test_a_flipped_bit_is_a_clear_error(tmp_path, part):
    split = make_split(tmp_path)
    fit(make_model(split), split, tmp_path, TrainOptions(epochs=1))
    content = bytearray((tmp_path / CHECKPOINT_FILE).read_bytes())
    place = -1 if part == "weights" else content.index(b"train_seconds") + 5
    content[place] ^= 1
    (tmp_path / CHECKPOINT_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its checksum"):
        fit(make_model(split), split, tmp_path, TrainOptions(epochs=1))


@pytest.mark.parametrize("lost", ["reports", "metrics", "steps", "best.norm.weight"])
def test_an_incomplete_checkpoint_is_damaged(tmp_path, lost):
    split, path = make_split(tmp_path), tmp_path / CHECKPOINT_FILE
    fit(make_model(split), split, tmp_path, TrainOptions(epochs=1))
    tensors, progress = load_checkpoint(path)
    tensors.pop(lost, None)
    without = [report | {"metrics": {}} for report in progress["reports"]]
    instead = {"reports": {"reports": []}, "metrics": {"reports": without}, "steps": {"steps": "many"}}
    save_checkpoint(path, tensors, progress | instead.get(lost, {}))
    with pytest.raises(ValueError, match="is damaged"):
        fit(make_model(split), split, tmp_path, TrainOptions(epochs=1))


def test_what_cannot_be_trained_is_known_at_once(tmp_path):
    split = make_split(tmp_path)
    small = TTT4Rec(dataclasses.replace(make_model(split).config, num_items=NUM_ITEMS - 1))
    with pytest.raises(ValueError, match="must know at least the data's 24 items; given 23"):
        fit(small, split, tmp_path / "run")
    for change, part in (({"train_end": split.train_end * 0}, "train"), ({"valid_end": split.train_end}, "valid")):
        with pytest.raises(ValueError, match=f"no {part} targets"):
            fit(make_model(split), dataclasses.replace(split, **change), tmp_path / "run")
    walk = [f"u{user},i{t % 2},{t}" for user in range(3) for t in range(20)]
    (tmp_path / "two.csv").write_text("\n".join(["user_id,item_id,timestamp", *walk]))
    repeats = split_by_ratio(build_histories(read_interactions(tmp_path / "two.csv")))
    with pytest.raises(ValueError, match="validation targets must be new to their users for exclude_seen"):
        fit(make_model(repeats), repeats, tmp_path / "run", TrainOptions(exclude_seen=True))
    assert not (tmp_path / "run").exists()


def test_the_best_weights_are_kept_and_validated_as_asked(tmp_path, monkeypatch):
    split, seen, asked = make_split(tmp_path), [], []

    def scored(model, windows, *, exclude_seen, **_):
        assert windows.num_targets == split.num_targets("valid")
        assert torch.equal(windows.starts, training_windows(split, max_len=8, part="valid").starts)
        asked.append(exclude_seen)
        seen.append(model.norm.weight.detach().clone())
        return {"NDCG@10": [0.1, 0.9, 0.2, 0.3][len(seen) - 1]}

    def stop(report):
        if report.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "evaluate", scored)
    options = dataclasses.replace(OPTIONS, epochs=4, exclude_seen=True)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(split), split, tmp_path, options, report=stop)
    model = make_model(split)
    fit(model, split, tmp_path, options)
    assert asked == [True] * 4
    assert [torch.equal(model.norm.weight, x) for x in seen] == [False, True, False, False]


@pytest.mark.parametrize("change", [{"popularity": 2.0}, {"calibration": 0.0}, {"clip_norm": 1e-9}], ids=str)
def test_options_reach_the_training(tmp_path, change):
    split = make_split(tmp_path)
    options = TrainOptions(epochs=2, targets_per_batch=64, loss="gbce", num_negatives=8)
    losses = [
        fit(make_model(split), split, tmp_path / str(i), given)[1].loss
        for i, given in enumerate((options, dataclasses.replace(options, **change)))
    ]
    assert losses[0] != losses[1]


def test_a_silent_bar_is_none_of_tqdms(monkeypatch):
    """Its lock, when another thread holds it in the moment of a fork, would stop the new process for ever."""
    monkeypatch.setattr(progress, "tqdm", None)
    with progress.progress_bar(total=3, unit="step", desc="epoch", enabled=False) as bar:
        bar.update()
        bar.update(2)
