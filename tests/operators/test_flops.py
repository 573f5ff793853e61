"""``FlopCounterMode`` counts the products of our operators, as by hand, and as it counts the reference's."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.checks import BACKBONES, INNERS, inner_inputs, run_inner
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer
from ttt4rec.models import full_softmax
from ttt4rec.operators import CONVOLUTIONS, SCANS, output, projection
from ttt4rec.operators.samples import Sizes

B, L, H, D, K = 2, 11, 2, 8, 4
C, T = H * D, B * L
PAIRS = B * (2 * 4 * 4 + 3 * 3)  # of the mini-batches of 4, 4 and 3 tokens of each row


def count(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        # k W, q W and the update; q kᵀ and its product with G
        ("linear", H * (3 * 2 * T * D * D + 2 * 2 * PAIRS * D)),
        # k W1, X2 W2, G2 W2ᵀ, q W1, X̄2 W2 and two updates; q kᵀ, (·) G1, X̄2 X2ᵀ, (·) G2
        ("mlp", H * (7 * 2 * T * D * 32 + 2 * PAIRS * (D + 32 + 32 + D))),
    ],
)
def test_inner_loops_forward(inner, expected, backend):
    inputs = inner_inputs(inner, B, L, H, D, K, dtype=torch.float32)
    assert count(lambda: run_inner(inner, inputs, backend=backend))[0] == expected


@pytest.mark.parametrize(
    ("inner", "again"),
    [
        ("linear", H * (3 * 2 * T * D * D + 2 * 2 * PAIRS * D)),  # all of the forward is computed again
        ("mlp", H * (6 * 2 * T * D * 32 + 2 * PAIRS * 2 * (D + 32))),  # all but k W1, which is kept
    ],
)
def test_inner_loops_backward(inner, again):
    """Two products for each of the forward's, as autograd takes, and what is computed again."""
    inputs = {name: x.requires_grad_() for name, x in inner_inputs(inner, B, L, H, D, K, dtype=torch.float32).items()}
    forward, (o, _) = count(lambda: run_inner(inner, inputs))
    backward, _ = count(lambda: o.sum().backward())
    assert backward == 2 * forward + again


def test_sequences_count_by_their_lengths():
    """As each alone; where lengths have no values, as one."""
    inputs = inner_inputs("linear", 1, 14, H, D, K, dtype=torch.float32)
    packed, _ = count(lambda: run_inner("linear", inputs, cu_seqlens=torch.tensor([0, 5, 5, 14])))
    pairs = (4 * 4 + 1) + (2 * 4 * 4 + 1)
    assert packed == H * (6 * 14 * D * D + 4 * pairs * D)
    meta = {name: x.to("meta") for name, x in inputs.items()}
    total, _ = count(lambda: run_inner("linear", meta, cu_seqlens=torch.tensor([0, 5, 5, 14], device="meta")))
    assert total == H * (6 * 14 * D * D + 4 * (3 * 16 + 4) * D)


@pytest.mark.parametrize(("inner", "width", "layers"), [("linear", D * D, 1), ("mlp", D * 32, 2)])
def test_mini_batches_in_blocks_cost_as_blocks_and_a_product_more_a_layer(inner, width, layers):
    tokens, own = 2 * 128 + 70, {}
    for size in (64, 128):
        inputs = {n: x.requires_grad_() for n, x in inner_inputs(inner, 1, tokens, H, D, size).items()}
        forward, (o, _) = count(lambda inputs=inputs: run_inner(inner, inputs, backend="eager"))
        backward, _ = count(lambda o=o: o.sum().backward())
        own[size] = forward, backward
    assert own[128][0] - own[64][0] == H * 2 * tokens * width * layers
    assert own[128][1] - own[64][1] == H * 6 * tokens * width * layers


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_a_layer_counts_what_its_reference_counts(inner, backbone):
    layer, x = TTTLayer(C, H, inner=inner, backbone=backbone, mini_batch_size=K), torch.randn(B, L, C)
    own, _ = count(lambda: layer(x))
    layer.backend = "reference"
    expected, _ = count(lambda: layer(x))
    convolutions = 0 if backbone == "transformer" else 2 * 2 * T * C * 4  # the reference's are sums of shifted products
    assert own == expected + convolutions


def test_operators_around_the_inner_loop():
    """Alone, since hooks of the counter have a layer call its modules one by one."""
    calls = [
        (projection, {}, 2 * T * C * (3 * C + H)),
        (CONVOLUTIONS[2], {"taps": 4, "plain": True}, 2 * 2 * T * C * 4),
        (CONVOLUTIONS[1], {"taps": 3, "lead": 2}, 2 * T * C * 3),
        (output, {}, 2 * T * C * C),
    ]
    for operator, options, expected in calls:
        given = operator.sample(Sizes(B, L, H, D, K), **options)
        given[0].requires_grad_()
        forward, outputs = count(partial(operator, given, "eager"))
        assert forward == expected
        backward, _ = count(sum(y.sum() for y in outputs).backward)
        assert backward == 2 * expected


def test_the_loss_over_a_catalogue_and_a_whole_model():
    """The loss: the scores, or with the gradients three products; the model: what it counts on the reference."""
    h, table, items = torch.randn(5, 4, requires_grad=True), torch.randn(12, 4), torch.randint(1, 12, (5,))
    scores = 2 * 5 * 4 * 11
    forward, losses = count(lambda: full_softmax.nll(h, table, items))
    assert forward == scores
    assert count(lambda: losses.sum().backward())[0] == 3 * scores
    forward, loss = count(lambda: full_softmax.nll(h, table, items, "sum"))
    assert forward == 3 * scores
    assert count(lambda: loss.backward())[0] == 0
    model = TTT4Rec(TTT4RecConfig(20, 16, 2, 2)).eval()
    ids = torch.randint(1, 21, (B, 8))
    own, _ = count(lambda: model(ids))
    for block in model.blocks:
        block.mixer.backend = "reference"
    assert own == count(lambda: model(ids))[0] > 0


@pytest.mark.parametrize("inner", INNERS)
def test_a_step_counts_as_a_token_of_a_full_mini_batch(inner):
    layer = TTTLayer(C, H, inner=inner, mini_batch_size=K)
    pool = layer.make_pool(B)
    step, _ = count(lambda: layer.step(torch.randn(B, C), pool, torch.arange(B)))
    forward, _ = count(lambda: layer(torch.randn(B, K, C)))
    assert step * K == forward


def test_every_operator_has_a_formula():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ttt4rec::")]
    registry = sys.modules["torch.utils.flop_counter"].flop_registry
    assert len(names) == 22
    for name in names:
        assert getattr(torch.ops.ttt4rec, name.removeprefix("ttt4rec::")) in registry, name
    assert SCANS["linear"].op._opoverload.overloadpacket in registry


@pytest.mark.parametrize("first", ["ttt4rec", pytest.param("torch.utils.flop_counter", marks=pytest.mark.slow)])
def test_whichever_is_imported_first(first):
    """And the import of this package loads neither the counter nor triton."""
    second = {"ttt4rec": "torch.utils.flop_counter", "torch.utils.flop_counter": "ttt4rec"}[first]
    program = f"""
import sys, torch, {first}
print("torch.utils.flop_counter" in sys.modules, "triton" in sys.modules)
import {second}
from torch.utils.flop_counter import flop_registry
print(torch.ops.ttt4rec.linear_scan in flop_registry)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = "False False" if first == "ttt4rec" else "True True"
    assert ran.stdout.split("\n")[:2] == [expected, "True"]
