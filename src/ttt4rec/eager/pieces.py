"""What the steps of both inner models are made of, in pairs of tokens or in blocks of them, and when it is which."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import Scan
from .blocks import BLOCK, BlockedLayer, BlockedWeights, BlockRates
from .gelu import Gelu
from .tiles import DualLayer, InnerGradient, InnerWeights, OutputNorm, Rates


class Pieces(NamedTuple):
    """Another set of pieces than PyTorch's operators computes the same, such as one of fused kernels.

    Each has the methods of the one it stands for. ``operand`` is in which dtype tokens are read and products' operands
    are, ``rounded`` brings there what is kept.
    """

    block: int = 1  # tokens of a mini-batch are filled up to a multiple of it
    ones: int = 1  # features behind those of keys and queries: a one, and zeros
    operand: Callable[[Scan], torch.dtype] = lambda scan: scan.weights[0].dtype
    rounded: Callable[[Tensor], Tensor] = lambda x: x
    rates: Any = Rates
    weights: Any = InnerWeights
    layer: Any = DualLayer
    inner_gradient: Any = InnerGradient
    output_norm: Any = OutputNorm
    gelu: Any = Gelu


PAIRS = Pieces()
BLOCKS = Pieces(block=BLOCK, rates=BlockRates, weights=BlockedWeights, layer=BlockedLayer)


def pieces_for(scan: Scan) -> Pieces:
    """Pairs of all tokens of a mini-batch or, where it has more than a block, of a block's tokens."""
    return PAIRS if scan.token_scale.numel() <= BLOCK else BLOCKS
