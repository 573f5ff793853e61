"""GPUs as far as the simulation knows them: rates, latencies and sizes.

Rates of arithmetic are those of NVIDIA's table of instruction throughputs for compute capabilities 8.0 and 9.0.
Latencies are published measurements: of Ampere arXiv 2208.11174, of Hopper arXiv 2402.13499 and 2501.12084; how a
multiprocessor chooses its next instruction is that of arXiv 2503.20481.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Latencies:
    """Cycles from issue to result, or as said."""

    shared: int = 29
    matrix_from_shared: int = 33
    shuffle: int = 24
    special: int = 23  # functions: exponential, root, reciprocal
    constant: int = 35
    near: int = 40  # the first-level cache, local memory too
    cache: int = 270  # the second level
    memory: int = 560
    tensor: int = 24
    operands: int = 14  # until a store has read its registers
    address: int = 20  # until a load has
    barrier: int = 14  # from the last arrival, and a cycle more for each warp
    other: int = 25  # whatever else raises a counter


@dataclass(frozen=True)
class Machine:
    """A GPU; a rate is a multiprocessor's."""

    name: str
    architecture: str
    processors: int
    clock: float  # GHz
    memory_bytes: float  # per ns, of the whole GPU, reachable
    cache_bytes: float  # per cycle from the second-level cache, all multiprocessors reading
    cache_size: int  # bytes
    fma_pipes: int  # of a sub-partition, each of half a warp a cycle
    product: int  # cycles between matrix products of 16×8×16 on a sub-partition
    latencies: Latencies = field(default_factory=Latencies)

    @property
    def memory_rate(self) -> float:
        """Bytes per cycle that memory gives each multiprocessor when all read."""
        return self.memory_bytes / self.clock / self.processors

    def picoseconds(self, cycles: float) -> float:
        """Of the whole GPU, for something that takes one multiprocessor so many cycles."""
        return 1000 * cycles / self.clock / self.processors


_MIB = 2**20
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("A100", "sm_80", 108, 1.41, 1700, 32, 40 * _MIB, fma_pipes=1, product=8),
        Machine("H100", "sm_90", 132, 1.755, 3000, 28, 50 * _MIB, fma_pipes=2, product=6),
        Machine("H200", "sm_90", 132, 1.98, 4300, 28, 50 * _MIB, fma_pipes=2, product=6),
    )
}
"""Memory rates are what copies reach."""
DEFAULT = {"sm_80": "A100", "sm_90": "H200"}
"""The machine that stands for an architecture."""
