"""Heads split among processes: each has weights, states and pools of its own heads, and runs their inner loop alone.

PyTorch's styles for linear maps do not suffice: the inner model's weights belong to the layer itself, and the norm
behind the inner loop is over the width of all heads. And each map would sum its own gradient of the input over the
processes, where one sum for all of them will do.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .convolution import CausalConv
from .pool import StatePool
from .state import TTTState
from .ttt import TTTLayer

_WHOLE = "token_offset"
_BY_INPUTS = "output.weight"
_MODULES: dict[type[nn.Module], list[str]] = {
    nn.Linear: ["weight"],
    nn.LayerNorm: ["weight", "bias"],
    CausalConv: ["weight", "bias"],
}
"""What a layer is made of, with their parameters."""
_Module = TypeVar("_Module", bound=nn.Module)


class HeadParallel(ParallelStyle):
    """A plan for ``torch.distributed.tensor.parallel.parallelize_module`` that splits the heads of a ``TTTLayer``.

    The layer's parameters become DTensors: of projections, gate, convolutions and norms each process has the features
    of its heads, of the output projection the columns, of the inner model, its norm, rates and gates the heads, and
    ``token_offset`` as a whole. Input, its gradients and output are whole, and the same in all processes. States
    and pools hold the process's own heads; the convolutions' context in them, its own features.

    A forward pass sums outputs over the processes, and gathers a mean and a variance for each token and process. A
    backward pass sums gradients of the input, of ``token_offset`` and of these means and variances. Sums are
    float32 at least.

    The mesh's first process gives its weights to all. Loading and ``fully_shard`` over another dimension of a mesh come
    after it; ``load_release_state_dict`` comes before. What has replaced or adapts a linear map cannot be split.

    ``state_dict`` has DTensors, as with PyTorch's styles. ``load_state_dict`` also takes whole tensors, the same in all
    processes, of which each keeps its part. Where ``fully_shard`` has split the weights too, whole ones are for
    ``torch.distributed.checkpoint.state_dict.set_model_state_dict``.

    Raises:
        TypeError: the module is no ``TTTLayer``.
        ValueError: the mesh has several dimensions, its size does not divide the number of heads, or weights are split
            already or not the layer's own.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _checked(module, device_mesh)
        for prefix, part in layer.named_modules():
            for name, p in part.named_parameters(recurse=False):
                full = f"{prefix}.{name}" if prefix else name
                place = Replicate() if full == _WHOLE else Shard(1 if full == _BY_INPUTS else 0)
                split = nn.Parameter(distribute_tensor(p, device_mesh, [place]), requires_grad=p.requires_grad)
                part.register_parameter(name, split)
        layer.__class__ = HeadParallelLayer
        return layer


