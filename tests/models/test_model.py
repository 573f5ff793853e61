"""TTT4Rec: blocks against the original release, padding, packing, streams, saving."""

import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checks import BACKBONES, GOLDEN_CASES, INNERS, layer_of, load_golden, relative_error
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer
from ttt4rec.layers.original_weights import _BLOCK_NAMES, load_release_block
from ttt4rec.models.blocks import AttentionMixer, Block
from ttt4rec.models.mixers import MIXERS, MambaMixer
from ttt4rec.models.ttt4rec import make_mixer

TTT_SETTINGS = ("inner", "backbone", "mini_batch_size", "rope_theta", "base_lr", "max_inner_step", "conv_kernel")
KINDS = [
    *({"mixer": name} for name, mixer in MIXERS.items() if name != "ttt" and mixer.causal),
    *({"inner": i, "backbone": b} for i, b in itertools.product(INNERS, BACKBONES)),
    {"backbone": "mamba", "block_conv": True},
    {"gates": True},
]


def make(seed=0, **options):
    torch.manual_seed(seed)
    small = {"num_items": 30, "width": 8, "num_heads": 2, "num_blocks": 2, "ffn_width": 12, "mini_batch_size": 4}
    model = TTT4Rec(TTT4RecConfig(**(small | options))).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_block_agrees_with_the_release(name):
    golden = load_golden(name)
    config, parameters = golden.config, golden.part("param.")
    width = config["num_heads"] * config["head_dim"]
    layer = layer_of(config, "auto")
    hidden = parameters["mlp.up_proj.weight"].shape[0]
    block = Block(
        width, layer, ffn_width=hidden, conv_kernel=config["conv_kernel"] if config["pre_conv"] else None
    ).double()
    load_release_block(block, parameters)
    expected, gradients = golden.part("block."), golden.part("block.grad.")
    x = golden.tensors["x"].requires_grad_()
    y = block(x)
    y.backward(expected["grad_y"])
    assert relative_error(y, expected["y"]) <= 1e-6
    assert relative_error(x.grad, expected["grad_x"]) <= 1e-6
    own = dict(block.named_parameters())
    compared = [name for name in gradients if _BLOCK_NAMES[name] in own]
    assert len(compared) == len(own)
    for name in compared:
        assert relative_error(own[_BLOCK_NAMES[name]].grad.flatten(), gradients[name].flatten()) <= 1e-6, name


def test_release_weights_load_into_a_model():
    golden = load_golden("mlp_transformer_d16_k8_l50")
    model = TTT4Rec(TTT4RecConfig(num_items=5)).double()
    model.load_release_state_dict(golden.part("param."))
    assert torch.equal(model.blocks[0].mixer.W2, golden.tensors["param.seq_modeling_block.W2"])
    with pytest.raises(ValueError, match=r"missing \['ffn_norm.weight'\]"):
        model.load_release_state_dict({k: x for k, x in golden.part("param.").items() if k != "ffn_norm.weight"})


def release_checkpoint(blocks, width, num_items=9):
    """A state dict as RecBole saves it of the release's recommender."""
    layers = {f"ttt_layers.layers.{i}.{name}": x for i, block in enumerate(blocks) for name, x in block.items()}
    names = {"item_embedding.weight": (num_items + 1, width), "ttt_layers.embed_tokens.weight": (20, width)}
    names |= dict.fromkeys(("LayerNorm.weight", "LayerNorm.bias", "ttt_layers.norm.weight"), (width,))
    return layers | {name: torch.randn(shape, dtype=torch.float64) for name, shape in names.items()}


def test_a_checkpoint_of_the_release_loads():
    golden = load_golden("mlp_transformer_d16_k8_l50")
    saved = release_checkpoint([golden.part("param.")] * 2, 64)
    for constant in ("token_idx", "rotary_emb.inv_freq"):
        saved[f"ttt_layers.layers.1.seq_modeling_block.{constant}"] = torch.ones(3)
    model = TTT4Rec(TTT4RecConfig(num_items=9, num_blocks=2, dropout=0.0)).double()
    model.load_release_checkpoint(saved)
    ids = torch.randint(1, 10, (2, 11))
    x = torch.nn.functional.embedding(ids, saved["item_embedding.weight"])
    h = torch.nn.functional.layer_norm(x, (64,), saved["LayerNorm.weight"], saved["LayerNorm.bias"], 1e-12)
    for block in model.blocks:  # each is held to the release's numbers above
        h = block(h)
    h = saved["ttt_layers.norm.weight"] * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(model(ids), h)
    torch.testing.assert_close(model.scores(h), h @ saved["item_embedding.weight"][1:].T)
    assert torch.equal(model.blocks[1].mixer.W2, golden.tensors["param.seq_modeling_block.W2"])
    assert not model.embedding.weight[0].any()


