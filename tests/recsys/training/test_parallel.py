"""Several processes train the model that one trains; checkpoints, evaluation, the command line under torchrun."""

import dataclasses
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import together
from tests.support.recsys_data import make_model, make_split, write_events
from ttt4rec import TTT4Rec, TTT4RecConfig, cli
from ttt4rec.atomic_files import locked
from ttt4rec.models.losses import Loss
from ttt4rec.recsys.data.windows import evaluation_prefixes, training_windows
from ttt4rec.recsys.training import parallel
from ttt4rec.recsys.training.callbacks import Callback
from ttt4rec.recsys.training.evaluate import evaluate
from ttt4rec.recsys.training.train import CHECKPOINT_FILE, METRICS_FILE, TrainOptions, fit

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
    [
        pytest.param(2, {}, {}, id="two", marks=pytest.mark.slow),
        pytest.param(2, {"clip_norm": 0.01, "inner_lr_warmup": 3, "average_over": 0.1}, {}, id="all at once"),
        pytest.param(3, {"accumulate": 2}, {"mixer": "gru"}, id="three accumulating", marks=pytest.mark.slow),
        pytest.param(2, {"targets_per_batch": 1}, {"mixer": "attention"}, id="a process without a window"),
    ],
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
    split, options = make_split(tmp_path, users=20), dataclasses.replace(OPTIONS, average_over=0.5)
    whole = together(2, lambda: train(split, tmp_path / "whole", options, dropout=0.3))
    together(2, lambda: train(split, tmp_path / "parts", dataclasses.replace(options, epochs=1), dropout=0.3))
    assert together(2, lambda: train(split, tmp_path / "parts", options, dropout=0.3)) == whole


def test_processes_draw_their_own_dropout(tmp_path):
    split = make_split(tmp_path, users=8)

    def run():
        drawn = []
        options = dataclasses.replace(OPTIONS, epochs=1)
        fit(make_model(split), split, tmp_path / "run", options, report=lambda _: drawn.append(torch.rand(4).tolist()))
        return drawn[0]

    first, second = together(2, run)
    assert not set(first) & set(second)


class FixedNegatives(Loss):
    def draw(self):
        return torch.arange(3, 11)


@pytest.mark.parametrize("name", ["sampled", "gbce", "bpr"])
def test_losses_over_negatives_and_their_gradients(tmp_path, name):
    split = make_split(tmp_path, users=8)
    windows = training_windows(split, max_len=8)
    loss = FixedNegatives(name, torch.full((24,), 1 / 24, dtype=torch.float64).log(), 8, 0.75)

    def gradients():
        model = make_model(split, dropout=0.0).double()
        parallel.distribute(model)
        ids, targets, cu_seqlens = windows.packed_batch(parallel.share(torch.arange(5))[0])
        value = loss(model, *model.predict(ids, targets, cu_seqlens))
        with parallel.scoring():
            value.backward()
        parallel.add_up_gradients(model)
        return float(parallel.add_up(value.detach())), [parallel.whole(p.grad).tolist() for p in model.parameters()]

    expected = gradients()
    for value, given in together(2, gradients):
        assert value == pytest.approx(expected[0], rel=1e-12)
        for x, y in zip(given, expected[1], strict=True):
            x, y = (torch.tensor(z, dtype=torch.float64) for z in (x, y))
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


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


def test_split_scores_are_not_rounded_by_autocast_and_unknown_items_are_refused(tmp_path):
    model = make_model(make_split(tmp_path, users=8))
    h, items = torch.randn(3, 16), torch.tensor([1, 5, 24])

    def run():
        parallel.distribute(model)
        with parallel.scoring(), torch.autocast("cpu", torch.bfloat16):
            losses = model.nll(h, items)
        with pytest.raises(ValueError, match="items must be from 1 to 24; given 1 to 25"):
            model.nll(h[:2], torch.tensor([1, 25]))
        with pytest.raises(ValueError, match="items must be from 1 to 24; given -1 to 3"):
            model.embedding(torch.tensor([[0, 3, -1]]))
        return losses.dtype, losses.tolist()

    for dtype in (torch.float32, torch.bfloat16):
        model.embedding.to(dtype)
        expected = model.nll(h, items).tolist()  # in float32, of a narrow table too
        assert together(2, run) == [(torch.float32, pytest.approx(expected, rel=1e-5))] * 2


