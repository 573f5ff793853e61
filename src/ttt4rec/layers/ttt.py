"""TTTLayer: the drop-in module around the inner loop (Sun et al. 2024, section 2 and figure 2)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..arguments import TokenStep
from ..inner_models import INNER_MODELS, matrices
from ..operators import Backend, check_backend, choose_backend, forgetting_token_step, token_step
from ..reference import token_scale
from .convolution import CausalConv, convolve
from .forgetting import FIRST_BIAS, GATES, Forget, log_decay
from .functional import Rates, autocast, inner_loop, make_spans
from .initialisation import STD, Device, draw
from .layer_at_once import layer_at_once
from .original_weights import load_release_layer
from .output import finish
from .pool import StatePool
from .projection import Rope, project
from .rotary import rotary_table
from .spans import Spans
from .state import TTTState
from .step_at_once import step_at_once
from .validation import (
    as_mask,
    check_conv_state,
    check_cu_seqlens,
    check_layer_input,
    check_layer_options,
    check_mask,
    check_step_input,
)
from .watching import inner_losses, moved

Inner = Literal["linear", "mlp"]
Backbone = Literal["transformer", "mamba"]
_FIRST = {"inner_norm_weight": 1.0, "forget_bias": FIRST_BIAS}
"""What a new layer's parameters are, if neither drawn nor zero."""