def test_a_checkpoint_that_does_not_fit_is_refused_whole():
    golden = load_golden("mlp_transformer_d16_k8_l50")
    saved = release_checkpoint([golden.part("param.")], 64)
    model = TTT4Rec(TTT4RecConfig(num_items=9)).double()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for wrong, message in (
        (saved | {"extra": torch.ones(1)}, r"unknown \['extra'\]"),
        ({key: x for key, x in saved.items() if key != "LayerNorm.bias"}, r"missing \['LayerNorm.bias'\]"),
        (saved | {"item_embedding.weight": torch.ones(8, 64)}, r"must have shape \[10, 64\]; given \[8, 64\]"),
        (release_checkpoint([golden.part("param.")] * 2, 64), "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_release_checkpoint(wrong)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    other = TTT4Rec(TTT4RecConfig(num_items=9, norm="layer")).double()
    before = {name: x.clone() for name, x in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"its own that no release has .*'norm\.bias'"):
        other.load_release_checkpoint(saved)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize(("norm", "ffn"), [("rms", "swiglu"), ("layer", "gelu"), ("rms", "none")])
def test_padding_packing_and_causality(options, norm, ffn):
    model = make(norm=norm, ffn=ffn, **options)
    ids = torch.randint(1, 31, (3, 11))
    whole = model(ids)
    right, left = ids.clone(), ids.clone()
    right[1, 7:] = 0
    left[2] = torch.cat((torch.zeros(4, dtype=torch.int64), ids[2, :7]))
    torch.testing.assert_close(model(right)[1, :7], whole[1, :7], rtol=0, atol=1e-10)
    torch.testing.assert_close(model(left)[2, 4:], whole[2, :7], rtol=0, atol=1e-10)
    packed = model(torch.cat((ids[0, :5], ids[1], ids[2, :1]))[None], cu_seqlens=torch.tensor([0, 5, 16, 17]))[0]
    expected = torch.cat((whole[0, :5], whole[1], whole[2, :1]))
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-10)
    changed = ids.clone()
    changed[:, 6] = changed[:, 6] % 30 + 1
    torch.testing.assert_close(model(changed)[:, :6], whole[:, :6], rtol=0, atol=1e-12)
    assert not torch.allclose(model(changed)[:, 6:], whole[:, 6:])


@pytest.mark.parametrize("options", [k for k in KINDS if MIXERS[k.get("mixer", "ttt")].streams], ids=str)
@pytest.mark.parametrize("cut", [1, 4, 6])
def test_a_stream_gives_the_numbers_of_one_call(options, cut):
    model = make(**options)
    ids = torch.randint(1, 31, (2, 11))
    first, states = model(ids[:, :cut], return_states=True)
    second, states = model(ids[:, cut:10], states=states, return_states=True)
    third, _ = model(ids[:, 10:], states=states, return_states=True)
    torch.testing.assert_close(torch.cat((first, second, third), 1), model(ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 10.0}, {"base_lr": 0.1}, {"max_inner_step": 0.01}, {"mini_batch_size": 2}, {"conv_kernel": 2},
     {"inner": "linear"}, {"mixer": "attention", "rope_theta": 10.0}, {"mixer": "mamba", "conv_kernel": 2}],
    ids=str,
)  # fmt: skip
def test_the_configuration_reaches_the_mixer(change):
    """The model's is that of a layer that is made with the settings by hand, weights alike."""
    config = TTT4RecConfig(num_items=30, width=16, num_heads=2, backbone="mamba")
    given = make_mixer(dataclasses.replace(config, **change))
    names = {"attention": ("rope_theta",), "mamba": ("conv_kernel",)}.get(change.get("mixer"), TTT_SETTINGS)
    settings = {name: getattr(config, name) for name in names} | {n: x for n, x in change.items() if n != "mixer"}
    expected = {
        "attention": lambda: AttentionMixer(16, 2, **settings),
        "mamba": lambda: MambaMixer(16, **settings),
    }.get(change.get("mixer"), lambda: TTTLayer(16, 2, **settings))()
    expected.load_state_dict(given.state_dict())
    x = torch.randn(2, 11, 16)
    assert torch.equal(given(x), expected(x))
    if not {"conv_kernel", "inner", "mini_batch_size"} & change.keys():  # of which the weights are of other shapes
        usual = make_mixer(dataclasses.replace(config, mixer=change.get("mixer", "ttt")))
        usual.load_state_dict(given.state_dict())
        assert not torch.allclose(given(x), usual(x))


