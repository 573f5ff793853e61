"""What operators are given, one type an operator: a backend's function takes it whole and reads it by name.

Shapes: B sequences or rows of a batch, L tokens, H heads, D head dimension, C = H·D width, K mini-batch size, F hidden
features of TTT-MLP, N sequences in all.

Numbers in brackets are equations of docs/mathematics.md.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .inner_models import INNER_MODELS, InnerModel, Record

MAX_HEAD_DIM, MAX_MINI_BATCH_SIZE = 128, 64  # of the fused kernels; longer mini-batches are cut into blocks so long


class Scan(NamedTuple):
    """An inner loop over sequences that start at a mini-batch boundary. docs/mathematics.md says what it computes."""

    q: Tensor  # [B, L, H, D] any float dtype, as k and v; computed in that of the weights
    k: Tensor
    v: Tensor
    inner_lr: Tensor  # lr [B, L, H], float32 or float64
    token_scale: Tensor  # s [K], not negative
    weights: tuple[Tensor, ...]  # incoming W1, b1[, W2, b2] [N, H, ...], float32 or float64; may be expanded from one
    ln_weight: Tensor  # γ [H, D]
    ln_bias: Tensor  # β [H, D]
    starts: Tensor | None  # first token of each sequence in the flattened tokens [N]; None: every row is one
    lengths: Tensor | None  # [N], or None
    eps: float  # added to the layer norm's variance
    segment: int  # mini-batches between two checkpoints
    inner: str  # the inner model's name; an operator's own, and no argument of its schema
    log_decay: Tensor | None = None  # ln a [B, L, H], how much stays of what was learned; None: all of it
    initial: tuple[Tensor, ...] = ()  # with it, W̄ towards which the weights decay [H, ...], in their dtype

    @property
    def model(self) -> InnerModel:
        """The inner model."""
        return INNER_MODELS[self.inner]

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is given by tokens: q, k, v and the inner rates."""
        return self[:4]

    @property
    def hidden(self) -> int:
        """F, 0 if there are no hidden features."""
        return self.model.hidden(self.weights)

    def new_checkpoints(self) -> Tensor:
        """Memory for the weights before every segment that is not its sequence's first, ``[number, H, weights]``.

        The checkpoint of a segment that begins at token t of all is number ``t // (segment K) - 1``. Numbers that no
        segment has are zeros, so that a result is the same whenever it is computed. Two are spare: whether a size is 0
        or 1 would become a guard of traced programs.
        """
        number = self.q.shape[0] * self.q.shape[1] // (self.segment * self.token_scale.shape[0]) + 2
        return self.weights[0].new_zeros(number, self.q.shape[2], sum(w.shape[2:].numel() for w in self.weights))


class TokenStep(NamedTuple):
    """One token of each of B streams, whose states in the records of a pool are advanced in place."""

    q: Tensor  # [B, H, D] any float dtype, as k and v; computed in that of the records
    k: Tensor
    v: Tensor
    inner_lr: Tensor  # lr [B, H]
    token_scale: Tensor  # s [K]
    ln_weight: Tensor  # γ [H, D]
    ln_bias: Tensor  # β [H, D]
    slots: Tensor  # the streams' places in the pool, all different, int64 [B]
    offset: Tensor  # how many tokens of their mini-batch they have read, int64 [B]
    records: Tensor  # of all streams of the pool [N, H, R], contiguous; ``record`` tells what is in one
    inner: str  # the inner model's name
    hidden: int  # F, 0 if there are no hidden features
    eps: float
    log_decay: Tensor | None = None  # as in Scan [B, H]
    initial: Tensor | None = None  # with it, W̄ and b̄ of every layer as they lie in a record [H, numbers]

    @property
    def record(self) -> Record:
        """How a record is laid out."""
        return INNER_MODELS[self.inner].record(self.q.shape[-1], self.hidden, self.token_scale.shape[0])


class Projection(NamedTuple):
    """Three views of the input and its inner rates, ``base_lr · sigmoid(x w_lr + b_lr) / D``."""

    x: Tensor  # [B, L, C]
    weights: tuple[Tensor, ...]  # each [C, C], output features first
    lr_weight: Tensor  # w_lr [H, C]
    lr_bias: Tensor  # b_lr [H]
    cos: Tensor  # of the angles at every place in a mini-batch [K, D/2], float32 or float64
    sin: Tensor
    positions: Tensor  # every token's place in its mini-batch, [L] or [B, L]
    rotated: int  # how many of the views are rotated
    base_lr: float  # η_base
    dtype: torch.dtype  # in which to multiply, and of the views


class Convolution(NamedTuple):
    """Causal depthwise convolutions (33) of one input, then RoPE on every y."""

    x: Tensor  # [B, lead + L, C]; the first ``lead`` tokens are context and have no output
    weights: tuple[Tensor, ...]  # each [C, taps]
    biases: tuple[Tensor, ...]  # each [C]
    cos: Tensor | None  # of the angles at every place in a mini-batch [K, D/2]; None: no rotation
    sin: Tensor | None
    positions: Tensor | None  # every output's place in its mini-batch, [L] or [B, L]
    offsets: Tensor | None  # how far back an output may read [B, L]; None: to the beginning of x
    lead: int


class Output(NamedTuple):
    """y of (34), zero at padding."""

    o: Tensor  # the inner loop's outputs [B, L, H, D]
    gate: Tensor | None  # [B, L, C]
    mask: Tensor | None  # bool [B, L], True for tokens; None: all are
    norm_weight: Tensor  # γ [C]
    norm_bias: Tensor  # β [C]
    weight: Tensor  # [C, C], output features first
    eps: float  # added to the layer norm's variance