class HeadParallelLayer(TTTLayer):
    """What ``HeadParallel`` makes of a ``TTTLayer``: it is called, stepped and watched like one.

    Every process calls it with the same inputs. States that go in and come out, pools and ``moved`` are of the
    process's own heads.
    """

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: TTTState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, TTTState]:
        """As ``TTTLayer.forward``."""
        x = _same_everywhere(x, self._mesh)
        own = self._own_heads()  # not called: it has this layer's hooks, which run round this call
        return own.forward(x, mask=mask, cu_seqlens=cu_seqlens, state=state, return_state=return_state)

    def initial_state(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """As of ``TTTLayer``, of this process's heads."""
        return self._own_heads().initial_state()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Of whole tensors this process's parts take their places, for the layer's modules too, which come next."""
        split = {prefix + name: p for name, p in self.named_parameters()}
        for name in split.keys() & state_dict.keys():
            x, p = state_dict[name], split[name]
            if isinstance(x, Tensor) and not isinstance(x, DTensor) and x.shape == p.shape:
                state_dict[name] = _divided(name, x, p)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def _mesh(self) -> DeviceMesh:
        offset: Any = self.token_offset
        mesh: DeviceMesh = offset.device_mesh
        return mesh

    @property
    def _context(self) -> tuple[int, int] | None:
        return self._own_heads()._context

    def _step_by_parts(self, x: Tensor, pool: StatePool, slots: Tensor) -> Tensor:
        return self._own_heads()._step_by_parts(x, pool, slots)

    def _losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mine = torch.stack(self._own_heads()._losses(x))
        own, first = _summed(mine, self._mesh).unbind()
        return own, first

    def _own_heads(self) -> "_OwnHeads":
        """The layer of this process's heads, whose weights are differentiable functions of the split ones."""
        mesh = self._mesh
        own = _part_of(self, _OwnHeads)
        own.num_heads //= mesh.size()
        for name, child in self.named_children():
            special = {"norm": _SplitNorm, "output": _SummedLinear}.get(name)
            kind = special or (_PartOfLinear if type(child) is nn.Linear else type(child))
            own._modules[name] = _part_of(child, kind)
            if special is not None:
                own._modules[name].__dict__["mesh"] = mesh
        return own


class _OwnHeads(TTTLayer):
    """A layer of some heads of another one, and of the other's width, except between its projections."""


class _PartOfLinear(nn.Linear):
    """To fewer features, so that it is called by itself: operators of all projections have square ones."""


class _SummedLinear(nn.Linear):
    """From a part of the features; what the processes have of the results is summed."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        return _summed(super().forward(x), self.mesh)


class _SplitNorm(nn.LayerNorm):
    """Over the features of all processes, by the means and variances of everybody's."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        mine = DTensor.from_local(torch.stack((mean, var), -1), self.mesh, [Shard(2)], run_check=False)
        means, variances = mine.full_tensor(grad_placements=[Partial()]).unbind(-1)  # each [B, L, processes]
        mean = means.mean(-1, keepdim=True)
        var = (variances + (means - mean).square()).mean(-1, keepdim=True)
        return ((wide - mean) * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


def _checked(module: nn.Module, mesh: DeviceMesh) -> TTTLayer:
    if not isinstance(module, TTTLayer):
        raise TypeError(f"module must be a TTTLayer for its heads to be split; given a {type(module).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, such as mesh['heads'] of a larger one; given {mesh.ndim}")
    if any(isinstance(p, DTensor) for p in module.parameters()):
        raise ValueError("weights must be whole before heads are split, as before fully_shard; given DTensors")
    foreign = [
        name
        for name, child in module.named_children()
        if [each for each, _ in child.named_parameters()] != _MODULES.get(type(child))
    ]
    if type(module) is not TTTLayer or foreign:
        given = ", ".join(foreign) or f"a {type(module).__name__}"
        raise ValueError(f"layer must be as TTTLayer makes it for its heads to be split; changed in it: {given}")
    if module.num_heads % mesh.size():
        given = f"{module.num_heads} and {mesh.size()}"
        raise ValueError(f"num_heads must be a multiple of the number of processes in the mesh; given {given}")
    return module


def _divided(name: str, x: Tensor, p: Any) -> DTensor:
    """A whole tensor, the same in all processes, as a parameter lies."""
    if p.device_mesh.ndim != 1:
        raise ValueError(
            f"{name} must be a DTensor where fully_shard has split the weights too; given a whole tensor: load it by "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict with full_state_dict=True"
        )
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)


def _part_of(module: nn.Module, kind: type[_Module]) -> _Module:
    """A module of another kind with all that the given one has, but of its weights this process's part."""
    part = kind.__new__(kind)
    weights = {name: None if p is None else _part(p) for name, p in module._parameters.items()}
    part.__dict__ |= module.__dict__ | {"_parameters": weights, "_modules": dict(module._modules)}
    return part


def _part(p: Any) -> Tensor:
    """This process's part of a split weight; of a whole one, all of it, whose gradients are summed."""
    if p.placements == (Replicate(),):
        wide = p.to(torch.promote_types(p.dtype, torch.float32))
        whole = wide.redistribute(placements=[Replicate()])  # its gradient becomes whole again
        return whole.to_local(grad_placements=[Partial()]).to(p.dtype)  # type: ignore[no-any-return]
    return p.to_local()  # type: ignore[no-any-return]


def _same_everywhere(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x as it is, the same in all processes; its gradients are summed over them."""
    if isinstance(x, DTensor):
        raise TypeError("x must be whole in every process of the layer, a plain tensor; given a DTensor")
    if not x.is_floating_point():
        return x  # the layer refuses it
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    shared = DTensor.from_local(wide, mesh, [Replicate()], run_check=False)
    return shared.to_local(grad_placements=[Partial()]).to(x.dtype)


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all processes' x, in float32 at least; its gradient is everybody's alike."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return DTensor.from_local(wide, mesh, [Partial()], run_check=False).full_tensor().to(x.dtype)
