"""The average of the weights over the newest steps, which is what is validated and kept.

Steps of a constant learning rate go on jumping around what they approach; their average does not. It is the
polynomial-decay average of Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth Optimization", ICML 2013,
section 3.2: after step t, average += (weights - average) (η + 1) / (t + η), with η + 1 = 1 / reach. It needs no length
of the training to be known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """Averages of parameters, in float32 at least: they take in less of a step than bfloat16 can tell.

    Args:
        parameters: by name; those split between processes are averaged by each for its own part.
        reach: share of the steps so far that the average reaches over, above 0 and at most 1 (all steps alike).
    """

    def __init__(self, parameters: Mapping[str, Tensor], reach: float) -> None:
        self.parameters = parameters
        self.reach = reach
        self.values = {name: _wide(p.detach()).clone() for name, p in parameters.items()}

    @torch.no_grad()
    def add(self, steps: int) -> None:
        """Take in the parameters after a step, the first of which has the number 1."""
        share = 1 / (1 + self.reach * (steps - 1))
        for name, p in self.parameters.items():
            self.values[name].lerp_(_wide(p), share)

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Go on with averages of earlier; ValueError if they are not these parameters'."""
        if {name: x.shape for name, x in values.items()} != {name: x.shape for name, x in self.values.items()}:
            raise ValueError(f"it must have the averages of {len(self.values)} parameters; given {len(values)}")
        self.values = {name: values[name].to(x.device, x.dtype) for name, x in self.values.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages as the parameters' values for a while."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._write(self.values)
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
