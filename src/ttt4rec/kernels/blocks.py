"""Mini-batches of more tokens than a program holds: products by PyTorch's library, and fused kernels between them.

The walk and its steps come from ``ttt4rec.eager``, in blocks. Here are their pieces: operands are in the dtype of
the tokens, products are summed in float32, and all that lies between two products is one kernel.

Numbers in brackets are equations of docs/mathematics.md.
"""

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from .. import eager
from ..arguments import Scan
from ..eager.blocks import BLOCK, BlockedLayer, BlockedWeights, BlockRates
from ..eager.pieces import Pieces
from . import block_kernels as jit
from . import launch

ONES = 8
"""Features behind the keys' and queries' own: the library's products want rows of whole 16 bytes."""
PROGRAM = 2048
"""Numbers of a program's tile, 16 a thread. Chosen on paper, by registers, and not measured."""


def pieces(scan: Scan) -> Pieces:
    """What the steps of a scan are made of.

    Raises:
        ValueError: the kernels do not run that dtype or head dimension.
    """
    launch.check_tokens(scan.q)
    dtype = scan.q.dtype
    return Pieces(
        block=BLOCK,
        ones=ONES,
        operand=lambda scan: scan.q.dtype,
        rounded=lambda x: x.to(dtype),
        rates=BlockRates,
        weights=partial(FusedWeights, dtype=dtype),
        layer=FusedLayer,
        inner_gradient=FusedInnerGradient,
        output_norm=partial(FusedOutputNorm, dtype=dtype),
        gelu=partial(FusedGelu, dtype=dtype),
    )


@launch.on_its_device
def linear_scan(scan: Scan) -> tuple[Tensor, ...]:
    """The inner loop of TTT-Linear, as ``eager.linear_scan``; G is kept in q's dtype."""
    return eager.linear_scan(scan, pieces(scan))


