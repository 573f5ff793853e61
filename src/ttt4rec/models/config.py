"""The shape of a recommender: TTT4RecConfig."""

import dataclasses
from typing import Any, get_args

from ..checks import check_integer, check_positive, is_number
from ..fields import check_choices, choice
from ..inner_models import INNER_MODELS
from ..layers.forgetting import GATES
from ..layers.ttt import Backbone
from .blocks import FEED_FORWARDS, NORMS
from .event_times import TIMES
from .mixers import MIXERS
from .presets import preset


@dataclasses.dataclass(frozen=True)
class TTT4RecConfig:
    """The model's shape; the defaults are the published TTT4Rec's.

    Attributes:
        num_items: number of items; their ids are 1 .. num_items, 0 is padding.
        width: size of embeddings and hidden states.
        num_blocks: residual blocks.
        num_heads: heads of each mixer.
        mixer: what reads the history.
        inner: TTT's inner model.
        backbone: TTT's backbone.
        mini_batch_size: tokens in a mini-batch of TTT, K.
        rope_theta: base of the rotary frequencies.
        base_lr: TTT's η_base.
        conv_kernel: taps of the convolutions.
        block_conv: whether each block begins with a convolution of its own.
        max_inner_step: bound on TTT's inner steps, if there is to be one; see ``TTTLayer``.
        forget: by what share TTT's weights decay towards the initial ones.
        norm: normalisation before each sub-layer and at the end.
        ffn: feed-forward network, if there is to be one.
        ffn_width: its hidden size.
        gates: multiply what mixer and feed-forward network add to a hidden state by gates of that state; LiGR's blocks.
        dropout: share of the embedded history's features that is dropped.
        max_len: items of history that the model is trained and evaluated for.
        hide_rate: share of the targets that BERT4Rec hides in a training step; the last of a history always is.
        times: what is known of the times of events.
    """

    num_items: int
    width: int = 64
    num_blocks: int = 1
    num_heads: int = 4
    mixer: str = choice("ttt", MIXERS)
    inner: str = choice("mlp", INNER_MODELS)
    backbone: str = choice("transformer", get_args(Backbone))
    mini_batch_size: int = 8
    rope_theta: float = 1000.0
    base_lr: float = 1.0
    conv_kernel: int = 4
    block_conv: bool = False
    max_inner_step: float | None = None
    forget: str = choice("none", GATES)
    norm: str = choice("rms", NORMS)
    ffn: str = choice("swiglu", FEED_FORWARDS)
    ffn_width: int = 256
    gates: bool = False
    dropout: float = 0.2
    max_len: int = 50
    hide_rate: float = 0.2
    times: str = choice("none", TIMES)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: one is out of range.
        """
        sizes = (
            "num_items",
            "width",
            "num_blocks",
            "num_heads",
            "mini_batch_size",
            "conv_kernel",
            "ffn_width",
            "max_len",
        )
        for name in sizes:
            check_integer(name, getattr(self, name))
        if self.width % self.num_heads or self.width // self.num_heads % 2:
            raise ValueError(
                f"width must be num_heads times an even head dimension; given {self.width} and {self.num_heads}"
            )
        check_choices(self)
        for name in ("block_conv", "gates"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; given {getattr(self, name)!r}")
        check_positive("rope_theta", self.rope_theta)
        check_positive("base_lr", self.base_lr)
        if self.max_inner_step is not None:
            check_positive("max_inner_step", self.max_inner_step)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; given {self.dropout!r}")
        if not is_number(self.hide_rate) or not 0 <= self.hide_rate <= 1:
            raise ValueError(f"hide_rate must be from 0 to 1; given {self.hide_rate!r}")
        if TIMES[self.times].gaps and not MIXERS[self.mixer].causal:
            raise ValueError(f"times must be none with mixer {self.mixer}, which hides items; given {self.times!r}")

    def identity(self) -> dict[str, Any]:
        """The fields by name, to compare models by; times, which older ones do not have, only if they are known."""
        fields = dataclasses.asdict(self)
        return fields if TIMES[self.times].gaps else {name: x for name, x in fields.items() if name != "times"}

    @staticmethod
    def from_preset(name: str, num_items: int, **given: Any) -> "TTT4RecConfig":
        """The shape of a preset, ``"best"``, ``"paper"`` or ``"fast"``; given fields have the values given.

        Raises:
            ValueError: the preset is unknown, or a field is out of range.
        """
        return TTT4RecConfig(num_items, **{**preset(name).model, **given})
