"""Residual blocks: a sequence mixer and a feed-forward network, each behind a norm."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.serialization import add_safe_globals

from ..checks import check_shape
from ..layers.convolution import CausalConv, convolve
from ..layers.functional import make_spans
from ..layers.initialisation import Device
from ..layers.pool import StatePool
from ..layers.rotary import rotary_table
from ..layers.spans import Spans
from ..layers.validation import as_mask, check_slots
from ..operators import choose_backend
from ..operators.transforms import check_has_values
from ..reference import rotate


class BlockState(NamedTuple):
    """What a block remembers of its streams: its mixer's state, and its own convolution's last inputs."""

    mixer: Any
    conv: Tensor | None


add_safe_globals([BlockState])


class BlockPool(NamedTuple):
    """What a block remembers of the streams of a pool; the methods are as ``StatePool``'s."""

    mixer: StatePool
    conv: Tensor | None  # [num_slots, conv_kernel - 1, width]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return self.mixer.nbytes + (0 if self.conv is None else self.conv.nbytes)

    def read(self, slots: Tensor) -> BlockState:
        """The states of some streams, copied."""
        return BlockState(self.mixer.read(slots), None if self.conv is None else self.conv[slots])

    def write(self, slots: Tensor, state: BlockState) -> None:
        """Replace some streams."""
        check_block_state(state, slots.numel(), None if self.conv is None else self.conv.shape[1:])
        self.mixer.write(slots, state.mixer)
        if self.conv is not None and state.conv is not None:
            self.conv.index_copy_(0, slots, state.conv.detach())

    def reset(self, slots: Tensor) -> None:
        """Start new streams in some slots."""
        self.mixer.reset(slots)
        if self.conv is not None:
            self.conv.index_fill_(0, slots, 0)


class HistoryMixer(nn.Module):
    """A mixer that reads whole histories and keeps no state; a subclass defines ``read``.

    One with ``reads_gaps`` is told the time between events too: its ``read`` takes ``gaps``, ``[N, L]``, any number at
    padding.
    """

    reads_gaps = False

    def read(self, x: Tensor, real: Tensor | None) -> Tensor:
        """x ``[N, L, width]`` to the same shape; real ``[N, L]`` is False for padding, which is behind the tokens."""
        raise AssertionError(f"{type(self).__name__} must define read")

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: None = None,
        return_state: bool = False,
        gaps: Tensor | None = None,
    ) -> Tensor:
        """x ``[B, L, width]`` to the same shape, zeros at padding; mask and cu_seqlens as in ``TTTLayer``.

        gaps ``[B, L]``, as in ``TTT4Rec.forward``, are for mixers that read them.

        Raises:
            ValueError: a state was given or asked for.
        """
        if state is not None or return_state:
            raise ValueError(f"{type(self).__name__} keeps no state; give it the whole history instead")
        if mask is not None or cu_seqlens is not None:
            check_has_values(f"{type(self).__name__}, which puts histories of like lengths together,", x)
        if mask is not None:
            inside = None if gaps is None else gaps[mask][None]
            packed: Tensor = self(x[mask][None], cu_seqlens=F.pad(mask.sum(1).cumsum(0), (1, 0)), gaps=inside)
            return packed.new_zeros(x.shape).masked_scatter(mask.unsqueeze(-1), packed)
        if cu_seqlens is None:
            return self._read(x, None, gaps)
        places, outputs = [], []
        for place, lengths in by_length(cu_seqlens):
            bounds = F.pad(lengths.cumsum(0), (1, 0))
            padded, real = pad_packed(x[:, place], bounds)
            between = None if gaps is None else pad_packed(gaps[:, place].unsqueeze(-1), bounds)[0].squeeze(-1)
            places.append(place)
            outputs.append(self._read(padded, real, between)[real])
        return torch.cat(outputs)[torch.cat(places).argsort()][None] if places else x

    def _read(self, x: Tensor, real: Tensor | None, gaps: Tensor | None) -> Tensor:
        more: dict[str, Any] = {} if gaps is None else {"gaps": gaps}
        return self.read(x, real, **more)


class AttentionMixer(HistoryMixer):
    """Multi-head self-attention with rotary positions, SASRec's mixer; BERT4Rec's when it is not causal.

    Args:
        width: feature size.
        num_heads: number of heads; width / num_heads must be even.
        rope_theta: base of the rotary frequencies.
        causal: whether a token attends only to itself and those before it.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        rope_theta: float = 10000.0,
        *,
        causal: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.rope_theta, self.causal = num_heads, rope_theta, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False, device=device, dtype=dtype)
        self.output = nn.Linear(width, width, bias=False, device=device, dtype=dtype)

    def read(self, x: Tensor, real: Tensor | None) -> Tensor:
        """x ``[N, L, width]`` to the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [N, L, H, D]
        table_dtype = torch.promote_types(q.dtype, torch.float32)
        cos, sin = rotary_table(x.shape[1], q.shape[-1], self.rope_theta, table_dtype, x.device)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        if self.causal or real is None:  # padding lies behind, where causal attention does not look
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
        y: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return y


