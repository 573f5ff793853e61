# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# Jit functions are typed by Triton when they are compiled.

"""Causal depthwise convolutions of one input, all in one launch, rotated as they are written.

A program has some tokens and some features. A tap reads what its neighbour read, from the cache: memory gives every
token once. A rotation is undone where the backward reads a gradient, as often as there are taps.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Convolution
from . import launch
from .primitives import total
from .projection import contiguous, load_angles, turned

TILE = 2048  # tokens times features of a program, 4 warps: beyond, the backward spills


class Sizes(NamedTuple):
    """The compile-time sizes of a convolution kernel."""

    width: int  # C
    features: int  # at a time, a power of two
    head_dim: int  # D
    rows: int  # tokens at a time
    taps: int
    convolutions: int


@triton.jit
def program_tile(sizes: tl.constexpr):
    """The program's block of tokens, these tokens [R], and its first feature."""
    columns = tl.cdiv(sizes.width, sizes.features)
    block = tl.program_id(0) // columns
    rows = block.to(tl.int64) * sizes.rows + tl.arange(0, sizes.rows)
    return block.to(tl.int64), rows, (tl.program_id(0) % columns) * sizes.features


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "L", "lead"])
def convolution_forward_kernel(
    x,  # [B, lead + L, C]
    weights,  # each [C, taps]
    biases,  # each [C]
    table,  # cos, sin [K, D/2]
    positions,  # [num_positions]
    reaches,  # [B, L]: how far back an output may read
    outputs,  # each [B, L, C]
    num_tokens,
    num_positions,
    L,
    lead,
    sizes: tl.constexpr,
):
    """One program: R tokens and N features of y_t = b + Σ_back w_(taps - 1 - back) x_(t - back), turned."""
    R: tl.constexpr = sizes.rows
    N: tl.constexpr = sizes.features
    taps: tl.constexpr = sizes.taps
    convolutions: tl.constexpr = sizes.convolutions
    _, rows, first = program_tile(sizes)
    features = first + tl.arange(0, sizes.features)
    own = features < sizes.width
    exists = rows < num_tokens
    token = lead + rows % L
    source = (rows // L) * (lead + L) + token
    reach = token
    if reaches is not None:
        reach = tl.minimum(token, tl.load(reaches + rows, mask=exists, other=0))
    if table is not None:
        cos, sin = load_angles(table, positions, rows, num_tokens, num_positions, first, sizes)
    for i in tl.static_range(convolutions):
        y = tl.zeros((R, N), tl.float32)
        y += tl.load(biases[i] + features, mask=own, other=0.0).to(tl.float32)[None, :]
        for back in tl.static_range(taps):
            w = tl.load(weights[i] + features * sizes.taps + (sizes.taps - 1 - back), mask=own, other=0.0)
            mask = (exists & (reach >= back))[:, None] & own[None, :]
            X = tl.load(x + (source - back)[:, None] * sizes.width + features[None, :], mask=mask, other=0.0)
            y += w.to(tl.float32)[None, :] * X.to(tl.float32)
        if table is not None:
            y = turned(y, cos, sin, sizes)
        target = outputs[i] + rows[:, None] * sizes.width + features[None, :]
        tl.store(target, y.to(outputs[i].dtype.element_ty), mask=exists[:, None] & own[None, :])


@triton.jit(do_not_specialize=["num_inputs", "num_positions", "L", "lead"])
def convolution_backward_kernel(
    grads,  # each [B, L, C]
    x,  # [B, lead + L, C]
    weights,  # each [C, taps]
    table,  # cos, sin [K, D/2]
    positions,  # [num_positions]
    reaches,  # [B, L]: how far back an output may read
    dx,  # [B, lead + L, C]
    d_weights,  # each [P, C, taps], float32, P blocks of tokens
    d_biases,  # each [P, C], float32
    num_inputs,
    num_positions,
    L,
    lead,
    sizes: tl.constexpr,
):
    """One program: R inputs and N features.

    g = turned back(grad)                       db = Σ_t g_t
    dx_t = Σ_back w_(taps - 1 - back) g_(t + back)    dw_(taps - 1 - back) = Σ_t g_(t + back) x_t
    """
    R: tl.constexpr = sizes.rows
    N: tl.constexpr = sizes.features
    taps: tl.constexpr = sizes.taps
    convolutions: tl.constexpr = sizes.convolutions
    block, rows, first = program_tile(sizes)
    features = first + tl.arange(0, sizes.features)
    own = features < sizes.width
    exists = rows < num_inputs
    offsets = rows[:, None] * sizes.width + features[None, :]
    mask = exists[:, None] & own[None, :]
    X = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    sequence, token = rows // (lead + L), rows % (lead + L) - lead
    num_outputs = num_inputs // (lead + L) * L
    d_x = tl.zeros((R, N), tl.float32)
    for back in tl.static_range(taps):
        reached = exists & (token + back >= 0) & (token + back < L)
        source = tl.where(reached, sequence * L + token + back, 0)
        if reaches is not None:
            reached = reached & (tl.load(reaches + source, mask=reached, other=0) >= back)
        if table is not None:
            cos, sin = load_angles(table, positions, source, num_outputs, num_positions, first, sizes)
        for i in tl.static_range(convolutions):
            g_mask = reached[:, None] & own[None, :]
            g = tl.load(grads[i] + source[:, None] * sizes.width + features[None, :], mask=g_mask, other=0.0)
            g = g.to(tl.float32)
            if table is not None:
                g = turned(g, cos, -sin, sizes)
            tap = features * sizes.taps + (sizes.taps - 1 - back)
            d_x += tl.load(weights[i] + tap, mask=own, other=0.0).to(tl.float32)[None, :] * g
            tl.store(d_weights[i] + block * sizes.width * sizes.taps + tap, total(g * X, 0), mask=own)
            if back == 0:
                tl.store(d_biases[i] + block * sizes.width + features, total(g, 0), mask=own)
    tl.store(dx + offsets, d_x.to(dx.dtype.element_ty), mask=mask)


@launch.on_its_device
def convolution(given: Convolution) -> tuple[Tensor, ...]:
    """For each weight ``[B, L, C]`` in x's dtype. The arithmetic is float32.

    Raises:
        ValueError: the kernels do not run that dtype.
    """
    results, prepared = prepare_convolution(given)
    prepared.run()
    return results


def prepare_convolution(given: Convolution) -> tuple[tuple[Tensor, ...], launch.Launch]:
    """Allocate the outputs and make the launch that fills them."""
    x, lead, (B, length, C) = given.x, given.lead, given.x.shape
    sizes, (table, places, num_positions) = _sizes(given), _rope(given)
    outputs = tuple(torch.empty((B, length - lead, C), dtype=x.dtype, device=x.device) for _ in given.weights)
    num_tokens = B * (length - lead)
    arguments = (
        x.contiguous(),
        contiguous(*given.weights),
        contiguous(*given.biases),
        table,
        places,
        None if given.offsets is None else given.offsets.contiguous(),
        outputs,
        num_tokens,
        num_positions,
        length - lead,
        lead,
        sizes,
    )
    return outputs, _launch(convolution_forward_kernel, num_tokens, arguments, sizes)


@launch.on_its_device
def convolution_backward(given: Convolution, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of x, of every weight and of every bias; nothing is kept. Two runs give the same bits."""
    (dx, *partial_sums), prepared = prepare_convolution_backward(given, kept, grads)
    prepared.run()
    parameters = zip(partial_sums, (*given.weights, *given.biases), strict=True)
    return dx, *(partial.sum(0).to(p.dtype) for partial, p in parameters)


def prepare_convolution_backward(
    given: Convolution, _: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[list[Tensor], launch.Launch]:
    """Allocate dx and the parameters' partial sums, one for every block of tokens, and make the launch."""
    x, weights, lead, (B, length, C) = given.x, given.weights, given.lead, given.x.shape
    sizes, (table, places, num_positions) = _sizes(given), _rope(given)
    blocks = triton.cdiv(B * length, sizes.rows)
    shapes = [(blocks, C, sizes.taps)] * len(weights) + [(blocks, C)] * len(weights)
    partial_sums = [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arguments = (
        contiguous(*grads),
        x.contiguous(),
        contiguous(*weights),
        table,
        places,
        None if given.offsets is None else given.offsets.contiguous(),
        dx,
        tuple(partial_sums[: len(weights)]),
        tuple(partial_sums[len(weights) :]),
        B * length,
        num_positions,
        length - lead,
        lead,
        sizes,
    )
    return [dx, *partial_sums], _launch(convolution_backward_kernel, B * length, arguments, sizes)


def _sizes(given: Convolution) -> Sizes:
    if given.x.dtype not in launch.TRITON_DTYPE:
        raise ValueError(f"kernels' inputs must be float32, bfloat16 or float16; given {given.x.dtype}")
    C, taps = given.weights[0].shape
    features = min(64, launch.padded(C))
    return Sizes(
        width=C,
        features=features,
        head_dim=C if given.cos is None else 2 * given.cos.shape[1],
        rows=TILE // features,
        taps=taps,
        convolutions=len(given.weights),
    )


def _rope(given: Convolution) -> tuple[Any, Tensor | None, int]:
    """The table, the positions, and how many there are, at least one."""
    if given.cos is None or given.sin is None or given.positions is None:
        return None, None, 1
    return contiguous(given.cos, given.sin), given.positions.contiguous(), max(1, given.positions.numel())


def _launch(kernel: Any, num_tokens: int, arguments: tuple[Any, ...], sizes: Sizes) -> launch.Launch:
    grid = triton.cdiv(num_tokens, sizes.rows) * triton.cdiv(sizes.width, sizes.features)
    return launch.Launch(kernel, (grid,), arguments, launch.Blocks(4, 1))
