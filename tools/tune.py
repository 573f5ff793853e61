"""How the launch table was made: ``python -m tools.tune linear_backward:sm_90:16:8:bf16 ...``.

Every sensible cut of a kernel is compiled, and its cost read from the machine code. The best has no spill in its loop,
if any has none, and then the fewest issue slots per mini-batch and head: a warp's instructions times warps by heads, a
spill counted as sixteen. The forward loads at least one mini-batch ahead (two stages), which the count does not see;
the backward has no registers for it. This needs no GPU; timings on one may overrule it.
"""

import argparse
import contextlib
import io
import json

from ttt4rec.kernels import launch

from .aot import DTYPES, Cost, compile_for

SPILL = 16  # instructions


def candidates(op: str, head_dim: int, mini_batch_size: int) -> list[launch.Blocks]:
    """The cuts worth compiling."""
    heads = (1, 2) if mini_batch_size <= 8 and head_dim <= 32 else (1,)
    if op.startswith("mlp"):
        stages: tuple[int, ...] = (2,) if op.endswith("forward") else (1,)
        chunks: tuple[int, ...] = (1,)
        if head_dim > 32:  # the whole state of a forward just fits into registers at 64, that of a backward does not
            chunks = (4, 8) if head_dim > 64 else (1, 4, 8) if op.endswith("forward") else (2, 4, 8)
        warps = [w for w in (2, 4, 8) if min(4, head_dim // 8) <= w <= head_dim // 4]
    else:
        tiles = max(launch.padded(mini_batch_size), launch.padded(head_dim)) // 16
        warps, chunks = [w for w in (1, 2, 4, 8) if tiles // 2 <= w <= 2 * tiles], (1,)
        stages = (2, 3) if op.endswith("forward") else (1, 2)
    return [launch.Blocks(w, s, h, c) for w in warps for s in stages for h in heads for c in chunks]


def streamed(op: str, head_dim: int, choice: launch.Blocks) -> float:
    """Registers' worth of state that a thread reads and writes per mini-batch, where chunks of it wait in memory."""
    if choice.chunks == 1:
        return 0.0
    passes = 24 if op.endswith("forward") else 68  # times D²: of 8D² weights, and in the backward as many gradients
    return passes * launch.padded(head_dim) ** 2 / (32 * choice.num_warps)


def issue_slots(cost: Cost, choice: launch.Blocks, streamed: float) -> float:
    """Issue slots per mini-batch and head."""
    return (cost.loop_instructions + SPILL * (cost.loop_spills + streamed)) * choice.num_warps / choice.heads


def tuned(kernel: str) -> list[tuple[bool, float, launch.Blocks, Cost]]:
    """All cuts of a kernel that compile, best first."""
    op, architecture, head_dim, mini_batch_size, dtype = kernel.split(":")
    table, found = launch.blocks, []
    for choice in candidates(op, int(head_dim), int(mini_batch_size)):
        launch.blocks = lambda *_, choice=choice: choice
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the code of a kernel that does not assemble
                cost = compile_for(architecture, op, int(head_dim), int(mini_batch_size), DTYPES[dtype])
        except Exception:  # the compiler's own failures, of several kinds, rule a cut out
            continue
        slots = issue_slots(cost, choice, streamed(op, int(head_dim), choice))
        found.append((cost.loop_spills > 0, slots, choice, cost))
    launch.blocks = table
    return sorted(found, key=lambda entry: entry[:2])


def main() -> None:
    """Print every kernel's cuts, best first, or as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="+", help="op:architecture:head_dim:mini_batch_size:dtype")
    parser.add_argument("--json", action="store_true", help="one object per kernel: its best cut")
    given = parser.parse_args()
    for kernel in given.kernels:
        cuts = tuned(kernel)
        if given.json:
            _, slots, choice, cost = cuts[0]
            print(json.dumps({"kernel": kernel, **choice._asdict(), "slots": slots, "cost": str(cost)}), flush=True)
            continue
        for _, slots, choice, cost in cuts:
            print(f"{kernel:36} {choice!s:50} {slots:8.0f} slots  {cost}", flush=True)


if __name__ == "__main__":
    main()
