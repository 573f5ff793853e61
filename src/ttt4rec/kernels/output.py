# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""Behind the inner loop: layer norm over the width, gate and output projection, each token read once.

A program holds whole tokens, so that it computes the norm's mean and variance from registers, in two passes, and the
backward computes them again rather than read them. The heads of a token lie side by side: merging them is no step.
Up to a width the output projection is in the same launch; beyond it is the library's product. The widths were chosen
on paper, by bytes and registers, and not measured.

Numbers in brackets are equations of docs/mathematics.md.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Output
from . import launch
from .hidden_layer import gelu
from .primitives import centred, dot, layer_norm_backward, normalised, total
from .projection import flat, product

FUSED_WIDTH = {"forward": 256, "backward": 128}
FUSED_WIDTH_BY_ARCHITECTURE = {"sm_80": {"forward": 256, "backward": 64}}  # whose registers do not hold 128
FUSED_WIDTH_SINGLE = {"forward": 64, "backward": 0}  # of float32, whose tiles take twice the room and more products
PARTIAL_SUMS = {"fused_backward": 128, "norm_backward": 512}  # programs of a backward, each with sums of its own


class Width(NamedTuple):
    """The compile-time sizes and types of a kernel; to a layer norm's jit helpers the width is one head."""

    rows: int  # tokens at a time
    head_dim: int  # C
    features: int  # C padded to a power of two
    outputs: int  # output features at a time, a power of two
    operand: Any  # as in ``Tile``
    dot: Any
    precision: str


Choice = tuple[int, int, launch.Blocks]  # rows, outputs, warps and stages
TABLE: dict[str, dict[int, Choice]] = {  # op: {largest width: choice}, for bfloat16 and float16
    "fused_forward": {
        64: (64, 64, launch.Blocks(4, 2)),
        128: (64, 64, launch.Blocks(4, 2)),
        256: (64, 32, launch.Blocks(8, 2)),
    },
    "fused_backward": {64: (64, 64, launch.Blocks(8, 1)), 128: (32, 128, launch.Blocks(8, 1))},
}
TABLE_BY_ARCHITECTURE = {
    "gfx942": {"fused_backward": {64: (16, 64, launch.Blocks(4, 1)), 128: (16, 128, launch.Blocks(8, 1))}}
}


def fused(direction: str, width: int, dtype: torch.dtype) -> bool:
    """Whether the ``"forward"`` or ``"backward"`` of a width is one kernel, or a kernel and the library's products."""
    half = FUSED_WIDTH_BY_ARCHITECTURE.get(launch.architecture(), FUSED_WIDTH)
    return width <= (FUSED_WIDTH_SINGLE if dtype == torch.float32 else half)[direction]


