"""Training losses against their definitions, term by term."""

import dataclasses
import math

import pytest
import torch

from tests.support.recsys_data import make_model, make_split
from ttt4rec.models.losses import LOSSES, Loss, LossKind, bpr, gbce_beta, generalised_bce, sampled_softmax
from ttt4rec.recsys.training.train import TrainOptions, fit

N, S = 5, 7


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def scores():
    positive, negative = torch.randn(N, dtype=torch.float64), torch.randn(N, S, dtype=torch.float64)
    own = torch.rand(N, S) < 0.2
    own[0] = False
    own[1] = True  # every draw was the target itself
    return positive, negative, own


def rows(positive, negative, own):
    for p, row, mask in zip(positive.tolist(), negative.tolist(), own.tolist(), strict=True):
        yield p, [(j, score) for j, (score, hit) in enumerate(zip(row, mask, strict=True)) if not hit]


def test_sampled_softmax_is_its_definition(scores):
    expected_draws = torch.rand(S, dtype=torch.float64) + 0.1
    given = sampled_softmax(*scores, expected_draws.log())
    for value, (p, others) in zip(given.tolist(), rows(*scores), strict=True):
        denominator = math.exp(p) + sum(math.exp(score) / expected_draws[j].item() for j, score in others)
        assert value == pytest.approx(-math.log(math.exp(p) / denominator))


def test_gbce_is_its_definition(scores):
    beta = gbce_beta(S, 100, 0.75)
    given = generalised_bce(*scores, beta)
    rate = S / 99
    assert beta == pytest.approx(rate * (0.75 * (1 - 1 / rate) + 1 / rate))
    for value, (p, others) in zip(given.tolist(), rows(*scores), strict=True):
        terms = [math.log(sigmoid(p) ** beta), *(math.log(1 - sigmoid(score)) for _, score in others)]
        assert value == pytest.approx(-sum(terms) / (S + 1))
    assert gbce_beta(S, 100, 0.0) == pytest.approx(1)
    assert gbce_beta(S, 100, 1.0) == pytest.approx(rate)
    assert gbce_beta(S, 2, 0.5) == 1


def test_bpr_is_its_definition(scores):
    for value, (p, others) in zip(bpr(*scores).tolist(), rows(*scores), strict=True):
        terms = [-math.log(sigmoid(p - score)) for _, score in others]
        assert value == pytest.approx(sum(terms) / len(terms) if terms else 0)


@pytest.mark.parametrize("popularity", [0.0, 0.75])
def test_the_sampled_denominator_is_unbiased(popularity):
    num_items, draws, repeats = 12, 6, 40_000
    counts = torch.arange(num_items)
    loss = Loss.make("sampled", counts, num_negatives=draws, popularity=popularity, calibration=0)
    probability = (counts.double() + 1) ** popularity
    torch.testing.assert_close(loss.log_probability.exp(), probability / probability.sum())
    score, target = torch.randn(num_items, dtype=torch.float64), 4
    drawn = dataclasses.replace(loss, num_negatives=repeats * draws).draw().view(repeats, draws)
    log_expected = loss.log_probability[drawn - 1] + math.log(draws)
    log_denominators = sampled_softmax(
        score[target - 1].expand(repeats), score[drawn - 1] - log_expected, drawn == target, torch.zeros(draws)
    )
    estimates = (log_denominators + score[target - 1]).exp()
    error = (estimates.mean() - score.exp().sum()).abs()
    assert error < 4 * estimates.std() / repeats**0.5


@pytest.mark.parametrize("popularity", [0.0, 1.0])
def test_draws_follow_the_counts(popularity):
    counts = torch.tensor([0, 9, 0, 29])
    loss = Loss.make("bpr", counts, num_negatives=100_000, popularity=popularity, calibration=0)
    drawn = loss.draw()
    assert drawn.min() == 1
    probability = torch.tensor([1.0, 10.0, 1.0, 30.0]) ** popularity
    expected = probability / probability.sum()
    assert (drawn.bincount(minlength=5)[1:] / 100_000 - expected).abs().max() < 5 * 0.5 / 100_000**0.5


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_scores_with_the_model(tmp_path, name):
    split = make_split(tmp_path)
    model = make_model(split).double()
    loss = Loss.make(name, torch.from_numpy(split.train_counts()), num_negatives=S, popularity=0.5, calibration=0.75)
    h, items = torch.randn(N, 16, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2, 2, 9, 24])
    torch.manual_seed(3)
    given = loss(model, h, items)
    torch.manual_seed(3)
    drawn = None if name == "softmax" else loss.draw()
    scores = model.scores(h)
    positive = scores.gather(1, items[:, None] - 1)[:, 0]
    if name == "softmax":
        expected = scores.logsumexp(1) - positive
    else:
        negative, own = scores[:, drawn - 1], drawn == items[:, None]
        log_expected = loss.log_probability[drawn - 1] + math.log(S)
        expected = {
            "sampled": lambda: sampled_softmax(positive, negative, own, log_expected),
            "gbce": lambda: generalised_bce(positive, negative, own, gbce_beta(S, 24, 0.75)),
            "bpr": lambda: bpr(positive, negative, own),
        }[name]()
    expected = expected.sum()
    torch.testing.assert_close(given, expected)
    inputs = (h, model.embedding.weight)
    torch.testing.assert_close(torch.autograd.grad(given, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_a_narrow_model_are_float32(tmp_path, name, dtype):
    split = make_split(tmp_path)
    model = make_model(split).to(dtype)
    loss = Loss.make(name, torch.from_numpy(split.train_counts()), num_negatives=S, popularity=0, calibration=0.75)
    given = loss(model, torch.randn(N, 16, dtype=dtype), torch.tensor([1, 2, 2, 9, 24]))
    assert given.dtype == torch.float32
    given.backward()
    assert model.embedding.weight.grad.abs().sum() > 0


def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    def hinge(given):
        return (1 - given.positive[:, None] + given.negative).clamp_min(0).masked_fill(given.own, 0).mean(1)

    with pytest.raises(ValueError, match="loss must be one of softmax, sampled, gbce, bpr; given 'hinge'"):
        TrainOptions(loss="hinge")
    monkeypatch.setitem(LOSSES, "hinge", LossKind("a margin over negatives", hinge))
    split = make_split(tmp_path)
    options = TrainOptions(epochs=2, targets_per_batch=64, learning_rate=1e-2, loss="hinge", num_negatives=16)
    first, second = fit(make_model(split, mixer="gru"), split, tmp_path / "run", options)
    assert first.loss > second.loss > 0


@pytest.mark.parametrize("name", ["sampled", "gbce", "bpr"])
def test_each_loss_learns_the_pattern(tmp_path, name):
    split = make_split(tmp_path)
    options = TrainOptions(
        epochs=15, patience=15, targets_per_batch=64, learning_rate=1e-2, loss=name, num_negatives=16
    )
    reports = fit(make_model(split, mixer="gru"), split, tmp_path / "run", options)
    assert max(report.metrics["NDCG@10"] for report in reports) > 0.6  # 0.19 by chance
