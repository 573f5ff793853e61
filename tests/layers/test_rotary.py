"""Tables of rotary positions are made once, and never where a kept one would not be what it seems."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ttt4rec import TTTLayer
from ttt4rec.layers.rotary import rotary_table
from ttt4rec.reference import rotation

CPU = torch.device("cpu")


def test_a_table_is_that_of_the_reference_and_made_once():
    table = rotary_table(7, 6, 100.0, torch.float64, CPU)
    for own, true in zip(table, rotation(torch.arange(7), 6, 100.0, torch.float64), strict=True):
        assert torch.equal(own, true)
    assert rotary_table(7, 6, 100.0, torch.float64, CPU)[0] is table[0]
    for other in ((8, 6, 100.0, torch.float64), (7, 8, 100.0, torch.float64), (7, 6, 99.0, torch.float64)):
        assert rotary_table(*other, CPU)[0] is not table[0]
    assert rotary_table(7, 6, 100.0, torch.float32, CPU)[0].dtype == torch.float32


def test_one_that_was_made_in_inference_mode_serves_a_backward():
    layer = TTTLayer(12, 2, mini_batch_size=11, rope_theta=321.0, backend="reference")
    x = torch.randn(1, 5, 12)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.query.weight.grad is not None


def test_a_fake_one_is_not_kept():
    with FakeTensorMode():
        rotary_table(9, 6, 55.0, torch.float32, CPU)
    assert type(rotary_table(9, 6, 55.0, torch.float32, CPU)[0]) is torch.Tensor
