"""The average of the weights: what it is, that it is what is validated and kept, and that it survives a stop."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from tests.support.recsys_data import make_model, make_split
from ttt4rec.recsys.training import train
from ttt4rec.recsys.training.averaging import Average
from ttt4rec.recsys.training.checkpoint import load_checkpoint, save_checkpoint
from ttt4rec.recsys.training.train import CHECKPOINT_FILE, TrainOptions, fit

OPTIONS = TrainOptions(epochs=3, targets_per_batch=64, learning_rate=1e-2, average_over=0.25)


@pytest.mark.parametrize(
    ("reach", "weight"),
    [
        (1.0, lambda t: 1.0),  # all alike
        (0.5, lambda t: t),
        (0.25, lambda t: t * (t + 1) * (t + 2)),
    ],
    ids=["all", "half", "quarter"],
)
def test_weights_of_the_steps(reach, weight):
    """With η = 1 / reach - 1, step t counts in proportion to t (t + 1) ... (t + η - 1)."""
    steps = 50
    values = torch.randn(steps, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.zeros(3, dtype=torch.float64)
    average = Average({"p": p}, reach)
    for step, value in enumerate(values, start=1):
        p.copy_(value)
        average.add(step)
    shares = torch.tensor([weight(t) for t in range(1, steps + 1)], dtype=torch.float64)
    torch.testing.assert_close(average.values["p"], (shares / shares.sum()) @ values, rtol=1e-12, atol=1e-12)


def test_steps_too_small_for_bfloat16_are_taken_in():
    values, p = torch.linspace(0, 1, 1000).bfloat16(), torch.zeros((), dtype=torch.bfloat16)
    average, mean = Average({"p": p}, 1.0), values.double().mean()
    for step, value in enumerate(values, start=1):
        p.copy_(value)
        average.add(step)
    assert average.values["p"].item() == pytest.approx(mean.item(), rel=1e-5)
    with average.in_place():
        assert p == mean.bfloat16()
    assert p == values[-1]


def test_whatever_stops_the_average_on_its_way_in_the_weights_come_back():
    parameters = {name: torch.zeros(2) for name in "ab"}
    average = Average(parameters, 0.5)
    average.values = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(RuntimeError), average.in_place():
        pass
    assert not any(p.any() for p in parameters.values())


def test_the_average_is_validated_and_kept_and_the_weights_go_on(tmp_path, monkeypatch):
    split, validated = make_split(tmp_path), []
    evaluate = train.evaluate

    def seen(model, *args, **given):
        validated.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return evaluate(model, *args, **given)

    monkeypatch.setattr(train, "evaluate", seen)
    runs = []
    for name, options in (("averaged", OPTIONS), ("not", dataclasses.replace(OPTIONS, average_over=0.0))):
        model = make_model(split)
        reports = fit(model, split, tmp_path / name, options)
        runs.append((model, reports, load_file(tmp_path / name / CHECKPOINT_FILE)))
    (averaged, reports, kept), (_, plain, others) = runs
    assert [report.loss for report in reports] == [report.loss for report in plain]  # the same weights are trained
    for name, _ in averaged.named_parameters():
        assert torch.equal(kept[f"model.{name}"], others[f"model.{name}"]), name
        assert torch.equal(kept[f"average.{name}"], validated[2][name]), name
        assert torch.equal(validated[5][name], others[f"model.{name}"]), name
        assert not torch.equal(kept[f"average.{name}"], kept[f"model.{name}"]), name
    best = max(range(3), key=lambda i: reports[i].metrics["NDCG@10"])
    assert all(torch.equal(p, validated[best][name]) for name, p in averaged.named_parameters())


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    split = make_split(tmp_path, users=20)
    whole = make_model(split)
    expected = fit(whole, split, tmp_path / "whole", OPTIONS)
    fit(make_model(split), split, tmp_path / "parts", dataclasses.replace(OPTIONS, epochs=1))
    model = make_model(split)
    resumed = fit(model, split, tmp_path / "parts", OPTIONS)
    assert [r.metrics for r in resumed] == [r.metrics for r in expected]
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in whole.state_dict().items())


@pytest.mark.parametrize("change", ["lost", "cut"])
def test_a_checkpoint_without_its_average_is_damaged(tmp_path, change):
    split = make_split(tmp_path, users=20)
    options = dataclasses.replace(OPTIONS, epochs=1)
    fit(make_model(split), split, tmp_path, options)
    path = tmp_path / CHECKPOINT_FILE
    tensors, progress = load_checkpoint(path)
    name = "average.norm.weight"
    tensors[name] = tensors[name][:-1]
    save_checkpoint(path, tensors if change == "cut" else {k: x for k, x in tensors.items() if k != name}, progress)
    with pytest.raises(ValueError, match=r"damaged: it must have the averages of"):
        fit(make_model(split), split, tmp_path, dataclasses.replace(options, epochs=2))
