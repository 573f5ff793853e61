"""Tensor memory, its matrix products and barriers in shared memory, as PTX's manual defines them."""

import numpy as np
import pytest

from tests.support.emulation import check, lane_address, launch, run
from tests.support.matrices import LAYOUTS, in_shared_memory, integers, names, raw

THREADS = 128
SWIZZLE = {8: 2, 4: 4, 2: 6, 1: 0}  # of the descriptor, by chunks in a row
ALLOC = """mov.b32 %r1, global_smem; shr.u32 %r2, %r0, 5; setp.eq.s32 %p1, %r2, 0;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 128;
    @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned; bar.sync 0; ld.shared.b32 %r3, [global_smem];
    shl.b32 %r4, %r2, 21; add.s32 %r5, %r3, %r4;"""  # %r3: the memory, %r5: the warp's lanes of it
DEALLOC = "bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 128;"
BARRIER = """add.s32 %r6, %r1, 8; setp.eq.s32 %p2, %r0, 0; @%p2 mbarrier.init.shared::cta.b64 [%r6], 1; bar.sync 0;"""
WAIT = """{ .reg .pred complete; waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r6], 0;
    @!complete bra.uni waitLoop; } bar.sync 0;"""
INVAL = "@%p2 mbarrier.inval.shared::cta.b64 [%r6];"
COMMIT = "@%p4 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r6];"
SPLIT = "tcgen05.{op}.sync.aligned.16x32bx2.x{n}.b32"
WHOLE = "tcgen05.{op}.sync.aligned.32x32b.x{n}.b32"


def rows_of(array: int, n: int, first: int, op: str) -> str:
    """The thread's row of words of an array to registers, or from them."""
    lines = [lane_address(array, 4 * n, "%d10")]
    for i in range(n):
        place, register = f"[%d10+{4 * i}]", f"%r{first + i}"
        lines.append(f"ld.global.b32 {register}, {place};" if op == "ld" else f"st.global.b32 {place}, {register};")
    return "\n".join(lines)


@pytest.mark.parametrize("n", [1, 4, 16, 32])
def test_loads_and_stores_of_two_halves(n: int) -> None:
    """Sixteen lanes a warp; the second sixteen threads go on `split` columns further."""
    x = np.arange(THREADS * n, dtype=np.uint32).reshape(THREADS, n)
    back, lanes = np.zeros_like(x), np.zeros((THREADS, 2 * n), np.uint32)
    marks = np.full((THREADS, 2 * n), 7, np.uint32)
    run(
        f"""{ALLOC} {rows_of(3, 2 * n, 20, "ld")}
        {WHOLE.format(op="st", n=2 * n)} [%r5 + 0], {names(20, 2 * n)}; tcgen05.wait::st.sync.aligned;
        {rows_of(0, n, 20, "ld")}
        {SPLIT.format(op="st", n=n)} [%r5 + 0], {n}, {names(20, n)}; tcgen05.wait::st.sync.aligned;
        {SPLIT.format(op="ld", n=n)} {names(100, n)}, [%r5 + 0], {n}; tcgen05.wait::ld.sync.aligned;
        {rows_of(1, n, 100, "st")}
        {WHOLE.format(op="ld", n=2 * n)} {names(100, 2 * n)}, [%r5 + 0]; tcgen05.wait::ld.sync.aligned;
        {rows_of(2, 2 * n, 100, "st")} {DEALLOC}""",
        [x, back, lanes, marks],
        threads=THREADS,
        shared=64,
    )
    assert np.array_equal(back, x)
    for t in range(THREADS):
        warp, lane, half = t // 32, t % 16, t % 32 // 16
        assert np.array_equal(lanes[32 * warp + lane, n * half : n * half + n], x[t])
    assert (lanes.reshape(4, 32, -1)[:, 16:] == 7).all()