@pytest.mark.slow
def test_only_the_first_process_needs_the_folder(tmp_path):
    split = make_split(tmp_path, users=20)

    def run(epochs):
        own = tmp_path / ("first" if parallel.rank() == 0 else "others")
        return train(split, own, dataclasses.replace(OPTIONS, epochs=epochs), dropout=0.3)

    whole = together(2, lambda: train(split, tmp_path / "whole", dropout=0.3))
    together(2, lambda: run(1))
    assert together(2, lambda: run(2)) == whole
    assert not (tmp_path / "others").exists()


@pytest.mark.parametrize("what", ["seed", "patience", "data", "no validation", "width", "dtype"])
def test_processes_that_differ_are_refused(tmp_path, what):
    split, other = (make_split(tmp_path, users) for users in (8, 9))

    def run():
        second = parallel.rank() == 1
        options = dataclasses.replace(OPTIONS, **({what: 7} if second and what in ("seed", "patience") else {}))
        model = make_model(split, width=32 if second and what == "width" else 16)
        model.to(torch.float64 if second and what == "dtype" else torch.float32)
        others = {"data": other, "no validation": dataclasses.replace(split, valid_end=split.train_end)}
        with pytest.raises(ValueError, match=r"must be given the same data, .* given others to 1 than to 0"):
            fit(model, others.get(what, split) if second else split, tmp_path / "run", options)
        return type(model.embedding).__name__

    assert together(2, run) == ["Embedding"] * 2


class Ends(Callback):
    def __init__(self):
        self.seen = []

    def on_epoch(self, report):
        self.seen.append(report.epoch)
        return True

    def on_end(self, reports, error):
        self.seen.append(len(reports))


@pytest.mark.slow
def test_the_first_of_several_processes_tells_callbacks_and_all_end_early(tmp_path):
    split = make_split(tmp_path, users=8)

    def run():
        follower = Ends()
        reports = fit(make_model(split), split, tmp_path / "run", OPTIONS, callbacks=[follower])
        return len(reports), follower.seen

    assert together(2, run) == [(1, [0, 1]), (1, [])]


@pytest.mark.slow
def test_after_an_error_the_model_can_be_trained(tmp_path):
    split = make_split(tmp_path, users=20)
    together(2, lambda: train(split, tmp_path / "run", dataclasses.replace(OPTIONS, seed=1)))
    whole = together(2, lambda: train(split, tmp_path / "whole"))

    def run():
        model = make_model(split, dropout=0.0).double()
        with pytest.raises(ValueError, match="given another's: "):
            fit(model, split, tmp_path / "run", OPTIONS)
        with locked(tmp_path / "used") if parallel.rank() == 0 else nullcontext():
            with pytest.raises(ValueError, match="another run is using"):
                fit(model, split, tmp_path / "used", OPTIONS)
            parallel.from_first(lambda: None)
        losses = [report.loss for report in fit(model, split, tmp_path / "new", OPTIONS)]
        with pytest.raises(ValueError, match="training diverged"):
            fit(model, split, tmp_path / "diverging", dataclasses.replace(OPTIONS, learning_rate=1e200))
        return losses, type(model.embedding).__name__

    (tmp_path / "used").mkdir()
    assert together(2, run) == [(losses, "Embedding") for losses, _, _ in whole]


@pytest.mark.slow
def test_what_goes_wrong_in_the_first_process_is_told_in_all_and_leaves_the_model_whole(tmp_path, monkeypatch):
    split = make_split(tmp_path, users=20)
    wholes = together(2, lambda: train(split, tmp_path / "whole"))

    def full(*_):
        raise OSError("cannot write: No space left on device")

    def run():
        model = make_model(split, dropout=0.0).double()
        with monkeypatch.context() as patch:
            patch.setattr("ttt4rec.recsys.training.train.save_checkpoint", full)
            with pytest.raises(OSError, match="No space left"):
                fit(model, split, tmp_path / "run", OPTIONS)
        with pytest.raises(RuntimeError, match="only here"):
            parallel.from_first(lambda: (_ for _ in ()).throw(RuntimeError("only here")))
        assert type(model.embedding).__name__ == "Embedding"
        return train(split, tmp_path / "run")

    assert together(2, run) == wholes


