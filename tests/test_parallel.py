"""Several processes train the model that one trains; checkpoints, evaluation, the command line under torchrun."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from processes import together
from recsys_data import make_model, make_split, write_events
from ttt4rec import cli
from ttt4rec.recsys import parallel
from ttt4rec.recsys.evaluate import evaluate
from ttt4rec.recsys.train import CHECKPOINT_FILE, METRICS_FILE, TrainOptions, fit
from ttt4rec.recsys.windows import evaluation_prefixes

OPTIONS = TrainOptions(epochs=2, targets_per_batch=64, learning_rate=1e-2)


def train(split, folder, options=OPTIONS, dropout=0.0, **config):
    """Losses, validation metrics and weights of a run in float64."""
    model = make_model(split, dropout=dropout, **config).double()
    reports = fit(model, split, folder, options)
    weights = {name: x.tolist() for name, x in model.state_dict().items()}
    return [report.loss for report in reports], [report.metrics for report in reports], weights


def bound(split, options=OPTIONS):
    """What the order of summing may change: one rounding of 2^-53 for every target in every step."""
    targets = split.num_targets("train")
    return 2**-53 * targets * options.epochs * (targets // options.targets_per_batch + 1)


def assert_same_run(given, expected, limit):
    for losses, metrics, weights in given:
        assert losses == pytest.approx(expected[0], rel=limit)
        assert metrics == [pytest.approx(epoch, rel=limit) for epoch in expected[1]]
        assert weights.keys() == expected[2].keys()
        for name, x in weights.items():
            assert torch.tensor(x).flatten().tolist() == pytest.approx(
                torch.tensor(expected[2][name]).flatten().tolist(), rel=0, abs=limit * 100
            ), name  # Adam divides by the root of squares, of which the smallest here are a hundredth


@pytest.mark.parametrize(
    ("world_size", "change", "config"),
    [(2, {}, {}), (3, {"accumulate": 2}, {"mixer": "gru"}), (2, {"targets_per_batch": 1}, {"mixer": "attention"})],
    ids=["two", "three accumulating", "a process without a window"],
)
def test_several_processes_give_the_run_of_one(tmp_path, world_size, change, config):
    split = make_split(tmp_path, users=60 if world_size == 2 and not config else 8)
    options = dataclasses.replace(OPTIONS, **change)
    one = train(split, tmp_path / "one", options, **config)
    several = together(world_size, lambda: train(split, tmp_path / "several", options, **config))
    assert_same_run(several, one, bound(split, options))
    assert several[1:] == several[:-1]
    csv = [(tmp_path / name / METRICS_FILE).read_text().count("\n") for name in ("one", "several")]
    assert csv[0] == csv[1] == 3


def test_a_checkpoint_goes_on_with_another_number_of_processes(tmp_path):
    split = make_split(tmp_path, users=20)
    options = dataclasses.replace(OPTIONS, epochs=3)
    whole = train(split, tmp_path / "whole", options)
    together(2, lambda: train(split, tmp_path / "parts", dataclasses.replace(options, epochs=1)))
    together(3, lambda: train(split, tmp_path / "parts", dataclasses.replace(options, epochs=2)))
    assert (tmp_path / "parts" / CHECKPOINT_FILE).is_file()
    assert_same_run([train(split, tmp_path / "parts", options)], whole, bound(split, options))


def test_resumed_by_as_many_processes_equals_uninterrupted_with_dropout(tmp_path):
    split = make_split(tmp_path, users=20)
    whole = together(2, lambda: train(split, tmp_path / "whole", dropout=0.3))
    together(2, lambda: train(split, tmp_path / "parts", dataclasses.replace(OPTIONS, epochs=1), dropout=0.3))
    assert together(2, lambda: train(split, tmp_path / "parts", dropout=0.3)) == whole


def test_processes_draw_their_own_dropout(tmp_path):
    split = make_split(tmp_path, users=8)

    def run():
        drawn = []
        options = dataclasses.replace(OPTIONS, epochs=1)
        fit(make_model(split), split, tmp_path / "run", options, report=lambda _: drawn.append(torch.rand(4).tolist()))
        return drawn[0]

    first, second = together(2, run)
    assert not set(first) & set(second)


@pytest.mark.parametrize("loss", ["sampled", "gbce", "bpr"])
def test_losses_over_negatives_learn(tmp_path, loss):
    split = make_split(tmp_path, users=20)
    options = dataclasses.replace(OPTIONS, epochs=4, patience=4, loss=loss, num_negatives=8, popularity=0.5)
    losses, _, _ = together(2, lambda: train(split, tmp_path / "run", options, mixer="gru"))[0]
    assert losses[-1] < losses[0]


def test_the_item_table_and_its_scores_are_split(tmp_path):
    split = make_split(tmp_path, users=8)
    whole = make_model(split).double()
    ids, targets = torch.tensor([[3, 1, 4], [1, 5, 9]]), torch.tensor([2, 6, 5])

    def run():
        model = make_model(split, seed=parallel.rank()).double()  # the first one's weights are everybody's
        parallel.distribute(model)
        items = model.embedding
        own = ids[: 2 - parallel.rank()]  # unequal numbers
        with parallel.scoring():
            h = items(own)[:, 0]
            losses = model.nll(h, targets[: len(h)])
            losses.sum().backward()
        rows = (items.weight.to_local().shape[0], items.weight.grad.to_local().shape[0])
        gradient = parallel.whole(items.weight.grad)
        parallel.collect(model)
        return rows, losses.tolist(), gradient.tolist(), model.embedding.weight.tolist()

    results = together(2, run)
    assert [rows for rows, *_ in results] == [(13, 13), (12, 12)]
    expected = whole.nll(whole.embedding(ids)[:, 0], targets[:2])
    again = whole.nll(whole.embedding(ids[:1])[:, 0], targets[:1])
    (expected.sum() + again.sum()).backward()
    for (_, losses, gradient, table), one in zip(results, (expected, again), strict=True):
        torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), one)
        torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), whole.embedding.weight.grad)
        assert table == whole.embedding.weight.tolist()
        assert gradient[0] == [0.0] * 16  # padding


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_a_shared_evaluation_is_that_of_one(tmp_path, exclude_seen):
    split = make_split(tmp_path, users=9)
    model = make_model(split).double()
    windows = evaluation_prefixes(split, "test", max_len=8)
    one = evaluate(model, windows, exclude_seen=exclude_seen)
    for metrics in together(2, lambda: evaluate(model, windows, exclude_seen=exclude_seen, shared=True)):
        assert metrics == pytest.approx(one, rel=1e-12)


def test_clipping_is_torchs(tmp_path):
    split = make_split(tmp_path, users=8)
    grads = []
    for clip in (parallel.clip_gradients, lambda model, norm: torch.nn.utils.clip_grad_norm_(model.parameters(), norm)):
        model = make_model(split)
        model.nll(model(torch.tensor([[1, 2, 3]]))[0], torch.tensor([4, 5, 6])).sum().backward()
        clip(model, 0.1)
        grads.append([p.grad for p in model.parameters()])
    for given, expected in zip(*grads, strict=True):
        torch.testing.assert_close(given, expected)
    assert sum(float(g.square().sum()) for g in grads[0]) == pytest.approx(0.01)


def test_the_command_line_under_torchrun(tmp_path, capsys):
    write_events(tmp_path / "ring.inter", users=20)
    options = ["--epochs", "1", "--width", "16", "--max-len", "8", "--dropout", "0", "--targets-per-batch", "64"]
    command = ["train", str(tmp_path / "ring.inter"), *options, "--threads", "1", "--out"]
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = [*launcher, "ttt4rec.cli", *command, str(tmp_path / "two")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for printed in (capsys.readouterr().out, done.stdout):
        assert printed.count("epoch   0") == printed.count("model in") == 1
    results = [json.loads((tmp_path / name / "run.json").read_text())["test"] for name in ("one", "two")]
    assert results[1] == pytest.approx(results[0], abs=1 / 100)  # of 300 targets; float32 may swap close scores
