"""ttt4rec with Hugging Face's libraries (extra ``hf``): layers, a language model and recommenders."""

from ..extras import missing

try:
    from .attention import TTTAttention, replace_attention, with_ttt_attention
    from .cache import TTTCache, TTTCacheLayer
    from .configuration import TTTConfig
    from .hub import from_pretrained, model_card, push_to_hub, save_pretrained
    from .language_model import TTTForCausalLM, TTTModel
except ModuleNotFoundError as error:
    raise missing("ttt4rec.hf", error) from error

__all__ = [
    "TTTAttention",
    "TTTCache",
    "TTTCacheLayer",
    "TTTConfig",
    "TTTForCausalLM",
    "TTTModel",
    "from_pretrained",
    "model_card",
    "push_to_hub",
    "replace_attention",
    "save_pretrained",
    "with_ttt_attention",
]