class TTTLayer(nn.Module):
    """A sequence layer whose hidden state is a model trained on every token it reads.

    Maps ``[B, L, width]`` to ``[B, L, width]``, causally, like a self-attention layer.

    Args:
        width: feature size C of the input.
        num_heads: H; the head dimension D = C / H must be even.
        inner: the inner model, ``"linear"`` (x W1 + b1) or ``"mlp"`` (gelu(x W1 + b1) W2 + b2, hidden size 4D).
        backbone: ``"transformer"`` has its own projections for q and k; ``"mamba"`` shares one, followed by a causal
            convolution each, and gates the output.
        mini_batch_size: K, tokens whose inner gradients are taken at the same weights.
        rope_theta: base of the rotary frequencies; positions restart in every mini-batch.
        base_lr: η_base; a token's inner rate is ``base_lr · sigmoid(x · w_lr + b_lr) / D``.
        conv_kernel: taps of the Mamba backbone's convolutions.
        adapt: False freezes the inner loop at the initial weights, for ablations. The switch may be flipped later.
        max_inner_step: bounds every token's rate at ``max_inner_step / (1 + |k|²)``: the step a linear model takes
            on a sample is then at most that fraction of the way to fitting it (2 is the limit of stability). None
            leaves the rates as learned.
        forget: what was learned decays towards the initial weights, at the end of every mini-batch: ``"constant"``, by
            a share that each head learns; ``"token"``, by one that depends on the input too; ``"none"``.
        backend: see ``ttt4rec.ttt_linear``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        inner_lr_scale: what all inner rates are multiplied with; see ``set_inner_lr_scale``.
        prepared: passes in compiled code, and for what they stand; see ``standing.prepared``.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        inner: Inner = "linear",
        backbone: Backbone = "transformer",
        mini_batch_size: int = 16,
        rope_theta: float = 10000.0,
        base_lr: float = 1.0,
        conv_kernel: int = 4,
        adapt: bool = True,
        max_inner_step: float | None = None,
        forget: Forget = "none",
        backend: Backend = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_layer_options(
            width,
            num_heads,
            inner,
            backbone,
            mini_batch_size,
            rope_theta,
            base_lr,
            conv_kernel,
            max_inner_step,
            forget,
        )
        check_backend(backend)
        self.width, self.num_heads, self.head_dim = width, num_heads, width // num_heads
        self.inner: str = inner
        self.backbone, self.mini_batch_size = backbone, mini_batch_size
        self.rope_theta, self.base_lr, self.conv_kernel = rope_theta, base_lr, conv_kernel
        self.adapt, self.max_inner_step, self.backend = adapt, max_inner_step, backend
        self.forget: str = forget

        self.prepared: Any = None
        self.inner_lr_scale = 1.0  # a number: a buffer that is not saved would be lost where layers are made empty

        factory: Any = {"device": device, "dtype": dtype}
        self.query = nn.Linear(width, width, bias=False, **factory)
        self.value = nn.Linear(width, width, bias=False, **factory)
        self.output = nn.Linear(width, width, bias=False, **factory)
        if backbone == "transformer":
            self.key = nn.Linear(width, width, bias=False, **factory)
        else:
            self.query_conv = CausalConv(width, conv_kernel, **factory)
            self.key_conv = CausalConv(width, conv_kernel, **factory)
            self.gate = nn.Linear(width, width, bias=False, **factory)
        self.norm = nn.LayerNorm(width, eps=1e-6, **factory)

        H, D = num_heads, self.head_dim
        model = INNER_MODELS[inner]
        for name, shape in model.shapes(D, model.expansion * D).items():
            self.register_parameter(name, nn.Parameter(torch.empty(H, *shape, **factory)))
        self.inner_norm_weight = nn.Parameter(torch.empty(H, D, **factory))
        self.inner_norm_bias = nn.Parameter(torch.empty(H, D, **factory))
        self.inner_lr_weight = nn.Parameter(torch.empty(H, width, **factory))
        self.inner_lr_bias = nn.Parameter(torch.empty(H, **factory))
        self.token_offset = nn.Parameter(torch.empty(mini_batch_size, **factory))
        for name, shape_of in GATES[forget].items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape_of(H, width), **factory)))
        for module in self.children():
            draw(module)
        self.reset_own_parameters()

    def __getstate__(self) -> dict[str, Any]:
        """A copy prepares its own passes."""
        return self.__dict__ | {"prepared": None}

    def reset_parameters(self) -> None:
        """Draw all of the layer again: weights from N(0, 0.02), biases and offsets zero, norms one; convolutions too.

        Gates of what is forgotten begin with a share of 0.953 a token that stays, whatever the input is.
        """
        for module in self.children():
            reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
            if reset is not None:  # what stands in a linear map's place may have none
                reset()
        self.reset_own_parameters()

    def reset_own_parameters(self) -> None:
        """As ``reset_parameters``; but the modules in the layer stay as they are."""
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("W1", "W2", "inner_lr_weight"):
                nn.init.normal_(parameter, std=STD)
            else:
                nn.init.constant_(parameter, _FIRST.get(name, 0.0))

    def set_inner_lr_scale(self, scale: float) -> None:
        """Multiply all inner rates by ``scale``; raised from 0 to 1 over some steps it warms the inner loop up.

        A captured CUDA graph keeps the scale with which it was captured.
        """
        if not 0 <= scale < float("inf"):
            raise ValueError(f"the scale of the inner rates must be finite and at least 0; given {scale}")
        self.inner_lr_scale = float(scale)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: TTTState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, TTTState]:
        """Map x ``[B, L, width]`` to the same shape.

        Args:
            x: the input, any float dtype the parameters have.
            mask: bool ``[B, L]``, True for real tokens, padding on the right or the left; or as integers, 1 and 0.
                Padding yields zeros and never touches the state; each real token gets what it gets alone.
            cu_seqlens: int ``[N + 1]``: N sequences packed one behind the other in x ``[1, total, width]``.
            state: continue these streams, at any token; None starts them.
            return_state: also return the state after the last token.

        Returns:
            y, or (y, state).

        Raises:
            ValueError: a wrong shape, or mask and cu_seqlens together.
            TypeError: a wrong dtype.
        """
        check_layer_input(x, self.width, mask, cu_seqlens)
        mask = as_mask(mask)
        if mask is not None:
            check_mask(mask, *x.shape[:2])
            x = x.masked_fill(~mask.unsqueeze(-1), 0)  # whatever padding holds, NaN included, stays out of gradients
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, *x.shape[:2])
        if type(self) is TTTLayer and mask is None and state is None and not return_state:
            at_once = layer_at_once(self, x, cu_seqlens)
            if at_once is not None:
                return at_once
        if state is not None:
            N = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            check_conv_state(state, N, self._context)
        spans = make_spans(mask, cu_seqlens, x.shape[1])
        backend = choose_backend(self.backend, x, self.head_dim, self.mini_batch_size, self.inner)
        position, context = (None, None) if state is None else (state.position, state.conv)
        q, k, v, inner_lr, gate, conv = self._views(x, spans, position, context, backend)
        model, scale = INNER_MODELS[self.inner], token_scale(self.token_offset.to(inner_lr.dtype))
        rates, weights = Rates(inner_lr, scale, log_decay(self, x)), (*self.initial_state(), self.mini_batch_size)
        o, new_state = inner_loop(model, (q, k, v), rates, *weights, state, mask, cu_seqlens, 1e-6, backend)
        y = finish(o, gate, mask, self.norm, self.output, backend)
        return (y, dataclasses.replace(new_state, conv=conv)) if return_state else y

    @property
    def forgets(self) -> bool:
        """Whether its weights decay towards the initial ones."""
        return self.forget != "none"

    def make_pool(self, num_slots: int) -> StatePool:
        """A pool of new streams on the layer's device, for ``step``."""
        return StatePool(num_slots, self, self._context)

    def initial_state(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """What a stream starts with: the inner model's weights, W1, b1, ..., and γ and β of the inner norm."""
        initial = tuple(getattr(self, name) for name in INNER_MODELS[self.inner].weights)
        return initial, (self.inner_norm_weight, self.inner_norm_bias)

    def step(self, x: Tensor, pool: StatePool, slots: Tensor) -> Tensor:
        """Advance B streams of a pool by one token each, in place; what comes out is what ``forward`` would give.

        There are no gradients. On a GPU the host waits for nothing, so that a step can be captured in a CUDA graph;
        there, as in compiled code, the values of ``slots`` are not checked: of a slot given twice, state and outputs
        are undefined, and no others.

        Args:
            x: the streams' next inputs ``[B, width]``.
            pool: made by ``make_pool``.
            slots: the streams' places in the pool, int64 ``[B]``, in any order, all different.

        Returns:
            y ``[B, width]``.

        Raises:
            ValueError: a wrong shape, another layer's pool, a slot out of range or given twice.
            TypeError: a wrong dtype.
        """
        y = step_at_once(self, x, pool, slots) if type(self) is TTTLayer else None
        if y is not None:
            return y
        check_step_input(x, self.width, slots, pool.num_slots, pool.records)
        if pool.layer is not self:
            raise ValueError("the pool belongs to another layer; a layer steps the pools that its make_pool made")
        return self._step_by_parts(x, pool, slots)

    @torch.no_grad()
    def _step_by_parts(self, x: Tensor, pool: StatePool, slots: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        if self.backend == "reference":
            y: Tensor
            y, state = self(x, state=pool.read(slots), return_state=True)
            pool.write(slots, state)
            return y.squeeze(1)
        position, context = pool.position[slots], None if pool.conv is None else pool.conv[slots]
        backend = choose_backend(self.backend, x, self.head_dim, self.mini_batch_size)
        q, k, v, lr, gate, conv = self._views(x, None, position, context, backend)
        q, k, v, lr = (t.squeeze(1) for t in (*autocast(q, k, v), lr))
        scale, norm = token_scale(self.token_offset.to(lr.dtype)), (self.inner_norm_weight, self.inner_norm_bias)
        offset = position % self.mini_batch_size
        token = TokenStep(q, k, v, lr, scale, *norm, slots, offset, pool.records, self.inner, pool.hidden, 1e-6)
        decay = log_decay(self, x)
        if decay is None:
            (o,) = token_step(token, backend)
        else:
            initial = torch.cat([W.flatten(1) for W in matrices(self.initial_state()[0])], 1).to(pool.records.dtype)
            (o,) = forgetting_token_step(token._replace(log_decay=decay.squeeze(1), initial=initial), backend)
        pool.position.index_copy_(0, slots, position + 1)
        if pool.conv is not None and conv is not None:
            pool.conv.index_copy_(0, slots, conv)
        return finish(o.unsqueeze(1), gate, None, self.norm, self.output, backend).squeeze(1)

    def moved(self, state: TTTState) -> Tensor:
        """How far each stream's and head's weights are from the initial ones, over those' norm: float64 ``[N, H]``."""
        return moved(self, state)

    def surprise(self, x: Tensor) -> Tensor:
        """How much worse than the initial weights those know a token with which its mini-batch begins.

        That is a ratio of inner losses, summed over the heads: below 1 where what was learned helps, and above where it
        misleads, as after a switch. There are no gradients.

        Args:
            x: sequences from their beginning ``[B, L, width]``.

        Returns:
            The ratios ``[B, L]``.

        Raises:
            ValueError: x has another shape, or the inner model is another package's.
        """
        check_layer_input(x, self.width, None, None)
        own, first = self._losses(x)
        return own / first.clamp_min(torch.finfo(first.dtype).tiny)

    def _losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return inner_losses(self, x)

    @property
    def _context(self) -> tuple[int, int] | None:
        """Shape of a stream's context of the convolutions."""
        return None if self.backbone == "transformer" else (self.conv_kernel - 1, len(self.query_conv.bias))

    def _views(
        self, x: Tensor, spans: Spans | None, position: Tensor | None, context: Tensor | None, backend: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """q and k, rotated, and v, ``[B, L, H, D]``; the rates; what gates the output; the convolutions' context."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        table = rotary_table(self.mini_batch_size, self.head_dim, self.rope_theta, dtype, x.device)
        rope = Rope(*table, self._positions(x, spans, position))
        rates = (self.inner_lr_weight, self.inner_lr_bias)
        if self.backbone == "transformer":
            linears = [self.query, self.key, self.value]
            (q, k, v), lr = project(x, linears, *rates, rope, 2, self.base_lr, backend)
            return q, k, v, self._inner_lr(lr, k), None, None
        linears = [self.query, self.value, self.gate]
        (shared, v, gate), lr = project(x, linears, *rates, rope, 0, self.base_lr, backend)
        convs, shared = (self.query_conv, self.key_conv), shared.flatten(-2)
        views, conv = convolve(convs, shared, spans, context, rope, backend=backend)
        q, k = (view.unflatten(-1, (self.num_heads, -1)) for view in views)
        return q, k, v, self._inner_lr(lr, k), gate.flatten(-2), conv

    def _positions(self, x: Tensor, spans: Spans | None, position: Tensor | None) -> Tensor:
        """Each token's place in its mini-batch, ``[L]`` or ``[B, L]``."""
        if spans is None:
            offset = torch.arange(x.shape[1], device=x.device)
            if position is not None:
                offset = position[:, None] + offset
        else:
            offset = spans.offset
            if position is not None:
                offset = offset + position[spans.sequence]
        return offset % self.mini_batch_size

    def _inner_lr(self, lr: Tensor, k: Tensor) -> Tensor:
        """The learned rates ``[B, L, H]``, bounded, scaled or switched off."""
        if not self.adapt:
            return torch.zeros_like(lr)
        if self.max_inner_step is not None:
            lr = torch.minimum(lr, self.max_inner_step / (1 + k.to(lr.dtype).square().sum(-1)))
        return lr * self.inner_lr_scale  # also by one: torch.compile would make a program for each side of a branch

    def load_release_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load weights of the original ``ttt-lm-pytorch`` TTTLinear or TTTMLP.

        Raises:
            ValueError: a key is missing or unknown, or a shape does not fit; nothing is loaded then.
        """
        load_release_layer(self, state_dict)

    def extra_repr(self) -> str:
        """The options, for ``print``."""
        return (
            f"width={self.width}, num_heads={self.num_heads}, inner={self.inner!r}, backbone={self.backbone!r}, "
            f"mini_batch_size={self.mini_batch_size}" + (f", forget={self.forget!r}" if self.forgets else "")
        )
