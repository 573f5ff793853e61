"""Products of float32 operands, cut to TF32, with tensor memory."""

import re

import numpy as np
import pytest

from tests.emulator.test_matrices import integers
from tests.emulator.test_tensor_memory import THREADS, product
from tests.support.emulation import check, run


def tf32_product(A: np.ndarray, B: np.ndarray, C: np.ndarray, left: int | None, right: int, transposed: int = 0):
    """The same program as for half precision, with operands of four bytes whose depth is contiguous."""
    layouts = None if left is None else (left, True), (right, True)
    body, arrays, shared = product(len(A), A, B, C, "tf32", *layouts)
    kind = 2 << 7 | 2 << 10 | transposed << 16
    body = re.sub(r"(?<=%d14, )\d+(?=, %p5)", lambda how: str(int(how[0]) | kind), body)
    return body.replace("kind::f16", "kind::tf32"), arrays, shared


@pytest.mark.parametrize("M", [64, 128])
@pytest.mark.parametrize(("left", "right"), [(None, 2), (None, 1), (2, 2), (1, 2)])
def test_products(left: int | None, right: int, M: int) -> None:
    """The operands' last bits, which TF32 does not have, do not count."""
    A, B, C = integers(M, 8), integers(32, 8, seed=1), integers(M, 32, seed=2)
    body, arrays, shared = tf32_product(A * (1 + 2**-12), B * (1 + 2**-12), C, left, right)
    run(body, arrays, threads=THREADS, shared=shared)
    rows = np.arange(M)
    lanes = rows // 16 * 32 + rows % 16 if M == 64 else rows
    assert np.array_equal(arrays[3].view(np.float32)[lanes], A @ B.T + C)


def test_transposed_operands_are_not_known() -> None:
    body, arrays, shared = tf32_product(integers(64, 8), integers(16, 8), integers(64, 16), 2, 2, transposed=1)
    findings = check(body, arrays, threads=THREADS, shared=shared).findings
    assert "matrix product of a kind that the emulator does not know" in {finding.what for finding in findings}
