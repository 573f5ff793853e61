"""What the emulator finds in small kernels with one fault each, and that it finds nothing without the fault."""

import numpy as np
import pytest

from tests.support.emulation import check, lane_address, launch, run

READ_LANES = "read after another lane's write without a barrier of the warp"
READ_WARPS = "read after another warp's write without a barrier"
WRITE_LANES = "write after another lane's write without a barrier of the warp"
WRITE_WARPS = "write after another warp's write without a barrier"
OVER_LANES = "write after another lane's read without a barrier of the warp"
OVER_WARPS = "write after another warp's read without a barrier"
READ_PROGRAMS = "read of what another program wrote"
WRITE_PROGRAMS = "write where another program wrote"
OVER_PROGRAMS = "write where another program read"
FRESH_SHARED = "read of shared memory that nobody wrote"
FRESH_GLOBAL = "read of global memory that nobody wrote"
OUTSIDE = "access to memory that is no argument's"
OUTSIDE_SHARED = "access beyond shared memory"
UNALIGNED = "misaligned access"
UNALIGNED_ROW = "misaligned row of a matrix"
COPYING = "access to where an asynchronous copy is under way"
COPY_AT_END = "end with an asynchronous copy under way"
MULTIPLYING = "write to what an asynchronous matrix product may still read"
PRODUCT_AT_END = "end with an asynchronous matrix product under way"
UNFENCED = "matrix product of what was stored without a fence.proxy.async"
PART_AT_BARRIER = "barrier that a part of the warp does not reach"
WARP_MISSING = "barrier that an ended warp does not reach"
TWO_BARRIERS = "warps wait at different barriers"
PART_OF_WARP = "instruction of a whole warp that a part of it executes"
ABSENT_LANE = "shuffle from a lane that takes no part"

OWN = f"{lane_address(0, 4, '%d10')} {lane_address(1, 4, '%d11')}"
SHARED = "mov.b32 %r1, global_smem; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; ld.global.b32 %r4, [%d10];"
NEIGHBOUR = "xor.b32 %r5, %r0, {distance}; shl.b32 %r5, %r5, 2; add.s32 %r5, %r1, %r5;"
PATTERN = np.array([0x7FFD7FFD], np.uint32)  # fresh memory


def found(body: str, *arrays: np.ndarray, **options: object) -> set[str]:
    return {finding.what for finding in check(body, arrays, **options).findings}


def numbers(n: int) -> np.ndarray:
    return np.arange(1, n + 1, dtype=np.uint32)


def exchange(distance: int, barrier: str, again: str = "") -> str:
    """Everyone stores, and loads what the thread at a distance stored."""
    return f"""{OWN} {SHARED} {NEIGHBOUR.format(distance=distance)}
        st.shared.b32 [%r3], %r4; {barrier} ld.shared.b32 %r6, [%r5]; {again} st.global.b32 [%d11], %r6;"""


@pytest.mark.parametrize(
    ("distance", "barrier", "what"),
    [
        (1, "bar.warp.sync -1;", None),
        (1, "bar.sync 0;", None),
        (32, "bar.sync 0;", None),
        (1, "", READ_LANES),
        (32, "", READ_WARPS),
        (32, "bar.warp.sync -1;", READ_WARPS),
    ],
)
def test_reads_after_writes(distance: int, barrier: str, what: str | None) -> None:
    x, y = numbers(64), np.zeros(64, np.uint32)
    report = check(exchange(distance, barrier), [x, y], threads=64, shared=256)
    assert what in {None, *(finding.what for finding in report.findings)}
    if what is None:
        assert not report.findings
        assert np.array_equal(y, x[np.arange(64) ^ distance])
    else:
        finding = next(finding for finding in report.findings if finding.what == what)
        assert [access.text for access in finding.accesses] == ["ld.shared.b32 %r6, [%r5]", "st.shared.b32 [%r3], %r4"]
        assert finding.accesses[1].thread == finding.accesses[0].thread ^ distance
        assert finding.place.startswith("shared memory, byte")


