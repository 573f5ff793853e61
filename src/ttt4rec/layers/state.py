"""TTTState: what a TTT layer remembers of a stream."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import add_safe_globals
from torch.utils import _pytree

from ..atomic_files import read_sealed, write_sealed


@dataclass(frozen=True)
class TTTState:
    """The state of N streams, each at its own position, also inside a mini-batch.

    To ``torch.utils._pytree`` it is a node whose leaves are its tensors, so that it goes into and out of exported
    programs, and ``torch.load`` reads it with ``weights_only=True``.

    A stream that stops inside a mini-batch keeps the weights with which that mini-batch began and its tokens so far,
    rather than their gradient sums: ``(2D + 1)(K - 1)`` numbers a head instead of a second copy of the weights, and
    the continuation is the very computation of one long call.

    Attributes:
        weights: ``(W1, b1)`` or ``(W1, b1, W2, b2)`` at the start of the current mini-batch; ``[N, H, in, out]`` and
            ``[N, H, out]``, float32 (float64 for float64 models).
        pending_k: keys of the current mini-batch's tokens, rotated, ``[N, K-1, H, D]``, the last at the end.
        pending_v: their values.
        pending_lr: their inner rates ``[N, K-1, H]``; zero where there is no token.
        position: tokens seen, int64 ``[N]``; ``position % K`` of them are pending.
        conv: the last inputs of the Mamba backbone's convolutions ``[N, conv_kernel - 1, width]``, else None.
        pending_log_decay: the pending tokens' decays, as ``pending_lr``, of a layer that forgets, else None.
    """

    weights: tuple[Tensor, ...]
    pending_k: Tensor
    pending_v: Tensor
    pending_lr: Tensor
    position: Tensor
    conv: Tensor | None = None
    pending_log_decay: Tensor | None = None

    def __repr__(self) -> str:
        W = self.weights[0]
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in self.tensors().items())
        kind = f"{str(W.dtype).removeprefix('torch.')} on {W.device}"
        return f"TTTState({self.batch_size:,} streams: {shapes}; {kind}, {self.nbytes:,} bytes)"

    @property
    def batch_size(self) -> int:
        """Number of streams N."""
        return self.position.numel()

    @property
    def mini_batch_size(self) -> int:
        """K of the layer this state belongs to."""
        return self.pending_k.shape[1] + 1

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def weight_norm(self) -> Tensor:
        """Frobenius norm of each stream's and head's weights ``[N, H]``: the cheap thing to watch for divergence."""
        return torch.stack([w.flatten(2).square().sum(-1) for w in self._matrices()]).sum(0).sqrt()

    def detach(self) -> "TTTState":
        """Cut the graph: truncated back-propagation through time."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TTTState":
        """Move to a device; ``dtype`` converts everything but the positions."""
        return self._map(lambda x: x.to(device, dtype if x.is_floating_point() else None))

    def clone(self) -> "TTTState":
        """Copy all tensors."""
        return self._map(Tensor.clone)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "TTTState":
        """Select streams; the result is again a batch, of one for an integer.

        Raises:
            IndexError: an integer out of range.
        """
        if hasattr(index, "__index__") and not (isinstance(index, Tensor) and index.dim()):
            index = operator.index(index)
            if not -self.batch_size <= index < self.batch_size:
                raise IndexError(f"stream {index} is out of range for a state of {self.batch_size} streams")
            index = [index % self.batch_size]
        if isinstance(index, list | tuple) and not index:
            index = slice(0)
        chosen = index if isinstance(index, slice | Tensor) else torch.tensor(index, device=self.position.device)
        return self._map(lambda x: x[chosen])

    @staticmethod
    def stack(states: Sequence["TTTState"]) -> "TTTState":
        """Put the streams of several states, in order, into one.

        Raises:
            ValueError: no state was given, or they come from layers of different shape.
        """
        if not states:
            raise ValueError("states must be at least one; given none")
        shapes = [{name: tuple(x.shape[1:]) for name, x in s.tensors().items()} for s in states]
        for i, other in enumerate(shapes):
            if other != shapes[0]:
                raise ValueError(
                    f"states must all be of one layer; given shapes {shapes[0]} and, of number {i}, {other}"
                )
        tensors = [s.tensors() for s in states]
        return TTTState.from_tensors({name: torch.cat([t[name] for t in tensors]) for name in tensors[0]})

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a safetensors file, with a checksum (needs the extra ``ttt4rec[recsys]``).

        Raises:
            OSError: it cannot be written; a file that was there is as before.
        """
        write_sealed(Path(path), self.tensors())

    @staticmethod
    def load(path: str | PathLike[str], device: str = "cpu") -> "TTTState":
        """Read what ``save`` wrote. A file without a checksum, of an older version, is read with a warning.

        Raises:
            ValueError: the file is damaged or holds something else. FileNotFoundError: it is missing.
        """
        tensors = read_sealed(Path(path))
        missing = {
            "weights.0",
            "weights.1",
            "pending_k",
            "pending_v",
            "pending_lr",
            "position",
        } - tensors.keys()
        if missing:
            raise ValueError(f"{path} is not a saved TTTState: it lacks {', '.join(sorted(missing))}")
        return TTTState.from_tensors(tensors).to(device)

    def _matrices(self) -> tuple[Tensor, ...]:
        return tuple(w.unsqueeze(-1) if w.dim() == 3 else w for w in self.weights)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as ``save`` writes them."""
        named = {f"weights.{i}": w for i, w in enumerate(self.weights)}
        named |= {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weights"}
        return {name: x for name, x in named.items() if x is not None}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "TTTState":
        """The state whose ``tensors()`` these are."""
        count = sum(name.startswith("weights.") for name in tensors)
        rest: dict[str, Any] = {name: x for name, x in tensors.items() if not name.startswith("weights.")}
        return TTTState(weights=tuple(tensors[f"weights.{i}"] for i in range(count)), **rest)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TTTState":
        return TTTState.from_tensors({name: function(x) for name, x in self.tensors().items()})


def _flatten(state: TTTState) -> tuple[list[Tensor], tuple[str, ...]]:
    named = state.tensors()
    return list(named.values()), tuple(named)


def _flatten_with_names(state: TTTState) -> tuple[list[tuple[_pytree.KeyEntry, Tensor]], tuple[str, ...]]:
    named = state.tensors()
    return [(_pytree.MappingKey(name), x) for name, x in named.items()], tuple(named)


def _unflatten(leaves: Iterable[Any], names: tuple[str, ...]) -> TTTState:
    return TTTState.from_tensors(dict(zip(names, leaves, strict=True)))


_pytree.register_pytree_node(
    TTTState,
    _flatten,
    _unflatten,
    serialized_type_name="ttt4rec.TTTState",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_names,
)
add_safe_globals([TTTState])
