"""Checks of what layers are given; every error names what is wrong, what was expected and what was given."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..checks import check_choice, check_device, check_integer, check_positive, check_shape
from ..inner_models import INNER_MODELS, InnerModel
from ..operators.transforms import has_values, transformed
from .forgetting import GATES
from .state import TTTState

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_right: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Masks and cu_seqlens found right, for as long as they live, and what they were at that time."""


def as_mask(mask: Tensor | None) -> Tensor | None:
    """A mask as bool; it may be of integers, 1 for tokens and 0 for padding, as tokenizers give it.

    Raises:
        ValueError: an integer is neither. TypeError: it is of floats, which others add to scores.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask must be bool, or integers with 1 for real tokens; given {mask.dtype}")
    if has_values(mask) and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"mask must be of 0 and 1 if it is of integers; given {int(mask.min())} to {int(mask.max())}")
    return mask.bool()


def check_mask(mask: Tensor, B: int, L: int) -> None:
    """Raise unless mask is bool ``[B, L]`` with the True entries of each row adjacent."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True for real tokens; given {mask.dtype}")
    check_shape("mask", mask, (B, L), "[B, L]")
    if _need_no_look(mask, L):
        return
    begins = mask[:, :1].sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if bool((begins > 1).any()):
        row = int((begins > 1).nonzero()[0])
        raise ValueError(f"mask must mark one run of adjacent tokens in each row; row {row} has a gap")
    _remember(mask, L)


def check_cu_seqlens(cu_seqlens: Tensor, B: int, total: int) -> None:
    """Raise unless cu_seqlens are the ascending bounds of sequences that fill ``[1, total]`` tokens."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64; given {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape [N + 1] with N >= 1; given {list(cu_seqlens.shape)}")
    if B != 1:
        raise ValueError(f"packed input must have batch size 1, all tokens in one row; given batch size {B}")
    if _need_no_look(cu_seqlens, total):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must ascend from 0 to the number of tokens, {total}; given {_short(bounds)}")
    _remember(cu_seqlens, total)


def _need_no_look(x: Tensor, total: int) -> bool:
    """Whether the values of a mask or of cu_seqlens for ``total`` tokens are known, or cannot be looked at in tracing.

    A look at a GPU's values waits for all that is queued there, so that the layers of a model, which are given the same
    tensor, look once. On a CPU a look is cheap and NumPy may write past the tensor's count of changes.
    """
    return not has_values(x) or (_is_counted(x) and _right.get(x) == (x._version, total))


def _remember(x: Tensor, total: int) -> None:
    if _is_counted(x):
        _right[x] = (x._version, total)


def _is_counted(x: Tensor) -> bool:
    """Whether changes of x are counted in its version, by all who are likely to make them."""
    return not x.is_cpu and not x.is_inference()


def check_inner_loop_arguments(
    model: InnerModel,
    tokens: tuple[Tensor, Tensor, Tensor],
    inner_lr: Tensor,
    token_scale: Tensor,
    weights: tuple[Tensor, ...],
    layer_norm: tuple[Tensor, Tensor],
    K: int,
    state: TTTState | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check what ``ttt_linear`` and ``ttt_mlp`` are given."""
    q = tokens[0]
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, L, H, D]; given {list(q.shape)}")
    if q.dtype not in _FLOATS:
        raise TypeError(f"q must be float32, bfloat16, float16 or float64; given {q.dtype}")
    B, L, H, D = q.shape
    for name, x in zip("kv", tokens[1:], strict=True):
        check_shape(name, x, (B, L, H, D), "[B, L, H, D] of q")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}; given {x.dtype}")
    if 0 in (B, L, H, D):  # each alone: of sizes that are symbols no order is known
        raise ValueError(f"q must have at least one sequence, token, head and feature; given {list(q.shape)}")
    if not isinstance(K, int) or K < 1:
        raise ValueError(f"mini_batch_size must be an integer of at least 1; given {K!r}")
    check_shape("inner_lr", inner_lr, (B, L, H), "[B, L, H]")
    check_shape("token_scale", token_scale, (K,), "[mini_batch_size]")
    shapes = [(name, (H, *shape)) for name, shape in model.shapes(D, model.hidden(weights)).items()]
    for (name, shape), w in zip(shapes, weights, strict=True):
        check_shape(name, w, shape, "[H, in, out]" if len(shape) == 3 else "[H, out]")
    for name, p in zip(("ln_weight", "ln_bias"), layer_norm, strict=True):
        check_shape(name, p, (H, D), "[H, D]")
    named = dict(zip(("k", "v", "inner_lr", "token_scale"), (*tokens[1:], inner_lr, token_scale), strict=True))
    named |= dict(zip(model.weights, weights, strict=True))
    named |= dict(zip(("ln_weight", "ln_bias"), layer_norm, strict=True))
    check_device("q's", q.device, mask=mask, cu_seqlens=cu_seqlens, **named)
    if mask is not None and cu_seqlens is not None:
        raise ValueError("give mask or cu_seqlens, not both")
    if mask is not None:
        check_mask(mask, B, L)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, L)
    if state is not None:
        N = B if cu_seqlens is None else cu_seqlens.numel() - 1
        check_state(state, N, shapes, K, q)