class FullSoftmax(NamedTuple):
    """Negative log-likelihoods of items under the softmax over all items."""

    h: Tensor  # hidden states [N, C]
    table: Tensor  # embeddings [num_items + 1, C]; row 0 is padding
    items: Tensor  # int64 [N], from 1 to num_items


class ItemTable(NamedTuple):
    """A table of which an index is to be made."""

    table: Tensor  # embeddings [num_items + 1, C], contiguous; row 0 is padding
    largest: float  # no number of an item is larger in size


class IndexedItems(NamedTuple):
    """A table with codes of one byte for its numbers, laid out as the backend that made them wants it."""

    table: Tensor  # as it was given, no copy
    codes: Tensor  # in groups of items, the last one filled up
    scale: Tensor  # of each item: a code times this is about a number of the table
    size: Tensor  # of each item: its codes times its scale have no larger norm
    error: Tensor  # of each item: times the norm of a hidden state, how far its score may be above that of the codes
    largest: float  # no item has a larger norm


class BestItems(NamedTuple):
    """The best items of hidden states, equal scores in the order of the catalogue."""

    catalogue: IndexedItems
    h: Tensor  # [N, C], contiguous
    k: int  # how many, from 1 to num_items
    seen: tuple[Tensor, Tensor] | None  # rows and items to leave out of them, int64 [P], contiguous, in any order


class Around(NamedTuple):
    """What surrounds a whole layer's inner loop; tensors of a CPU, contiguous, of one float dtype."""

    projections: tuple[Tensor, ...]  # query, key, value [C, C]; of the Mamba backbone query, value, gate
    output: Tensor  # [C, C]
    lr_weight: Tensor  # w_lr [H, C]
    lr_bias: Tensor  # b_lr [H]
    token_offset: Tensor  # τ [K]
    ln_weight: Tensor  # γ [H, D]
    ln_bias: Tensor  # β [H, D]
    norm_weight: Tensor  # of the norm behind the inner loop [C]
    norm_bias: Tensor
    convolutions: tuple[Tensor, ...]  # of the Mamba backbone: query's weight [C, taps] and bias [C], key's
    cos: Tensor  # of the angles at every place in a mini-batch [K, D/2]
    sin: Tensor
    base_lr: float
    lr_scale: float
    norm_eps: float
    eps: float  # added to the inner layer norm's variance
    inner: str  # the inner model's name


class WholeLayer(NamedTuple):
    """A whole layer, of which sequences that begin are computed at once."""

    around: Around
    weights: tuple[Tensor, ...]  # initial W1, b1[, W2, b2] [H, ...], as the others
    segment: int  # mini-batches between two checkpoints
    forgetting: tuple[Tensor, ...] = ()  # of its gates the bias [H] and, if they read the input, the weight [H, C]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that have gradients; first the three of what is behind the inner loop."""
        a = self.around
        return (
            a.output, a.norm_weight, a.norm_bias, a.lr_weight, a.lr_bias, a.token_offset, a.ln_weight, a.ln_bias,
            *a.projections, *a.convolutions, *self.forgetting, *self.weights,
        )  # fmt: skip

    @property
    def hidden(self) -> int:
        """F, 0 if there are no hidden features."""
        return INNER_MODELS[self.around.inner].hidden(self.weights)


class Forget(NamedTuple):
    """How a layer forgets."""

    bias: Tensor  # of its gates [H]
    weight: Tensor | None  # [H, C]; None: whatever the input is
    initial: tuple[Tensor, ...]  # W1, b1[, W2, b2] [H, ...]


Step = Callable[..., Tensor | None]
"""Advances streams: of inputs [B, C], or items [B], and slots, int64 [B], outputs [B, C]; None if they are wrong.

A model's step may be given rows [B, C] to read instead of the embeddings of the items.
"""


class LayerParts(NamedTuple):
    """A whole layer and its pool, whose streams are advanced in place by one token each."""

    around: Around
    records: Tensor  # of the pool [N, H, R]; as in TokenStep
    position: Tensor  # tokens that the pool's streams have read, int64 [N]
    context: Tensor | None  # of the pool's streams, the last inputs of the convolutions [N, taps - 1, C]
    hidden: int  # F, 0 if there are no hidden features
    adapt: bool  # whether there are inner rates at all
    max_inner_step: float  # infinite if there is no bound
    forget: Forget | None = None  # None: it does not


class NormParts(NamedTuple):
    """A norm over the width; without a bias an RMS norm."""

    weight: Tensor  # [C]
    bias: Tensor | None
    eps: float


class BlockParts(NamedTuple):
    """A residual block: optionally a convolution, a layer, a feed-forward network, each behind a norm."""

    layer: LayerParts
    mixer_norm: NormParts
    ffn_norm: NormParts
    gate: Tensor | None  # of SwiGLU [hidden, C]; None: the network is down(gelu(up(x)))
    up: tuple[Tensor, Tensor | None]  # weight [hidden, C] and bias
    down: tuple[Tensor, Tensor | None]  # weight [C, hidden] and bias
    conv: tuple[NormParts, Tensor, Tensor, Tensor] | None  # norm, weight [C, taps], bias, and the streams' contexts


class ModelParts(NamedTuple):
    """A whole model and its pools, whose streams are advanced in place by one item each."""

    table: Tensor  # embeddings [num_items + 1, C]
    embedding_norm: NormParts
    blocks: tuple[BlockParts, ...]
    norm: NormParts