@pytest.mark.parametrize("mixer", MIXERS)
def test_ids_with_gaps_and_wrong_bounds_are_refused(mixer):
    model = make(mixer=mixer)
    with pytest.raises(ValueError, match="row 1 has a gap"):
        model(torch.tensor([[1, 2, 0], [1, 0, 2]]))
    for bounds in ([0, 2], [0, 4], [1, 3], [0, 2, 1, 3]):
        with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to the number of tokens, 3"):
            model(torch.tensor([[1, 2, 3]]), cu_seqlens=torch.tensor(bounds))


def test_a_row_of_padding_leaves_a_grus_stream_where_it_was():
    model = make(mixer="gru")
    _, states = model(torch.tensor([[1, 2], [3, 4]]), return_states=True)
    _, after = model(torch.tensor([[0, 0], [5, 0]]), states=states, return_states=True)
    for old, new in zip(states, after, strict=True):
        assert torch.equal(old.mixer[0], new.mixer[0])
        assert not torch.equal(old.mixer[1], new.mixer[1])


def test_gates_are_those_of_ligr():
    torch.manual_seed(0)
    block = Block(8, AttentionMixer(8, 2), gates=True, ffn_width=12).double()
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    gate = torch.sigmoid(h @ block.mixer_gate.weight.T + block.mixer_gate.bias)
    between = h + gate * block.mixer(block.mixer_norm(h))
    gate = torch.sigmoid(between @ block.ffn_gate.weight.T + block.ffn_gate.bias)
    torch.testing.assert_close(block(h), between + gate * block.ffn(block.ffn_norm(between)))


@pytest.mark.parametrize("gates", [False, True])
def test_a_block_without_a_network_is_its_mixer(gates):
    torch.manual_seed(0)
    block = Block(8, AttentionMixer(8, 2), ffn="none", gates=gates).double()
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    gate = torch.sigmoid(block.mixer_gate(h)) if gates else 1
    torch.testing.assert_close(block(h), h + gate * block.mixer(block.mixer_norm(h)))
    assert not any(name.startswith("ffn") for name, _ in block.named_parameters())


@pytest.mark.parametrize("options", [{"gates": True}, {"ffn": "none"}, {"gates": True, "ffn": "none"}], ids=str)
def test_steps_of_other_blocks_are_those_of_whole_histories(options):
    model = make(**options)
    pools, slots = model.make_pools(2), torch.tensor([1, 0])
    ids = torch.randint(1, 31, (2, 6))
    steps = torch.stack([model.step(item, pools, slots) for item in ids.T], 1)
    torch.testing.assert_close(steps, model(ids), rtol=0, atol=1e-10)


def test_attention_refuses_a_state():
    with pytest.raises(ValueError, match="AttentionMixer keeps no state"):
        make(mixer="attention")(torch.ones(1, 2, dtype=torch.int64), return_states=True)


def test_scores_leave_padding_out():
    model = make()
    h = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(model.scores(h), h @ model.embedding.weight[1:].T)