def check_log_decay(log_decay: Tensor | None, inner_lr: Tensor, state: TTTState | None) -> None:
    """Check the decays of ``ttt_linear`` and ``ttt_mlp``, whose other arguments are right."""
    if log_decay is not None:
        check_shape("log_decay", log_decay, tuple(inner_lr.shape), "[B, L, H]")
        check_device("q's", inner_lr.device, log_decay=log_decay)
    if state is not None:
        check_pending_log_decay(state, log_decay is not None)


def check_pending_log_decay(state: TTTState, forgets: bool) -> None:
    """Check that a state, which is right otherwise, has decays if its inner loop forgets, and else none."""
    pending, kinds = state.pending_log_decay, ("does not forget", "forgets")
    if (pending is not None) != forgets:
        raise ValueError(
            f"state must come from a layer that {kinds[forgets]}; given one from a layer that {kinds[not forgets]}"
        )
    if pending is not None:
        check_shape("state's pending_log_decay", pending, tuple(state.pending_lr.shape), "[N, mini_batch_size - 1, H]")


def _check_streams(state: TTTState, N: int) -> None:
    if not isinstance(state, TTTState):
        raise TypeError(f"state must be a TTTState; given {type(state).__name__}")
    if state.batch_size != N:
        raise ValueError(f"state must hold one stream per sequence, {N}; given {state.batch_size}")
    if state.position.dtype != torch.int64:
        raise TypeError(f"state's position must be torch.int64; given {state.position.dtype}")


def check_state(state: TTTState, N: int, shapes: list[tuple[str, tuple[int, ...]]], K: int, q: Tensor) -> None:
    """Check what the inner loop reads of a state of N streams; q is ``[.., .., H, D]`` of the state's kind."""
    _check_streams(state, N)
    if len(state.weights) != len(shapes):
        raise ValueError(
            f"state must hold {len(shapes)} weight tensors for this inner model; given {len(state.weights)}"
        )
    for (name, shape), w in zip(shapes, state.weights, strict=True):
        check_shape(f"state's {name}", w, (N, *shape), "[N, H, ...]")
    for name, x in (("pending_k", state.pending_k), ("pending_v", state.pending_v)):
        check_shape(f"state's {name}", x, (N, K - 1, *q.shape[2:]), "[N, mini_batch_size - 1, H, D]")
    check_shape("state's pending_lr", state.pending_lr, (N, K - 1, q.shape[2]), "[N, mini_batch_size - 1, H]")
    dtype = torch.promote_types(q.dtype, torch.float32)
    for name, x in state.tensors().items():
        if name != "position" and x.dtype != dtype:
            raise TypeError(f"state's {name} must be {dtype} for {q.dtype} inputs; given {x.dtype}")
    check_device("the inputs'", q.device, **{f"state's {name}": x for name, x in state.tensors().items()})
    if q.is_cpu and has_values(state.position) and bool((state.position < 0).any()):
        raise ValueError(f"state's position must count tokens from 0; given {_short(state.position.tolist())}")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:7]))}, ...]"