def choose(op: str, width: int, dtype: torch.dtype) -> tuple[Width, launch.Blocks]:
    """Sizes and blocks of a kernel.

    Raises:
        ValueError: the kernels do not run that dtype.
    """
    if dtype not in launch.TRITON_DTYPE:
        raise ValueError(f"kernels' inputs must be float32, bfloat16 or float16; given {dtype}")
    features = launch.padded(width)
    table = TABLE | TABLE_BY_ARCHITECTURE.get(launch.architecture(), {})
    if op in table:
        rows, outputs, blocks = next(choice for largest, choice in table[op].items() if width <= largest)
        blocks = launch.fenced(blocks)
        rows = rows // 2 if dtype == torch.float32 else rows
    else:  # nothing but whole tokens, 16 features of them a thread
        rows, outputs, blocks = max(1, 2048 // features), features, launch.Blocks(min(max(4, features // 512), 16), 1)
    return Width(rows, width, features, min(outputs, features), **product(dtype)._asdict()), blocks


@triton.jit
def real_tokens(mask, rows, num_tokens):
    """Which of the tokens exist and are no padding, [R]."""
    real = rows < num_tokens
    if mask is not None:
        real = tl.load(mask + rows, mask=real, other=False)
    return real


@triton.jit
def places(rows, tokens, sizes: tl.constexpr):
    """Offsets of tokens' features in a contiguous ``[T, C]``, and which of them are wanted, [R, N]."""
    features = tl.arange(0, sizes.features)
    return rows[:, None] * sizes.head_dim + features[None, :], tokens[:, None] & (features < sizes.head_dim)[None, :]


@triton.jit
def load_parameter(pointer, sizes: tl.constexpr):
    """γ or β, [1, N]."""
    features = tl.arange(0, sizes.features)
    return tl.load(pointer + features, mask=features < sizes.head_dim, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_normed(o, norm, offsets, wanted, eps, sizes: tl.constexpr):
    """γ, x̂, r and n, (34), of the inner loop's outputs, float32."""
    gamma, beta = norm
    gamma = load_parameter(gamma, sizes)
    x_hat, r = normalised(centred(tl.load(o + offsets, mask=wanted, other=0.0).to(tl.float32), sizes), eps, sizes)
    return gamma, x_hat, r, gamma * x_hat + load_parameter(beta, sizes)


@triton.jit
def load_gated(o, gate, norm, offsets, wanted, eps, sizes: tl.constexpr):
    """h, (34), zero at padding, [R, N]."""
    _, _, _, h = load_normed(o, norm, offsets, wanted, eps, sizes)
    if gate is not None:
        value, _, _ = gelu(tl.load(gate + offsets, mask=wanted, other=0.0).to(tl.float32))
        h *= value
    return tl.where(wanted, h, 0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def fused_forward_kernel(
    o,  # [T, C], the heads side by side
    gate,  # [T, C]
    mask,  # [T]
    norm,  # γ, β [C]
    weight,  # [C, C], output features first
    y,  # [T, C]
    num_tokens,
    eps,
    sizes: tl.constexpr,
):
    """One program: y, (34), of R tokens, zero at padding."""
    rows = tl.program_id(0).to(tl.int64) * sizes.rows + tl.arange(0, sizes.rows)
    offsets, wanted = places(rows, real_tokens(mask, rows, num_tokens), sizes)
    h = load_gated(o, gate, norm, offsets, wanted, eps, sizes)
    features = tl.arange(0, sizes.features)
    for first in tl.range(0, sizes.head_dim, sizes.outputs):
        outputs = first + tl.arange(0, sizes.outputs)
        W_mask = (outputs < sizes.head_dim)[:, None] & (features < sizes.head_dim)[None, :]
        W = tl.load(weight + outputs[:, None] * sizes.head_dim + features[None, :], mask=W_mask, other=0.0)
        target = y + rows[:, None] * sizes.head_dim + outputs[None, :]
        target_mask = (rows < num_tokens)[:, None] & (outputs < sizes.head_dim)[None, :]
        tl.store(target, dot(h, tl.trans(W), sizes).to(sizes.operand), mask=target_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def norm_forward_kernel(o, gate, mask, norm, h, num_tokens, eps, sizes: tl.constexpr):
    """One program: h, (34), of R tokens, zero at padding; the rest is a product."""
    rows = tl.program_id(0).to(tl.int64) * sizes.rows + tl.arange(0, sizes.rows)
    offsets, wanted = places(rows, real_tokens(mask, rows, num_tokens), sizes)
    gated = load_gated(o, gate, norm, offsets, wanted, eps, sizes)
    _, exists = places(rows, rows < num_tokens, sizes)
    tl.store(h + offsets, gated.to(sizes.operand), mask=exists)


@triton.jit
def gated_backward(dh, o, gate, norm, d_o, d_gate, offsets, wanted, exists, eps, sizes: tl.constexpr):
    """Store the gradients of o and the gate; returns h, and the terms of dγ and dβ, [R, N] each; (35)."""
    gamma, x_hat, r, n = load_normed(o, norm, offsets, wanted, eps, sizes)
    dn, h = dh, n
    if gate is not None:
        value, slope, _ = gelu(tl.load(gate + offsets, mask=wanted, other=0.0).to(tl.float32))
        dn, h = dh * value, n * value
        tl.store(d_gate + offsets, (dh * n * slope).to(d_gate.dtype.element_ty), mask=exists)
    tl.store(d_o + offsets, layer_norm_backward(gamma * dn, x_hat, r, sizes).to(d_o.dtype.element_ty), mask=exists)
    return tl.where(wanted, h, 0.0), dn * x_hat, dn


@triton.jit
def store_norm_sums(d_norm, d_gamma, d_beta, sizes: tl.constexpr):
    """Sum over the rows and store the program's share of dγ and dβ, contiguous ``[P, C]``."""
    gamma_sums, beta_sums = d_norm
    features = tl.arange(0, sizes.features)
    target = tl.program_id(0) * sizes.head_dim + features
    tl.store(gamma_sums + target, tl.sum(d_gamma, 0), mask=features < sizes.head_dim)
    tl.store(beta_sums + target, tl.sum(d_beta, 0), mask=features < sizes.head_dim)


@triton.jit(do_not_specialize=["num_tokens"])
def fused_backward_kernel(
    dy,  # [T, C]
    o,  # [T, C]
    gate,  # [T, C]
    mask,  # [T]
    norm,  # γ, β [C]
    weight,  # [C, C]
    d_o,  # [T, C]
    d_gate,  # [T, C]
    d_norm,  # two of [P, C], float32
    d_weight,  # [P, C, C], float32
    num_tokens,
    eps,
    sizes: tl.constexpr,
):
    """One program of P: every P-th block of R tokens, the parameters' gradients in registers; (35)."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    features = tl.arange(0, sizes.features)
    square = features[:, None] * sizes.head_dim + features[None, :]
    square_mask = (features < sizes.head_dim)[:, None] & (features < sizes.head_dim)[None, :]
    W = tl.load(weight + square, mask=square_mask, other=0.0)
    N: tl.constexpr = sizes.features
    dW = tl.zeros((N, N), tl.float32)
    d_gamma = tl.zeros((1, N), tl.float32)
    d_beta = tl.zeros_like(d_gamma)
    for block in tl.range(program, tl.cdiv(num_tokens, sizes.rows), num_programs):
        rows = tl.arange(0, sizes.rows).to(tl.int64) + block * sizes.rows
        offsets, wanted = places(rows, real_tokens(mask, rows, num_tokens), sizes)
        _, exists = places(rows, rows < num_tokens, sizes)
        d_y = tl.load(dy + offsets, mask=wanted, other=0.0)
        dh = dot(d_y, W, sizes)
        h, dn_x_hat, dn = gated_backward(dh, o, gate, norm, d_o, d_gate, offsets, wanted, exists, eps, sizes)
        dW += dot(tl.trans(d_y), h, sizes)
        d_gamma += total(dn_x_hat, 0)[None, :]
        d_beta += total(dn, 0)[None, :]
    tl.store(d_weight + program.to(tl.int64) * sizes.head_dim * sizes.head_dim + square, dW, mask=square_mask)
    store_norm_sums(d_norm, d_gamma, d_beta, sizes)


@triton.jit(do_not_specialize=["num_tokens"])
def norm_backward_kernel(dh, o, gate, mask, norm, d_o, d_gate, d_norm, num_tokens, eps, sizes: tl.constexpr):
    """One program of P: every P-th block of R tokens; h takes the place of its gradient."""
    R: tl.constexpr = sizes.rows
    N: tl.constexpr = sizes.features
    d_gamma = tl.zeros((R, N), tl.float32)
    d_beta = tl.zeros_like(d_gamma)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_tokens, sizes.rows), tl.num_programs(0)):
        rows = tl.arange(0, sizes.rows).to(tl.int64) + block * sizes.rows
        offsets, wanted = places(rows, real_tokens(mask, rows, num_tokens), sizes)
        _, exists = places(rows, rows < num_tokens, sizes)
        d_h = tl.load(dh + offsets, mask=wanted, other=0.0).to(tl.float32)
        h, dn_x_hat, dn = gated_backward(d_h, o, gate, norm, d_o, d_gate, offsets, wanted, exists, eps, sizes)
        tl.store(dh + offsets, h.to(sizes.operand), mask=exists)
        d_gamma += dn_x_hat
        d_beta += dn
    store_norm_sums(d_norm, d_gamma, d_beta, sizes)


@launch.on_its_device
def output(given: Output) -> tuple[Tensor]:
    """y ``[B, L, C]`` in o's dtype, in which the product is taken; the arithmetic before is float32.

    Raises:
        ValueError: the kernels do not run that dtype.
    """
    result, prepared = prepare_output(given)
    prepared.run()
    o, weight = given.o, given.weight
    y = result if fused("forward", weight.shape[0], o.dtype) else result @ weight.to(o.dtype).t()
    return (y.view(*o.shape[:2], weight.shape[0]),)


def prepare_output(given: Output) -> tuple[Tensor, launch.Launch]:
    """Allocate y, or what is multiplied with the weight, ``[T, C]``, and make the launch that fills it."""
    tokens, dtype = flat(given.o), given.o.dtype
    whole = fused("forward", tokens.shape[1], dtype)
    sizes, blocks = choose("fused_forward" if whole else "norm_forward", tokens.shape[1], dtype)
    result = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    arguments = (
        *_inputs(tokens, given),
        *((given.weight.to(dtype).contiguous(),) if whole else ()),
        result,
        tokens.shape[0],
        given.eps,
        sizes,
    )
    kernel = fused_forward_kernel if whole else norm_forward_kernel
    return result, launch.Launch(kernel, (triton.cdiv(tokens.shape[0], sizes.rows),), arguments, blocks)


@launch.on_its_device
def output_backward(given: Output, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of o, the gate (empty if there is none), γ, β and the weight; nothing is kept.

    Errors as in ``output``. Two runs give the same bits.
    """
    ((d_o, d_gate, *partial_sums), d_y, h), prepared = prepare_output_backward(given, kept, grads)
    prepared.run()
    d_gamma, d_beta, *rest = (partial.sum(0) for partial in partial_sums)
    d_weight = rest[0] if rest else d_y.t() @ h
    parameters = zip((d_gamma, d_beta, d_weight), (given.norm_weight, given.norm_bias, given.weight), strict=True)
    return d_o, d_gate, *(d.to(p.dtype) for d, p in parameters)


def prepare_output_backward(
    given: Output, _: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[tuple[list[Tensor], Tensor, Tensor], launch.Launch]:
    """Make a launch and what it fills: gradients of o and gate, and the parameters' partial sums.

    With them dy ``[T, C]``, and where one kernel does not do it all its product with the weight, which is replaced by
    h: then dW is yet to be taken.
    """
    o, gate, mask, d_y = given.o, given.gate, given.mask, flat(grads[0])
    num_tokens, C = d_y.shape
    whole = fused("backward", C, o.dtype)
    op = "fused_backward" if whole else "norm_backward"
    sizes, blocks = choose(op, C, o.dtype)
    if whole:
        operand = d_y
    else:
        d_y = d_y if mask is None else d_y.masked_fill(~mask.reshape(-1, 1), 0)
        operand = d_y @ given.weight.to(o.dtype)
    num_programs = min(triton.cdiv(num_tokens, sizes.rows), PARTIAL_SUMS[op])
    shapes = [(num_programs, C)] * 2 + [(num_programs, C, C)] * whole
    partial_sums = [torch.empty(shape, dtype=torch.float32, device=o.device) for shape in shapes]
    d_o = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    d_gate = o.new_empty(0) if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    arguments = (
        operand,
        *_inputs(flat(o), given),
        *((given.weight.to(o.dtype).contiguous(),) if whole else ()),
        d_o,
        None if gate is None else d_gate,
        tuple(partial_sums[:2]),
        *partial_sums[2:],
        num_tokens,
        given.eps,
        sizes,
    )
    kernel = fused_backward_kernel if whole else norm_backward_kernel
    return ([d_o, d_gate, *partial_sums], d_y, operand), launch.Launch(kernel, (num_programs,), arguments, blocks)


def _inputs(tokens: Tensor, given: Output) -> tuple[Any, ...]:
    """What all kernels read, without strides."""
    rest = (None if x is None else x.contiguous() for x in (given.gate, given.mask))
    return tokens, *rest, (given.norm_weight.contiguous(), given.norm_bias.contiguous())
