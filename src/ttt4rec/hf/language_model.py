"""A language model of TTT blocks, as transformers' own models are."""

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..layers.original_weights import load_release_language_model
from ..layers.ttt import TTTLayer
from ..models.blocks import Block, make_norm
from .cache import TTTCache, place_of, read_on
from .configuration import TTTConfig
from .initialisation import draw_own
from .sequences import find_sequences

Output = TypeVar("Output", BaseModelOutputWithPast, CausalLMOutputWithPast)
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the cache in outputs; 5.6 has the second name."""


class TTTPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What ``TTTModel`` and ``TTTForCausalLM`` share: how weights are drawn and what is supported."""

    config_class = TTTConfig
    config: TTTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # generate then refuses what would have to take tokens back
    _no_split_modules = ["Block"]  # noqa: RUF012 as transformers declares it

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        draw_own(module)


class TTTModel(TTTPreTrainedModel):
    """Embeddings, residual blocks of TTT layers, and a norm.

    Args:
        config: the shape.
    """

    def __init__(self, config: TTTConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.layers = nn.ModuleList(
            Block(
                width,
                TTTLayer(width, config.num_attention_heads, **config.layer_options),
                ffn_width=config.intermediate_size,
                conv_kernel=config.conv_kernel if config.block_conv else None,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = make_norm("rms", width)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read tokens.

        Args:
            input_ids: int64 ``[B, L]``.
            attention_mask: ``[B, at least L]``, 1 for tokens and 0 for padding, which may be on either side.
            position_ids: ``[1, L]``: where they start again, another sequence begins. They say nothing else: a TTT
                layer knows the order of its tokens.
            cache: where to go on, and where the states are left.
            past_key_values: what transformers 5.6 calls it.
            inputs_embeds: ``[B, L, hidden_size]``, instead of input_ids.
            use_cache: whether to return a cache, made if none is given; by default as configured, but not in training.
            output_hidden_states: whether to return what each block is given, and the last hidden states.
            return_dict: whether to return a ``BaseModelOutputWithPast`` or a tuple.
            kwargs: what other models take; ignored.

        Returns:
            ``last_hidden_state`` ``[B, L, hidden_size]``, the cache and ``hidden_states``.

        Raises:
            ValueError: input_ids and inputs_embeds are both given or both missing, or sequences are laid out as no TTT
                layer can read them, see ``TTTAttention``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        h: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        sequences = find_sequences(attention_mask, position_ids, h.shape[1])
        seen = []
        for i, block in enumerate(self.layers):
            seen.append(h)
            place = None if cache is None else place_of(cache, i)
            read = partial(read_on, block, sequences=sequences, place=place)
            h = self._gradient_checkpointing_func(read, h) if self._checkpoints else read(h)
        h = self.norm(h)
        hidden_states = (*seen, h) if _or(output_hidden_states, self.config.output_hidden_states) else None
        output = BaseModelOutputWithPast(last_hidden_state=h, hidden_states=hidden_states, **{_CACHE: cache})
        return output if _or(return_dict, self.config.return_dict) else output.to_tuple()

    @property
    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing and self.training

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        if self._checkpoints or not _or(use_cache, self.config.use_cache and not self.training):
            return None  # a block that is run again must not find its own state
        return TTTCache(len(self.layers)) if given is None else given


class TTTForCausalLM(TTTPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """``TTTModel`` with scores of the next token: the models of the original release, and others of its kind.

    Args:
        config: the shape.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 as transformers declares it

    def __init__(self, config: TTTConfig) -> None:
        super().__init__(config)
        self.model = TTTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Score next tokens; arguments and errors as for ``TTTModel.forward``, and besides:

        Args:
            input_ids: see there, as for those down to inputs_embeds.
            attention_mask: see there.
            position_ids: see there.
            cache: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: tokens to be predicted, int64 ``[B, L]``, shifted here; -100 where none is.
            use_cache: see there.
            output_hidden_states: see there.
            return_dict: whether to return a ``CausalLMOutputWithPast`` or a tuple.
            logits_to_keep: of how many tokens at the end, or of which, scores are computed; 0: all.
            kwargs: what the loss takes, such as ``num_items_in_batch``.

        Returns:
            ``loss`` if labels are given, ``logits`` ``[B, L, vocab_size]``, the cache and ``hidden_states``.
        """
        read = self.model(
            input_ids, attention_mask, position_ids, cache, past_key_values, inputs_embeds, use_cache,
            output_hidden_states, return_dict=True,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        h = read.last_hidden_state
        logits = self.lm_head(h if isinstance(kept, int) else h[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=read.hidden_states, **{_CACHE: read.get(_CACHE)}
        )
        return output if _or(return_dict, self.config.return_dict) else output.to_tuple()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a call of ``generate``'s.

        Raises:
            ValueError: a prompt is padded on the right, where its continuation is to stand.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise ValueError("prompts must be padded on the left for generate; given an attention_mask that ends in 0")
        return inputs

    def load_release_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the weights of a language model of the original ``ttt-lm-pytorch``.

        Its configuration becomes ours by ``TTTConfig.from_release``.

        Raises:
            ValueError: a key is missing or unknown, or a shape does not fit; nothing is loaded then.
        """
        load_release_language_model(self, state_dict, self.config.num_hidden_layers, self.config.tie_word_embeddings)


def _or(given: bool | None, otherwise: bool) -> bool:
    return otherwise if given is None else given


AutoConfig.register(TTTConfig.model_type, TTTConfig)
AutoModel.register(TTTConfig, TTTModel)
AutoModelForCausalLM.register(TTTConfig, TTTForCausalLM)
