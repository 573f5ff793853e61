"""The tables of rotary positions, made once for each size where that is safe."""

import functools

import torch
from torch import Tensor

from ..operators.transforms import transformed
from ..reference import rotation


def rotary_table(
    length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles at places 0 to length - 1, ``[length, head_dim / 2]``; not to be changed.

    On a CPU they are kept: small calls would spend a twentieth of their time on making them. While tracing, within
    transforms and under modes of PyTorch they are made again, since tensors there are not what they seem.
    """
    kept = device.type == "cpu" and not (
        torch.compiler.is_compiling() or transformed() or torch._C._len_torch_dispatch_stack()
    )
    return (_kept if kept else _made)(length, head_dim, theta, dtype, device)


def _made(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return rotation(torch.arange(length, device=device), head_dim, theta, dtype)


@functools.lru_cache(maxsize=32)
def _kept(*sizes: object) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # or they could take no part in a backward
        return _made(*sizes)  # type: ignore[arg-type]
