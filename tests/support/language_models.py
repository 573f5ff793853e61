"""Small language models with TTT layers; transformers, whose import takes seconds, is imported when one is made."""

import copy

import torch

VOCABULARY = 40
MODELS = {
    "linear-mamba": ("ours", {"inner": "linear", "backbone": "mamba", "block_conv": True}),
    "mlp-transformer": ("ours", {"inner": "mlp", "backbone": "transformer", "forget": "token"}),
    "llama": ("llama", {"layers": None, "inner": "mlp"}),
    "llama-second": ("llama", {"layers": [1], "backbone": "mamba"}),
    "gpt2-first": ("gpt2", {"layers": [0], "inner": "mlp"}),
}
"""Ours, and those of transformers with some of their attention replaced."""


def make_model(name, **more):
    """One of ``MODELS`` in evaluation mode, with weights so large that every part of it matters to what it says."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from ttt4rec.hf import TTTConfig, TTTForCausalLM, replace_attention

    kind, options = MODELS[name]
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **more}
    if kind == "ours":
        model = TTTForCausalLM(TTTConfig(**sizes, intermediate_size=24, mini_batch_size=4, **options))
    else:
        config = LlamaConfig(**sizes, intermediate_size=24) if kind == "llama" else GPT2Config(**sizes)
        model = LlamaForCausalLM(config) if kind == "llama" else GPT2LMHeadModel(config)
        replace_attention(model, mini_batch_size=4, **options)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.3 * torch.randn_like(x))
    return model.eval()


def exact_and_allowed(model, ids, **given):
    """Logits in float64 of a whole call, and twice the widest error of such calls in float32.

    These are the model's own and three whose weights moved by their rounding: of few numbers one error says little.
    """
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, **given).logits
        moved = copy.deepcopy(model)
        errors = [(model(ids, **given).logits - exact).abs().max().item()]
        for _ in range(3):
            for x, own in zip(moved.parameters(), model.parameters(), strict=True):
                x.copy_(own * (1 + torch.finfo(x.dtype).eps * (torch.rand_like(own) - 0.5)))
            errors.append((moved(ids, **given).logits - exact).abs().max().item())
    return exact, 2 * max(errors)


def prompts(B=2, L=6):
    """Tokens that are no special ones."""
    return torch.randint(3, VOCABULARY, (B, L))
