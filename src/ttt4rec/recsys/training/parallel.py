"""Training by several processes, as ``torchrun`` starts them.

Every process computes with its part of each step's windows. The item table, its gradient and its optimiser's state are
split between them by rows (PyTorch's DTensor). The softmax over it is split too (``loss_parallel``): a process scores
the targets of all with its own items. What else the model has is small, kept by all, and its gradients are summed.

``torch.distributed.tensor`` is imported where it is used: that takes seconds, which a process alone need not spend.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ttt4rec import item_blocks
from ttt4rec.layers.initialisation import draw
from ttt4rec.precision import without_autocast

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ttt4rec.models.item_features import FeaturedItems
    from ttt4rec.models.ttt4rec import TTT4Rec

T = TypeVar("T")
_IGNORED = -100  # cross_entropy's ignore_index


def rank() -> int:
    """Number of this process among those that train together; 0 when it is alone."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that ``torchrun`` started, if it did, and leave them at the end.

    Only the first one prints to stdout.

    Yields:
        The device of this process: of ``"cuda"`` the GPU with its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield device
        return
    if device.startswith("cuda:"):
        raise ValueError(
            f"device must be 'cuda' for processes that torchrun started, one GPU for each; given {device!r}"
        )
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if dist.get_rank() else sys.stdout):
            yield device
            dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def check_group() -> None:
    """Look whether the processes that ``torchrun`` started, if it did, can train together.

    Raises:
        ValueError: they have not joined, or cannot exchange tensors of the CPU.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and dist.is_available() and dist.is_torchelastic_launched() and not _together():
        raise ValueError(
            "torch.distributed must be initialised, as within ttt4rec.recsys.training.parallel.processes; given "
            f"{started} processes that torchrun started, each of which would train alone"
        )
    if world_size() > 1:
        try:
            add_up(torch.zeros(()))
        except RuntimeError as error:
            raise ValueError(
                "the process group must be for tensors of the CPU too, such as "
                f"init_process_group('cpu:gloo,cuda:nccl'); given {dist.get_backend()!r} ({error})"
            ) from error


def from_first(function: Callable[[], T]) -> T:
    """What a function returns in the first process, in all of them; what it raises there too."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None]
    if rank() == 0:
        try:
            outcome = [function()]
        except Exception as error:  # whatever it is, the others wait for it
            outcome = [error]
    dist.broadcast_object_list(outcome, 0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    result: T = outcome[0]
    return result


def check_alike(given: Any) -> None:
    """Compare what can be written as JSON between all processes.

    Raises:
        ValueError: in all of them, if some have something else than the first.
    """
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).digest()
    digests = gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
    others = (digests != digests[0]).any(1).nonzero().flatten().tolist()
    if others:
        raise ValueError(
            "all processes must be given the same data, options and model, of the same seed; "
            f"given others to {', '.join(map(str, others))} than to 0"
        )


def add_up(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather(x: Tensor) -> Tensor:
    """The tensors of all processes, alike in shape, ``[world size, ...]``."""
    if world_size() == 1:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts)


def share(indices: Tensor) -> tuple[Tensor, bool]:
    """This process's part of some windows, and whether it counts: one that gets none computes with a stand-in."""
    own = indices[rank() :: world_size()]
    return (own, True) if len(own) else (indices[:1], False)