class GRUMixer(nn.Module):
    """A gated recurrent unit, GRU4Rec's mixer.

    Args:
        width: feature size.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, width: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x ``[B, L, width]`` to the same shape; the rest as in ``TTTLayer``; the state is ``[B, width]``."""
        if cu_seqlens is not None:
            padded, real = pad_packed(x, cu_seqlens)
            result = self(padded, mask=real, state=state, return_state=True)
            y = result[0][real][None]
            return (y, result[1]) if return_state else y
        hidden = None if state is None else state[None]
        if mask is None:
            y, last = self.gru(x, hidden)
            return (y, last[0]) if return_state else y
        # Move every row's tokens to its front, where a recurrence reads them before any padding.
        B, L, _ = x.shape
        first = mask.to(torch.int8).argmax(1, keepdim=True)
        slots = torch.arange(L, device=x.device)
        rows = torch.arange(B, device=x.device)[:, None]
        y, _ = self.gru(x[rows, (slots + first) % L], hidden)
        length = mask.sum(1)
        last_real = y[torch.arange(B, device=x.device), (length - 1).clamp_min(0)]
        before = torch.zeros_like(last_real) if state is None else state
        new_state = torch.where(length[:, None] > 0, last_real, before)
        y = y[rows, (slots - first) % L].masked_fill(~mask.unsqueeze(-1), 0)
        return (y, new_state) if return_state else y


class SwiGLU(nn.Module):
    """Feed-forward network ``down(silu(gate(x)) ∘ up(x))`` without biases."""

    def __init__(self, width: int, hidden: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., width]`` to the same shape."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class GELUFeedForward(nn.Module):
    """Feed-forward network ``down(gelu(up(x)))`` with biases."""

    def __init__(self, width: int, hidden: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., width]`` to the same shape."""
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


NORMS: dict[str, Callable[..., nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
FEED_FORWARDS: dict[str, Callable[..., nn.Module] | None] = {"swiglu": SwiGLU, "gelu": GELUFeedForward, "none": None}
"""By the names that ``TTT4RecConfig.ffn`` takes; HSTU's published blocks have none."""


