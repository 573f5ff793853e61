"""Matrices in memory and matrix products: places of elements as PTX's manual draws them, and how sums are rounded."""

import numpy as np
import pytest

from tests.support.emulation import lane_address, run
from tests.support.matrices import LAYOUTS, in_shared_memory, integers, names, raw

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


def together(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def left_fragment(A: np.ndarray, kind: str) -> list[np.ndarray]:
    """The registers of the left operand: [register][lane]."""
    bits, registers = raw(A, kind), []
    for i in range(A.shape[1] // (4 if kind == "tf32" else 8) * 2):
        row, block = GROUP + 8 * (i % 2), i // 2
        if kind == "tf32":
            registers.append(bits[row, MEMBER + 4 * block])
        else:
            column = 2 * MEMBER + 8 * block
            registers.append(together(bits[row, column], bits[row, column + 1]))
    return registers


def right_fragment(B: np.ndarray, kind: str) -> list[np.ndarray]:
    bits, registers = raw(B, kind), []
    for i in range(len(B) // (4 if kind == "tf32" else 8)):
        if kind == "tf32":
            registers.append(bits[MEMBER + 4 * i, GROUP])
        else:
            row = 2 * MEMBER + 8 * i
            registers.append(together(bits[row, GROUP], bits[row + 1, GROUP]))
    return registers


def accumulators(C: np.ndarray) -> np.ndarray:
    """[lane][register] of 16 rows: four registers a block of eight columns."""
    registers = [C[GROUP + 8 * (i // 2), 8 * n + 2 * MEMBER + i % 2] for n in range(C.shape[1] // 8) for i in range(4)]
    return np.stack(registers, 1).astype(np.float32)


def loads(array: int, count: int, first: int, words: int) -> str:
    """The thread's row of an array of words in registers."""
    lines = [lane_address(array, 4 * words, "%d10")]
    return "\n".join(lines + [f"ld.global.b32 %r{first + i}, [%d10+{4 * i}];" for i in range(count)])


@pytest.mark.parametrize(("kind", "K"), [("bf16", 16), ("f16", 16), ("bf16", 8), ("f16", 8), ("tf32", 8), ("tf32", 4)])
def test_mma(kind: str, K: int) -> None:
    A, B, C = integers(16, K), integers(K, 8, seed=1), integers(16, 8, seed=2)
    a, b = (np.stack(x, 1).astype(np.uint32) for x in (left_fragment(A, kind), right_fragment(B, kind)))
    D = np.zeros((32, 4), np.float32)
    (in_a, in_b), shape = (a.shape[1], b.shape[1]), f"m16n8k{K}.row.col.f32.{kind}.{kind}.f32"
    run(
        f"""{loads(0, in_a, 20, in_a)} {loads(1, in_b, 30, in_b)} {loads(2, 4, 40, 4)}
        mma.sync.aligned.{shape} {names(50, 4)}, {names(20, in_a)}, {names(30, in_b)}, {names(40, 4)};
        {lane_address(3, 16, "%d10")} st.global.v4.b32 [%d10], {names(50, 4)};""",
        [a, b, accumulators(C), D],
    )
    assert np.array_equal(D, accumulators(A @ B + C))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2.0**-24], 1.0),  # cut off, not rounded up
        ([1, 2.0**-23 + 2.0**-24], 1 + 2.0**-23),
        ([-1, -(2.0**-23) - 2.0**-24], -1 - 2.0**-23),
        ([2.0**-120, 2.0**-130], 2.0**-120 + 2.0**-130),  # a denormal operand counts
        ([np.inf, -np.inf], np.nan),
    ],
)
def test_mma_cuts_sums_off(values: list[float], expected: float) -> None:
    A, B = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
    A[0, :2], B[:2, 0] = 1, values
    a, b = (np.stack(x, 1).astype(np.uint32) for x in (left_fragment(A, "bf16"), right_fragment(B, "bf16")))
    if not np.array_equal(raw(B, "bf16").astype(np.uint32) << 16, B.view(np.uint32)):  # more digits than bf16 has
        A[0, :3], B[:3, 0] = 1, [values[0], np.copysign(2.0**-23, values[0]), np.copysign(2.0**-24, values[0])]
        a, b = (np.stack(x, 1).astype(np.uint32) for x in (left_fragment(A, "bf16"), right_fragment(B, "bf16")))
    D = np.zeros((32, 4), np.float32)
    run(
        f"""{loads(0, 4, 20, 4)} {loads(1, 2, 30, 2)} mov.b32 %r40, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {names(50, 4)}, {names(20, 4)}, {names(30, 2)},
            {{%r40, %r40, %r40, %r40}};
        {lane_address(2, 16, "%d10")} st.global.v4.b32 [%d10], {names(50, 4)};""",
        [a, b, D],
    )
    assert D[0, 0].view(np.uint32) == (np.float32(expected).view(np.uint32) if expected == expected else 0x7FFFFFFF)


def test_mma_takes_nineteen_bits_of_tf32() -> None:
    A, B = np.full((16, 8), 1 + 2.0**-10 + 2.0**-11, np.float32), np.zeros((8, 8), np.float32)
    B[0] = 1
    a, b = (np.stack(x, 1).astype(np.uint32) for x in (left_fragment(A, "tf32"), right_fragment(B, "tf32")))
    D = np.zeros((32, 4), np.float32)
    run(
        f"""{loads(0, 4, 20, 4)} {loads(1, 2, 30, 2)} mov.b32 %r40, 0;
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {names(50, 4)}, {names(20, 4)}, {names(30, 2)},
            {{%r40, %r40, %r40, %r40}};
        {lane_address(2, 16, "%d10")} st.global.v4.b32 [%d10], {names(50, 4)};""",
        [a, b, D],
    )
    assert (D == 1 + 2.0**-10).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    """Rows of matrix i begin where lanes 8i and up say; what one stores the other loads."""
    trans = ".trans" if transposed else ""
    tiles = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    fragments = np.zeros((32, count), np.uint32)
    for i in range(count):
        own = tiles[i].T if transposed else tiles[i]
        fragments[:, i] = together(own[GROUP, 2 * MEMBER], own[GROUP, 2 * MEMBER + 1])
    rows = np.random.default_rng(0).permutation(32).astype(np.uint32)  # where a lane's row lies
    memory = np.zeros((32, 8), np.uint16)
    memory[rows[: 8 * count]] = tiles.reshape(-1, 8)
    back, loaded = np.zeros_like(memory), np.zeros_like(fragments)
    addresses = f"{loads(1, 1, 20, 1)} shl.b32 %r20, %r20, 4; mov.b32 %r21, global_smem; add.s32 %r20, %r20, %r21;"
    own_row = f"shl.b32 %r22, %r0, 4; add.s32 %r22, %r22, %r21; {lane_address(0, 16, '%d10')}"
    stores = "\n".join(f"st.global.b32 [%d10+{4 * i}], %r{40 + i};" for i in range(count))
    shape = f"sync.aligned.m8n8.x{count}{trans}.shared.b16"
    run(
        f"""{addresses} {own_row} ld.global.v4.b32 {names(30, 4)}, [%d10]; st.shared.v4.b32 [%r22], {names(30, 4)};
        bar.sync 0; ldmatrix.{shape} {names(40, count)}, [%r20];
        {lane_address(2, 4 * count, "%d10")} {stores}""",
        [memory, rows, loaded],
        shared=512,
    )
    assert np.array_equal(loaded, fragments)
    run(
        f"""{addresses} {own_row} mov.b32 %r30, 0; st.shared.v4.b32 [%r22], {{%r30, %r30, %r30, %r30}}; bar.sync 0;
        {loads(2, count, 40, count)} stmatrix.{shape} [%r20], {names(40, count)}; bar.sync 0;
        ld.shared.v4.b32 {names(30, 4)}, [%r22]; st.global.v4.b32 [%d11], {names(30, 4)};""".replace(
            "bar.sync 0;", f"{lane_address(0, 16, '%d11')} bar.sync 0;", 1
        ),
        [back, rows, fragments],
        shared=512,
    )
    assert np.array_equal(back, memory)


def wgmma(
    A: np.ndarray, B: np.ndarray, C: np.ndarray, kind: str, left: tuple[int, bool] | None, right: tuple[int, bool],
    keep: str = "1", signs: tuple[int, int] = (1, 1),
) -> np.ndarray:  # fmt: skip
    """A [64, K] times Bᵀ [N, K], with operands in shared memory by (chunks, contiguous depth), or A in registers."""
    N, K = B.shape
    b, b_descriptor = in_shared_memory(B, kind, *right)
    a, a_descriptor = in_shared_memory(A, kind, *left) if left else (np.zeros(0, b.dtype), 0)
    start = -(-b.nbytes // 1024) * 1024
    image = np.zeros(-(-(start + a.nbytes) // 2048) * 2048, np.uint8)
    image[: b.nbytes], image[start : start + a.nbytes] = b.view(np.uint8), a.view(np.uint8)
    fragments = np.concatenate([np.stack(left_fragment(A[16 * w : 16 * w + 16], kind), 1) for w in range(4)])
    own = np.concatenate([accumulators(C[16 * w : 16 * w + 16]) for w in range(4)])
    result, words = np.zeros_like(own), N // 2
    copies = "\n".join(
        f"ld.global.v4.b32 {names(20, 4)}, [%d10+{i}]; st.shared.v4.b32 [%r19+{i}], {names(20, 4)};"
        for i in range(0, image.nbytes, 2048)
    )
    stores = "\n".join(f"st.global.b32 [%d11+{4 * i}], %r{200 + i};" for i in range(words))
    transposed = [int(not right[1])] if left is None else [int(not left[1]), int(not right[1])]
    flags = ", ".join(map(str, [*signs, *(transposed if kind != "tf32" else [])]))
    body = f"""{lane_address(0, 16, "%d10")} mov.b32 %r18, global_smem; shl.b32 %r17, %r0, 4; add.s32 %r19, %r18, %r17;
        {copies}
        {loads(1, 4, 30, 4)} {loads(2, words, 200, words)} {lane_address(3, 4 * words, "%d11")}
        fence.proxy.async.shared::cta; bar.sync 0;
        shr.u32 %r16, %r18, 4; cvt.u64.u32 %d12, %r16; or.b64 %d13, %d12, {b_descriptor};
        or.b64 %d14, %d12, {a_descriptor}; add.s64 %d14, %d14, {start >> 4}; setp.ne.b32 %p1, %r18, 0;
        setp.eq.b32 %p2, %r18, 0; wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{N}k{K}.f32.{kind}.{kind} {names(200, words)},
            {names(30, 4) if left is None else "%d14"}, %d13, {keep}, {flags};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        {stores}"""
    run(body, [image, fragments.astype(np.uint32), own, result], threads=128, shared=image.nbytes)
    out = np.zeros((64, N), np.float32)
    for w in range(4):
        for n in range(N // 8):
            for i in range(4):
                rows = 16 * w + GROUP + 8 * (i // 2)
                out[rows, 8 * n + 2 * MEMBER + i % 2] = result[32 * w : 32 * w + 32, 4 * n + i]
    return out


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("right", LAYOUTS)
def test_wgmma_with_the_left_operand_in_registers(right: tuple[int, bool], kind: str) -> None:
    A, B, C = integers(64, 16), integers(64, 16, seed=1), integers(64, 64, seed=2)
    assert np.array_equal(wgmma(A, B, C, kind, None, right), A @ B.T + C)


@pytest.mark.parametrize("left", LAYOUTS)
def test_wgmma_with_both_operands_in_shared_memory(left: tuple[int, bool]) -> None:
    A, B, C = integers(64, 16), integers(32, 16, seed=1), integers(64, 32, seed=2)
    assert np.array_equal(wgmma(A, B, C, "bf16", left, (4, False)), A @ B.T + C)
    assert np.array_equal(wgmma(A, B, C, "f16", left, (8, True)), A @ B.T + C)


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_wgmma_of_tf32(chunks: int) -> None:
    A, B, C = integers(64, 8), integers(16, 8, seed=1), integers(64, 16, seed=2)
    assert np.array_equal(wgmma(A, B, C, "tf32", (chunks, True), (chunks, True)), A @ B.T + C)
    assert np.array_equal(wgmma(A, B, C, "tf32", None, (chunks, True)), A @ B.T + C)


@pytest.mark.parametrize("N", [8, 16, 24, 128, 256])
def test_wgmma_of_any_width(N: int) -> None:
    A, B, C = integers(64, 16), integers(N, 16, seed=1), integers(64, N, seed=2)
    assert np.array_equal(wgmma(A, B, C, "bf16", None, (2, True)), A @ B.T + C)


def test_wgmma_options() -> None:
    """Whether it adds to what the registers hold, by a number or a predicate, and the operands' signs."""
    A, B, C = integers(64, 16), integers(8, 16, seed=1), integers(64, 8, seed=2)
    for keep, added in (("0", 0), ("1", 1), ("%p1", 1), ("%p2", 0)):
        assert np.array_equal(wgmma(A, B, C, "bf16", None, (2, True), keep=keep), A @ B.T + added * C), keep
    for signs in ((1, -1), (-1, 1), (-1, -1)):
        assert np.array_equal(wgmma(A, B, C, "bf16", None, (2, True), signs=signs), signs[0] * signs[1] * A @ B.T + C)
