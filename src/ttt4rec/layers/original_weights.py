"""Weights of the original releases, ``ttt-lm-pytorch`` and TTT4Rec's, under our names."""

from collections.abc import Mapping

from torch import Tensor, nn

_LAYER_NAMES = {
    "q_proj.weight": "query.weight",
    "k_proj.weight": "key.weight",
    "v_proj.weight": "value.weight",
    "o_proj.weight": "output.weight",
    "g_proj.weight": "gate.weight",
    "conv_q.weight": "query_conv.weight",
    "conv_q.bias": "query_conv.bias",
    "conv_k.weight": "key_conv.weight",
    "conv_k.bias": "key_conv.bias",
    "post_norm.weight": "norm.weight",
    "post_norm.bias": "norm.bias",
    "learnable_ttt_lr_weight": "inner_lr_weight",
    "learnable_ttt_lr_bias": "inner_lr_bias",
    "learnable_token_idx": "token_offset",
    "ttt_norm_weight": "inner_norm_weight",
    "ttt_norm_bias": "inner_norm_bias",
    "W1": "W1",
    "b1": "b1",
    "W2": "W2",
    "b2": "b2",
}
_BLOCK_NAMES = {
    "seq_norm.weight": "mixer_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn.gate.weight",
    "mlp.up_proj.weight": "ffn.up.weight",
    "mlp.down_proj.weight": "ffn.down.weight",
    "conv.norm.weight": "conv_norm.weight",
    "conv.conv.weight": "conv.weight",
    "conv.conv.bias": "conv.bias",
} | {f"seq_modeling_block.{theirs}": f"mixer.{ours}" for theirs, ours in _LAYER_NAMES.items()}
_MODEL_NAMES = {
    "item_embedding.weight": "embedding.weight",
    "LayerNorm.weight": "embedding_norm.weight",
    "LayerNorm.bias": "embedding_norm.bias",
    "ttt_layers.norm.weight": "norm.weight",
}
_UNUSED = "ttt_layers.embed_tokens.weight"  # the language model's table, which the release's recommender leaves alone
_BUFFERS = ("token_idx", "rotary_emb.inv_freq")  # constants that the release stores and we compute


def load_release_layer(layer: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a release layer's weights into a ``TTTLayer``; see ``TTTLayer.load_release_state_dict``."""
    _load(layer, state_dict, _LAYER_NAMES)


def load_release_block(block: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a release block's weights into a ``Block``."""
    _load(block, state_dict, _BLOCK_NAMES)


def load_release_model(model: nn.Module, state_dict: Mapping[str, Tensor], num_blocks: int) -> None:
    """Load the weights of a release's recommender into a ``TTT4Rec``; see ``TTT4Rec.load_release_checkpoint``."""
    names = dict(_MODEL_NAMES)
    for i in range(num_blocks):
        names |= {f"ttt_layers.layers.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in _BLOCK_NAMES.items()}
    _load(model, {key: x for key, x in state_dict.items() if key != _UNUSED}, names)


def load_release_language_model(
    model: nn.Module, state_dict: Mapping[str, Tensor], num_blocks: int, tied: bool
) -> None:
    """Load the weights of a release's language model into one of ``TTTForCausalLM``'s form.

    Args:
        model: with ``model.embed_tokens``, ``model.layers``, ``model.norm`` and ``lm_head``.
        state_dict: the release's.
        num_blocks: of the model.
        tied: whether ``lm_head`` is the embeddings, which then may stand for both.
    """
    names = {name: name for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for i in range(num_blocks):
        names |= {f"model.layers.{i}.{theirs}": f"model.layers.{i}.{ours}" for theirs, ours in _BLOCK_NAMES.items()}
    if tied and "model.embed_tokens.weight" in state_dict:
        state_dict = {"lm_head.weight": state_dict["model.embed_tokens.weight"], **state_dict}
    _load(model, state_dict, names)


def _load(module: nn.Module, state_dict: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    given = {key: x for key, x in state_dict.items() if not _is_buffer(key)}
    unknown = sorted(key for key in given if key not in names)
    own = module.state_dict()
    missing = sorted(theirs for theirs, ours in names.items() if ours in own and theirs not in given)
    extra = sorted(key for key in given if key in names and names[key] not in own)
    foreign = sorted(own.keys() - set(names.values()))
    if unknown or missing or extra or foreign:
        raise ValueError(
            f"release weights do not fit this module: unknown {unknown}, missing {missing}, "
            f"for parts it does not have {extra}, its own that no release has {foreign}"
        )
    renamed = {}
    for theirs, x in given.items():
        target = own[names[theirs]]
        if x.numel() != target.numel() or x.squeeze().shape != target.squeeze().shape:
            raise ValueError(f"{theirs} must have shape {list(target.shape)}; given {list(x.shape)}")
        renamed[names[theirs]] = x.reshape(target.shape)
    module.load_state_dict(renamed)


def _is_buffer(key: str) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in _BUFFERS)
