"""Predict what a kernel takes, and say what binds it: ``python -m tools.cycles linear_backward --head-dim 64``.

No GPU is needed, and none is asked: every figure is predicted. Cuts are those of the launch table but for what is
given; kernels around the inner loops have their own.
"""

import argparse
import itertools
from pathlib import Path

import triton

from ttt4rec.arguments import MAX_HEAD_DIM, MAX_MINI_BATCH_SIZE
from ttt4rec.kernels import launch
from ttt4rec.operators.samples import Sizes

from ..aot import DTYPES, INNER_LOOPS, KERNELS, cut_as
from ..documents import number
from .machines import DEFAULT, MACHINES, Machine
from .prediction import Filling, Kernel, binding, filled, fitting, floors, kernel, machine_for, slowest_lines

NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def main() -> None:
    """Print the prediction for one kernel and cut."""
    given = _arguments()
    dtype = DTYPES[NAMES.get(given.dtype, given.dtype)]
    machine = machine_for(given.arch, given.gpu)
    sizes = Sizes(2, 50, 4, given.head_dim, given.mini_batch_size)
    cut = None
    if given.kernel in INNER_LOOPS:
        table = launch.blocks(given.kernel, given.head_dim, given.mini_batch_size, dtype, given.arch, sizes.H)
        wanted = {"num_warps": given.warps, "num_stages": given.stages, "heads": given.heads, "chunks": given.chunks}
        cut = table._replace(**{name: n for name, n in wanted.items() if n})
    with cut_as(cut):
        found = kernel(given.arch, given.kernel, sizes, dtype)
    print(report(found, machine, counterfactuals=not given.quick, lines=given.lines))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--head-dim", type=int, default=16, metavar=f"1..{MAX_HEAD_DIM}")
    parser.add_argument("--mini-batch-size", type=int, default=16, metavar=f"1..{MAX_MINI_BATCH_SIZE}")
    parser.add_argument("--dtype", default="bfloat16", choices=[*NAMES, *NAMES.values()])
    parser.add_argument("--arch", default="sm_90", choices=DEFAULT)
    parser.add_argument("--gpu", choices=MACHINES, help="of that architecture")
    parser.add_argument("--warps", type=int)
    parser.add_argument("--stages", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--chunks", type=int, help="of TTT-MLP's hidden features")
    parser.add_argument("--quick", action="store_true", help="do not ask what binds, which takes ten simulations more")
    parser.add_argument("--lines", type=int, default=0, help="so many lines of source that take most of a warp's time")
    return parser.parse_args()


def report(of: Kernel, machine: Machine, *, counterfactuals: bool = True, lines: int = 0) -> str:
    """The whole prediction, for reading."""
    cut, fit = of.blocks, fitting(of, machine)
    if not fit:
        return f"{of.op}: no program of {of.shared_memory} B shared memory fits a multiprocessor of {machine.name}"
    text = [
        f"{of.op}, D = {of.sizes.D}, K = {of.sizes.K}, {str(of.dtype).removeprefix('torch.')}, on {machine.name}; "
        f"Triton {triton.__version__}; all figures are predicted",
        f"cut: {cut.num_warps} warps, {cut.num_stages} stages, {cut.heads} heads, {cut.chunks} chunks; "
        f"{of.registers} registers, {of.shared_memory} B shared memory, {of.spills:.0f} spills a head; "
        f"instructions {' + '.join(f'{loop.times}×{len(loop.trip)}' for loop in of.loops)}",
    ]
    if of.op in INNER_LOOPS:
        known = ", ".join(f"{name} {number(floor)}" for name, floor in floors(of, machine).items())
        text.append(f"floors, ps a token and head: {known}")
    for count in sorted({1, fit}):
        filling = filled(of, machine, count)
        text += ["", *_filling(of, filling)]
        if counterfactuals:
            saved = binding(of, machine, filling)
            text.append("  would save without: " + _shares(saved, 0.02))
            text.append(f"  binds: {next(iter(saved))}")
        text += [
            f"  {share:4.0%} {Path(file).name}:{line}"
            for (file, line), share in itertools.islice(slowest_lines(of, filling).items(), lines)
        ]
    return "\n".join(text)


def _filling(of: Kernel, filling: Filling) -> list[str]:
    cycles, microseconds = number(filling.cycles, 4), number(filling.cycles / filling.machine.clock / 1000)
    time = f"a trip of its longest loop, or all of it, takes {cycles} cycles, {microseconds} µs"
    if of.op in INNER_LOOPS:
        per_token = number(filling.picoseconds)
        time = f"{per_token} ps a token and head; a program's mini-batch takes {cycles} cycles, {microseconds} µs"
    return [
        f"{filling.programs} program{'s' * (filling.programs > 1)} a multiprocessor: predicted {time}",
        "  a warp waits for: " + _shares(filling.waits(), 0.02),
        "  busy: " + _shares(filling.busy(), 0.1),
    ]


def _shares(shares: dict[str, float], least: float) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= least) or "nothing"


if __name__ == "__main__":
    main()
