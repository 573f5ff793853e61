"""The shape of the language model, also from the settings of the original release."""

from collections.abc import Mapping
from typing import Any, get_args

from transformers import PreTrainedConfig

from ..checks import check_choice, check_integer
from ..inner_models import INNER_MODELS
from ..layers.forgetting import GATES
from ..layers.ttt import Backbone

_LAYER = ("inner", "backbone", "mini_batch_size", "base_lr", "conv_kernel", "max_inner_step", "forget", "backend")
_RELEASE = {  # the release's names of what has another one here
    "ttt_layer_type": "inner",
    "ttt_base_lr": "base_lr",
    "pre_conv": "block_conv",
}
_RELEASE_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "mini_batch_size",
    "conv_kernel", "initializer_range", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


class TTTConfig(PreTrainedConfig):  # type: ignore[misc]
    """The shape of ``TTTForCausalLM``; it takes all other arguments of ``PreTrainedConfig``, too.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: size of embeddings and hidden states.
        intermediate_size: hidden size of the feed-forward networks.
        num_hidden_layers: residual blocks.
        num_attention_heads: heads of each TTT layer.
        inner: see ``TTTLayer``, as for all down to ``backend``.
        backbone: the Mamba backbone has convolutions and a gate.
        mini_batch_size: K.
        rotary_base: ``TTTLayer``'s ``rope_theta``; positions restart in every mini-batch.
        base_lr: η_base.
        conv_kernel: taps of the convolutions.
        max_inner_step: bound on inner steps, if there is to be one.
        forget: by what share weights decay towards the initial ones.
        backend: what computes the layers.
        block_conv: whether each block begins with a convolution of its own.
        initializer_range: standard deviation of what linear maps and embeddings are drawn from.
        use_cache: whether a call returns a cache, but in training.
        tie_word_embeddings: whether scores are products with the embeddings.
    """

    model_type = "ttt_lm"

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    inner: str = "linear"
    backbone: str = "mamba"
    mini_batch_size: int = 16
    rotary_base: float = 10000.0
    base_lr: float = 1.0
    conv_kernel: int = 4
    max_inner_step: float | None = None
    forget: str = "none"
    backend: str = "auto"
    block_conv: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what the layers do not.

        Raises:
            ValueError: a size is no positive integer, or a choice unknown.
        """
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            check_integer(name, getattr(self, name))
        check_choice("inner", self.inner, tuple(INNER_MODELS))
        check_choice("backbone", self.backbone, get_args(Backbone))
        check_choice("forget", self.forget, tuple(GATES))
        super().__post_init__(**kwargs)

    @property
    def layer_options(self) -> dict[str, Any]:
        """What each ``TTTLayer`` is made with, but its width and heads."""
        return {name: getattr(self, name) for name in _LAYER} | {"rope_theta": self.rotary_base}

    @classmethod
    def from_release(cls, settings: Mapping[str, Any]) -> "TTTConfig":
        """The shape of a model of ``ttt-lm-pytorch``, from the contents of its ``config.json``.

        Raises:
            ValueError: it is of a kind that there is not here.
        """
        fixed = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
        for name, value in fixed.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{name} of a release's model must be {value}; given {settings[name]}")
        gate, shared = settings.get("use_gate", False), settings.get("share_qk", False)
        if gate != shared:
            raise ValueError(f"use_gate and share_qk of a release's model must agree; given {gate} and {shared}")
        given = {name: settings[name] for name in _RELEASE_SAME if name in settings}
        given |= {ours: settings[theirs] for theirs, ours in _RELEASE.items() if theirs in settings}
        rope = settings.get("rope_theta", 10000.0)
        return cls(**given, backbone="mamba" if gate else "transformer", rotary_base=rope)
