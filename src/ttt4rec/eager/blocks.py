"""An inner layer in a mini-batch of several blocks: what a token reads of blocks before its own are sums.

Numbers in brackets are equations of docs/mathematics.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import MAX_MINI_BATCH_SIZE
from .tiles import InnerWeights

BLOCK = MAX_MINI_BATCH_SIZE
"""Tokens between which pairs are taken. Sums before blocks are then no more than the tokens, up to as many features."""


@dataclass
class BlockRates:
    """lr_j and s_i of one mini-batch, and their gradients; zeros behind its tokens."""

    lr: Tensor  # [R, r]
    scale: Tensor  # s; given as those of a whole mini-batch, [r] from then on
    complete: int  # rows whose mini-batch is complete; only these are updated

    @staticmethod
    def scales(token_scale: Tensor) -> Tensor:
        """Scales of a whole mini-batch, from s ``[K]``."""
        return token_scale

    def __post_init__(self) -> None:
        r, K = self.lr.shape[1], self.scale.numel()
        self.place, self.last = K - 1, self.scale[-1]
        self.scale = torch.nn.functional.pad(self.scale, (0, r - K)) if r > K else self.scale[:r]
        self.d_lr: Tensor | None = None
        self.d_scale: Tensor | None = None

    def accumulate(self, d_lr: Tensor, d_scale: Tensor, d_last: Tensor) -> None:
        """Add what one inner layer contributes: ``[R, r]``, ``[r]`` and a number."""
        if self.complete:
            d_scale[self.place] += d_last
        self.d_lr = d_lr if self.d_lr is None else self.d_lr.add_(d_lr)
        self.d_scale = d_scale if self.d_scale is None else self.d_scale.add_(d_scale)

    def backward(self) -> tuple[Tensor, Tensor]:
        """Return d lr ``[R, r]`` and d s ``[r]``."""
        assert self.d_lr is not None
        assert self.d_scale is not None
        return self.d_lr, self.d_scale


class BlockedWeights(InnerWeights):
    """Products with weights; sums over tokens have two levels, in a block and over all."""

    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        """A batch of products."""
        return torch.bmm(a, b)

    @classmethod
    def outer(cls, x: Tensor, d: Tensor) -> Tensor:
        """``xᵀ d``, ``[R, in + 1, out]``."""
        sums: Tensor = cls.product(in_blocks(x).mT, in_blocks(d)).unflatten(0, (x.shape[0], -1)).sum(1)
        return sums

    @classmethod
    def add_outer(cls, total: Tensor, x: Tensor, d: Tensor, other: tuple[Tensor, Tensor] | None = None) -> None:
        """As the class above."""
        sums = cls.outer(x, d)
        if other is not None:
            sums += cls.outer(*other)
        total += sums[:, : total.shape[1]]


class BlockedLayer:
    """One inner layer in one mini-batch, as ``DualLayer``, of r tokens that are a multiple of ``BLOCK``.

    What is no product of matrices is a method of its own, which fused kernels take the place of.
    """

    def __init__(self, keys: Tensor, G: Tensor, weights: InnerWeights, rates: BlockRates) -> None:
        self._keys, self._G, self._weights, self._rates = keys, G, weights, rates
        self._U = self.scaled(G, rates.lr)
        sums = self.product(in_blocks(keys).mT, in_blocks(self._U)).unflatten(0, (keys.shape[0], -1))
        self._before, self._all = self.running(sums, None)  # S and t, (36)

    def update(self) -> None:
        """(9) in place, the sum formed by itself: W, which may be larger, rounds once."""
        W, c = self._weights.value, self._rates.complete
        W[:c].addcmul_(self._all[:c, : W.shape[1]], -self._rates.last)

    def output(self, queries: Tensor) -> Tensor:
        """(37) at the queries."""
        self._queries, features = queries, self._weights.features
        q, k = in_blocks(queries), in_blocks(self._keys)
        self._pairs = self.causal(self.product(q[..., :features], k[..., :features].mT), 1)
        read = self.product(self._pairs, in_blocks(self._U))
        self._read = self.product(q, self._before, read).view(*queries.shape[:2], -1)
        return self.combined(self._weights.affine(queries), self._read, self._rates.scale)

    def backward(self, d_out: Tensor, dW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Backward of ``output`` and ``update`` together, (38) and (39).

        dW comes in as gradient of the updated weights and leaves, in place, as gradient of the weights before. Returns
        d queries and d keys, without their ones, and dG.
        """
        weights, rates, c, features = self._weights, self._rates, self._rates.complete, self._weights.features
        d_read, minus_d_scale = self.scaled_with_dot(d_out, -rates.scale, self._read)
        q, k, U, d = (in_blocks(x) for x in (self._queries, self._keys, self._U, d_read))
        from_update = torch.zeros_like(self._all)
        from_update[:c, : dW.shape[1]] = dW[:c] * -rates.last
        d_sums = self.product(q.mT, d).unflatten(0, (self._keys.shape[0], -1))
        after, _ = self.running(d_sums, from_update)  # dS and dt
        d_last = -(self._all[:c, : dW.shape[1]] * dW[:c]).sum()
        d_pairs = self.causal(self.product(d, U.mT), 0)
        dU = self.product(k, after, self.product(self._pairs.mT, d)).view_as(d_out)
        d_keys = self.product(U, after[:, :features].mT, self.product(d_pairs.mT, q[..., :features]))
        d_queries = self.product(d, self._before[:, :features].mT, self.product(d_pairs, k[..., :features]))
        dG, d_lr = self.scaled_with_dot(dU, rates.lr, self._G)
        shape = (*self._keys.shape[:2], -1)
        rates.accumulate(d_lr, -minus_d_scale.sum(0), d_last)
        d_queries = weights.back(d_out, onto=d_queries.view(shape))
        weights.add_outer(dW, self._queries, d_out)
        return d_queries, d_keys.view(shape), dG

    @staticmethod
    def product(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        """A batch of products; onto a tensor of their shape, which may be overwritten, if one is given."""
        return torch.bmm(a, b) if onto is None else onto.baddbmm_(a, b)

    @staticmethod
    def scaled(x: Tensor, scale: Tensor) -> Tensor:
        """Rows ``[R, r, ...]`` times ``[R, r]``, an operand."""
        return x * scale.unsqueeze(-1)

    @staticmethod
    def scaled_with_dot(x: Tensor, scale: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Rows times ``[R, r]`` or ``[r]``, and their products with y's rows, summed over features ``[R, r]``."""
        return x * scale.unsqueeze(-1), (x * y).sum(-1)

    def causal(self, pairs: Tensor, add: int) -> Tensor:
        """tril(pairs + add), in place of what is given."""
        return (pairs.add_(add) if add else pairs).tril_()

    def running(self, sums: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """From sums of every block ``[R, blocks, ...]``: for every block the sum of all before it, and the sum of all.

        Or the sum of all after it, if there is something that is after the last: it may be larger by far, and is added
        to the sum of the others.
        """
        nothing = torch.zeros_like(sums[:, :1])
        if last is None:
            before = torch.cat((nothing, sums[:, :-1]), 1).cumsum_(1)
            return before.flatten(0, 1), before[:, -1] + sums[:, -1]
        after = torch.cat((sums[:, 1:], nothing), 1).flip(1).cumsum_(1).flip(1)
        return after.add_(last.unsqueeze(1)).flatten(0, 1), after[:, 0] + sums[:, 0]

    @staticmethod
    def combined(base: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """base - scale ∘ x, in place of base."""
        return base.addcmul_(x, -scale.unsqueeze(-1))


def in_blocks(x: Tensor) -> Tensor:
    """[R, r, ...] to ``[R · blocks, BLOCK, ...]``."""
    return x.view(-1, BLOCK, x.shape[-1])