class Block(nn.Module):
    """``h + mixer(norm(h))``, then ``h + ffn(norm(h))``; before both, optionally ``h + conv(norm(h))``.

    With gates, what mixer and network add is multiplied by ``sigmoid(W h + b)``, each with a W and b of its own.

    Args:
        width: feature size.
        mixer: a causal sequence mixer, called as ``mixer(x, mask=, cu_seqlens=, state=, return_state=)``.
        norm: one of ``NORMS``, eps 1e-6.
        ffn: one of ``FEED_FORWARDS``.
        ffn_width: its hidden size.
        conv_kernel: taps of the block's own convolution; None: it has none.
        gates: whether there are gates, as in LiGR's blocks.
    """

    def __init__(
        self,
        width: int,
        mixer: nn.Module,
        *,
        norm: str = "rms",
        ffn: str = "swiglu",
        ffn_width: int = 256,
        conv_kernel: int | None = None,
        gates: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        self.has_conv = conv_kernel is not None
        if conv_kernel is not None:
            self.conv_norm = make_norm(norm, width, **factory)
            self.conv = CausalConv(width, conv_kernel, **factory)
        self.mixer_norm = make_norm(norm, width, **factory)
        self.mixer = mixer
        make_ffn = FEED_FORWARDS[ffn]
        self.ffn_norm = None if make_ffn is None else make_norm(norm, width, **factory)
        self.ffn = None if make_ffn is None else make_ffn(width, ffn_width, **factory)
        self.mixer_gate = nn.Linear(width, width, **factory) if gates else None
        self.ffn_gate = nn.Linear(width, width, **factory) if gates and make_ffn is not None else None

    def forward(
        self,
        h: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: BlockState | None = None,
        return_state: bool = False,
        gaps: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, BlockState]:
        """h ``[B, L, width]`` to the same shape, or (h, state); mask and cu_seqlens as in ``TTTLayer``.

        gaps ``[B, L]``, as in ``TTT4Rec.forward``, go to a mixer that has ``reads_gaps``.
        """
        conv_state, mask = None, as_mask(mask)
        if state is not None:
            N = h.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            check_block_state(state, N, self._context)
        if self.has_conv:
            spans = make_spans(mask, cu_seqlens, h.shape[1])
            context = None if state is None else state.conv
            h, conv_state = self._convolve(h, spans, context)
        mixer_state = None if state is None else state.mixer
        more = {"gaps": gaps} if getattr(self.mixer, "reads_gaps", False) else {}
        mixed = self.mixer(
            self.mixer_norm(h), mask=mask, cu_seqlens=cu_seqlens, state=mixer_state, return_state=return_state, **more
        )
        if return_state:
            mixed, mixer_state = mixed
        h = self._feed(_add(h, mixed, self.mixer_gate))
        return (h, BlockState(mixer_state, conv_state)) if return_state else h

    def _feed(self, h: Tensor) -> Tensor:
        """``h + ffn(norm(h))``, if there is a feed-forward network."""
        if self.ffn is None or self.ffn_norm is None:
            return h
        return _add(h, self.ffn(self.ffn_norm(h)), self.ffn_gate)

    def surprise(self, h: Tensor) -> Tensor:
        """``TTTLayer.surprise`` of what the mixer reads of h ``[B, L, width]``."""
        if self.has_conv:
            h, _ = self._convolve(h, None, None)
        mixer: Any = self.mixer
        found: Tensor = mixer.surprise(self.mixer_norm(h))
        return found

    @property
    def _context(self) -> tuple[int, ...] | None:
        """Shape of the convolution's last inputs for a stream, if there is a convolution."""
        return (self.conv.weight.shape[1] - 1, self.conv.weight.shape[0]) if self.has_conv else None

    def _convolve(self, h: Tensor, spans: Spans | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``h + conv(norm(h))``, and the convolution's last inputs."""
        x = self.conv_norm(h)
        backend = choose_backend("auto", x)
        (convolved,), context = convolve((self.conv,), x, spans, context, backend=backend)
        return h + convolved, context

    def make_pool(self, num_slots: int) -> BlockPool:
        """A pool of new streams.

        Raises:
            ValueError: the mixer is not one that steps.
        """
        make_pool: Callable[[int], StatePool] | None = getattr(self.mixer, "make_pool", None)
        if make_pool is None:
            mixer = type(self.mixer).__name__
            raise ValueError(f"mixer must have steps and pools, as TTTLayer has; given {mixer}")
        if not self.has_conv:
            return BlockPool(make_pool(num_slots), None)
        weight, shape = self.conv.weight, self._context or ()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return BlockPool(make_pool(num_slots), torch.zeros(num_slots, *shape, dtype=dtype, device=weight.device))

    @torch.no_grad()
    def step(self, h: Tensor, pool: BlockPool, slots: Tensor) -> Tensor:
        """Advance B streams of a pool by one token each: h ``[B, width]`` to the same; as ``TTTLayer.step``."""
        context = None
        if pool.conv is not None:
            check_slots(slots, pool.mixer.num_slots, pool.conv.device)
            with_context, context = self._convolve(h[:, None], None, pool.conv[slots])
            h = with_context.squeeze(1)
        step: Callable[..., Tensor] = self.mixer.step  # type: ignore[assignment]
        h = _add(h, step(self.mixer_norm(h), pool.mixer, slots), self.mixer_gate)
        if pool.conv is not None and context is not None:  # not before the mixer has accepted what it was given
            pool.conv.index_copy_(0, slots, context)
        return self._feed(h)


def _add(h: Tensor, update: Tensor, gate: nn.Module | None) -> Tensor:
    """``h + update``, the update multiplied by ``sigmoid(gate(h))`` if there is a gate."""
    return h + (update if gate is None else torch.sigmoid(gate(h)) * update)


def check_block_state(state: BlockState, N: int, context: Sequence[int] | None) -> None:
    """Check the convolution's part of a state of N streams; context is its shape, None without a convolution.

    Raises:
        ValueError: it is there and should not, the other way round, or of another shape.
    """
    if (state.conv is None) != (context is None):
        there, wanted = ("without", "with") if state.conv is None else ("with", "without")
        raise ValueError(f"state must be of a block {wanted} a convolution; given one {there}")
    if state.conv is not None and context is not None:
        check_shape("state's conv", state.conv, (N, *context), "[N, conv_kernel - 1, width]")


def by_length(cu_seqlens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed sequences in groups of like length, so that padding at most doubles a group.

    Yields:
        places: int64, where the tokens of a group's sequences stand, one sequence behind the other.
        lengths: int64 ``[n]``, of these sequences.
    """
    ends = cu_seqlens.tolist()
    groups: dict[int, list[int]] = {}
    for row, (begin, end) in enumerate(pairwise(ends)):
        if end > begin:
            groups.setdefault((end - begin - 1).bit_length(), []).append(row)
    for rows in groups.values():
        places = torch.cat([torch.arange(ends[row], ends[row + 1]) for row in rows])
        yield places.to(cu_seqlens.device), cu_seqlens.diff()[rows]


def pad_packed(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed x ``[1, total, width]`` to ``[N, longest, width]``, zeros behind, and the mask of its tokens.

    Raises:
        ValueError: x is a meta or fake tensor.
    """
    check_has_values("how far packed histories are padded", x)
    lengths = cu_seqlens.diff()
    real = torch.arange(int(lengths.max()), device=x.device) < lengths[:, None]
    padded = x.new_zeros(*real.shape, x.shape[-1])
    return padded.masked_scatter(real.unsqueeze(-1), x), real


def make_norm(kind: str, width: int, device: Device = None, dtype: torch.dtype | None = None) -> nn.Module:
    """One of ``NORMS``, with eps 1e-6."""
    return NORMS[kind](width, eps=1e-6, device=device, dtype=dtype)
