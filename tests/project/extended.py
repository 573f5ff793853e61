"""What docs/extending.md adds, beyond what the tests over the tables ask of it; run by ``test_extending``."""

import importlib

import pytest
import torch

from tests.support.checks import assert_close, inner_inputs, inner_results, relative_error, run_inner
from tests.support.guide import names
from tests.support.recsys_data import make_model, make_split, write_events
from ttt4rec import TTT4Rec, TTTLayer
from ttt4rec.cli import main
from ttt4rec.inner_models import INNER_MODELS
from ttt4rec.operators import register_inner_model
from ttt4rec.recsys.training.train import TrainOptions, fit
from ttt4rec.reference import linear_model, primal_form


def test_a_toy_inner_model_is_its_definition():
    """The dual form is the primal one, and the declared operator the dual form, gradients too."""
    inputs = inner_inputs("recall", B=2, L=11, H=2, D=4, K=4)
    q, k, v, lr, scale, W1, b1, *norm = inputs.values()
    weights = tuple(w.expand(2, *w.shape) for w in (W1, b1))
    o, outgoing = primal_form(q, k, v + k, lr, scale, weights, *norm, model=linear_model)  # its loss has v - k
    expected, state, expected_grads = inner_results("recall", inputs, backend="reference")
    assert_close(expected, o)
    assert_close(state.weights[0], outgoing[0])
    for backend in ("eager", "auto"):
        given, _, grads = inner_results("recall", inputs, backend=backend)
        assert_close(given, expected)
        for name, gradient in expected_grads.items():
            assert_close(grads[name], gradient, name=name)
    assert relative_error(run_inner("linear", inputs)[0], expected) > 0.01


def test_a_toy_inner_model_is_trained_and_streams(tmp_path):
    split = make_split(tmp_path)
    model = make_model(split, inner="recall")
    reports = fit(model, split, tmp_path / "run", TrainOptions(epochs=8, targets_per_batch=64, learning_rate=1e-2))
    assert reports[-1].loss < 0.8 * reports[0].loss
    model, ids = model.double().eval(), torch.randint(1, 25, (2, 9))
    pools, slots = model.make_pools(3), torch.tensor([2, 0])
    steps = torch.stack([model.step(items, pools, slots) for items in ids.T], 1)
    assert_close(steps, model(ids))


def test_no_inner_model_is_registered_twice():
    with pytest.raises(ValueError, match="name must be new, not one of linear, mlp, recall; given 'mlp'"):
        register_inner_model(INNER_MODELS["mlp"])


def test_the_model_of_the_guide_takes_a_step():
    model = names["model"]
    ids = torch.randint(1, 101, (4, 9))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model.nll(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), "mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_toy_mixer_is_trained(tmp_path):
    split = make_split(tmp_path)
    options = TrainOptions(epochs=8, targets_per_batch=64, learning_rate=1e-2)
    reports = fit(make_model(split, mixer="mean"), split, tmp_path / "run", options)
    assert reports[-1].loss < 0.8 * reports[0].loss


def test_a_toy_mixer_is_an_option(tmp_path, capsys):
    data = write_events(tmp_path / "ring.inter")
    small = ["--width", "16", "--num-heads", "2", "--max-len", "8", "--epochs", "1"]
    assert main(["train", str(data), "--out", str(tmp_path / "run"), "--mixer", "mean", *small]) == 0
    assert TTT4Rec.load(tmp_path / "run").config.mixer == "mean"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "mean: nobody's" in " ".join(capsys.readouterr().out.split())


def test_a_toy_backend_is_asked_and_refuses():
    calls = importlib.import_module("toy_backend").calls
    assert calls == ["forward", "backward"]  # by the guide
    layer, eager = (TTTLayer(32, 2, backend=backend) for backend in ("toy", "eager"))
    eager.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, 32)
    assert torch.equal(layer(x), eager(x))
    assert len(calls) == 3
    with pytest.raises(RuntimeError, match="backend 'toy' takes head dimensions up to 64; given 80"):
        TTTLayer(80, 1, backend="toy")(torch.randn(1, 3, 80))
