"""Which inner-loop kernels there are: not those that the compiler does not make, or the GPU has no room for."""

import torch
from torch import Tensor

from ..arguments import Scan
from . import launch

SHARED_MEMORY = {"sm_80": 163, "sm_87": 163, "sm_8": 99, "sm_9": 227, "sm_10": 227, "sm_11": 227, "sm_12": 99}
"""KiB that a program may have, by the beginnings of architectures' names, longer ones first."""

Needed = dict[tuple[str, int], dict[int, int]]
"""Kernel and padded head dimension: {largest mini-batch: KiB of shared memory}, the most under any Triton."""
NEEDED_HALF: dict[str, Needed] = {
    "sm_80": {
        ("linear_backward", 128): {64: 128},
        ("mlp_forward", 128): {32: 58, 64: 104},
        ("mlp_backward", 128): {32: 82, 64: 160},
    },
}
NEEDED_SINGLE: dict[str, Needed] = {
    "sm_80": {
        ("linear_backward", 128): {16: 136, 32: 160, 64: 192},
        ("mlp_forward", 32): {32: 64, 64: 128},
        ("mlp_forward", 64): {32: 64, 64: 112},
        ("mlp_forward", 128): {16: 64, 32: 128, 64: 224},
        ("mlp_backward", 32): {32: 76, 64: 112},
        ("mlp_backward", 64): {32: 64, 64: 144},
        ("mlp_backward", 128): {16: 64, 32: 112, 64: 208},
    },
    "sm_90": {
        ("linear_backward", 128): {16: 136, 32: 192, 64: 640},
        ("mlp_forward", 128): {16: 96, 32: 200, 64: 368},
        ("mlp_backward", 128): {16: 64, 32: 112, 64: 288},
    },
    "sm_100": {("linear_backward", 128): {16: 136, 32: 144, 64: 384}},
}
"""Of those kernels alone that some GPU has no room for, by the architecture whose cuts are taken."""
FORGETTING_MLP = 16
"""Tokens of the longest mini-batch for which TTT-MLP's kernels forget; longer ones go in blocks."""
TITLES = {"linear": "TTT-Linear", "mlp": "TTT-MLP"}


def scan_refusal(op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run here; None if it can.

    Args:
        op: ``"linear_forward"``, ``"mlp_backward"``, ...
        head_dim: D.
        mini_batch_size: K.
        dtype: of q, k and v.
    """
    return launch.compiler_refusal(op, head_dim, mini_batch_size) or _of_room(op, head_dim, mini_batch_size, dtype)


def check(op: str, q: Tensor, mini_batch_size: int) -> None:
    """Raise ValueError where ``scan_refusal`` has a reason."""
    if (reason := scan_refusal(op, q.shape[-1], mini_batch_size, q.dtype)) is not None:
        raise ValueError(f"the kernel {reason}")


def fuses_forgetting(scan: Scan) -> bool:
    """Whether a scan of TTT-MLP that forgets, and its backward, are one kernel each.

    They are for heads of up to 32 features, and of up to 16 in float32.
    """
    features = 16 if scan.q.dtype == torch.float32 else 32
    return scan.q.shape[3] <= features and scan.token_scale.numel() <= FORGETTING_MLP


def room(architecture: str) -> int:
    """KiB of shared memory that a program may have; where nobody knows, all that any GPU has."""
    found = (kib for prefix, kib in SHARED_MEMORY.items() if architecture.startswith(prefix))
    return next(found, max(SHARED_MEMORY.values()))


def needed(op: str, head_dim: int, dtype: torch.dtype) -> dict[int, int]:
    """KiB of shared memory by the largest mini-batch; nothing where every GPU has it."""
    table = NEEDED_SINGLE if dtype == torch.float32 else NEEDED_HALF
    return table.get(launch.architecture(), {}).get((op, launch.padded(head_dim)), {})


def _of_room(op: str, head_dim: int, mini_batch_size: int, dtype: torch.dtype) -> str | None:
    sizes, name = needed(op, head_dim, dtype), launch.target()
    has = room(name)
    needs = next((kib for largest, kib in sizes.items() if mini_batch_size <= largest), 0)
    if needs <= has:
        return None
    inner, way = op.split("_")
    does = f"on {name} {'trains' if way == 'backward' else 'runs'} {TITLES[inner]} in {str(dtype).split('.')[1]}"
    if fitting := [largest for largest, kib in sizes.items() if kib <= has]:
        limit = f"with head dimension {head_dim} and a mini_batch_size of up to {fitting[-1]}; given {mini_batch_size}"
    else:
        limit = f"with head dimensions of up to {launch.padded(head_dim) // 2}; given {head_dim}"
    return f"{does} {limit}, for which {has} KiB of shared memory must be {needs}"
