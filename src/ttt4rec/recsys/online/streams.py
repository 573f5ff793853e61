"""Streams: the states of histories in preallocated pools, which read any number of items more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt4rec.layers.state import TTTState
from ttt4rec.models.blocks import BlockState
from ttt4rec.models.ttt4rec import TTT4Rec

TOKENS_AT_ONCE = 2048
"""Items read in one call of the model; enough to fill a CPU's matmuls, few enough for others to wait for their turn."""


class Streams:
    """As many streams as fit into a byte budget, each with its blocks' states and its last hidden state.

    Args:
        model: in evaluation mode.
        pool_bytes: all of it is allocated at once.

    Attributes:
        num_slots: how many.

    Raises:
        ValueError: not one stream fits, or a block's mixer is a baseline's.
    """

    def __init__(self, model: TTT4Rec, pool_bytes: int) -> None:
        self.model = model
        one: Tensor = model.embedding.weight.new_zeros(1, model.config.width).detach()
        per_stream = one.nbytes + sum(pool.nbytes for pool in model.make_pools(1))
        self.num_slots = pool_bytes // per_stream
        if self.num_slots < 1:
            raise ValueError(f"pool_bytes must be at least {per_stream}, which a stream takes; given {pool_bytes}")
        self._pools = model.make_pools(self.num_slots)
        self._hidden = one.repeat(self.num_slots, 1)
        for items in ([1], [1, 1]):  # what torch loads or compiles at a first call may take seconds
            self.read([0], [items])
        self.reset([0])

    def read(self, slots: Sequence[int], items: Sequence[Sequence[int]]) -> None:
        """Read on in some streams, all different: one item by ``TTT4Rec.step``, several in packed calls of the model.

        Should it raise, for lack of memory perhaps, these streams are undefined and no others.
        """
        together = list(zip(slots, items, strict=True))
        single = [(slot, codes) for slot, codes in together if len(codes) == 1]
        if single:
            where = self._where([slot for slot, _ in single])
            ids = torch.tensor([codes[0] for _, codes in single], device=where.device)
            self._hidden.index_copy_(0, where, self.model.step(ids, self._pools, where))
        for pack in _packs([(slot, codes) for slot, codes in together if len(codes) > 1]):
            self._read_pack([slot for slot, _ in pack], [codes for _, codes in pack])

    def hidden(self, slots: Sequence[int]) -> Tensor:
        """Hidden states ``[n, width]`` after the last items of some streams, copied."""
        return self._hidden[self._where(slots)]

    def moved(self, slots: Sequence[int]) -> Tensor:
        """How far some streams' weights are from the initial ones, the mean over blocks and heads ``[n]``."""
        where, found = self._where(slots), []
        for block, pool in zip(self.model.blocks, self._pools, strict=True):
            layer: Any = block.mixer
            found.append(layer.moved(pool.read(where).mixer).mean(1))
        return torch.stack(found).mean(0)

    def reset(self, slots: Sequence[int]) -> None:
        """Begin again in some slots; nothing of what they held remains."""
        if slots:
            where = self._where(slots)
            for pool in self._pools:
                pool.reset(where)
            self._hidden.index_fill_(0, where, 0)

    def export(self, slots: Sequence[int]) -> dict[str, Tensor]:
        """Some streams as tensors by name, ``[n, ...]`` each, copied."""
        where = self._where(slots)
        tensors = {"hidden": self._hidden[where]}
        for number, pool in enumerate(self._pools):
            state = pool.read(where)
            tensors |= {f"{number}.mixer.{name}": x for name, x in state.mixer.tensors().items()}
            if state.conv is not None:
                tensors[f"{number}.conv"] = state.conv
        return tensors

    def load(self, slots: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """Put what ``export`` gave into some slots.

        Raises:
            ValueError: the tensors belong to another model. KeyError: some are missing.
        """
        where = self._where(slots)
        for number, pool in enumerate(self._pools):
            begin = f"{number}.mixer."
            named = {name.removeprefix(begin): x for name, x in tensors.items() if name.startswith(begin)}
            conv = None if pool.conv is None else tensors[f"{number}.conv"].to(where.device)
            pool.write(where, BlockState(TTTState.from_tensors(named).to(where.device), conv))
        self._hidden.index_copy_(0, where, tensors["hidden"].to(where.device))

    def _where(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self._hidden.device)

    @torch.no_grad()
    def _read_pack(self, slots: Sequence[int], items: Sequence[Sequence[int]]) -> None:
        where = self._where(slots)
        ids = torch.tensor([code for codes in items for code in codes], device=where.device)
        ends = torch.tensor([len(codes) for codes in items], device=where.device).cumsum(0)
        states = [pool.read(where) for pool in self._pools]
        bounds = torch.cat((ends.new_zeros(1), ends))
        hidden, states = self.model(ids[None], cu_seqlens=bounds, states=states, return_states=True)
        for pool, state in zip(self._pools, states, strict=True):
            pool.write(where, state)
        self._hidden.index_copy_(0, where, hidden[0, ends - 1])


def _packs(pieces: Sequence[tuple[int, Sequence[int]]]) -> Iterator[list[tuple[int, Sequence[int]]]]:
    """Slots and items in packs of at most ``TOKENS_AT_ONCE`` items, and of one run of items for a slot."""
    pack: list[tuple[int, Sequence[int]]] = []
    size = 0
    for slot, codes in pieces:
        for start in range(0, len(codes), TOKENS_AT_ONCE):
            piece = codes[start : start + TOKENS_AT_ONCE]
            if size + len(piece) > TOKENS_AT_ONCE:
                yield pack
                pack, size = [], 0
            pack.append((slot, piece))
            size += len(piece)
    if pack:
        yield pack
