"""The specification agrees with itself: primal and dual form, closed-form and automatic derivatives."""

import math

import pytest
import torch

from tests.support.checks import INNERS, assert_close, gradients, inner_inputs
from ttt4rec import reference
from ttt4rec.reference.dual import gelu_derivative, layer_norm_gradient

MODELS = {"linear": reference.linear_model, "mlp": reference.mlp_model}


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize(("L", "K"), [(1, 1), (5, 1), (4, 4), (11, 4), (3, 8), (13, 5)])
def test_primal_and_dual_form_agree(inner, L, K):
    inputs = inner_inputs(inner, B=2, L=L, H=2, D=6, K=K)
    primal, dual = (results(form, inner, inputs) for form in ("primal", "dual"))
    for name, expected in primal.items():
        assert_close(dual[name], expected, name=name)


@pytest.mark.parametrize("inner", INNERS)
def test_a_zero_token_scale_gives_the_output_of_the_initial_weights(inner):
    inputs = inner_inputs(inner, B=1, L=4, H=1, D=4, K=4)
    q, weights = inputs["q"].transpose(1, 2), weights_of(inputs)
    expected = q + reference.layer_norm(MODELS[inner](q, weights), inputs["ln_weight"], inputs["ln_bias"], 1e-6)
    o = results("dual", inner, inputs)["o"].transpose(1, 2)
    assert inputs["token_scale"][1] == 0
    assert_close(o[:, :, 1], expected[:, :, 1])
    assert (o[:, :, 2] - expected[:, :, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("inner", INNERS)
def test_an_update_lowers_the_inner_loss(inner):
    inputs = inner_inputs(inner, B=1, L=4, H=1, D=8, K=4)
    k, v = (inputs[name].transpose(1, 2) for name in "kv")
    arguments = (k, v, inputs["ln_weight"], inputs["ln_bias"], MODELS[inner], 1e-6)
    inputs["inner_lr"] = inputs["inner_lr"] * 0.1
    _, updated = reference.dual_form(*tokens_of(inputs), weights_of(inputs), *norm_of(inputs), inner=inner)
    assert reference.inner_loss(updated, *arguments) < reference.inner_loss(weights_of(inputs), *arguments)


def test_layer_norm_is_that_of_torch():
    z, gamma, beta = torch.randn(2, 1, 3, 8).double(), torch.randn(1, 8).double(), torch.randn(1, 8).double()
    expected = torch.nn.functional.layer_norm(z, (8,), gamma[0], beta[0], 1e-6)
    assert_close(reference.layer_norm(z, gamma, beta, 1e-6), expected)


def test_layer_norm_gradient_is_the_derivative_of_the_inner_loss():
    z = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    target, gamma, beta = torch.randn(1, 2, 3, 8).double(), torch.randn(2, 8).double(), torch.randn(2, 8).double()
    loss = 0.5 * (reference.layer_norm(z, gamma, beta, 1e-6) - target).square().sum()
    (expected,) = torch.autograd.grad(loss, z)
    assert_close(layer_norm_gradient(z.detach(), target, gamma, beta, 1e-6), expected)


def test_gelu_derivative():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(x, approximate="tanh").sum(), x)
    assert_close(gelu_derivative(x.detach()), expected)


def test_rotation_turns_interleaved_pairs():
    cos, sin = reference.rotation(torch.tensor([0, 3]), 4, 100.0, torch.float64)
    x = torch.tensor([1.0, 0.0, 0.0, 2.0], dtype=torch.float64).expand(1, 2, 1, 4)
    still, turned = reference.rotate(x, cos, sin)[0, :, 0]
    assert torch.equal(still, x[0, 0, 0])
    slow = 3 / 10  # position 3, frequency 100^(-2/4)
    expected = [math.cos(3), math.sin(3), -2 * math.sin(slow), 2 * math.cos(slow)]
    assert_close(turned, torch.tensor(expected, dtype=torch.float64))


def test_token_scale_is_one_over_the_place_plus_the_offset_and_never_negative():
    offset = torch.tensor([0.5, -1.0, 0.0, -0.25], dtype=torch.float64)
    expected = torch.tensor([1.5, 0.0, 1 / 3, 0.0], dtype=torch.float64)
    assert_close(reference.token_scale(offset), expected)


def test_inner_learning_rate():
    x, weight, bias = torch.randn(2, 3, 8), torch.zeros(2, 8), torch.tensor([0.0, math.log(3)])
    lr = reference.inner_learning_rate(x, weight, bias, base_lr=2.0, head_dim=4)
    assert_close(lr, torch.tensor([0.25, 0.375]).expand(2, 3, 2), 1e-6)
    assert reference.inner_learning_rate(x.bfloat16(), weight, bias, 2.0, 4).dtype == torch.float32


def results(form, inner, inputs):
    """Outputs, outgoing weights and all gradients of one form."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    arguments = (*tokens_of(leaves), weights_of(leaves), *norm_of(leaves))
    if form == "primal":
        o, weights = reference.primal_form(*arguments, model=MODELS[inner])
    else:
        o, weights = reference.dual_form(*arguments, inner=inner)
    named = {"o": o} | {f"weights.{i}": w for i, w in enumerate(weights)}
    grads = gradients(list(named.values()), list(leaves.values()))
    return named | {f"grad {name}": g for name, g in zip(leaves, grads, strict=True)}


def tokens_of(inputs):
    return [inputs[name] for name in ("q", "k", "v", "inner_lr", "token_scale")]


def weights_of(inputs):
    """The initial weights, one copy a sequence."""
    B = inputs["q"].shape[0]
    return tuple(inputs[name].expand(B, *inputs[name].shape) for name in ("W1", "b1", "W2", "b2") if name in inputs)


def norm_of(inputs):
    return inputs["ln_weight"], inputs["ln_bias"]
