"""``torch.export`` with sizes that stay open: one program, and the same numbers at sizes it was not made with."""

import io

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.utils._pytree import tree_leaves

from tests.support.checks import assert_close, assert_states_close, make_layer
from ttt4rec import TTT4Rec, TTT4RecConfig, item_blocks

SIZES = [(3, 7), (5, 13), (2, 4), (1, 2), (1, 1), (4, 1), (8, 16)]  # of batch and length, the first that of the export
BATCH_AND_LENGTH = {0: Dim("B"), 1: Dim("L")}


class Call(nn.Module):
    """A call as a module, tensors in and out."""

    def __init__(self, module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs):
        return self.function(self.module, *inputs)


def masked(B, L):
    """The first row on the left, the last on the right, one row of padding if there are three."""
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[0, L // 2 :] = False
    mask[-1, : L // 3] = False
    mask[1:2] = mask[1:2] if B < 3 else False
    return mask


def exported(module, inputs, dynamic_shapes, strict=False):
    """The program, given the module's arguments at the first size."""
    return export(module, inputs, dynamic_shapes=dynamic_shapes, strict=strict).module()


@pytest.mark.parametrize(
    ("inner", "backbone", "strict"),
    [("linear", "transformer", False), ("linear", "mamba", True), ("mlp", "mamba", False)],
)
def test_layer(inner, backbone, strict):
    layer = make_layer(inner, backbone, width=16)
    program = exported(layer, (torch.randn(*SIZES[0], 16).double(),), (BATCH_AND_LENGTH,), strict)
    for size in SIZES:
        x = torch.randn(*size, 16).double()
        assert_close(program(x), layer(x), name=str(size))


@pytest.mark.parametrize(
    ("backbone", "strict"),
    [
        ("mamba", False),
        pytest.param("transformer", False, marks=pytest.mark.slow),
        pytest.param("mamba", True, marks=pytest.mark.slow),
    ],
)
def test_layer_with_a_mask_and_its_state(backbone, strict):
    """The state too: its context of the convolutions is shorter and longer than the input."""
    layer = make_layer("mlp", backbone, width=16)

    def run(layer, x, mask):
        y, state = layer(x, mask=mask, return_state=True)
        return y, *state.tensors().values(), *layer(x, return_state=True)[1].tensors().values()

    call = Call(layer, run)
    inputs = torch.randn(*SIZES[0], 16).double(), masked(*SIZES[0])
    program = exported(call, inputs, ((BATCH_AND_LENGTH, BATCH_AND_LENGTH),), strict)
    for size in SIZES:
        x, mask = torch.randn(*size, 16).double(), masked(*size)
        for i, (actual, expected) in enumerate(zip(program(x, mask), call(x, mask), strict=True)):
            assert_close(actual, expected, name=f"{size}, {i}")


def test_packed_sequences():
    layer = make_layer("linear", "mamba", width=16)
    call = Call(layer, lambda layer, x, cu_seqlens: layer(x, cu_seqlens=cu_seqlens))
    inputs = torch.randn(1, 9, 16).double(), torch.tensor([0, 5, 5, 9])
    program = exported(call, inputs, (({1: Dim("total")}, {0: Dim("bounds", min=3)}),))
    for bounds in ([0, 5, 5, 9], [0, 2, 3], [0, 1, 2, 3, 12, 20]):
        x = torch.randn(1, bounds[-1], 16).double()
        assert_close(program(x, torch.tensor(bounds)), layer(x, cu_seqlens=torch.tensor(bounds)))


def test_a_stream_goes_on():
    """A program, also a saved one, takes a state and gives one."""
    layer = make_layer("mlp", "mamba", width=16)
    call = Call(layer, lambda layer, x, state: layer(x, state=state, return_state=True))

    def arguments(B, L):
        state = layer(torch.randn(B, 6, 16).double(), return_state=True)[1].detach()
        return torch.randn(B, L, 16).double(), state

    first = arguments(*SIZES[0])
    dynamic = (BATCH_AND_LENGTH, [{0: BATCH_AND_LENGTH[0]}] * len(tree_leaves(first[1])))  # a list for a node
    file = io.BytesIO()
    torch.export.save(export(call, first, dynamic_shapes=(dynamic,)), file)
    program = torch.export.load(file).module()
    for size in SIZES:
        given = arguments(*size)
        y, state = program(*given)
        expected, expected_state = call(*given)
        assert_close(y, expected, name=str(size))
        assert_states_close(state, expected_state)


@pytest.mark.slow
def test_the_reference_with_a_batch_of_any_size():
    """Its loop over mini-batches is unrolled, so that the length is that of the export."""
    layer = make_layer("mlp", "mamba", width=16, backend="reference")
    program = exported(layer, (torch.randn(*SIZES[0], 16).double(),), ({0: Dim("B")},))
    for B in (1, 2, 9):
        x = torch.randn(B, SIZES[0][1], 16).double()
        assert_close(program(x), layer(x))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"inner": "linear", "backbone": "mamba", "block_conv": True}, id="mamba"),
        pytest.param({"inner": "mlp"}, id="mlp", marks=pytest.mark.slow),
    ],
)
def test_model(options):
    """With padding on either side, which its mask is made of, up to the scores."""
    model = TTT4Rec(TTT4RecConfig(20, 16, 2, 2, mini_batch_size=4, **options), dtype=torch.float64).eval()
    call = Call(model, lambda model, ids: model.scores(model(ids)))
    program = exported(call, (ids_of(*SIZES[0]),), ((BATCH_AND_LENGTH,),))
    for size in SIZES:
        ids = ids_of(*size)
        assert_close(program(ids), call(ids), name=str(size))


@pytest.mark.parametrize(("reduction", "block"), [("none", 1 << 20), ("mean", 1 << 20), ("mean", 200)])
def test_the_loss_of_any_number_of_targets(reduction, block, monkeypatch):
    """Also where the table is so large that their number would choose the way."""
    monkeypatch.setattr(item_blocks, "SCORES_PER_BLOCK", block)
    model = TTT4Rec(TTT4RecConfig(20, 16), dtype=torch.float64)
    call = Call(model, lambda model, h, items: model.nll(h, items, reduction))
    inputs = torch.randn(100, 16).double(), torch.randint(1, 21, (100,))
    program = exported(call, inputs, (({0: Dim("N")}, {0: Dim("N")}),))
    for N in (1, 2, 63, 300):
        h, items = torch.randn(N, 16).double(), torch.randint(1, 21, (N,))
        assert_close(program(h, items), call(h, items), name=str(N))


def ids_of(B, L):
    return torch.randint(1, 21, (B, L)) * masked(B, L)


@pytest.mark.slow
def test_a_library_compiled_ahead_of_time(tmp_path):
    """AOTInductor: a model with padding on either side, at sizes that it was not compiled for."""
    model = TTT4Rec(TTT4RecConfig(20, 16, 1, 2, mini_batch_size=4, inner="linear", ffn="none")).eval()
    call = Call(model, lambda model, ids: model.scores(model(ids)))
    program = export(call, (ids_of(*SIZES[0]),), dynamic_shapes=((BATCH_AND_LENGTH,),))
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # to compile, not to run
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "library.pt2"), inductor_configs=quick
    )
    library = torch._inductor.aoti_load_package(path)
    for size in SIZES:
        ids = ids_of(*size)
        assert_close(library(ids), call(ids), 1e-5, str(size))  # the same operators; what is around is reordered