@pytest.mark.parametrize(
    ("distance", "again", "what"),
    [
        (1, "bar.warp.sync -1; st.shared.b32 [%r3], %r6;", None),
        (1, "st.shared.b32 [%r3], %r6;", OVER_LANES),
        (1, "shfl.sync.idx.b32 %r9, %r6, 0, 31, -1; st.shared.b32 [%r3], %r6;", OVER_LANES),
        (32, "bar.sync 0; st.shared.b32 [%r3], %r6;", None),
        (32, "bar.warp.sync -1; st.shared.b32 [%r3], %r6;", READ_WARPS),
        (32, "setp.ge.u32 %p1, %r0, 32; @%p1 st.shared.b32 [%r3], %r6;", OVER_WARPS),
        (32, "bar.warp.sync -1; st.shared.b32 [%r3], %r4;", None),  # what is there already
    ],
)
def test_writes_after_reads(distance: int, again: str, what: str | None) -> None:
    kinds = found(exchange(distance, "bar.sync 0;", again), numbers(64), numbers(64), threads=64, shared=256)
    assert what in kinds if what else not kinds


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("%r1", None),  # the same from all
        ("%r0", WRITE_LANES),
    ],
)
def test_writes_to_one_place(value: str, what: str | None) -> None:
    body = (
        f"{SHARED} st.shared.b32 [%r1], {value}; bar.sync 0; ld.shared.b32 %r6, [%r1]; {OWN} st.global.b32 [%d11], %r6;"
    )
    kinds = found(f"{OWN} {body}", numbers(32), numbers(32), shared=256)
    assert what in kinds if what else not kinds


@pytest.mark.parametrize("unit", ["shr.u32 %r8, %r0, 5;", "and.b32 %r8, %r0, 31;"])
def test_results_that_depend_on_the_order_of_warps_or_lanes(unit: str) -> None:
    body = f"""{OWN} {SHARED} {unit} st.shared.b32 [%r1], %r8; bar.sync 0; ld.shared.b32 %r6, [%r1];
        st.global.b32 [%d11], %r6;"""
    report = check(body, [numbers(64), np.zeros(64, np.uint32)], threads=64, shared=256)
    (finding,) = (each for each in report.findings if each.what.startswith("results that depend on the order"))
    assert finding.place == "64 elements of array 1, element 0"
    assert finding.accesses[0].text == "st.global.b32 [%d11], %r6"


def test_memory_that_nobody_wrote() -> None:
    x, y = numbers(32), np.zeros(32, np.uint32)
    body = f"{OWN} {SHARED} ld.shared.b32 %r6, [%r3]; st.global.b32 [%d11], %r6;"
    assert found(body, x, y, shared=256) == {FRESH_SHARED}
    x[7] = PATTERN[0]
    body = f"{OWN} ld.global.b32 %r6, [%d10]; st.global.b32 [%d11], %r6;"
    report = check(body, [x, y])
    assert [(f.what, f.place) for f in report.findings] == [(FRESH_GLOBAL, "array 0, element 7")]
    halves = np.resize(PATTERN.view(np.uint16), 64).copy()
    halves[1:] = 1
    body = f"{OWN} ld.global.b32 %r6, [%d10]; st.global.b32 [%d11], %r6;"
    assert found(body, halves, y) == {FRESH_GLOBAL}
    assert found(f"{OWN} setp.gt.u32 %p1, %r0, 0; @%p1 ld.global.b32 %r6, [%d10];", halves, y) == set()


def test_shared_memory_of_the_program_before_is_not_kept() -> None:
    """Of two programs only the first writes."""
    body = f"""{OWN} {SHARED} mov.u32 %r7, %ctaid.x; setp.eq.u32 %p1, %r7, 0; @%p1 st.shared.b32 [%r3], %r4;
        ld.shared.b32 %r6, [%r3];"""
    assert found(body, numbers(32), numbers(32), shared=256, grid=(2, 1, 1)) == {FRESH_SHARED}


@pytest.mark.parametrize(
    ("body", "what", "shared"),
    [
        ("add.s64 %d10, %d10, 4; ld.global.b32 %r6, [%d10];", OUTSIDE, 0),
        ("add.s64 %d10, %d10, -4; st.global.b32 [%d10], %r0;", OUTSIDE, 0),
        ("add.s64 %d10, %d0, 4; ld.global.b64 %d12, [%d10];", UNALIGNED, 0),
        (SHARED + "st.shared.b32 [%r3], %r0;", OUTSIDE_SHARED, 64),
        (SHARED + "add.s32 %r1, %r1, 2; st.shared.b32 [%r1], %r0;", UNALIGNED, 256),
        (
            SHARED + "add.s32 %r1, %r1, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r1];",
            UNALIGNED_ROW,
            256,
        ),
    ],
)
def test_addresses(body: str, what: str, shared: int) -> None:
    findings, _, _ = launch(f"{OWN} {body}", [numbers(32), numbers(32)], shared=shared).run()
    assert what in {finding.what for finding in findings}


