"""Modules made empty and filled later are the modules they would have been, whoever makes and fills them."""

import copy
import gc
import io
import math
import weakref

import accelerate
import pytest
import torch
from torch import nn

from tests.support.checks import BACKBONES, INNERS, assert_close, make_layer
from tests.support.processes import together
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer
from ttt4rec.layers.convolution import CausalConv
from ttt4rec.models.blocks import Block, GELUFeedForward, SwiGLU
from ttt4rec.models.mixers import MIXERS
from ttt4rec.models.ttt4rec import make_mixer

X = torch.linspace(-2, 2, 2 * 7 * 16).view(2, 7, 16)
IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 0, 0, 0, 0]])
CONSTANTS = {
    "norm.weight": 1.0,
    "inner_norm_weight": 1.0,
    "skip": 1.0,
    "bias": 0.0,
    "b1": 0.0,
    "b2": 0.0,
    "inner_norm_bias": 0.0,
    "inner_lr_bias": 0.0,
    "rate_bias": 0.0,
    "token_offset": 0.0,
}
MAKERS = {
    "layer-linear": lambda **factory: TTTLayer(16, 2, backbone="mamba", **factory),
    "layer-mlp": lambda **factory: TTTLayer(16, 2, inner="mlp", **factory),
    "conv": lambda **factory: CausalConv(16, 4, **factory),
    **{name: lambda name=name, **factory: make_mixer(TTT4RecConfig(9, 16, 1, 2, name), **factory) for name in MIXERS},
    "swiglu": lambda **factory: SwiGLU(16, 32, **factory),
    "gelu": lambda **factory: GELUFeedForward(16, 32, **factory),
    "block": lambda **factory: Block(16, TTTLayer(16, 2, **factory), conv_kernel=4, **factory),
    **{mixer: lambda mixer=mixer, **factory: model(mixer, **factory) for mixer in (f"model-{m}" for m in MIXERS)},
}


def model(mixer, backbone="mamba", **factory):
    config = TTT4RecConfig(
        400, 16, 1, 2, mixer.removeprefix("model-"), backbone=backbone, block_conv=True, ffn="gelu", norm="layer"
    )
    return TTT4Rec(config, **factory)


def run(module):
    module.eval()
    with torch.no_grad():
        if isinstance(module, TTT4Rec):
            return module(IDS)
        if isinstance(module, CausalConv):
            return module.weight.sum() + module.bias.sum()
        return module(X)


def poisoned(module):
    """``to_empty`` as it may be: all that is not filled later is NaN."""
    module.to_empty(device="cpu")
    for x in (*module.parameters(), *module.buffers()):
        x.data.fill_(float("nan"))
    return module


def reset_all(module):
    """As PyTorch's deferred initialisations do: whoever owns something, parents first."""
    for part in module.modules():
        owns = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if owns:
            part.reset_parameters()
    return module


@pytest.mark.parametrize("make", MAKERS)
def test_every_module_takes_device_and_dtype(make):
    module = MAKERS[make](device="meta", dtype=torch.bfloat16)
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        assert x.device.type == "meta", name
        assert x.dtype == torch.bfloat16, name


@pytest.mark.parametrize("make", MAKERS)
def test_made_on_meta_and_loaded_it_computes_the_same(make):
    """By copying into empty memory, by assigning, and on accelerate's empty weights."""
    original = MAKERS[make]()
    expected = run(original)
    copied = poisoned(MAKERS[make](device="meta"))
    copied.load_state_dict(original.state_dict())
    assigned = MAKERS[make](device="meta")
    assigned.load_state_dict(original.state_dict(), assign=True)
    with accelerate.init_empty_weights(include_buffers=True):
        empty = MAKERS[make]()
    empty.load_state_dict(original.state_dict(), assign=True)
    for module in (copied, assigned, empty):
        assert torch.equal(run(module), expected)
        assert not [name for name, x in (*module.named_parameters(), *module.named_buffers()) if x.is_meta]


