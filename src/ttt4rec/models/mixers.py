"""The registry of sequence mixers, and three of them: NARM's, Mamba4Rec's and HSTU's.

SASRec's, BERT4Rec's and GRU4Rec's are ``AttentionMixer`` and ``GRUMixer`` in ``blocks``. All of them stand in the same
frame as TTT: embedding, norms, residual connections, feed-forward network and scores are TTT4Rec's.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.convolution import CausalConv, convolve
from ..layers.initialisation import STD, Device
from ..layers.ttt import TTTLayer
from ..operators import choose_backend
from .blocks import AttentionMixer, GRUMixer, HistoryMixer
from .event_times import FIRST, TIMES, bucket, time_since

ELEMENTS_AT_ONCE = 1 << 24
"""NARM's pairs of positions times features, or HSTU's times heads, held at once where no gradient is wanted: 64 MiB."""


class NARMMixer(HistoryMixer):
    """NARM's encoder: a GRU read globally, by its last output, and locally, by attention over all of them.

    With h_t the GRU's outputs, α_tj = w · sigmoid(A_1 h_t + A_2 h_j) for j ≤ t and c_t = Σ_j α_tj h_j, the output is
    B [h_t, c_t]. The attention is not normalised, as published.

    Args:
        width: feature size.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, width: int, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        self.gru = nn.GRU(width, width, batch_first=True, **factory)
        self.query = nn.Linear(width, width, bias=False, **factory)
        self.key = nn.Linear(width, width, bias=False, **factory)
        self.energy = nn.Linear(width, 1, bias=False, **factory)
        self.output = nn.Linear(2 * width, width, bias=False, **factory)

    def read(self, x: Tensor, real: Tensor | None) -> Tensor:
        """x ``[N, L, width]`` to the same shape."""
        h, _ = self.gru(x)
        key, (N, L, width) = self.key(h).unsqueeze(1), h.shape
        rows = max(1, ELEMENTS_AT_ONCE // max(1, N * L * width))
        alpha = [
            self.energy(torch.sigmoid(query.unsqueeze(2) + key)).squeeze(-1) for query in self.query(h).split(rows, 1)
        ]  # [N, rows, L] each
        y: Tensor = self.output(torch.cat((h, torch.cat(alpha, 1).tril() @ h), -1))
        return y


class MambaMixer(HistoryMixer):
    """Mamba's selective state space (Gu & Dao 2023), Mamba4Rec's mixer.

    u = silu(conv(x)), s_t = exp(Δ_t A) s_{t-1} + Δ_t u_t B_t, y_t = C_t · s_t + D u_t, gated by silu(z): x and z
    are two projections of the input and Δ, B, C are projections of u. On a GPU the package
    ``mamba-ssm`` scans, where its kernels are installed; otherwise a loop over the tokens does.

    Args:
        width: feature size.
        state_size: of each feature's state; Mamba4Rec's 32.
        conv_kernel: taps of the convolution.
        expand: features of the scan, as a multiple of width.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        width: int,
        state_size: int = 32,
        conv_kernel: int = 4,
        expand: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        inner, self.rank, self.state_size = expand * width, math.ceil(width / 16), state_size
        self.input = nn.Linear(width, 2 * inner, bias=False, **factory)
        self.conv = CausalConv(inner, conv_kernel, **factory)
        self.selection = nn.Linear(inner, self.rank + 2 * state_size, bias=False, **factory)
        self.rate = nn.Parameter(torch.empty(inner, self.rank, **factory))
        self.rate_bias = nn.Parameter(torch.empty(inner, **factory))
        self.log_decay = nn.Parameter(torch.empty(inner, state_size, **factory))
        self.skip = nn.Parameter(torch.empty(inner, **factory))
        self.reset_parameters()
        self.output = nn.Linear(inner, width, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Rates from N(0, 0.02), A = -1, -2, .. for every feature, D one."""
        # Mamba4Rec draws every linear map anew, this one with them, so that Δ begins at softplus(0), not as in Mamba
        nn.init.normal_(self.rate, std=STD)
        nn.init.zeros_(self.rate_bias)
        nn.init.ones_(self.skip)
        with torch.no_grad():  # of the parameter's own kind, which may be split among processes
            wide = torch.promote_types(self.log_decay.dtype, torch.float32)
            self.log_decay.copy_(torch.ones_like(self.log_decay, dtype=wide).cumsum(1).log())

    def read(self, x: Tensor, real: Tensor | None) -> Tensor:
        """x ``[N, L, width]`` to the same shape."""
        u, z = self.input(x).chunk(2, -1)
        (u,), _ = convolve((self.conv,), u, None, None, backend=choose_backend("auto", u))
        u = F.silu(u)
        rank, B, C = self.selection(u).split((self.rank, self.state_size, self.state_size), -1)
        rate = rank @ self.rate.T
        scan = find_scan(x.device.type)
        y: Tensor = self.output(scan(u, rate, self.rate_bias, self.log_decay, B, C, self.skip, z))
        return y


def plain_scan(
    u: Tensor, rate: Tensor, rate_bias: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, skip: Tensor, z: Tensor
) -> Tensor:
    """The selective scan in PyTorch, state and arithmetic at least float32.

    Args:
        u: what enters the states, ``[N, L, I]``.
        rate: Δ before its bias ``[I]`` and softplus, ``[N, L, I]``.
        rate_bias: see rate.
        log_decay: log(-A), ``[I, S]``.
        B: how a token is written, ``[N, L, S]``.
        C: how it is read, ``[N, L, S]``.
        skip: D, ``[I]``.
        z: the gate, ``[N, L, I]``.

    Returns:
        ``[N, L, I]``, the dtype of u.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    delta = F.softplus(rate.to(dtype) + rate_bias)
    A, B, C = -log_decay.exp(), B.to(dtype).unsqueeze(-1), C.to(dtype).unsqueeze(-1)
    state = torch.zeros_like(B[:, 0] * delta[:, :1])  # [N, S, I]; one token at a time stays in the cache
    outputs = []
    for step, written, b, c in zip(*(t.unbind(1) for t in (delta, delta * u, B, C)), strict=True):
        state = torch.addcmul(b * written.unsqueeze(1), torch.exp(step.unsqueeze(1) * A.T), state)
        outputs.append((state * c).sum(1))
    y = torch.stack(outputs, 1)
    return ((y + skip * u) * F.silu(z.to(dtype))).to(u.dtype)


@cache
def find_scan(device_type: str) -> Callable[..., Tensor]:
    """On ``"cuda"`` the scan of ``mamba-ssm`` if its CUDA kernels are installed; else ``plain_scan``.

    A ``mamba-ssm`` that is installed and cannot be imported is warned of.
    """
    if device_type == "cuda" and find_spec("mamba_ssm") is not None:
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        except ImportError as error:
            warnings.warn(f"Mamba runs as a loop over the tokens: mamba-ssm does not load ({error})", stacklevel=2)
        else:
            return partial(fused_scan, selective_scan_fn)
    return plain_scan


def fused_scan(
    selective_scan_fn: Callable[..., Tensor],
    u: Tensor,
    rate: Tensor,
    rate_bias: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor,
    z: Tensor,
) -> Tensor:
    """``plain_scan`` by ``selective_scan_fn`` of ``mamba-ssm``, whose tensors are ``[N, features, L]``."""
    u, rate, B, C, z = (t.transpose(1, 2).contiguous() for t in (u, rate, B, C, z))
    A = -log_decay.float().exp()
    y = selective_scan_fn(u, rate, A, B, C, skip.float(), z, rate_bias.float(), delta_softplus=True)
    return y.transpose(1, 2)


class HSTUMixer(HistoryMixer):
    """HSTU's unit (Zhai et al. 2024): pointwise attention by SiLU in place of the softmax, gated by the input.

    With U, V, Q, K = silu(x W) and a learned bias r for each distance, a head's output at t is
    Σ_{j ≤ t} silu(q_t · k_j + r_{t-j}) v_j / max_len. The heads' outputs are normalised together, without a learned
    scale, multiplied by U and projected. Heads share r; distances beyond max_len - 1 have its last entry.

    With times there is a bias for the time between the two events as well: r_{t-j} + τ[b(T_t - T_j)], with the buckets
    b of ``event_times``. The published unit compares with the time of event t + 1, which is here the model's part: see
    ``TTT4RecConfig.times``.

    Args:
        width: feature size.
        num_heads: number of heads.
        max_len: how many distances have a bias of their own, and what sums over a history are divided by.
        device: of the parameters.
        dtype: of the parameters.
        times: one of ``TIMES``. Biases of times begin at zero.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        max_len: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        times: str = "none",
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        self.num_heads, self.max_len, self.reads_gaps = num_heads, max_len, TIMES[times].gaps
        self.input = nn.Linear(width, 4 * width, bias=False, **factory)
        self.distance_table = nn.Parameter(torch.empty(max_len, **factory))
        self.time_table = nn.Parameter(torch.empty(FIRST + 1, 1, **factory)) if self.reads_gaps else None
        self.reset_parameters()
        self.output = nn.Linear(width, width, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Biases of distances from N(0, 0.02), of times zero."""
        nn.init.normal_(self.distance_table, std=STD)
        if self.time_table is not None:
            nn.init.zeros_(self.time_table)

    def read(self, x: Tensor, real: Tensor | None, gaps: Tensor | None = None) -> Tensor:
        """x ``[N, L, width]`` to the same shape; gaps ``[N, L]``."""
        u, *heads = F.silu(self.input(x)).chunk(4, -1)
        v, q, k = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in heads)  # [N, H, L, D]
        N, H, L, _ = q.shape
        rows, attended = max(1, ELEMENTS_AT_ONCE // max(1, N * H * L)), []
        for begin in range(0, L, rows):
            end = min(begin + rows, L)
            distance = torch.arange(begin, end, device=x.device)[:, None] - torch.arange(end, device=x.device)
            bias = self.distance_table[distance.clamp(0, self.max_len - 1)]
            if self.time_table is not None and gaps is not None:
                elapsed = time_since(gaps[:, :end], begin)
                bias = bias + F.embedding(bucket(elapsed), self.time_table).squeeze(-1).unsqueeze(1)
            pairs = F.silu(q[:, :, begin:end] @ k[:, :, :end].mT + bias).masked_fill(distance < 0, 0)
            attended.append(pairs @ v[:, :, :end] / self.max_len)
        together = torch.cat(attended, 2).transpose(1, 2).flatten(2)
        y: Tensor = self.output(F.layer_norm(together, together.shape[-1:], eps=1e-6) * u)
        return y


class Mixer(NamedTuple):
    """A row of the registry: what may read the history, how it is made, and what it can do.

    Every mixer is called as ``TTTLayer`` is, with mask and packed sequences; training packs. One that reads whole
    histories has all of that from ``HistoryMixer``.
    """

    make: Callable[..., nn.Module]  # of its options, device and dtype, all by keyword
    options: tuple[str, ...]  # the fields of TTT4RecConfig that it is made of
    kind: str  # what it is, for tables
    published: str  # the recommender that is known for it
    causal: bool = True  # False: it reads in both directions and is trained to fill in hidden items
    streams: bool = False  # whether it takes and returns states
    steps: bool = False  # whether it has pools of streams, and steps for one token more of each

    @property
    def about(self) -> str:
        """For the command line's help."""
        return f"{self.published}'s"


_TTT = ("inner", "backbone", "mini_batch_size", "rope_theta", "base_lr", "conv_kernel", "max_inner_step", "forget")
_ATTENTION = ("width", "num_heads", "rope_theta")
MIXERS = {
    "ttt": Mixer(TTTLayer, ("width", "num_heads", *_TTT), "TTT", "TTT4Rec", streams=True, steps=True),
    "attention": Mixer(AttentionMixer, _ATTENTION, "attention", "SASRec"),
    "gru": Mixer(GRUMixer, ("width",), "GRU", "GRU4Rec", streams=True),
    "narm": Mixer(NARMMixer, ("width",), "GRU with attention", "NARM"),
    "mamba": Mixer(MambaMixer, ("width", "conv_kernel"), "Mamba", "Mamba4Rec"),
    "bidirectional": Mixer(
        partial(AttentionMixer, causal=False), _ATTENTION, "bidirectional", "BERT4Rec", causal=False
    ),
    "hstu": Mixer(HSTUMixer, ("width", "num_heads", "max_len", "times"), "pointwise attention", "HSTU"),
}
"""By the names that ``TTT4RecConfig.mixer`` and the command line take. ``ttt4rec.register_mixer`` adds one."""