def product(
    M: int, A: np.ndarray, B: np.ndarray, C: np.ndarray, kind: str, left: tuple[int, bool] | None,
    right: tuple[int, bool], *, keep: int = 1, negated: tuple[int, int] = (0, 0), after: str = WAIT,
    stored: str = "tcgen05.wait::st.sync.aligned;", fence: str = "fence.proxy.async.shared::cta;",
) -> tuple[str, list[np.ndarray], int]:  # fmt: skip
    """D = ±A Bᵀ + C with C and D in columns 0 and up of tensor memory, A in shared memory or from column 64 on."""
    N, lanes = len(B), [row // 16 * 32 + row % 16 if M == 64 else row for row in range(M)]
    b, b_place = in_shared_memory(B, kind, *right)
    a, a_place = in_shared_memory(A, kind, *left) if left else (np.zeros(0, b.dtype), 0)
    b_place, a_place = ((p & ~(3 << 62)) | SWIZZLE[c[0]] << 61 for p, c in ((b_place, right), (a_place, left or right)))
    a_start = 1024 + -(-b.nbytes // 1024) * 1024
    image = np.zeros(-(-(a_start + a.nbytes) // 2048) * 2048, np.uint8)
    image[1024 : 1024 + b.nbytes], image[a_start : a_start + a.nbytes] = b.view(np.uint8), a.view(np.uint8)
    own, pairs = np.zeros((THREADS, N), np.uint32), np.zeros((THREADS, 8), np.uint32)
    own[lanes], pairs[lanes] = C.view(np.uint32), raw(A, kind).view(np.uint32).reshape(M, 8)
    how = 1 << 4 | (kind == "bf16") * (1 << 7 | 1 << 10) | negated[0] << 13 | negated[1] << 14
    how |= (left is not None and not left[1]) << 15 | (not right[1]) << 16 | N // 8 << 17 | M // 16 << 24
    copies = "\n".join(
        f"ld.global.v4.b32 {names(20, 4)}, [%d11+{i}]; st.shared.v4.b32 [%r7+{i}], {names(20, 4)};"
        for i in range(0, image.nbytes, 2048)
    )
    operand = "%d13" if left else "[%r3 + 64]"
    body = f"""mov.b32 %r1, global_smem; shl.b32 %r8, %r0, 4; add.s32 %r7, %r1, %r8; {lane_address(0, 16, "%d11")}
        {copies} {fence} bar.sync 0;
        {ALLOC} {BARRIER} {rows_of(1, N, 100, "ld")} {WHOLE.format(op="st", n=N)} [%r5 + 0], {names(100, N)};
        {rows_of(2, 8, 20, "ld")} {WHOLE.format(op="st", n=8)} [%r5 + 64], {names(20, 8)}; {stored}
        bar.sync 0; shr.u32 %r9, %r1, 4; cvt.u64.u32 %d12, %r9;
        add.s64 %d13, %d12, {a_start >> 4}; or.b64 %d13, %d13, {a_place};
        add.s64 %d14, %d12, 64; or.b64 %d14, %d14, {b_place}; setp.ne.b32 %p5, {keep}, 0;
        elect.sync %r10|%p3, -1; and.pred %p4, %p1, %p3;
        @%p4 tcgen05.mma.cta_group::1.kind::f16 [ %r3 + 0 ], {operand}, %d14, {how}, %p5;
        {COMMIT} {after} {WHOLE.format(op="ld", n=N)} {names(100, N)}, [%r5 + 0];
        tcgen05.wait::ld.sync.aligned; {rows_of(3, N, 100, "st")} {INVAL} {DEALLOC}"""
    return body, [image, own, pairs, np.zeros_like(own)], image.nbytes


def multiply(M: int, A: np.ndarray, B: np.ndarray, C: np.ndarray, *args: object, **options: object) -> np.ndarray:
    body, arrays, shared = product(M, A, B, C, *args, **options)  # type: ignore[arg-type]
    run(body, arrays, threads=THREADS, shared=shared)
    rows = np.arange(M)
    return arrays[3].view(np.float32)[rows // 16 * 32 + rows % 16 if M == 64 else rows]


def operands(M: int, N: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return integers(M, 16), integers(N, 16, seed=1), integers(M, N, seed=2)


@pytest.mark.parametrize("M", [64, 128])
@pytest.mark.parametrize("left", LAYOUTS)
def test_products_of_shared_memory(left: tuple[int, bool], M: int) -> None:
    A, B, C = operands(M, 32)
    assert np.array_equal(multiply(M, A, B, C, "bf16", left, (4, False)), A @ B.T + C)
    assert np.array_equal(multiply(M, A, B, C, "f16", left, (8, True)), A @ B.T + C)


@pytest.mark.parametrize("M", [64, 128])
@pytest.mark.parametrize("right", LAYOUTS)
def test_products_with_tensor_memory(right: tuple[int, bool], M: int) -> None:
    A, B, C = operands(M, 64)
    assert np.array_equal(multiply(M, A, B, C, "bf16", None, right), A @ B.T + C)


def test_options_of_a_product() -> None:
    A, B, C = operands(64, 16)
    assert np.array_equal(multiply(64, A, B, C, "bf16", (2, True), (2, True), keep=0), A @ B.T)
    assert np.array_equal(multiply(64, A, B, C, "bf16", (2, True), (2, True), negated=(1, 0)), C - A @ B.T)
    assert np.array_equal(multiply(64, A, B, C, "f16", None, (2, True), negated=(1, 1)), A @ B.T + C)


OVERWRITTEN = "write to what an asynchronous matrix product may still read"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"after": "bar.sync 0;"}, "access to tensor memory that a matrix product may still write"),
        ({"stored": ""}, "matrix product while tensor memory is read or written"),
        ({"fence": ""}, "matrix product of what was stored without a fence.proxy.async"),
        ({"after": f"st.shared.b32 [%r1+1024], %r0; {WAIT}"}, OVERWRITTEN),
        ({"after": WAIT.replace("[%r6], 0", "[%r6], 1")}, "deadlock: all warps wait for barriers in memory"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_product(change: dict[str, str], what: str) -> None:
    A, B, C = operands(64, 16)
    body, arrays, shared = product(64, A, B, C, "bf16", (2, True), (2, True), **change)  # type: ignore[arg-type]
    assert what in {f.what for f in check(body, arrays, threads=THREADS, shared=shared).findings}


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (f"{BARRIER} {WAIT}", "deadlock: all warps wait for barriers in memory"),
        (WAIT, "use of a barrier in memory that is not there"),
        (f"{BARRIER} @%p2 mbarrier.init.shared::cta.b64 [%r6], 1;", "a barrier in memory where there is one"),
        (f"{SPLIT.format(op='ld', n=1)} {{%r20}}, [%r5 + 128], 1;", "access to tensor memory that is not allocated"),
        (f"{SPLIT.format(op='ld', n=1)} {{%r20}}, [%r5 + 0], 1;", "read of tensor memory that nobody wrote"),
        (
            f"{SPLIT.format(op='st', n=1)} [%r3 + 0], 1, {{%r20}};",
            "access to another warp's lanes",
        ),
    ],
)
def test_misuse(body: str, what: str) -> None:
    body = f"{ALLOC} add.s32 %r6, %r1, 8; {body} tcgen05.wait::ld.sync.aligned; {DEALLOC}"
    found = launch(body, [np.zeros(4, np.uint32)], threads=THREADS, shared=64).run()[0]
    assert what in {finding.what for finding in found}


def test_tensor_memory_is_given_back() -> None:
    found = launch(ALLOC, [np.zeros(4, np.uint32)], threads=THREADS, shared=64).run()[0]
    assert "end without a release of tensor memory" in {finding.what for finding in found}
