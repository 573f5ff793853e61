"""Streams that are read one token at a time."""

from types import SimpleNamespace

import torch

from tests.support.checks import inner_inputs
from ttt4rec import StatePool
from ttt4rec.arguments import TokenStep

WIDTH, LENGTH = 8, 11


def tokens(streams, length=LENGTH, width=WIDTH):
    return torch.randn(streams, length, width, dtype=torch.float64)


def read_on(layer, x, pool, slots):
    """Step through x [B, L, width]."""
    return torch.stack([layer.step(x[:, t], pool, slots) for t in range(x.shape[1])], 1)


def step_arguments(inner, dtype, *, B=3, H=2, D=6, K=4):
    """Arguments of the operator, for streams at the first, at a middle and at the last token of a mini-batch."""
    inputs = inner_inputs(inner, B, 1, H, D, K, dtype=dtype)
    q, k, v, lr = (inputs.pop(name).squeeze(1) for name in ("q", "k", "v", "inner_lr"))
    scale, gamma, beta = (inputs.pop(name) for name in ("token_scale", "ln_weight", "ln_bias"))
    initial = tuple(inputs.values()), (gamma, beta)
    layer = SimpleNamespace(inner=inner, mini_batch_size=K, initial_state=lambda: initial)
    pool = StatePool(5, layer)
    pool.records += 0.1 * torch.randn_like(pool.records)
    where = torch.tensor([4, 0, 2]), torch.tensor([0, K // 2, K - 1])
    return TokenStep(q, k, v, lr, scale, gamma, beta, *where, pool.records, inner, pool.hidden, 1e-6)


def forgetting(given, most=0.3):
    """The same of a layer that forgets, with some decays in the rows of the tokens before."""
    rows = given.record.row_parts(given.record.parts(given.records)[1])[-1]
    rows.copy_(-most * torch.rand(rows.shape))
    log_decay = -most * torch.rand(given.inner_lr.shape).to(given.inner_lr)
    initial = torch.randn(given.q.shape[1], given.record.weights_at[-1]).to(given.records)
    return given._replace(log_decay=log_decay, initial=initial)