def test_a_masked_access_may_be_anywhere() -> None:
    run(f"{OWN} setp.lt.u32 %p1, %r0, 16; @%p1 ld.global.b32 %r6, [%d10];", [numbers(16), numbers(16)])


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("st.global.b32 [%d0], %r7;", WRITE_PROGRAMS),
        ("st.global.b32 [%d0], 5;", None),  # the same from all
        ("ld.global.b32 %r6, [%d0];", None),
        (
            "setp.eq.u32 %p1, %r7, 0; @%p1 st.global.b32 [%d0], 5; @!%p1 ld.global.b32 %r6, [%d0];",
            READ_PROGRAMS,
        ),
        (
            "setp.eq.u32 %p1, %r7, 1; @%p1 st.global.b32 [%d0], 5; @!%p1 ld.global.b32 %r6, [%d0];",
            OVER_PROGRAMS,
        ),
    ],
)
def test_two_programs_at_one_address(body: str, what: str | None) -> None:
    findings, _, _ = launch(f"mov.u32 %r7, %ctaid.x; {body}", [numbers(32)], grid=(2, 1, 1)).run()
    kinds = {finding.what for finding in findings}
    assert what in kinds if what else not kinds


def test_warps_exchange_through_global_memory() -> None:
    body = """st.global.b32 [%d10], %r0; {barrier} xor.b32 %r5, %r0, 32; mad.wide.u32 %d12, %r5, 4, %d0;
        ld.global.b32 %r6, [%d12]; st.global.b32 [%d11], %r6;"""
    y = np.zeros(64, np.uint32)
    assert not found(OWN + body.format(barrier="bar.sync 0;"), numbers(64), y, threads=64)
    assert y.tolist() == [i ^ 32 for i in range(64)]
    kinds = found(OWN + body.format(barrier=""), numbers(64), y, threads=64)
    assert READ_WARPS in kinds


@pytest.mark.parametrize(("between", "what"), [("", OVER_LANES), ("shfl.sync.idx.b32 %r6, %r6, 0, 31, -1;", None)])
def test_lanes_meet_in_a_shuffle_before_they_overwrite_global_memory(between: str, what: str | None) -> None:
    body = f"""{OWN} xor.b32 %r5, %r0, 1; mad.wide.u32 %d12, %r5, 4, %d0; ld.global.b32 %r6, [%d12]; {between}
        st.global.b32 [%d10], %r6;"""
    kinds = found(body, numbers(32), numbers(32))
    assert what in kinds if what else not kinds


COPY = f"{OWN} {SHARED} cp.async.ca.shared.global [%r3], [%d10], 4; cp.async.commit_group;"


@pytest.mark.parametrize(
    ("wait", "what"),
    [
        ("cp.async.wait_group 0;", None),
        ("cp.async.wait_all;", None),
        ("cp.async.wait_group 1;", COPYING),
        ("", COPY_AT_END),
    ],
)
def test_asynchronous_copies(wait: str, what: str | None) -> None:
    x, y = numbers(32), np.zeros(32, np.uint32)
    kinds = found(f"{COPY} {wait} ld.shared.b32 %r6, [%r3]; st.global.b32 [%d11], %r6;", x, y, shared=256)
    assert what in kinds if what else not kinds
    if what is None:
        assert np.array_equal(x, y)


def test_an_asynchronous_copy_is_ordered_like_a_write() -> None:
    """A barrier between what is read and the copy over it; another between its wait and other threads."""
    again = "{barrier} cp.async.ca.shared.global [%r3], [%d10], 4; cp.async.wait_all;"
    x, y = numbers(64), np.zeros(64, np.uint32)
    body = exchange(32, "bar.sync 0;", again.format(barrier="bar.sync 0;"))
    assert not found(body, x, y, threads=64, shared=256)
    body = exchange(32, "bar.sync 0;", again.format(barrier=""))
    assert OVER_WARPS in found(body, x, y, threads=64, shared=256)
    other = NEIGHBOUR.format(distance=32) + "ld.shared.b32 %r6, [%r5];"
    kinds = found(f"{COPY} cp.async.wait_all; {other}", x, y, threads=64, shared=256)
    assert READ_WARPS in kinds
    assert not found(f"{COPY} cp.async.wait_all; bar.sync 0; {other}", x, y, threads=64, shared=256)


