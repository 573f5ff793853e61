"""Predict flash-linear-attention's TTT-Linear beside ours: ``python -m tools.cycles.competitor``.

It needs the extra ``competitors``, and no GPU. Sizes are D = 64 and mini-batches of 16 tokens, in bfloat16, of
sequences of 2,048 tokens. Of each of its kernels the best number of warps counts among those that its authors try on
that GPU. All that it loads comes from memory, as nothing else is known. Its group norm and residual, a pass of its own
behind the forward, are not simulated: their bytes are divided by the bandwidth. The backward's passes around its two
kernels are left out.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from ttt4rec.operators.samples import Sizes

from ..aot import OfflineDriver, registers_of
from ..resources import programs
from ..sass import decoded, disassembly
from .places import GLOBAL
from .prediction import kernel, machine_for, summary
from .simulator import simulated
from .steps import Place, steps
from .walk import one_trip

ARCHITECTURE, D, K, LENGTH, HEADS = "sm_90", 64, 16, 2048, 4
HALF, SINGLE = torch.bfloat16, torch.float32
WARPS = {  # that its authors try on Hopper
    "fused_chunk_ttt_linear_fwd_kernel": (1, 2, 4),
    "fused_chunk_ttt_linear_bwd_kernel_h": (1, 2, 4),
    "fused_chunk_ttt_linear_bwd_kernel_dh": (1, 2),
}
SINGLES = ("r",)  # tensors in float32: 1/σ
NONE = ("h0", "hb0", "ht", "hbt", "cu_seqlens", "dht", "dhbt", "dh0", "dhb0")
NUMBERS = {"scale": 0.125, "eps": 1e-6, "T": LENGTH, "H": HEADS, "K": D, "V": D, "BT": K, "BK": D, "BV": D}
NORM_BYTES = 7 * 2 * D  # per token and head, of group norm and residual


class Prediction(NamedTuple):
    """Of a kernel, or of several one after the other."""

    chain: float  # ns a token of a sequence, one program on a multiprocessor
    full: float  # ps a token and head


def of_kernel(found: Any, warps: Sequence[int]) -> Prediction:
    """With the best number of warps for each filling."""
    cuts = [_cut(found, n) for n in warps]
    return Prediction(min(cut.chain for cut in cuts), min(cut.full for cut in cuts))


def _cut(found: Any, warps: int) -> Prediction:
    machine = machine_for(ARCHITECTURE)
    driver.set_active(OfflineDriver(ARCHITECTURE))
    binary = found.warmup(**_arguments(found), grid=(1,), num_warps=warps, num_stages=3)
    trip = one_trip(decoded(disassembly(binary.asm["cubin"])), 1, whole=False)
    loads = [Place.MEMORY if x.name in GLOBAL else Place.NEAR for x in trip]
    fit = programs(ARCHITECTURE, registers_of(binary.asm["cubin"]), binary.metadata.shared, warps)
    few, full = (simulated(steps(trip, machine, loads), machine, warps, count).trip for count in (1, fit))
    return Prediction(few / machine.clock / K, machine.picoseconds(full / fit) / K)


def _arguments(found: Any) -> Mapping[str, Any]:
    """What a kernel without states of its own is given; of flags, those that say so."""
    given: dict[str, Any] = {}
    for name in inspect.signature(found.fn).parameters:
        if name in NUMBERS:
            given[name] = NUMBERS[name]
        elif name.isupper():
            given[name] = False
        else:
            dtype = SINGLE if name in SINGLES else HALF
            given[name] = None if name in NONE else torch.empty(16, dtype=dtype, device="meta")
    return given


def main() -> None:
    """Print both, and ours over theirs."""
    from fla.ops.ttt import fused_chunk

    machine = machine_for(ARCHITECTURE)
    theirs = {name: of_kernel(getattr(fused_chunk, name).fn.fn, warps) for name, warps in WARPS.items()}
    forward, before, behind = theirs.values()
    norm = 1000 * NORM_BYTES / machine.memory_bytes
    print(f"{machine.name}, Triton {triton.__version__}, all predicted; ns a token of a sequence, ps a token and head")
    for name, prediction in theirs.items():
        print(f"{name:40} {prediction.chain:8.0f} {prediction.full:8.0f}")
    rivals = {
        "forward": Prediction(forward.chain, forward.full + norm),
        "backward": Prediction(before.chain + behind.chain, before.full + behind.full),
    }
    for way, rival in rivals.items():
        own = summary(kernel(ARCHITECTURE, f"linear_{way}", Sizes(2, 50, HEADS, D, K), HALF), machine)
        assert own is not None
        chain = own.chain / machine.clock / K
        print(
            f"{way:10} ours {chain:6.0f} {own.full:6.0f}, theirs {rival.chain:6.0f} {rival.full:6.0f}, "
            f"ours / theirs {chain / rival.chain:.2f} {own.full / rival.full:.2f}"
        )


if __name__ == "__main__":
    main()
