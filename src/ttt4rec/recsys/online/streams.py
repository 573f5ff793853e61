"""Streams: the states of histories in preallocated pools, which read any number of items more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttt4rec.layers.state import TTTState
from ttt4rec.models.blocks import BlockState
from ttt4rec.models.event_times import time_between
from ttt4rec.models.ttt4rec import TTT4Rec

TOKENS_AT_ONCE = 2048
"""Items read in one call of the model; enough to fill a CPU's matmuls, few enough for others to wait for their turn."""


class Streams:
    """As many streams as fit into a byte budget, each with its blocks' states and its last hidden state.

    With a model that reads times they have the time of their last event too.

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
        unread = one.new_full((1,), torch.nan, dtype=torch.float64)
        timed = model.event_times is not None
        per_stream = one.nbytes + timed * unread.nbytes + sum(pool.nbytes for pool in model.make_pools(1))
        self.num_slots = pool_bytes // per_stream
        if self.num_slots < 1:
            raise ValueError(f"pool_bytes must be at least {per_stream}, which a stream takes; given {pool_bytes}")
        self._pools = model.make_pools(self.num_slots)
        self._hidden = one.repeat(self.num_slots, 1)
        self._latest = unread.repeat(self.num_slots) if timed else None
        for items in ([1], [1, 1]):  # what torch loads or compiles at a first call may take seconds
            self.read([0], [items], [[0.0] * len(items)])
        self.reset([0])

    def read(self, slots: Sequence[int], items: Sequence[Sequence[int]], times: Sequence[Sequence[float]] = ()) -> None:
        """Read on in some streams, all different: one item by ``TTT4Rec.step``, several in packed calls of the model.

        Should it raise, for lack of memory perhaps, these streams are undefined and no others.

        Args:
            slots: which streams.
            items: codes of what comes next in each.
            times: when that was, for a model that reads times.
        """
        of_each = items if self._latest is None else times
        together = [_Piece(*piece) for piece in zip(slots, items, of_each, strict=True)]
        single = [piece for piece in together if len(piece.codes) == 1]
        if single:
            where = self._where([piece.slot for piece in single])
            ids = torch.tensor([piece.codes[0] for piece in single], device=where.device)
            gaps = self._read_times(single, where)
            self._hidden.index_copy_(0, where, self.model.step(ids, self._pools, where, gaps))
        for pack in _packs([piece for piece in together if len(piece.codes) > 1]):
            self._read_pack(pack)

    @torch.no_grad()
    def hidden(self, slots: Sequence[int], at: float | None = None) -> Tensor:
        """Hidden states ``[n, width]`` after the last items of some streams, copied.

        Args:
            slots: which.
            at: the time of the request, for a model that is told; None: the time of each stream's last event.
        """
        where = self._where(slots)
        h, elapsed = self._hidden[where], None
        if self._latest is not None:
            latest = self._latest[where]
            elapsed = torch.zeros_like(latest) if at is None else time_between(latest, torch.full_like(latest, at))
        return self.model.at_request(h, elapsed)

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
            if self._latest is not None:
                self._latest.index_fill_(0, where, torch.nan)

    def export(self, slots: Sequence[int]) -> dict[str, Tensor]:
        """Some streams as tensors by name, ``[n, ...]`` each, copied."""
        where = self._where(slots)
        tensors = {"hidden": self._hidden[where]}
        if self._latest is not None:
            tensors["latest"] = self._latest[where]
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
        if self._latest is not None:
            self._latest.index_copy_(0, where, tensors["latest"].to(where.device))

    def _where(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(slots, dtype=torch.int64, device=self._hidden.device)

    @torch.no_grad()
    def _read_pack(self, pack: Sequence[_Piece]) -> None:
        where = self._where([piece.slot for piece in pack])
        ids = torch.tensor([code for piece in pack for code in piece.codes], device=where.device)
        ends = torch.tensor([len(piece.codes) for piece in pack], device=where.device).cumsum(0)
        states = [pool.read(where) for pool in self._pools]
        bounds = torch.cat((ends.new_zeros(1), ends))
        gaps = self._read_times(pack, where)
        hidden, states = self.model(
            ids[None],
            gaps=None if gaps is None else gaps[None],
            cu_seqlens=bounds,
            states=states,
            return_states=True,
        )
        for pool, state in zip(self._pools, states, strict=True):
            pool.write(where, state)
        self._hidden.index_copy_(0, where, hidden[0, ends - 1])

    def _read_times(self, pieces: Sequence[_Piece], where: Tensor) -> Tensor | None:
        """Gaps of some streams' next events, one stream's behind the other's, and remember the last ones' times."""
        if self._latest is None:
            return None
        now = torch.tensor([time for piece in pieces for time in piece.times], dtype=torch.float64, device=where.device)
        ends = torch.tensor([len(piece.codes) for piece in pieces], device=where.device).cumsum(0)
        before = now.roll(1)
        before[torch.cat((ends.new_zeros(1), ends[:-1]))] = self._latest[where]
        self._latest.index_copy_(0, where, now[ends - 1])
        return time_between(before, now)


class _Piece(NamedTuple):
    """What a stream reads next."""

    slot: int
    codes: Sequence[int]
    times: Sequence[float]


def _packs(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in packs of at most ``TOKENS_AT_ONCE`` items, and of one run of items for a slot."""
    pack: list[_Piece] = []
    size = 0
    for slot, codes, times in pieces:
        for start in range(0, len(codes), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            piece = _Piece(slot, codes[part], times[part])
            if size + len(piece.codes) > TOKENS_AT_ONCE:
                yield pack
                pack, size = [], 0
            pack.append(piece)
            size += len(piece.codes)
    if pack:
        yield pack
