"""A decoded kernel: what the core reads."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .parser import Instruction

SHARED_BASE = 1024  # where shared memory begins; also in core/machine.h
SPECIALS = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%laneid", "%warpid", "%nctaid.x")


class Parameter(NamedTuple):
    """A place that holds a kernel's parameter."""

    place: int
    number: int
    size: int  # bytes
    width: int  # of the register
    signed: bool


@dataclass
class Program:
    """A kernel that the core can run."""

    name: str
    threads: int
    parameters: list[int]  # bytes of each
    instructions: list[Instruction]  # by number; some stand for several
    code: np.ndarray
    offsets: np.ndarray
    image: np.ndarray  # registers of a warp when it begins
    places: list[Parameter]
    specials: list[int]
    granules: tuple[int, int]  # log2 of the smallest access, shared and global

    def registers(self, values: list[int]) -> np.ndarray:
        """The image with a launch's parameters, each of them its bits."""
        image = self.image.copy()
        for place, parameter, size, width, signed in self.places:
            value = values[parameter] & ((1 << 8 * size) - 1)
            if signed and value >> (8 * size - 1):
                value -= 1 << 8 * size
            fill(image, place, width, value)
        return image


def fill(image: np.ndarray, place: int, width: int, value: int) -> None:
    """Put a value into all lanes of a place; a predicate, of no width, has them in the bits of one word."""
    if width == 0:
        image[place] = 0xFFFFFFFF if value else 0
        return
    kind = {2: np.uint16, 4: np.uint32, 8: np.uint64}[width]
    image[place : place + 8 * width].view(kind)[:] = value & ((1 << 8 * width) - 1)