def test_a_copy_of_nothing_fills_with_zeros() -> None:
    """Its source may be anywhere."""
    y = np.ones(32, np.uint32)
    body = f"""{OWN} {SHARED} setp.lt.u32 %p1, %r0, 16; selp.b32 %r8, 4, 0, %p1; add.s64 %d12, %d10, 1000000;
        selp.b64 %d12, %d10, %d12, %p1; cp.async.ca.shared.global [%r3], [%d12], 4, %r8; cp.async.wait_all;
        ld.shared.b32 %r6, [%r3]; st.global.b32 [%d11], %r6;"""
    run(body, [numbers(32), y], shared=256)
    assert y.tolist() == [*range(1, 17), *[0] * 16]


def test_branches_part_and_meet_again() -> None:
    """Lanes loop as often as their number says, in two ways that meet at the end."""
    y = np.zeros(64, np.uint32)
    body = f"""{OWN} mov.b32 %r6, 0; and.b32 %r7, %r0, 7; setp.eq.s32 %p1, %r7, 0; @%p1 bra $done;
        and.b32 %r8, %r0, 1; setp.eq.s32 %p2, %r8, 0; @%p2 bra $even;
        $odd: add.s32 %r6, %r6, 3; sub.s32 %r7, %r7, 1; setp.gt.s32 %p1, %r7, 0; @%p1 bra $odd; bra.uni $done;
        $even: add.s32 %r6, %r6, 5; sub.s32 %r7, %r7, 1; setp.gt.s32 %p1, %r7, 0; @%p1 bra $even;
        $done: bar.sync 0; st.global.b32 [%d11], %r6;"""
    run(body, [numbers(64), y], threads=64)
    assert y.tolist() == [(i % 8) * (3 if i % 2 else 5) for i in range(64)]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("setp.lt.u32 %p1, %r0, 5; @%p1 bra $end; bar.sync 0; $end:", PART_AT_BARRIER),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra $end; bar.sync 0; $end:", WARP_MISSING),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra $a; bar.sync 0; bra $end; $a: bar.sync 0; $end:", TWO_BARRIERS),
        ("setp.lt.u32 %p1, %r0, 5; @%p1 bra $end; bar.warp.sync -1; $end:", PART_OF_WARP),
        ("setp.lt.u32 %p1, %r0, 5; @%p1 bra $end; shfl.sync.bfly.b32 %r5, %r0, 16, 31, -1; $end:", ABSENT_LANE),
    ],
)  # fmt: skip
def test_divergence(body: str, what: str) -> None:
    findings, _, _ = launch(f"{body} mov.b32 %r9, 0;", [numbers(32)], threads=64).run()
    assert what in {finding.what for finding in findings}


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("bfly", 5, 31, lambda i: i ^ 5),
        ("idx", 3, 31, lambda i: 3),
        ("idx", 3, 0x181F, lambda i: i // 8 * 8 + 3),  # segments of eight
        ("up", 2, 0, lambda i: max(i - 2, i if i < 2 else 0)),
        ("down", 3, 31, lambda i: i + 3 if i + 3 <= 31 else i),
    ],
)
def test_shuffles(mode: str, by: int, clamp: int, source: object) -> None:
    x, y = numbers(32), np.zeros(32, np.uint32)
    body = f"""{OWN} ld.global.b32 %r4, [%d10]; shfl.sync.{mode}.b32 %r5|%p1, %r4, {by}, {clamp}, -1;
        st.global.b32 [%d11], %r5;"""
    run(body, [x, y])
    assert y.tolist() == [source(i) + 1 for i in range(32)]  # type: ignore[operator]
    inside = np.zeros(32, np.uint32)
    run(body.replace("st.global.b32 [%d11], %r5", "selp.b32 %r6, 1, 0, %p1; st.global.b32 [%d11], %r6"), [x, inside])
    left_out = {"up": range(2), "down": range(29, 32)}.get(mode, range(0))
    assert inside.tolist() == [int(i not in left_out) for i in range(32)]


