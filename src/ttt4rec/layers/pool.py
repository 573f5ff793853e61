"""StatePool: the states of many streams, kept in one place and advanced there one token at a time."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..inner_models import INNER_MODELS, matrices
from ..operators.step import write_rows
from ..precision import without_autocast
from .state import TTTState
from .validation import check_conv_state, check_pending_log_decay, check_slots, check_state


class Streaming(Protocol):
    """A layer whose streams a pool keeps."""

    inner: str
    mini_batch_size: int

    @property
    def forgets(self) -> bool:
        """Whether its weights decay towards the initial ones."""

    def initial_state(self) -> tuple[Sequence[Tensor], tuple[Tensor, Tensor]]:
        """What a stream starts with, as it is now.

        The inner model's weights, and γ and β of the inner layer norm ``[H, D]``.
        """


class StatePool:
    """The states of ``num_slots`` streams of a TTT layer, preallocated; every slot begins as a new stream.

    ``TTTLayer.make_pool`` makes one, ``TTTLayer.step`` advances streams in it, ``read`` and ``write`` exchange
    ``TTTState``. Besides the tokens of an unfinished mini-batch it keeps their gradients, so that a step computes none
    twice; ``docs/serving.md`` tells why.

    Args:
        num_slots: number of streams N, on the device of the layer's parameters.
        layer: whose streams they are. Its parameters are looked up when streams start: a parametrised one is another
            tensor every time, and one that was loaded may have taken another's place.
        context: shape of the convolutions' context ``(conv_kernel - 1, width)``, with the Mamba backbone.

    Attributes:
        position: tokens seen, int64 ``[N]``.
        conv: the last inputs of the convolutions ``[N, conv_kernel - 1, width]``, or None.
        layer: see above; a layer steps its own pools only.
        records: what the inner loop needs of a stream and head ``[N, H, R]``, laid out as ``inner_models.Record``.
        hidden: F, 0 if there are no hidden features.
        prepared: the step's call of compiled code, and for what it stands; see ``standing.prepared``.

    Raises:
        ValueError: num_slots is below 1, or the layer's weights are split among processes.
    """

    def __init__(
        self,
        num_slots: int,
        layer: Streaming,
        context: tuple[int, int] | None = None,
    ) -> None:
        if not isinstance(num_slots, int) or num_slots < 1:
            raise ValueError(f"num_slots must be an integer of at least 1; given {num_slots!r}")
        self.num_slots, self.mini_batch_size, self.layer = num_slots, layer.mini_batch_size, layer
        initial, layer_norm = _whole(layer)
        H, D = layer_norm[0].shape
        self._model = INNER_MODELS[layer.inner]
        self.hidden = self._model.hidden(initial)
        self._record = self._model.record(D, self.hidden, self.mini_batch_size)
        like = initial[0].new_empty(0, dtype=torch.promote_types(initial[0].dtype, torch.float32)).detach()
        self.records = like.new_zeros(num_slots, H, self._record.size)
        self.position = like.new_zeros(num_slots, dtype=torch.int64)
        self.conv = None if context is None else like.new_zeros(num_slots, *context)
        self.prepared: Any = None
        self.reset(torch.arange(num_slots, device=like.device))

    def __getstate__(self) -> dict[str, Any]:
        """A copy prepares its own calls: addresses belong to this pool in this process."""
        return self.__dict__ | {"prepared": None}

    def __repr__(self) -> str:
        x = self.records
        conv = "" if self.conv is None else f", conv {list(self.conv.shape)}"
        kind = f"{str(x.dtype).removeprefix('torch.')} on {x.device}"
        shapes = f"records {list(x.shape)}{conv}; mini-batches of {self.mini_batch_size}"
        return f"StatePool({self.num_slots:,} slots: {shapes}; {kind}, {self.nbytes:,} bytes)"

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``records``, ``position`` and ``conv``, which a step changes in place."""
        return self.records, self.position, self.conv

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(x.numel() * x.element_size() for x in self.tensors if x is not None)

    @torch.no_grad()
    def read(self, slots: Tensor) -> TTTState:
        """The states of some streams, copied.

        Args:
            slots: which, int64 ``[n]``, all different.

        Raises:
            ValueError: a slot is out of range or given twice. TypeError: slots are not int64.
        """
        check_slots(slots, self.num_slots, self.position.device)
        position = self.position[slots]
        weights, rows = self._record.parts(self.records[slots])
        k, *_, v, lr, log_decay = self._record.row_parts(rows[:, :, :-1])
        lack = self.mini_batch_size - 1 - position % self.mini_batch_size
        k, v, lr, log_decay = (_moved(x, -lack).transpose(1, 2).contiguous() for x in (k, v, lr, log_decay))
        matrices = [w.contiguous() for W in weights for w in (W[:, :, :-1], W[:, :, -1])]
        conv = None if self.conv is None else self.conv[slots]
        decays = log_decay.squeeze(-1) if self.layer.forgets else None
        return TTTState(tuple(matrices), k, v, lr.squeeze(-1), position, conv, decays)

    @torch.no_grad()
    def write(self, slots: Tensor, state: TTTState) -> None:
        """Replace some streams.

        Args:
            slots: which, int64 ``[n]``, all different.
            state: their new states, of a layer like the pool's.

        Raises:
            ValueError: a slot is out of range or given twice, or the state is another layer's.
            TypeError: slots are not int64, or the state has another dtype.
        """
        check_slots(slots, self.num_slots, self.position.device)
        initial, layer_norm = _whole(self.layer)
        K, like = self.mini_batch_size, self.records.new_empty(1, 1, *layer_norm[0].shape)
        shapes = [(name, tuple(w.shape)) for name, w in zip(self._model.weights, initial, strict=True)]
        check_state(state, slots.numel(), shapes, K, like)
        check_pending_log_decay(state, self.layer.forgets)
        check_conv_state(state, slots.numel(), None if self.conv is None else tuple(self.conv.shape[1:]))
        lack = K - 1 - state.position % K
        decays = torch.zeros_like(state.pending_lr) if state.pending_log_decay is None else state.pending_log_decay
        pending = (state.pending_k, state.pending_v, state.pending_lr.unsqueeze(-1), decays.unsqueeze(-1))
        k, v, lr, log_decay = (_moved(x.transpose(1, 2), lack) for x in pending)
        weights = matrices(state.weights)
        gamma, beta = (p.to(k.dtype).repeat(slots.numel(), 1).unsqueeze(1) for p in layer_norm)
        records = torch.zeros_like(self.records[slots])
        targets, rows = self._record.parts(records.flatten(0, 1))
        k, v, lr, *weights = (x.flatten(0, 1) for x in (k, v, lr, *weights))
        for target, W in zip(targets, weights, strict=True):
            target.copy_(W)
        with without_autocast(k.device.type):
            write_rows(self._model.name, rows[:, :-1], (k, v, lr), (gamma, beta), weights, 1e-6)
        self._record.row_parts(rows[:, :-1])[-1].copy_(log_decay.flatten(0, 1))
        self.records.index_copy_(0, slots, records)
        self.position.index_copy_(0, slots, state.position)
        if self.conv is not None and state.conv is not None:
            self.conv.index_copy_(0, slots, state.conv)

    @torch.no_grad()
    def reset(self, slots: Tensor) -> None:
        """Start new streams in some slots, int64 ``[n]``, all different.

        Raises:
            ValueError: a slot is out of range or given twice. TypeError: slots are not int64.
        """
        check_slots(slots, self.num_slots, self.position.device)
        for x in (self.records, self.position, *([] if self.conv is None else [self.conv])):
            x.index_fill_(0, slots, 0)
        initial, _ = _whole(self.layer)
        for target, W in zip(self._record.parts(self.records)[0], matrices(initial), strict=True):
            target.index_copy_(0, slots, W.to(target.dtype).expand(slots.numel(), *W.shape))


def _whole(layer: Streaming) -> tuple[Sequence[Tensor], tuple[Tensor, Tensor]]:
    """What a stream starts with, if this process has it."""
    initial, layer_norm = layer.initial_state()
    kind = type(initial[0]).__name__
    if kind == "DTensor":  # whose module takes seconds to import
        raise ValueError(f"weights must be whole for streams of a pool, as after layer.unshard(); given a {kind}")
    return initial, layer_norm


def _moved(x: Tensor, by: Tensor) -> Tensor:
    """Row ``j + by[n]`` of x ``[n, H, K - 1, width]`` at j; zero where there is none."""
    source = torch.arange(x.shape[2], device=x.device) + by[:, None]  # [n, K - 1]
    inside = ((source >= 0) & (source < x.shape[2]))[:, None, :, None]
    moved = x.gather(2, source.clamp(0, max(0, x.shape[2] - 1))[:, None, :, None].expand_as(x))
    return torch.where(inside, moved, moved.new_zeros(()))
