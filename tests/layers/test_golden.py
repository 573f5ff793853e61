"""The layer gives the numbers of the original PyTorch release, forwards and backwards."""

import pytest
import torch

from tests.support.checks import GOLDEN_CASES, assert_close, golden_cases, layer_of, load_golden
from ttt4rec.layers.original_weights import _LAYER_NAMES

TOLERANCE = 1e-6  # the release computes its rotary tables in float32


def test_all_ten_cases_are_there():
    assert len(golden_cases()) == 10


@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_layer_matches_the_release(name, backend):
    case = load_golden(name)
    layer = layer_of(case.config, backend)
    layer.load_release_state_dict(case.part("param.seq_modeling_block."))
    x = case.tensors["x"].requires_grad_()
    y = layer(x)
    y.backward(case.tensors["layer.grad_y"])
    assert_close(y, case.tensors["layer.y"], TOLERANCE, "y")
    assert_close(x.grad, case.tensors["layer.grad_x"], TOLERANCE, "grad_x")
    own, expected = dict(layer.named_parameters()), case.part("layer.grad.")
    assert {_LAYER_NAMES[name] for name in expected} == own.keys()
    for theirs, gradient in expected.items():
        ours = own[_LAYER_NAMES[theirs]]
        assert_close(ours.grad, gradient.reshape(ours.shape), TOLERANCE, theirs)


@pytest.mark.parametrize("name", ["linear_mamba_d16_k16_l41", "mlp_transformer_d16_k8_l50"])
def test_a_streamed_release_layer_matches_the_release(name):
    case = load_golden(name)
    layer = layer_of(case.config, "auto")
    layer.load_release_state_dict(case.part("param.seq_modeling_block."))
    state, outputs = None, []
    with torch.no_grad():
        for piece in case.tensors["x"].split(7, dim=1):
            y, state = layer(piece, state=state, return_state=True)
            outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), case.tensors["layer.y"], TOLERANCE, "y")
