"""TTT layers instead of self-attention, in models that transformers defines."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from ..layers.ttt import TTTLayer
from .cache import place_of, read_on
from .initialisation import draw_own
from .sequences import find_sequences

_NAMES = ("self_attn", "attn")  # what Llama-like and GPT-2-like blocks call their self-attention
Model = TypeVar("Model", bound=PreTrainedModel)


class TTTAttention(nn.Module):
    """A ``TTTLayer``, called as transformers calls the self-attention of a block.

    Args:
        layer: the layer.
        layer_idx: the block's number, which is its place in a cache.
    """

    def __init__(self, layer: TTTLayer, layer_idx: int) -> None:
        super().__init__()
        self.layer, self.layer_idx = layer, layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Map hidden_states ``[B, L, width]`` to the same shape; there are no attention weights.

        Args:
            hidden_states: the input.
            attention_mask: padding, of two dimensions, or as ``[B, 1, L, at least L]`` which key a token attends to.
            position_ids: where they start again, in a batch of one row, another sequence begins.
            cache: where to go on, and where the state is left.
            past_key_values: what transformers 5.6 calls it.
            encoder_hidden_states: refused, this is no cross-attention.
            kwargs: what else attention needs, such as rotary embeddings.

        Raises:
            ValueError: encoder_hidden_states are given, the padding has gaps, packed sequences are in several rows
                or there is a cache for them, or a cache goes on behind padding.
        """
        if encoder_hidden_states is not None:
            raise ValueError("a TTT layer stands in for self-attention; given encoder_hidden_states to attend to")
        cache = past_key_values if cache is None else cache
        sequences = find_sequences(attention_mask, position_ids, hidden_states.shape[1])
        place = None if cache is None else place_of(cache, self.layer_idx)
        return read_on(self.layer, hidden_states, sequences, place), None


def replace_attention(
    model: PreTrainedModel, layers: Sequence[int] | None = None, *, num_heads: int | None = None, **options: Any
) -> None:
    """Put new TTT layers instead of a model's self-attention; what is left of it keeps its weights.

    What was done is kept in ``model.config.ttt_attention``, so that ``with_ttt_attention`` can load what was saved.

    Args:
        model: whose blocks call their self-attention ``self_attn`` or ``attn``, as Llama's and GPT-2's do.
        layers: numbers of the blocks; None: all of them.
        num_heads: of the TTT layers; None: as many as the attention has.
        options: more of ``TTTLayer``, such as ``inner`` and ``mini_batch_size``.

    Raises:
        ValueError: no block has that attention, some were replaced before, or an option is out of range.
        TypeError: the model is none of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers (PreTrainedModel); given {type(model).__name__}")
    if getattr(model.config, "ttt_attention", None) is not None:
        replaced = model.config.ttt_attention.get("layers")
        raise ValueError(
            f"model must have its own attention in all blocks; given one with TTT layers in blocks {replaced}: "
            "name all blocks in one call of replace_attention"
        )
    config = model.config.get_text_config(decoder=True)
    num_heads = config.num_attention_heads if num_heads is None else num_heads
    found: dict[int, tuple[nn.Module, str]] = {
        int(index): (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in _NAMES and isinstance(index := getattr(child, "layer_idx", None), int)
    }
    chosen = sorted(found) if layers is None else list(layers)
    if not found or not set(chosen) <= found.keys():
        raise ValueError(f"layers must be blocks with self_attn or attn, {sorted(found)}; given {layers}")
    made = {}
    for index in chosen:  # all of them, before the first one is put in
        weight = next(getattr(*found[index]).parameters())
        layer = TTTLayer(config.hidden_size, num_heads, device=weight.device, dtype=weight.dtype, **options)
        made[index] = TTTAttention(layer, index)
    for index, attention in made.items():
        parent, name = found[index]
        setattr(parent, name, attention.train(parent.training))
    model.config.ttt_attention = {"layers": chosen, "num_heads": num_heads, **options}


def with_ttt_attention(model_class: type[Model]) -> type[Model]:
    """A class like ``LlamaForCausalLM`` whose models have the TTT layers that their configuration tells of.

    Its ``from_pretrained`` loads what was saved of a model after ``replace_attention``.
    """

    class Replaced(model_class):  # type: ignore[valid-type, misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            options = getattr(config, "ttt_attention", None)
            if options is None:
                raise ValueError("config must have ttt_attention, which replace_attention leaves there; given none")
            self.config.ttt_attention = None
            replace_attention(self, **options)

        def initialize_weights(self) -> None:
            super().initialize_weights()  # by each model in the model, which know nothing of TTT layers
            with torch.no_grad(), guard_torch_init_functions():  # what was loaded stays
                self.apply(draw_own)

    Replaced.__name__ = Replaced.__qualname__ = model_class.__name__  # as which it is saved
    return Replaced
