"""The contestants: causal sequence mixers of one width, with their projections, without norm or feed-forward network.

What surrounds a mixer is the same for all, so it is left out here; whole models are measured in ``test_recommender``.
"""

import math
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt4rec import StatePool, TTTLayer
from ttt4rec.models.blocks import AttentionMixer, GRUMixer
from ttt4rec.reference import rotation


def num_heads(width: int) -> int:
    """Head dimension 64, as in language models; four small heads, as in TTT4Rec, up to width 128."""
    return 4 if width <= 128 else width // 64


def mini_batch_size(width: int) -> int:
    """8 in TTT4Rec, 16 in the TTT paper's language models."""
    return 8 if width <= 128 else 16


class Mixer(nn.Module):
    """What the benchmarks call. A mixer without a step for one token says why in ``no_stream``."""

    no_stream: ClassVar[str] = ""

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, L, width]`` to the same shape."""
        raise AssertionError("every mixer has its own forward")

    def prefill(self, x: Tensor) -> Any:
        """Read x from the start and return what ``step`` needs to go on."""
        raise AssertionError("every mixer with a stream has its own prefill")

    def step(self, x: Tensor, state: Any) -> Tensor:
        """Read one more token ``[B, 1, width]``; may change the state in place."""
        raise AssertionError("every mixer with a stream has its own step")

    def recurrence_flops(self, length: int) -> float:
        """FLOPs per token next to the projections, in the recurrent form; of attention, over half the square."""
        raise AssertionError("every mixer counts its own operations")

    def flops(self, length: int) -> float:
        """FLOPs per token of a forward pass."""
        layers = [module for module in self.modules() if isinstance(module, nn.Linear | nn.GRU)]
        projections = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2)
        return 2 * projections + self.recurrence_flops(length)


class TTT(Mixer):
    """TTT-Linear or TTT-MLP, either backbone; a stream is the layer called with a state."""

    def __init__(self, width: int, inner: str, backbone: str) -> None:
        super().__init__()
        options = {"inner": inner, "backbone": backbone, "mini_batch_size": mini_batch_size(width)}
        self.layer = TTTLayer(width, num_heads(width), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def prefill(self, x: Tensor) -> tuple[StatePool, Tensor]:
        pool, slots = self.layer.make_pool(x.shape[0]), torch.arange(x.shape[0], device=x.device)
        pool.write(slots, self.layer(x, return_state=True)[1])
        return pool, slots

    def step(self, x: Tensor, state: tuple[StatePool, Tensor]) -> Tensor:
        return self.layer.step(x.squeeze(1), *state).unsqueeze(1)

    def recurrence_flops(self, length: int) -> float:
        # Linear: k W, q W and an outer product. MLP, 4D hidden: k and q through both layers, one back, two products.
        layer = self.layer
        rates = 2 * layer.num_heads * layer.width
        return rates + (6 if layer.inner == "linear" else 56) * layer.width * layer.head_dim


class Attention(Mixer):
    """Causal attention; a stream keeps keys and values in a cache that has room for one more token.

    Rotations are complex products, in place of a dozen operators; their angles are computed once. SASRec has none.
    """

    def __init__(self, width: int, rotated: bool = True) -> None:
        super().__init__()
        self.mixer, self.rotated = AttentionMixer(width, num_heads(width)), rotated

    def forward(self, x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self._views(x, 0), is_causal=True)
        return self.mixer.output(out.transpose(1, 2).flatten(2))

    def prefill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self._views(x, 0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        self.mixer.output(out.transpose(1, 2).flatten(2))
        return F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = state
        q, keys[:, :, -1:], values[:, :, -1:] = self._views(x, keys.shape[2] - 1)
        out = F.scaled_dot_product_attention(q, keys, values)
        return self.mixer.output(out.transpose(1, 2).flatten(2))

    def _views(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[B, H, L, D]``, q and k rotated for the positions from ``first`` on."""
        q, k, v = self.mixer.qkv(x).unflatten(-1, (3, self.mixer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rotated:
            wide = torch.promote_types(q.dtype, torch.float32)
            table = turns(first + x.shape[1], q.shape[-1], self.mixer.rope_theta, wide, x.device)[first:]
            q, k = (
                torch.view_as_real(torch.view_as_complex(t.to(wide).unflatten(-1, (-1, 2))) * table).flatten(-2).to(t)
                for t in (q, k)
            )
        return q, k, v

    def recurrence_flops(self, length: int) -> float:
        return 2 * self.mixer.output.in_features * (length + 1)


@cache
def turns(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``cos + i sin`` of the rotary angles at places 0 to length - 1, complex ``[length, head_dim / 2]``."""
    with torch.inference_mode(False):
        return torch.complex(*rotation(torch.arange(length, device=device), head_dim, theta, dtype))


class GRU(Mixer):
    """A gated recurrent unit: cuDNN's on a GPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = GRUMixer(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x)

    def prefill(self, x: Tensor) -> Tensor:
        return self.mixer(x, return_state=True)[1]

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        return self.mixer(x, state=state)

    def recurrence_flops(self, length: int) -> float:
        return 0.0  # all of a GRU's products are with its weights


class PlainMamba(Mixer):
    """The Mamba of ``transformers`` in plain PyTorch: one step of the scan after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer
        from transformers.utils import logging

        logging.set_verbosity_error()  # the plain path warns at every construction; the label says it instead
        self.config = MambaConfig(hidden_size=width, num_hidden_layers=1, state_size=16, expand=2)
        self.mixer = MambaMixer(self.config, layer_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x)

    def prefill(self, x: Tensor) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config)
        self.mixer(x, cache=cache)
        return cache

    def step(self, x: Tensor, state: Any) -> Tensor:
        return self.mixer(x, cache=state)

    def recurrence_flops(self, length: int) -> float:
        return 6 * self.mixer.intermediate_size * self.mixer.ssm_state_size


class _MambaSSM(Mixer):
    """A module of ``mamba-ssm``; a stream is its own cache, changed in place."""

    module: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    def prefill(self, x: Tensor) -> Any:
        from mamba_ssm.utils.generation import InferenceParams

        cache = InferenceParams(max_seqlen=x.shape[1] + 1, max_batch_size=x.shape[0])
        self.module(x, inference_params=cache)
        cache.seqlen_offset = x.shape[1]
        return cache

    def step(self, x: Tensor, state: Any) -> Tensor:
        return self.module(x, inference_params=state)

    def recurrence_flops(self, length: int) -> float:
        return 6 * self.module.d_inner * self.module.d_state


class Mamba(_MambaSSM):
    """Mamba on its CUDA scan."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from mamba_ssm import Mamba as Module

        self.module = Module(width, layer_idx=0)


class Mamba2(_MambaSSM):
    """Mamba-2 on its Triton kernels for the state-space dual; its fused path where ``causal_conv1d`` is there too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from mamba_ssm.modules import mamba2

        sizes = {"headdim": 16, "d_state": 32} if width <= 128 else {"headdim": 64, "d_state": 128}
        fused = mamba2.causal_conv1d_fn is not None
        self.module = mamba2.Mamba2(width, layer_idx=0, use_mem_eff_path=fused, **sizes)


class GatedDeltaNet(Mixer):
    """The gated delta rule of ``flash-linear-attention``; keys take three quarters of the width, as its authors do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from fla.layers import GatedDeltaNet as Module

        head_dim = width // num_heads(width)
        self.module = Module(width, head_dim=head_dim, num_heads=3 * width // 4 // head_dim, layer_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]

    def prefill(self, x: Tensor) -> Any:
        from fla.models.utils import Cache

        return self.module(x, past_key_values=Cache(), use_cache=True)[2]

    def step(self, x: Tensor, state: Any) -> Tensor:
        return self.module(x, past_key_values=state, use_cache=True)[0]

    def recurrence_flops(self, length: int) -> float:
        return 6 * self.module.key_dim * self.module.head_v_dim


class FlaTTT(Mixer):
    """The TTT-Linear of ``flash-linear-attention`` between projections: one rate a query, output o + LN(o).

    It is another layer than ours, so only its speed is to be compared.
    """

    no_stream = "flash-linear-attention has no one-token step for it"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.heads = width, num_heads(width)
        self.head_dim, self.chunk = width // self.heads, 16  # its smallest chunk
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.rate = nn.Linear(width, self.heads)
        self.output = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.inner_norm_weight = nn.Parameter(torch.ones(self.heads, self.head_dim))
        self.inner_norm_bias = nn.Parameter(torch.zeros(self.heads, self.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        from fla.ops.ttt import fused_chunk_ttt_linear

        q, k, v = (t.contiguous() for t in self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        rate = self.rate(x).sigmoid().unsqueeze(-1) / math.sqrt(self.head_dim)
        norm = (self.inner_norm_weight, self.inner_norm_bias)
        o = fused_chunk_ttt_linear(q, k, v, *norm, rate, chunk_size=self.chunk)[0]
        return self.output(self.norm(o.flatten(2)))

    def recurrence_flops(self, length: int) -> float:
        return 6 * self.width * self.head_dim