def check_layer_input(x: Tensor, width: int, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Check what ``TTTLayer`` is called with."""
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"x must have shape [B, L, width] with width {width}; given {list(x.shape)}")
    if 0 in x.shape:  # each alone: of sizes that are symbols no order is known
        raise ValueError(f"x must have at least one sequence and one token; given {list(x.shape)}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64; given {x.dtype}")
    if mask is not None and cu_seqlens is not None:
        raise ValueError("give mask or cu_seqlens, not both")


def check_conv_state(state: TTTState, N: int, context: tuple[int, ...] | None) -> None:
    """Check the convolutions' part of a state of N streams; context is its shape, None with the other backbone."""
    _check_streams(state, N)
    if (state.conv is None) != (context is None):
        backbone = "transformer" if context is None else "mamba"
        raise ValueError(f"state comes from another backbone than this layer's, {backbone}")
    if state.conv is not None and context is not None:
        check_shape("state's conv", state.conv, (N, *context), "[N, conv_kernel - 1, width]")


def check_slots(slots: Tensor, num_slots: int, device: torch.device) -> None:
    """Raise unless slots are different places of a pool. On a GPU, and while tracing, values are not looked at."""
    if slots.dtype != torch.int64:
        raise TypeError(f"slots must be int64; given {slots.dtype}")
    if slots.dim() != 1 or slots.numel() < 1:
        raise ValueError(f"slots must have shape [B] with B >= 1; given {list(slots.shape)}")
    if slots.device != device:
        raise ValueError(f"slots must be on the pool's device {device}; given {slots.device}")
    if not slots.is_cpu or not has_values(slots):
        return
    ordered = slots.sort().values
    if ordered[0] < 0 or ordered[-1] >= num_slots:
        wrong = int(ordered[0] if ordered[0] < 0 else ordered[-1])
        raise ValueError(f"slots must be from 0 to {num_slots - 1}; given {wrong}")
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.numel():
        raise ValueError(f"slots must differ, each stream reads one token; {int(twice[0])} is given twice")


def check_step_input(x: Tensor, width: int, slots: Tensor, num_slots: int, pool: Tensor) -> None:
    """Check what ``TTTLayer.step`` is called with; pool is any float tensor of the pool."""
    if transformed():
        raise RuntimeError(
            "a step changes its pool in place and knows no transforms of torch.func or forward-mode derivatives; call "
            'the layer with state= and backend="reference" instead'
        )
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"x must have shape [B, width] with width {width}; given {list(x.shape)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dtype not in _FLOATS or pool.dtype != dtype:
        raise TypeError(f"x must fit the pool's dtype {pool.dtype}; given {x.dtype}")
    if x.device != pool.device:
        raise ValueError(f"x must be on the pool's device {pool.device}; given {x.device}")
    check_slots(slots, num_slots, pool.device)
    check_shape("slots", slots, (x.shape[0],), "[B] of x")


def check_layer_options(
    width: int,
    num_heads: int,
    inner: str,
    backbone: str,
    mini_batch_size: int,
    rope_theta: float,
    base_lr: float,
    conv_kernel: int,
    max_inner_step: float | None,
    forget: str,
) -> None:
    """Check what ``TTTLayer`` is built with."""
    positive = {
        "width": width,
        "num_heads": num_heads,
        "mini_batch_size": mini_batch_size,
        "conv_kernel": conv_kernel,
    }
    for name, size in positive.items():
        check_integer(name, size)
    if width % num_heads or width // num_heads % 2:
        raise ValueError(
            f"width must be num_heads times an even head dimension; given width {width} and {num_heads} heads"
        )
    check_choice("inner", inner, tuple(INNER_MODELS))
    check_choice("backbone", backbone, ("transformer", "mamba"))
    check_positive("rope_theta", rope_theta)
    check_positive("base_lr", base_lr)
    if max_inner_step is not None:
        check_positive("max_inner_step", max_inner_step)
    check_choice("forget", forget, tuple(GATES))
