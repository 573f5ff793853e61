"""Where the sequences of a batch lie, from what transformers gives its attention: masks of two or four dimensions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..operators.transforms import has_values


class Sequences(NamedTuple):
    """The arguments of ``TTTLayer.forward`` that say where sequences lie, at most one of them given."""

    mask: Tensor | None = None  # bool [B, L]
    cu_seqlens: Tensor | None = None  # int64 [N + 1]

    @property
    def end_in_padding(self) -> bool:
        """Whether a row does."""
        return self.mask is not None and has_values(self.mask) and not bool(self.mask[:, -1].all())


_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the mask or the positions: the layers of a model are given the same ones, and a GPU's are looked at once."""


def find_sequences(attention_mask: Tensor | None, position_ids: Tensor | None, length: int) -> Sequences:
    """The sequences among the last ``length`` tokens.

    Args:
        attention_mask: ``[B, at least length]``, not zero for tokens; or ``[B, 1 or heads, length, at least length]``,
            which key a token attends to, bool or added to scores; or None.
        position_ids: ``[1 or B, length]`` or None. Where they start again, another sequence begins.
        length: of the call.

    Raises:
        TypeError: attention_mask is no tensor.
        ValueError: sequences are packed in several rows, or with padding.
    """
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        kind = type(attention_mask).__name__
        raise TypeError(f"attention_mask must be a tensor of two or four dimensions; given {kind}")
    if position_ids is not None and position_ids.dim() != 2:
        position_ids = None
    key = attention_mask if attention_mask is not None else position_ids
    if key is None:
        return Sequences()
    if key.is_cpu or key.is_inference() or not has_values(key):  # a look is cheap, or impossible
        return _find(attention_mask, position_ids, length)
    known = _found.get(key)
    if known is None or known[0] != (key._version, length):
        known = _found[key] = ((key._version, length), _find(attention_mask, position_ids, length))
    found: Sequences = known[1]
    return found


def _find(attention_mask: Tensor | None, position_ids: Tensor | None, length: int) -> Sequences:
    real: Tensor | None
    follows: Tensor | None
    if attention_mask is not None and attention_mask.dim() == 4:
        attended = attention_mask[:, 0, :, -length:]
        attended = attended if attended.dtype == torch.bool else attended == 0
        real = attended.diagonal(dim1=-2, dim2=-1)
        follows = attended.diagonal(-1, dim1=-2, dim2=-1)  # [B, length - 1]
    else:
        real = None if attention_mask is None else attention_mask[:, -length:] != 0
        follows = None if position_ids is None else position_ids[:, -length:].diff() > 0
    if real is not None and has_values(real) and bool(real.all()):
        real = None
    if follows is None or not has_values(follows):
        return Sequences(real)
    begins = ~follows if real is None else ~follows & real[:, 1:] & real[:, :-1]
    if not bool(begins.any()):
        return Sequences(real)
    if real is not None or len(begins) != 1:
        raise ValueError("packed sequences must be in a batch of one row without padding; given them in another batch")
    bounds = begins[0].nonzero().flatten() + 1
    return Sequences(cu_seqlens=F.pad(F.pad(bounds, (1, 0)), (0, 1), value=length))