def test_special_registers_and_the_grid() -> None:
    y = np.zeros((2 * 3 * 2, 64), np.uint32)
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.x;
        mad.lo.s32 %r5, %r3, 3, %r2; mad.lo.s32 %r5, %r5, %r4, %r1; mad.lo.s32 %r6, %r5, 64, %r0;
        mad.wide.u32 %d10, %r6, 4, %d0; mov.u32 %r7, %laneid; mov.u32 %r8, %warpid; mov.u32 %r9, %tid.y;
        mad.lo.s32 %r8, %r8, 100, %r7; add.s32 %r8, %r8, %r9; mad.lo.s32 %r8, %r5, 1000, %r8;
        st.global.b32 [%d10], %r8;"""
    run(body, [y], threads=64, grid=(2, 3, 2))
    assert y.tolist() == [[1000 * n + 100 * (t // 32) + t % 32 for t in range(64)] for n in range(12)]


SIZES = [(size, vector) for size in (8, 16, 32, 64) for vector in (1, 2, 4) if size * vector <= 128]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("size", "vector"), SIZES)
def test_loads_and_stores_of_any_size(size: int, vector: int, space: str) -> None:
    x = np.random.default_rng(0).integers(0, 255, 32 * vector * size // 8, dtype=np.uint8).view(f"u{size // 8}")
    y, register, step = np.zeros_like(x), {8: "%h", 16: "%h", 32: "%r", 64: "%d"}[size], vector * size // 8
    group = ", ".join(f"{register}{20 + i}" for i in range(vector))
    group, form = ("{" + group + "}", f"v{vector}.") if vector > 1 else (group, "")
    through = ""
    if space == "shared":
        through = f"""mad.lo.s32 %r2, %r0, {step}, 1024; st.shared.{form}b{size} [%r2], {group}; bar.sync 0;
            ld.shared.{form}b{size} {group}, [%r2];"""
    run(
        f"""{lane_address(0, step, "%d10")} ld.global.{form}b{size} {group}, [%d10]; {through}
        {lane_address(1, step, "%d11")} st.global.{form}b{size} [%d11], {group};""",
        [x, y],
        shared=32 * step,
    )
    assert np.array_equal(x, y)


def product(before: str, after: str) -> str:
    """A matrix product by wgmma of what the threads store; the rows of B take 512 bytes."""
    registers = ", ".join(f"%r{100 + i}" for i in range(8))
    return f"""mov.b32 %r1, global_smem; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; st.shared.b32 [%r3], 0;
        {before} shr.u32 %r4, %r1, 4; cvt.u64.u32 %d12, %r4; or.b64 %d12, %d12, {16 << 32 | 8 << 16};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{registers}}}, {{%r0, %r0, %r0, %r0}}, %d12, 0, 1, 1, 0;
        wgmma.commit_group.sync.aligned; {after}"""


FENCED = "fence.proxy.async.shared::cta; bar.sync 0;"
AWAITED = "wgmma.wait_group.sync.aligned 0; bar.sync 0; st.shared.b32 [%r3], 1;"


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        (FENCED, AWAITED, None),
        ("bar.sync 0; fence.proxy.async.shared::cta;", AWAITED, None),  # by who reads
        ("bar.sync 0;", AWAITED, UNFENCED),
        (
            FENCED,
            AWAITED.replace("aligned 0", "aligned 1"),
            MULTIPLYING,
        ),
        (FENCED, "", PRODUCT_AT_END),
        (
            FENCED,
            f"mov.b32 %r9, %r104; {AWAITED} add.f32 %r9, %r104, %r9;",
            None,
        ),  # copies are the assembler's to order
        (FENCED, f"add.f32 %r9, %r104, %r104; {AWAITED}", "use of a register that a matrix product may still write"),
        ("fence.proxy.async.shared::cta;", AWAITED, READ_WARPS),
        (FENCED, AWAITED.replace("bar.sync 0;", ""), OVER_WARPS),
    ],
)
def test_asynchronous_matrix_products(before: str, after: str, what: str | None) -> None:
    kinds = {f.what for f in launch(product(before, after), [numbers(1)], threads=128, shared=512).run()[0]}
    assert what in kinds if what else not kinds
