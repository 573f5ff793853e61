"""Sequences cut into parts, one for each process: a process reads its part and passes its state on to the next."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree


def read_part(
    module: Callable[..., Any], x: Tensor, *, state: Any = None, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Any]:
    """Read this process's part of sequences whose parts the processes of a group have, in the order of their ranks.

    A process waits for the state of the one before it, so a single layer's parts are read one after the other. In a
    model they overlap: while the second process reads its part with the first layer, the first one is at the second
    layer. On the way back gradients of states go from each process to the one before it. Therefore every process calls
    ``backward`` from its outputs, and not ``torch.autograd.grad``, which goes no further than it is asked to. Each
    process has the gradients of weights for its part, to be summed over the group.

    Args:
        module: a ``TTTLayer`` or another module that is called with ``state`` and ``return_state``, with the same
            weights in all processes.
        x: the part, ``[B, L, width]``; L may differ between processes, B may not.
        state: where the first process goes on; None starts new streams.
        group: the processes; None: all of them.

    Returns:
        Outputs ``[B, L, width]``, and the state behind the part: the last process has the state of the whole sequences.

    Raises:
        ValueError: a state is given to another process than the first.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank and state is not None:
        raise ValueError(f"state must be given to the first process of the group alone; given to number {rank}")
    if rank:
        with torch.no_grad():
            _, like = module(x[:, :1], return_state=True)  # of one token, to know what to receive
        leaves, spec = _pytree.tree_flatten(like)
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        receive: Callable[..., Any] = _Receive.apply
        state = _pytree.tree_unflatten(receive(anchor, rank - 1, group, *leaves), spec)
    y, behind = module(x, state=state, return_state=True)
    if rank < size - 1:
        send: Callable[..., Any] = _Send.apply
        y = send(y, rank + 1, group, *_pytree.tree_leaves(behind))
    return y, behind


class _Receive(torch.autograd.Function):
    """A state from the process before; its gradients go back there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, source: int, group: Any, *like: Tensor) -> tuple[Tensor, ...]:
        ctx.source, ctx.group = source, group
        leaves = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)
        for x in leaves:
            dist.recv(x, group=group, group_src=source)
        ctx.mark_non_differentiable(*[x for x in leaves if not x.is_floating_point()])
        ctx.floats = [x.is_floating_point() for x in leaves]
        return leaves

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        for is_float, g in zip(ctx.floats, grads, strict=True):
            if is_float:
                dist.send(g.contiguous(), group=ctx.group, group_dst=ctx.source)
        return (None,) * (3 + len(grads))


class _Send(torch.autograd.Function):
    """Outputs as they are, and a state sent to the next process, from which its gradients come."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, target: int, group: Any, *leaves: Tensor) -> Tensor:
        ctx.target, ctx.group = target, group
        ctx.kinds = [(x.shape, x.dtype, x.device) for x in leaves]
        for x in leaves:
            dist.send(x.detach().contiguous(), group=group, group_dst=target)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = []
        for shape, dtype, device in ctx.kinds:
            if not dtype.is_floating_point:
                grads.append(None)
                continue
            g = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(g, group=ctx.group, group_src=ctx.target)
            grads.append(g)
        return (grad, None, None, *grads)