def test_after_an_error_of_the_callers_the_split_model_is_refused(tmp_path):
    split = make_split(tmp_path, users=20)

    def prune(report):
        raise ValueError("pruned")

    def run():
        model = make_model(split)
        with pytest.raises(ValueError, match="pruned"):
            fit(model, split, tmp_path / "run", OPTIONS, report=prune)
        with pytest.raises(ValueError, match=r"is split between processes.*call ttt4rec\.recsys\.parallel\.collect"):
            fit(model, split, tmp_path / "new", OPTIONS)
        parallel.collect(model)
        return len(fit(model, split, tmp_path / "new", OPTIONS))

    assert together(2, run) == [2, 2]


def test_a_frozen_item_table_stays_as_it_is(tmp_path):
    split = make_split(tmp_path, users=20)

    def run(folder):
        model = make_model(split, dropout=0.0).double()
        model.embedding.weight.requires_grad_(False)
        before = model.embedding.weight.clone()
        losses = [report.loss for report in fit(model, split, tmp_path / folder, OPTIONS)]
        return losses, torch.equal(model.embedding.weight, before), model.embedding.weight.requires_grad

    one = run("one")
    assert one[1:] == (True, False)
    for losses, *others in together(2, lambda: run("two")):
        assert (losses, *others) == (pytest.approx(one[0], rel=bound(split)), True, False)


def test_more_processes_than_rows_for_them(tmp_path):
    split = make_split(tmp_path, users=8)

    def run():
        model = TTT4Rec(TTT4RecConfig(num_items=4, width=16))
        with pytest.raises(ValueError, match="4 items cannot be split between 4 processes; start fewer"):
            parallel.distribute(model)
        return parallel.from_first(lambda: split.num_targets("train"))

    assert together(4, run) == [split.num_targets("train")] * 4


def test_a_group_that_cannot_train_together(tmp_path, monkeypatch):
    split = make_split(tmp_path, users=8)

    def run():
        with pytest.raises(ValueError, match=r"must be for tensors of the CPU too, such as .*; given"):
            fit(make_model(split), split, tmp_path / "run", OPTIONS)

    initialise = dist.init_process_group
    with monkeypatch.context() as patch:
        patch.setattr(dist, "init_process_group", lambda _: initialise("cuda:gloo"))  # one kind of device, as of "nccl"
        patch.setattr(dist, "barrier", lambda: None)  # which such a group has for that device only
        together(2, run)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = r"initialised, as within ttt4rec\.recsys\.training\.parallel\.processes; given 2 processes that torchrun"
    with pytest.raises(ValueError, match=message):
        fit(make_model(split), split, tmp_path / "run", OPTIONS)
    with pytest.raises(ValueError, match="one GPU for each; given 'cuda:1'"), parallel.processes("cuda:1"):
        pass


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


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path, capsys):
    write_events(tmp_path / "ring.inter", users=20)
    options = ["--epochs", "1", "--width", "16", "--max-len", "8", "--dropout", "0", "--targets-per-batch", "64"]
    command = ["train", str(tmp_path / "ring.inter"), *options, "--threads", "1", "--out"]
    assert cli.main([*command, str(tmp_path / "one")]) == 0
    alone = ["--standalone", "--local-addr", "localhost"]  # the machine's own name need not lead to it
    launcher = [sys.executable, "-m", "torch.distributed.run", *alone, "--nproc-per-node", "2", "-m"]
    words = [*launcher, "ttt4rec.cli", *command, str(tmp_path / "two")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for printed in (capsys.readouterr().out, done.stdout):
        assert printed.count("epoch   0") == printed.count("model in") == 1
    results = [json.loads((tmp_path / name / "run.json").read_text())["test"] for name in ("one", "two")]
    assert results[1] == pytest.approx(results[0], abs=1 / 100)  # of 185 targets; float32 may swap close scores