def test_every_parameter_learns():
    model = make(backbone="mamba", block_conv=True).train()
    ids = torch.randint(1, 31, (3, 9))
    torch.nn.functional.cross_entropy(model.scores(model(ids)).flatten(0, 1), ids.flatten() - 1).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_mixer_of_ones_own():
    class Mean(torch.nn.Module):
        def forward(self, x, *, mask=None, cu_seqlens=None, state=None, return_state=False):
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

    model = TTT4Rec(TTT4RecConfig(num_items=5, width=8, num_heads=2), mixer=lambda config: Mean())
    assert model(torch.ones(2, 3, dtype=torch.int64)).shape == (2, 3, 8)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_save_and_load(tmp_path, options):
    model = make(**options).float()
    model.save(tmp_path / "model")
    loaded = TTT4Rec.load(tmp_path / "model")
    assert loaded.config == model.config
    assert not loaded.training
    ids = torch.randint(1, 31, (2, 9))
    assert torch.equal(loaded(ids), model(ids))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_the_type_of_the_weights_is_kept(tmp_path):
    model = make().bfloat16()
    model.save(tmp_path)
    assert {name: x.dtype for name, x in TTT4Rec.load(tmp_path).state_dict().items()} == {
        name: x.dtype for name, x in model.state_dict().items()
    }


def test_loading_nothing_or_something_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        TTT4Rec.load(tmp_path)
    make().float().save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="does not hold a TTT4Rec model"):
        TTT4Rec.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")  # as if saved alone
    (tmp_path / "config.json").write_text('{"num_items": 30, "colour": "red"}')
    with pytest.raises(ValueError, match="colour"):
        TTT4Rec.load(tmp_path)
    (tmp_path / "config.json").write_text('{"num_items": 31}')
    with pytest.raises(ValueError, match="does not hold a TTT4Rec model"):
        TTT4Rec.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"num_items": 0}, "0"),
        ({"width": 2.5}, "2.5"),
        ({"num_blocks": True}, "True"),
        ({"width": 10, "num_heads": 4}, "10"),
        ({"width": 12, "num_heads": 4}, "12"),
        ({"mixer": "lstm"}, "lstm"),
        ({"inner": "cubic"}, "cubic"),
        ({"backbone": "rwkv"}, "rwkv"),
        ({"norm": "batch"}, "batch"),
        ({"ffn": "relu"}, "relu"),
        ({"rope_theta": 0.0}, "0.0"),
        ({"base_lr": float("inf")}, "inf"),
        ({"max_inner_step": -1.0}, "-1.0"),
        ({"dropout": 1.0}, "1.0"),
        ({"max_len": -3}, "-3"),
        ({"num_heads": "4"}, "'4'"),
        ({"dropout": "0.1"}, "'0.1'"),
        ({"dropout": float("nan")}, "nan"),
        ({"rope_theta": None}, "None"),
        ({"hide_rate": 1.5}, "1.5"),
        ({"gates": 1}, "1"),
        ({"block_conv": "no"}, "no"),
    ],
    ids=str,
)
def test_a_wrong_configuration_names_the_fault(change, given):
    with pytest.raises(ValueError, match=given) as error:
        TTT4RecConfig(**({"num_items": 3} | change))
    assert "\n" not in str(error.value)
    assert next(iter(change)) in str(error.value)


def test_wrong_ids_and_states():
    model = make()
    with pytest.raises(TypeError, match="int64"):
        model(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"\[3\]"):
        model(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="one entry per block, 2; given 0"):
        model(torch.ones(1, 3, dtype=torch.int64), states=[])


def test_the_configuration_is_the_published_one():
    config = dataclasses.asdict(TTT4RecConfig(num_items=1))
    published = {"width": 64, "num_blocks": 1, "num_heads": 4, "inner": "mlp", "mini_batch_size": 8, "dropout": 0.2}
    assert config | published | {"rope_theta": 1000.0, "norm": "rms", "ffn": "swiglu", "ffn_width": 256} == config


def test_a_model_grows():
    model = make()
    larger = model.with_items(33)
    h = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(larger.scores(h)[:, :30], model.scores(h), rtol=0, atol=1e-12)
    assert larger.scores(h).shape == (4, 33)
    assert larger.config.num_items == 33
    ids = torch.randint(1, 31, (2, 9))
    assert torch.equal(larger(ids), model(ids))
    assert larger(ids + 3).isfinite().all()
    larger.embedding.weight.data.zero_()
    assert model.embedding.weight.abs().sum() > 0
    with pytest.raises(ValueError, match="at least the model's 30; given 29"):
        model.with_items(29)
