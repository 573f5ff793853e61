"""The language model and the adapter in transformers' tools: the release's weights, saving, training."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checks import assert_close, load_golden
from tests.support.language_models import VOCABULARY, make_model, prompts
from ttt4rec.layers.ttt import TTTLayer

pytestmark = pytest.mark.slow  # transformers takes seconds to import


@pytest.mark.parametrize("name", ["linear_mamba_d16_k16_l41", "mlp_transformer_d16_k8_l50"])
def test_weights_of_the_release_give_its_numbers(name):
    from ttt4rec.hf import TTTConfig, TTTForCausalLM

    golden = load_golden(name)
    c = golden.config
    width = c["num_heads"] * c["head_dim"]
    settings = {  # as the release's config.json has them
        "model_type": "ttt", "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": 1, "num_attention_heads": c["num_heads"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "ttt_layer_type": c["inner"], "ttt_base_lr": c["ttt_base_lr"], "mini_batch_size": c["mini_batch_size"],
        "use_gate": c["use_gate"], "share_qk": c["share_qk"], "pre_conv": c["pre_conv"],
        "conv_kernel": c["conv_kernel"], "rope_theta": c["rope_theta"], "tie_word_embeddings": True,
    }  # fmt: skip
    weights = {f"model.layers.0.{key}": x for key, x in golden.part("param.").items()}
    weights["model.embed_tokens.weight"] = torch.randn(VOCABULARY, width, dtype=torch.float64)
    weights["model.norm.weight"] = torch.rand(width, dtype=torch.float64)
    model = TTTForCausalLM(TTTConfig.from_release(settings)).double()
    model.load_release_state_dict(weights)
    y = golden.tensors["block.y"]
    normed = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights["model.norm.weight"]
    logits = model(inputs_embeds=golden.tensors["x"]).logits
    assert_close(logits, normed @ weights["model.embed_tokens.weight"].T, 1e-6)
    with pytest.raises(ValueError, match=r"missing \['model\.norm\.weight'\]"):
        model.load_release_state_dict({key: x for key, x in weights.items() if key != "model.norm.weight"})


def test_other_models_of_the_release_are_refused():
    from ttt4rec.hf import TTTConfig

    with pytest.raises(ValueError, match="use_gate and share_qk of a release's model must agree"):
        TTTConfig.from_release({"use_gate": True})
    with pytest.raises(ValueError, match=r"rms_norm_eps of a release's model must be 1e-06; given 1e-05"):
        TTTConfig.from_release({"rms_norm_eps": 1e-5})
    with pytest.raises(ValueError, match="inner must be one of linear, mlp"):
        TTTConfig(inner="square")


@pytest.mark.parametrize("name", ["linear-mamba", "mlp-transformer"])
def test_a_saved_model_loads_by_its_auto_class(name, tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    model, ids = make_model(name), prompts()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("name", ["llama", "llama-second", "gpt2-first"])
def test_a_model_with_replaced_attention_is_saved_and_loaded(name, tmp_path):
    import transformers

    from ttt4rec.hf import replace_attention, with_ttt_attention

    model, ids = make_model(name), prompts()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
    model_class = getattr(transformers, type(model).__name__)
    loaded = with_ttt_attention(model_class).from_pretrained(tmp_path)
    assert isinstance(loaded, model_class)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"must have its own attention in all blocks; .* in blocks \["):
        replace_attention(loaded)
    with pytest.raises(TypeError, match=r"must be a model of transformers .*; given Linear"):
        replace_attention(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["linear-mamba", "llama"])
def test_weights_that_a_file_lacks_are_drawn(name, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    from ttt4rec.hf import with_ttt_attention

    model = make_model(name)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = ("inner_norm_weight", "W1", "query.weight", "key_conv.weight", "key_conv.bias")
    save_file(
        {k: x for k, x in weights.items() if not k.endswith(lacking)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    of_class = AutoModelForCausalLM if name == "linear-mamba" else with_ttt_attention(LlamaForCausalLM)
    loaded = of_class.from_pretrained(tmp_path)
    theirs = dict(model.named_parameters())
    for key, x in loaded.named_parameters():
        if key.endswith("inner_norm_weight"):
            assert (x == 1).all()
        elif key.endswith(("W1", "query.weight")):
            assert 0.015 < x.std() < 0.025, key
        elif key.endswith("key_conv.weight"):
            assert x.abs().max() <= 0.5
            assert x.std() > 0.2
        elif key.endswith("key_conv.bias"):
            assert not x.any()
        else:
            assert torch.equal(x, theirs[key]), key


def test_which_layers_are_replaced():
    from transformers import LlamaConfig, LlamaForCausalLM

    from ttt4rec.hf import replace_attention, with_ttt_attention

    config = LlamaConfig(num_hidden_layers=3, hidden_size=16, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with pytest.raises(ValueError, match=r"layers must be blocks with self_attn or attn, \[0, 1, 2\]; given \[3\]"):
        replace_attention(model, [3])
    with pytest.raises(ValueError, match="even head dimension"):
        replace_attention(model, num_heads=16)
    with pytest.raises(ValueError, match="config must have ttt_attention"):
        with_ttt_attention(LlamaForCausalLM)(copy.deepcopy(config))
    replace_attention(model, [2], num_heads=4)
    found = {name: module for name, module in model.named_modules() if isinstance(module, TTTLayer)}
    assert list(found) == ["model.layers.2.self_attn.layer"]
    (layer,) = found.values()
    assert (layer.num_heads, layer.W1.dtype, layer.training) == (4, torch.bfloat16, False)
    with pytest.raises(ValueError, match="stands in for self-attention"):
        model.model.layers[2].self_attn(torch.zeros(1, 2, 16), encoder_hidden_states=torch.zeros(1, 2, 16))


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [x.grad.clone() for x in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["linear-mamba", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant, monkeypatch):
    model, ids = make_model(name).double().train(), prompts()
    calls, forward = [], TTTLayer.forward
    monkeypatch.setattr(TTTLayer, "forward", lambda *x, **y: calls.append(1) or forward(*x, **y))
    expected = gradients(model, ids)
    once = len(calls)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for found, g in zip(gradients(model, ids), expected, strict=True):
        assert_close(found, g)
    assert len(calls) == 3 * once  # forwards, and again on the way back


def test_what_a_call_returns():
    model, ids = make_model("linear-mamba"), prompts()
    full = model(ids, labels=ids, output_hidden_states=True)
    loss, logits, cache, hidden = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, full.logits)
    assert cache.get_seq_length() == 6
    assert len(hidden) == len(full.hidden_states) == 3
    assert_close(loss, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), 1e-6)
    assert torch.equal(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, full.logits[:, [0, 3]])
    assert len(model.train()(ids, return_dict=False)) == 1  # no cache in training
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds, one of them"):
        model(ids, inputs_embeds=torch.zeros(1, 2, 16))


def test_the_trainer_trains_and_resumes(tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    def run(steps, **more):
        torch.manual_seed(3)
        model = make_model("linear-mamba", initializer_range=0.02)
        with torch.no_grad():
            for module in model.modules():
                getattr(module, "reset_parameters", lambda: None)()
        rows = [{"input_ids": row, "labels": row} for row in (torch.arange(16) * 2).repeat(64, 1) % 30 + 3]
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
            gradient_checkpointing=True, save_steps=6, logging_steps=1, disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(**more)
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    _, losses = run(12)
    assert losses[-1] < losses[0] - 1
    resumed, last = run(12, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert last[-1] == pytest.approx(losses[-1], rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-12")
    for x, y in zip(saved.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(x, y)