@launch.on_its_device
def linear_scan_backward(scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As ``eager.linear_scan_backward``. Two runs give the same bits."""
    return eager.linear_scan_backward(scan, kept, grads, pieces(scan))


@launch.on_its_device
def mlp_scan(scan: Scan) -> tuple[Tensor, ...]:
    """The inner loop of TTT-MLP, as ``eager.mlp_scan``; Z1 and G2 are kept in q's dtype."""
    return eager.mlp_scan(scan, pieces(scan))


@launch.on_its_device
def mlp_scan_backward(scan: Scan, kept: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As ``eager.mlp_scan_backward``. Two runs give the same bits."""
    return eager.mlp_scan_backward(scan, kept, grads, pieces(scan))


def product(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """A batch of products of operands, summed in float32; onto a float32 tensor, which may be overwritten."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b) if onto is None else onto.baddbmm_(a, b)
    if a.device.type == "cpu":  # which has no product that is wider than its operands
        return product(a.float(), b.float(), onto)
    result = torch.bmm(a, b, out_dtype=torch.float32)
    return result if onto is None else onto.add_(result)


class FusedWeights(BlockedWeights):
    """With a copy of the weights as an operand, that has rows of zeros for the zeros behind keys' features."""

    product = staticmethod(product)

    def __init__(self, value: Tensor, dtype: torch.dtype) -> None:
        super().__init__(value)
        self._operand = torch.nn.functional.pad(value, (0, 0, 0, ONES - 1)).to(dtype)

    def affine(self, x: Tensor) -> Tensor:
        """As the class above; float32."""
        return product(x, self._operand)

    def back(self, d: Tensor, onto: Tensor | None = None) -> Tensor:
        """As the class above; float32."""
        return product(d, self._operand[:, : self.features].mT, onto)

    def forth(self, x: Tensor, onto: Tensor) -> Tensor:
        """As the class above; float32."""
        return product(x, self._operand, onto)


class FusedLayer(BlockedLayer):
    """An inner layer, whose steps between two products are a kernel each."""

    product = staticmethod(product)

    @staticmethod
    def scaled(x: Tensor, scale: Tensor) -> Tensor:
        """As the class above."""
        out = torch.empty_like(x)
        _run(jit.scaled_kernel, x, x.dtype, (x, scale, scale.numel(), None, out, None))
        return out

    @staticmethod
    def scaled_with_dot(x: Tensor, scale: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """As the class above, in x's dtype."""
        out, dots = torch.empty_like(x), _float32(x.shape[:2], x)
        _run(jit.scaled_kernel, x, x.dtype, (x, scale, scale.numel(), y, out, dots))
        return out, dots

    def causal(self, pairs: Tensor, add: int) -> Tensor:
        """As the class above, an operand."""
        out = torch.empty_like(pairs, dtype=self._keys.dtype)
        _run(jit.causal_kernel, pairs, out.dtype, (pairs, out, float(add)))
        return out

    def running(self, sums: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """As the class above, the sums of blocks operands."""
        rows, blocks, numbers = *sums.shape[:2], sums.shape[2:].numel()
        out = torch.empty_like(sums, dtype=self._keys.dtype)
        total = _float32((rows, *sums.shape[2:]), sums)
        sizes = _sizes(out.dtype, 512)
        arguments = (sums, last, out, total, blocks, numbers, sizes)
        launch.Launch(
            jit.running_kernel, (rows * triton.cdiv(numbers, sizes.features),), arguments, launch.Blocks(4, 1)
        ).run()
        return out.flatten(0, 1), total


class FusedInnerGradient:
    """G, and its derivative, a kernel each."""

    def __init__(self, Z: Tensor, k: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> None:
        self._given, self._like, self._rest = (Z, k, v, gamma, beta), v, (k.shape[2], Z.shape[1], eps)

    def value(self) -> Tensor:
        """G, (6), an operand."""
        G = torch.empty_like(self._like)
        _run(jit.inner_gradient_kernel, G, G.dtype, (*self._given, G, *self._rest))
        return G

    def backward(self, dG: Tensor, G: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """dZ, an operand, de, and sums of what both give γ and β, by (21) and (23)."""
        dZ, de, sums = torch.empty_like(G), torch.empty_like(dG), _sums(G)
        arguments = (*self._given, dG, G, dZ, de, *sums, *self._rest)
        _run(jit.inner_gradient_backward_kernel, G, G.dtype, arguments)
        return dZ, de, sums


class FusedOutputNorm:
    """The layer norm of outputs P, and its backward, a kernel each."""

    def __init__(self, P: Tensor, eps: float, dtype: torch.dtype) -> None:
        self._P, self._eps, self._dtype, self._sums = P, eps, dtype, _sums(P)

    def output(self, q: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """O, (10) or (13)."""
        o = torch.empty_like(self._P, dtype=self._dtype)
        arguments = (self._P, q, gamma, beta, o, q.shape[2], q.shape[1], self._eps)
        _run(jit.output_kernel, o, self._dtype, arguments)
        return o

    def backward(self, dO: Tensor, gamma: Tensor) -> Tensor:
        """dP, (15), an operand."""
        dP = torch.empty_like(dO)
        arguments = (self._P, dO, gamma, dP, *self._sums, dO.shape[1], self._eps)
        _run(jit.output_backward_kernel, dP, self._dtype, arguments)
        return dP

    def parameters(self, _: Tensor, inner: tuple[Tensor, Tensor], __: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of dγ and dβ over some tokens each; inner are the inner gradient's, which are overwritten."""
        d_gamma, d_beta = inner
        return d_gamma.add_(self._sums[0]), d_beta.add_(self._sums[1])


class FusedGelu:
    """Gelu at z ``[rows, r, F]``, each of its uses a kernel."""

    def __init__(self, z: Tensor, dtype: torch.dtype) -> None:
        self._z, self._dtype = z, dtype

    def value_with_one(self) -> Tensor:
        """[rows, r, F + 8]: gelu(z), a one and zeros, an operand."""
        X = self._padded()
        _run(jit.gelu_kernel, self._z, self._dtype, (self._z, X, X.shape[2]))
        return X

    def times_slope(self, x: Tensor) -> Tensor:
        """x ∘ gelu'(z), an operand."""
        out = torch.empty_like(x, dtype=self._dtype)
        _run(jit.slope_kernel, x, self._dtype, (self._z, x, out, x.shape[2], False))
        return out

    def times_slope_with_zero(self, x: Tensor) -> Tensor:
        """The same with zeros behind it."""
        out = self._padded()
        _run(jit.slope_kernel, x, self._dtype, (self._z, x, out, out.shape[2], True))
        return out

    def backward(self, dX: Tensor, dG: Tensor, before: Tensor) -> Tensor:
        """dZ1, (27), an operand, from the gradients of X2 and of G1, and G2_W2."""
        dZ = torch.empty_like(dX, dtype=self._dtype)
        _run(jit.hidden_backward_kernel, dX, self._dtype, (self._z, dX, dG, before, dZ))
        return dZ

    def _padded(self) -> Tensor:
        rows, r, F = self._z.shape
        return torch.empty(rows, r, F + ONES, dtype=self._dtype, device=self._z.device)


def _run(kernel: Any, like: Tensor, dtype: torch.dtype, arguments: tuple[Any, ...]) -> None:
    """Run a kernel over the rows of a tensor, whose last dimension are the features."""
    sizes = _sizes(dtype, like.shape[-1])
    programs = like.shape[:-1].numel() // sizes.rows
    launch.Launch(kernel, (programs,), (*arguments, sizes), launch.Blocks(4, 1)).run()


def _sizes(dtype: torch.dtype, features: int) -> jit.Rows:
    operand, padded = launch.TRITON_DTYPE[dtype], launch.padded(features)
    rows = max(1, min(BLOCK, PROGRAM // padded))
    dot = launch.TRITON_DTYPE[torch.float32] if launch.interpreted() else operand
    return jit.Rows(rows, features, padded, operand, dot)


def _float32(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for two sums of every program that runs over the rows of x ``[rows, r, D]``."""
    shape = (x.shape[0], x.shape[1] // _sizes(torch.float32, x.shape[2]).rows, x.shape[2])
    return _float32(shape, x), _float32(shape, x)