@pytest.mark.parametrize("make", MAKERS)
def test_nothing_is_left_out_when_every_module_resets_its_own(make):
    torch.manual_seed(0)
    deferred = reset_all(poisoned(MAKERS[make](device="meta")))
    made = MAKERS[make]()
    torch.manual_seed(0)
    reset_all(made)
    for (name, x), y in zip(deferred.state_dict().items(), made.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert torch.equal(run(deferred), run(made))


def test_weights_split_among_processes_are_drawn_as_whole_ones():
    def drawn():
        from torch.distributed.fsdp import fully_shard

        net = fully_shard(model("mamba", device="meta")).to_empty(device="cpu")
        for x in net.parameters():
            x.to_local().detach().fill_(math.nan)
        return {name: x.full_tensor() for name, x in reset_all(net).state_dict().items()}

    for weights in together(2, drawn):
        assert not weights["embedding.weight"][0].any()
        assert weights["embedding.weight"][1:].all()
        decay = weights["blocks.0.mixer.log_decay"]
        assert torch.equal(decay, torch.arange(1.0, 33).log().expand_as(decay))
        assert not [name for name, x in weights.items() if x.isnan().any()]


@pytest.mark.parametrize("deferred", [False, True], ids=["made", "reset"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_is_drawn_as_documented(mixer, deferred):
    """Also after every module's own reset_parameters: N(0, 0.02) but for what is constant, uniform or the GRU's."""
    net = reset_all(poisoned(model(mixer, device="meta"))) if deferred else model(mixer)
    for name, x in net.named_parameters():
        constant = [value for suffix, value in CONSTANTS.items() if name.endswith(suffix)]
        if name.endswith("log_decay"):
            assert torch.allclose(x.exp(), torch.arange(1.0, 33).expand_as(x)), name
        elif "gru." in name:
            assert x.abs().max() <= 16**-0.5, name
            assert x.detach().std() == pytest.approx((3 * 16) ** -0.5, rel=0.3), name
        elif "conv.weight" in name:
            assert x.abs().max() <= 0.5, name
            assert x.detach().std() == pytest.approx(12**-0.5, rel=5 * (2 * x.numel()) ** -0.5), name
        elif constant:
            assert (x == constant[0]).all(), name
        else:
            drawn = x.detach()[1:] if name == "embedding.weight" else x.detach()
            assert drawn.std() == pytest.approx(0.02, rel=5 * (2 * drawn.numel()) ** -0.5), name
            assert drawn.mean().abs() <= 5 * 0.02 * drawn.numel() ** -0.5, name
    assert (net.embedding.weight[0] == 0).all()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_a_layer_resets_all_of_itself(inner, backbone):
    layer = make_layer(inner, backbone, width=16)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(3.0)
    layer.reset_parameters()
    assert not [name for name, p in layer.named_parameters() if (p == 3.0).any()]
    assert layer.query.weight.detach().std() == pytest.approx(0.02, rel=5 / math.sqrt(2 * 256))


def test_skip_init():
    layer = nn.utils.skip_init(TTTLayer, 16, 2, inner="mlp")
    layer.load_state_dict(MAKERS["layer-mlp"]().state_dict())
    assert run(layer).isfinite().all()
    net = nn.utils.skip_init(TTT4Rec, TTT4RecConfig(20, width=16), dtype=torch.float64)
    assert net.embedding.weight.dtype == torch.float64


def test_the_same_seed_draws_the_same_numbers_as_ever():
    """Figures that were published with a seed stay reproducible."""
    torch.manual_seed(3)
    net = TTT4Rec(TTT4RecConfig(11, inner="mlp", backbone="mamba", ffn="gelu", width=24, num_heads=2))
    total = sum(p.detach().double().abs().sum() for p in net.parameters())
    assert float(total) == pytest.approx(470.4156677384442, rel=1e-12)


def test_copies_and_files_draw_their_own_weights():
    """And a module is freed with its last user: nothing in it keeps it alive."""
    net = model("ttt")
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    larger = net.with_items(500)
    before = net.embedding.weight.clone()
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False), larger):
        others = other.embedding.weight.clone()
        other.embedding.reset_parameters()
        assert torch.equal(net.embedding.weight, before)
        assert not torch.equal(other.embedding.weight, others)
        assert other.embedding.weight.std() < 0.03
    gone = weakref.ref(net.embedding)
    gc.disable()
    try:
        del net
        assert gone() is None
    finally:
        gc.enable()


def test_the_scale_of_the_rates_survives_meta_and_compiles_once_for_all_values():
    torch._dynamo.reset()
    layer = poisoned(TTTLayer(16, 2, device="meta"))
    layer.load_state_dict(TTTLayer(16, 2).state_dict())
    assert layer.inner_lr_scale == 1
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        for step in range(30):
            layer.set_inner_lr_scale(step / 29)
            assert_close(compiled(X), layer(X), 1e-5)  # float32; a layer that is not compiled may go another way
    assert len(graphs) <= 2  # the first value is taken for a constant
