"""ttt4rec with Hugging Face's libraries (extra ``hf``): layers, a language model and recommenders.

Names are imported when they are first asked for: what has to do with the Hub does without transformers, whose import
takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..extras import missing

if TYPE_CHECKING:
    from .attention import TTTAttention, replace_attention, with_ttt_attention
    from .cache import TTTCache, TTTCacheLayer
    from .configuration import TTTConfig
    from .hub import from_pretrained, model_card, push_to_hub, save_pretrained
    from .language_model import TTTForCausalLM, TTTModel

_PLACES = {
    "TTTAttention": "attention",
    "TTTCache": "cache",
    "TTTCacheLayer": "cache",
    "TTTConfig": "configuration",
    "TTTForCausalLM": "language_model",
    "TTTModel": "language_model",
    "from_pretrained": "hub",
    "model_card": "hub",
    "push_to_hub": "hub",
    "replace_attention": "attention",
    "save_pretrained": "hub",
    "with_ttt_attention": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise missing(f"ttt4rec.hf.{name}", error) from error


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
