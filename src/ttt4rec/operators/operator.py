"""How an operator is declared: its arguments, results, fake and gradients, once; schemas and autograd follow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from ..precision import without_autocast
from . import backends
from .samples import SMALL, Device, Draw, Sizes
from .transforms import differentiate
from .transforms import operator as without_transforms

A = TypeVar("A", bound=tuple[Any, ...])
Results = tuple[Tensor, ...]
_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", str: "str", torch.dtype: "ScalarType"
}  # fmt: skip


class Slot(NamedTuple):
    """One argument of a flat schema: a field of the operator's arguments, or one tensor of a field that has several."""

    name: str
    field: str
    kind: Any  # the annotation

    @property
    def is_tensor(self) -> bool:
        """Whether it is saved for the backward, rather than written down."""
        return self.kind in (Tensor, Tensor | None)


class Gradients(NamedTuple):
    """What an operator's backward gives, and what it needs."""

    of: Sequence[str]  # arguments that it gives gradients of, groups included
    differentiable: int  # how many results, from the first, have gradients
    kept: Sequence[str] = ()  # results that it needs
    dtype: Callable[[Any, str], torch.dtype | None] = lambda *_: None
    """In which dtype it gives an argument's gradient, of the arguments and the field's name; None: in its own."""
    absent: Callable[[Any], Results] | None = None
    """What stands for gradients of results that nobody gave, of the arguments; None: zeros."""


NONE = Gradients((), 0)