class ShardedItems(nn.Module):
    """An item table split between processes by rows; takes the place of ``TTT4Rec.embedding``.

    All processes call its methods at the same time, each with as many items as it likes.

    Args:
        weight: the whole table ``[num_items + 1, C]``, the same in all processes; each keeps its part.
        mesh: the processes.
        features: encoded by each process for its part of the items; of the model, which owns them.
    """

    def __init__(self, weight: Tensor, mesh: DeviceMesh, features: FeaturedItems | None = None) -> None:
        super().__init__()
        from torch.distributed.tensor import Shard, distribute_tensor

        self.mesh = mesh
        self._features = [] if features is None else [features]  # in a list it is no module of this one
        split = distribute_tensor(weight.detach(), mesh, [Shard(0)])
        self.weight = nn.Parameter(split, requires_grad=weight.requires_grad)
        padding = weight.new_zeros(weight.shape[0]).index_fill_(0, torch.tensor(0, device=weight.device), -torch.inf)
        self.no_padding = distribute_tensor(padding, mesh, [Shard(0)])

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``[..., C]`` of this process's ids ``[...]``; 0 is padding."""
        from torch.distributed.tensor import Shard

        item_blocks.check_range(ids[ids != 0], self.weight)
        rows = F.embedding(self._of_all(ids.flatten(), 0), self._table())
        own: Tensor = rows.redistribute(placements=[Shard(0)]).to_local()  # type: ignore[attr-defined]
        embedded: Tensor = own[: ids.numel()].unflatten(0, ids.shape)
        return embedded

    def nll(self, h: Tensor, items: Tensor) -> Tensor:
        """``TTT4Rec.nll`` of this process's targets; forward and backward within ``loss_parallel``."""
        from torch.distributed.tensor import Partial

        item_blocks.check_range(items, self.weight)
        with without_autocast(h.device.type):
            dtype = item_blocks.score_dtype(h, self.weight)
            wide, table, no_padding = self._of_all(h.to(dtype), 0), self._table().to(dtype), self.no_padding.to(dtype)
            scores = F.linear(wide, table, no_padding)  # of all targets with this process's items
            losses = F.cross_entropy(scores, self._of_all(items, _IGNORED), reduction="none", ignore_index=_IGNORED)
        longest = len(losses) // world_size()
        local: Tensor = losses.to_local(grad_placements=[Partial()])  # type: ignore[attr-defined]
        return local[rank() * longest :][: len(items)]

    def _table(self) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        weight: Any = self.weight
        if not self._features:
            return self.weight
        first = -(-weight.shape[0] // world_size()) * rank()  # DTensor gives all but the last as many rows
        rows = self._features[0].table(weight.to_local(), first)
        return DTensor.from_local(rows, self.mesh, [Shard(0)], shape=weight.shape, stride=weight.stride())

    def whole(self) -> nn.Embedding:
        """The table as it was before it was split, in every process."""
        table = whole(self.weight.detach())
        items = nn.Embedding(table.shape[0], table.shape[1], padding_idx=0, device="meta")
        draw(items)  # on meta that is to say: when it is to be drawn anew, as the rest of the model
        items.weight = nn.Parameter(table, requires_grad=self.weight.requires_grad)
        return items

    def _of_all(self, x: Tensor, fill: int) -> Any:
        """The rows of all processes, one process's behind the other's, all filled up to the longest."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        longest = torch.tensor(len(x), device=x.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, int(longest) - len(x)), value=fill)
        return DTensor.from_local(padded, self.mesh, [Shard(0)]).redistribute(placements=[Replicate()])


def check_whole(model: TTT4Rec) -> None:
    """Refuse a model whose item table is split, by ValueError."""
    if isinstance(model.embedding, ShardedItems):
        raise ValueError(
            "the model's item table is split between processes, as an error in training left it; call "
            "ttt4rec.recsys.parallel.collect(model) in all of them, or make the model again"
        )


def distribute(model: TTT4Rec) -> None:
    """Give all processes the first one's weights and split the item table; nothing if there is one process.

    Raises:
        ValueError: a process would have no item.
    """
    if world_size() == 1:
        return
    rows = model.embedding.weight.shape[0]
    if -(-rows // world_size()) * (world_size() - 1) >= rows:
        raise ValueError(f"{rows - 1} items cannot be split between {world_size()} processes; start fewer")
    for x in model.state_dict().values():
        dist.broadcast(x, 0)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(model.embedding.weight.device.type, (world_size(),))
    model.embedding = ShardedItems(model.embedding.weight, mesh, model.features)


def collect(model: TTT4Rec) -> None:
    """Undo ``distribute``: the whole table in every process."""
    if isinstance(model.embedding, ShardedItems):
        model.embedding = model.embedding.whole()


@contextmanager
def collected_after_errors(model: TTT4Rec) -> Iterator[None]:
    """Leave the whole table in every process if a ValueError or an OSError is raised, as it must be in all of them."""
    try:
        yield
    except (ValueError, OSError):
        collect(model)
        raise


@contextmanager
def collected(model: TTT4Rec) -> Iterator[None]:
    """The whole table in every process for a while, not to be trained."""
    items = model.embedding
    collect(model)
    try:
        yield
    finally:
        model.embedding = items


def scoring() -> Any:
    """The context in which losses and their gradients are computed."""
    if world_size() == 1:
        return nullcontext()
    from torch.distributed.tensor.parallel import loss_parallel

    return loss_parallel()


def add_up_gradients(model: TTT4Rec) -> None:
    """Sum the gradients of what all processes keep; the item table's are complete already."""
    for name, parameter in model.named_parameters():
        if name != "embedding.weight" and parameter.grad is not None:
            add_up(parameter.grad)


def clip_gradients(model: TTT4Rec, max_norm: float) -> None:
    """``clip_grad_norm_`` over all gradients, the parts of the item table's that other processes hold included."""
    items = [model.embedding.weight]
    both = (items, [p for p in model.parameters() if p is not items[0]])  # no foreach operator mixes the two
    groups = [trained for group in both if (trained := [p for p in group if p.grad is not None])]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    for group in groups:
        foreach = None if world_size() == 1 else False
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, torch.stack([*map(whole, norms)]).norm(), foreach)


def whole(x: Tensor) -> Tensor:
    """A tensor that may be split between processes, as one."""
    full: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return full


def hand_out(tensors: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first process's tensors, given to all of them one after the other.

    One whose name ends with a split parameter's, as Adam's moments do, is split like it.
    """
    if world_size() == 1:
        return tensors
    from torch.distributed.tensor import DTensor, distribute_tensor

    split = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
    received = {}
    kinds: dict[str, Any] = from_first(lambda: {name: (x.shape, x.dtype) for name, x in tensors.items()})
    for name, (shape, dtype) in kinds.items():
        x = tensors[name] if rank() == 0 else torch.empty(shape, dtype=dtype)
        like = next((p for own, p in split.items() if name.endswith(f".{own}") and p.shape == shape), None)
        if like is None:
            dist.broadcast(x, 0)
            received[name] = x
        else:  # sends each process its part of the first one's
            received[name] = distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return received