class Operator(Generic[A]):
    """``ttt4rec::name``, and ``ttt4rec::name_backward`` if there are gradients.

    Schemas are flat, since lists of tensors make small calls slow; a backend's functions see the arguments as one tuple
    with names. Of an operator ``scan`` a backend has::

        scan(arguments) -> results
        scan_backward(arguments, kept, grads) -> gradients

    Both are called without autocast. Transforms and forward-mode derivatives are refused.

    Args:
        name: without the namespace.
        arguments: the type of its arguments, a NamedTuple.
        results: names of the results.
        fake: the results, empty, of the arguments by a backend.
        sample: small random arguments, of sizes and by a ``Draw``; options are its own.
        function: the name of a backend's function, its backward's without ``_backward``; None: the operator's.
        constants: values of fields that are the operator's own, and no arguments of its schema.
        groups: names of the tensors of each field that is a tuple of tensors.
        gradients: of the backward, if there is one.
        mutates: names of the arguments that it changes.
    """

    def __init__(
        self,
        name: str,
        arguments: type[A],
        results: Sequence[str],
        fake: Callable[[A, str], Results],
        sample: Callable[..., A],
        *,
        function: str | None = None,
        constants: Mapping[str, Any] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        gradients: Gradients = NONE,
        mutates: Sequence[str] = (),
    ) -> None:
        self.name, self.function, self.arguments, self.results = name, function or name, arguments, tuple(results)
        self._gradients, self._kept = gradients, tuple(map(self.results.index, gradients.kept))
        self._sample = sample
        constants, groups = dict(constants or {}), dict(groups or {})
        self.slots = tuple(slot for slot in _slots(arguments, groups) if slot.field not in constants)
        fields: tuple[str, ...] = arguments._fields  # type: ignore[attr-defined]
        # Of every field its constant and None, or how many tensors it has, 0 for what is no tuple.
        self._fields = [(constants.get(f), None if f in constants else len(groups.get(f, ()))) for f in fields]
        self._graded = tuple(i for i, slot in enumerate(self.slots) if slot.field in gradients.of)
        self._tensors = tuple(i for i, slot in enumerate(self.slots) if slot.is_tensor)
        inputs = [f"{_SCHEMA_TYPES[slot.kind]} {slot.name}" for slot in self.slots]
        self.op = self._define(name, [*inputs, "str backend"], len(self.results), self._forward, tuple(mutates))
        self.op.register_fake(lambda *flat: _one_or_all(fake(self.pack(flat[:-1]), flat[-1])))
        self.backward_op = self._define_backward(inputs) if self._graded else None
        self.overloads = getattr(torch.ops.ttt4rec, name)
        self.backward_overloads: Any = getattr(torch.ops.ttt4rec, f"{name}_backward") if self._graded else None

    def __call__(self, arguments: A, backend: str) -> Results:
        """The results; a single one in a tuple too."""
        results: Tensor | Results = self.overloads.default(*self.flatten(arguments), backend)
        return (results,) if isinstance(results, Tensor) else results

    def sample(
        self,
        sizes: Sizes = SMALL,
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
        **options: Any,
    ) -> A:
        """Small random arguments. Tokens have the dtype; options are the operator's own."""
        return self._sample(sizes, Draw(dtype, device), **options)

    def backward_sample(self, results: Results) -> tuple[Results, Results]:
        """What the backward is given after the arguments: what is kept of the results, and random gradients."""
        grads = tuple(torch.randn_like(x) for x in results[: self._gradients.differentiable])
        return tuple(results[i] for i in self._kept), grads

    def flatten(self, arguments: A) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
        flat: list[Any] = []
        for value, (_, size) in zip(arguments, self._fields, strict=True):
            if size is not None:
                flat.extend(value) if size else flat.append(value)
        return tuple(flat)

    def pack(self, flat: Sequence[Any]) -> A:
        """The inverse of ``flatten``."""
        values: list[Any] = []
        at = 0
        for constant, size in self._fields:
            if size is None:
                values.append(constant)
            else:
                values.append(tuple(flat[at : at + size]) if size else flat[at])
                at += size or 1
        return self.arguments(*values)

    def _define(
        self, name: str, inputs: Sequence[str], num_results: int, compute: Callable[..., Any], mutates: tuple[str, ...]
    ) -> Any:
        marked = [x.replace("Tensor", "Tensor(a!)") if x.split()[-1] in mutates else x for x in inputs]
        outputs = "Tensor" if num_results == 1 else f"({', '.join(['Tensor'] * num_results)})"
        schema = f"({', '.join(marked)}) -> {outputs}"
        return without_transforms(name, mutates, schema)(compute)

    def _forward(self, *flat: Any) -> Any:
        arguments = self.pack(flat[:-1])
        compute = backends.function(self.function, flat[-1], arguments)
        with without_autocast(arguments[0].device.type):
            return _one_or_all(compute(arguments))

    def _define_backward(self, inputs: Sequence[str]) -> Any:
        num_kept, num_graded = len(self._kept), self._gradients.differentiable
        more = [f"Tensor kept_{i}" for i in range(num_kept)] + [f"Tensor grad_{i}" for i in range(num_graded)]
        num_inputs = len(inputs)

        def split(flat: tuple[Any, ...]) -> tuple[A, Results, Results]:
            return (
                self.pack(flat[:num_inputs]),
                flat[num_inputs : num_inputs + num_kept],
                flat[num_inputs + num_kept : -1],
            )

        def compute(*flat: Any) -> Any:
            arguments, kept, grads = split(flat)
            backward = backends.function(f"{self.function}_backward", flat[-1], arguments)
            with without_autocast(arguments[0].device.type):
                return _one_or_all(backward(arguments, kept, grads))

        def fake(*flat: Any) -> Any:
            arguments = self.pack(flat[:num_inputs])
            return _one_or_all(tuple(self._fake_gradient(arguments, self.slots[i], flat[i]) for i in self._graded))

        backward_op = self._define(
            f"{self.name}_backward", [*inputs, *more, "str backend"], len(self._graded), compute, ()
        )
        backward_op.register_fake(fake)
        differentiate(self.name, self._save, self._backward)
        return backward_op

    def _fake_gradient(self, arguments: A, slot: Slot, x: Tensor | None) -> Tensor:
        if x is None:
            return arguments[0].new_empty(0)  # type: ignore[no-any-return]
        return x.new_empty(x.shape, dtype=self._gradients.dtype(arguments, slot.field))

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        output = (output,) if isinstance(output, Tensor) else output
        ctx.set_materialize_grads(self._gradients.absent is None)
        ctx.others = [None if i in self._tensors else x for i, x in enumerate(inputs)]
        ctx.save_for_backward(*(inputs[i] for i in self._tensors), *(output[i] for i in self._kept))

    def _backward(self, ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved, flat = ctx.saved_tensors, list(ctx.others)
        for i, x in zip(self._tensors, saved, strict=False):
            flat[i] = x
        given = list(grads[: self._gradients.differentiable])
        if self._gradients.absent is not None and any(g is None for g in given):
            absent = self._gradients.absent(self.pack(flat[:-1]))
            given = [zeros if g is None else g for g, zeros in zip(given, absent, strict=True)]
        found = self.backward_overloads.default(*flat[:-1], *saved[len(self._tensors) :], *given, flat[-1])
        result: list[Tensor | None] = [None] * len(flat)
        for i, gradient in zip(self._graded, (found,) if isinstance(found, Tensor) else found, strict=True):
            if flat[i] is not None:
                result[i] = gradient.to(flat[i].dtype)
        return tuple(result)


def _slots(arguments: Any, groups: Mapping[str, Sequence[str]]) -> list[Slot]:
    kinds = get_type_hints(arguments)
    slots = []
    for field in arguments._fields:
        kind = kinds[field]
        if field in groups:
            slots += [Slot(name, field, get_args(kind)[0]) for name in groups[field]]
        else:
            slots.append(Slot(field, field, kind))
    return slots


def _one_or_all(results: Sequence[Tensor]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def numbered(name: str, count: int) -> tuple[str, ...]:
    """Names of ``count`` arguments or results of one kind."""
    return tuple(f"{name}_{i}" for i in range(count))
