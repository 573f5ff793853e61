"""Instructions on registers alone, each against its definition in PTX's manual."""

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.support.emulation import apply, lane_address, run
from tools.ptx_emulator.decoder import decode
from tools.ptx_emulator.parser import UnknownPtxError

NAN = 0x7FFFFFFF  # what PTX gives for all of them
TYPES = {
    "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s32": np.int32, "u32": np.uint32, "b32": np.uint32,
    "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "f32": np.float32,
}  # fmt: skip
ARITHMETIC: list[tuple[str, Callable[..., np.ndarray]]] = [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)]
FLOATS = np.array(
    [0.0, -0.0, 1.0, -1.0, 1.5, 3.0, 1 / 3, -2.7, 1e-3, 65504.0, 65519.9, 65520.0, 1e10, 3e38, -3e38, 1e-38, 1e-40,
     -1e-45, 5e-8, 6e-8, 2.0**-24, 2.0**-25, 3 * 2.0**-26, np.inf, -np.inf, np.nan, 1 + 2.0**-8, 1 + 3 * 2.0**-8,
     1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-23, 1 - 2.0**-24],
    np.float32,
)  # fmt: skip


def integers(kind: str) -> np.ndarray:
    limits = np.iinfo(TYPES[kind])
    edges = [0, 1, 2, 3, 7, 31, limits.max, limits.max - 1, limits.max // 3, limits.min, limits.min // 2 + 5]
    if limits.min < 0:
        edges += [-1, -2, -7]
    random = np.random.default_rng(0).integers(limits.min, limits.max, 18, dtype=np.dtype(TYPES[kind]), endpoint=True)
    return np.concatenate([np.array(edges, TYPES[kind]), random])


def pairs(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every element with every other."""
    return np.repeat(x, len(x)), np.tile(x, len(x))


def wrapped(values: list[int], kind: str) -> np.ndarray:
    bits = 8 * np.dtype(TYPES[kind]).itemsize
    unsigned = np.array([v & ((1 << bits) - 1) for v in values], dtype=f"u{bits // 8}")
    return unsigned.view(TYPES[kind])


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


TWO = {
    "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "min": min, "max": max,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "div": truncated_quotient, "rem": lambda a, b: a - b * truncated_quotient(a, b),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", ["add", "sub", "mul.lo", "min", "max", "div", "rem"])
def test_integer_arithmetic(name: str, kind: str) -> None:
    x, y = pairs(integers(kind))
    if name in ("div", "rem"):
        x, y = x[y != 0], y[y != 0]
    expected = wrapped([TWO[name](int(a), int(b)) for a, b in zip(x, y, strict=True)], kind)
    assert np.array_equal(apply(f"{name}.{kind}", TYPES[kind], x, y), expected)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_logic(name: str, kind: str) -> None:
    x, y = pairs(integers(kind))
    expected = wrapped([TWO[name](int(a), int(b)) for a, b in zip(x, y, strict=True)], kind)
    assert np.array_equal(apply(f"{name}.{kind}", TYPES[kind], x, y), expected)
    assert np.array_equal(apply(f"not.{kind}", TYPES[kind], x), ~x)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_sign(kind: str) -> None:
    x = integers(kind)
    assert np.array_equal(apply(f"neg.{kind}", TYPES[kind], x), wrapped([-int(a) for a in x], kind))
    assert np.array_equal(apply(f"abs.{kind}", TYPES[kind], x), wrapped([abs(int(a)) for a in x], kind))


@pytest.mark.parametrize("kind", ["u16", "u32", "u64", "s16", "s32", "s64"])
def test_shifts_end_at_the_width(kind: str) -> None:
    bits = int(kind[1:])
    x = np.repeat(integers(kind), 7)
    by = np.tile(np.array([0, 1, bits // 2, bits - 1, bits, bits + 1, 0xFFFFFFFF], np.uint32), len(integers(kind)))
    right = wrapped([int(a) >> int(n) if n < bits else (-1 if a < 0 else 0) for a, n in zip(x, by, strict=True)], kind)
    assert np.array_equal(apply(f"shr.{kind}", TYPES[kind], x, by), right)
    left = wrapped([int(a) << int(n) if n < bits else 0 for a, n in zip(x, by, strict=True)], kind)
    assert np.array_equal(apply(f"shl.b{bits}", TYPES[kind], x, by), left)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products(kind: str) -> None:
    x, y = pairs(integers(kind))
    long = f"{kind[0]}{2 * int(kind[1:])}"
    z = np.resize(integers(long), len(x))
    products = [int(a) * int(b) for a, b in zip(x, y, strict=True)]
    assert np.array_equal(apply(f"mul.wide.{kind}", TYPES[long], x, y), wrapped(products, long))
    sums = [p + int(c) for p, c in zip(products, z, strict=True)]
    assert np.array_equal(apply(f"mad.wide.{kind}", TYPES[long], x, y, z), wrapped(sums, long))


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_high_products_and_sums(kind: str) -> None:
    x, y = pairs(integers(kind))
    z = x[::-1].copy()
    high = wrapped([int(a) * int(b) >> int(kind[1:]) for a, b in zip(x, y, strict=True)], kind)
    assert np.array_equal(apply(f"mul.hi.{kind}", TYPES[kind], x, y), high)
    sums = wrapped([int(a) * int(b) + int(c) for a, b, c in zip(x, y, z, strict=True)], kind)
    assert np.array_equal(apply(f"mad.lo.{kind}", TYPES[kind], x, y, z), sums)


def field(x: int, first: int, length: int, signed: bool) -> int:
    """As the manual's pseudo code has it."""
    first, length = first & 255, length & 255
    sign = 0 if not signed or length == 0 else x >> min(first + length - 1, 31) & 1
    return sum((x >> first + i & 1 if i < length and first + i <= 31 else sign) << i for i in range(32))


@pytest.mark.parametrize("signed", [True, False])
def test_bit_fields(signed: bool) -> None:
    grid = [(f, n) for f in (0, 1, 8, 31, 32, 200, 256) for n in (0, 1, 5, 31, 32, 255)]
    x = np.repeat(np.array([0xDEADBEEF, 0x7FFFFFFF, 0x80000001], np.uint32), len(grid))
    first, length = (np.tile(np.array([g[i] for g in grid], np.uint32), 3) for i in range(2))
    expected = [field(int(a), int(f), int(n), signed) for a, f, n in zip(x, first, length, strict=True)]
    assert apply(f"bfe.{'su'[not signed]}32", np.uint32, x, first, length).tolist() == expected


def test_bytes_chosen_by_prmt() -> None:
    x, y = np.array([0x83828180], np.uint32), np.array([0x07060504], np.uint32)
    selectors = {
        0x3210: 0x83828180,
        0x7654: 0x07060504,
        0x5410: 0x05048180,
        0x89AB: 0xFFFFFFFF,
        0xCDEF: 0,
        0x0000: 0x80808080,
    }
    chosen = np.array(list(selectors), np.uint32)
    assert apply("prmt.b32", np.uint32, np.resize(x, 6), np.resize(y, 6), chosen).tolist() == list(selectors.values())


def test_funnel_shifts() -> None:
    low, high = np.full(6, 0x89ABCDEF, np.uint32), np.full(6, 0x01234567, np.uint32)
    by = np.array([0, 4, 16, 31, 32, 36], np.uint32)
    whole = 0x0123456789ABCDEF
    right = [whole >> (int(n) & 31) & 0xFFFFFFFF for n in by]
    assert apply("shf.r.wrap.b32", np.uint32, low, high, by).tolist() == right
    left = [(whole << (int(n) & 31) >> 32) & 0xFFFFFFFF for n in by]
    assert apply("shf.l.wrap.b32", np.uint32, low, high, by).tolist() == left


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


def compare(name: str, x: np.ndarray, y: np.ndarray) -> list[bool]:
    """Through a predicate and a selection."""
    size, register = (8 * x.itemsize, {2: "%h", 4: "%r", 8: "%d"}[x.itemsize])
    out = []
    for first in range(0, len(x), 32):
        a, b = (np.resize(v[first : first + 32], 32).copy() for v in (x, y))
        result = np.zeros(32, np.uint32)
        run(
            f"""{lane_address(0, x.itemsize, "%d10")} ld.global.b{size} {register}20, [%d10];
            {lane_address(1, x.itemsize, "%d10")} ld.global.b{size} {register}21, [%d10];
            {name} %p1, {register}20, {register}21;
            selp.b32 %r30, 1, 0, %p1;
            {lane_address(2, 4, "%d10")} st.global.b32 [%d10], %r30;""",
            [a, b, result],
        )
        out += [bool(v) for v in result[: len(x) - first]]
    return out


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_integer_comparisons(name: str, kind: str) -> None:
    x, y = pairs(integers(kind)[:14])
    expected = [COMPARISONS[name](int(a), int(b)) for a, b in zip(x, y, strict=True)]
    assert compare(f"setp.{name}.{kind}", x, y) == expected
    if kind[0] == "u" and name in ("lt", "le", "gt", "ge"):
        unsigned = {"lt": "lo", "le": "ls", "gt": "hi", "ge": "hs"}[name]
        assert compare(f"setp.{unsigned}.{kind}", x, y) == expected
    if name in ("eq", "ne"):
        assert compare(f"setp.{name}.b{kind[1:]}", x, y) == expected


@pytest.mark.parametrize("name", [*COMPARISONS, *(f"{name}u" for name in COMPARISONS), "num", "nan"])
def test_float_comparisons(name: str) -> None:
    """Ordered ones are false with a NaN, unordered ones true."""
    x, y = pairs(FLOATS[[0, 1, 2, 3, 16, 23, 24, 25]])
    nan = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        expected = nan == (name == "nan")
    else:
        expected = np.array([COMPARISONS[name[:2]](a, b) for a, b in zip(x, y, strict=True)])
        expected = expected | nan if name.endswith("u") else expected & ~nan
    assert compare(f"setp.{name}.f32", x, y) == expected.tolist()


def rounded(value: Fraction) -> np.float32:
    """To float32 in one rounding."""
    first = np.float32(float(value)) if abs(value) < Fraction(2) ** 128 else np.float32(math.copysign(np.inf, value))
    if np.isinf(first):
        return first
    near = [np.nextafter(first, np.float32(-np.inf)), first, np.nextafter(first, np.float32(np.inf))]
    finite = [float(v) for v in near if np.isfinite(v)]
    best = min(finite, key=lambda v: (abs(Fraction(v) - value), int(np.float32(v).view(np.uint32)) & 1))
    return np.float32(best)


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z in one rounding."""
    numbers = ([Fraction(float(v)) for v in values] for values in (x, y, z))
    return np.array([rounded(a * b + c) for a, b, c in zip(*numbers, strict=True)], np.float32)


def same_bits(actual: np.ndarray, expected: np.ndarray) -> bool:
    """All NaNs of the result are PTX's one."""
    wanted = np.where(np.isnan(expected), np.uint32(NAN), expected.astype(np.float32).view(np.uint32))
    return np.array_equal(actual.view(np.uint32), wanted)


@pytest.mark.parametrize(("name", "function"), [*ARITHMETIC, ("div.rn", np.divide)])
def test_float_arithmetic_rounds_to_the_nearest(name: str, function: Callable[..., np.ndarray]) -> None:
    """float64 holds the sums and products of these well enough to round once; denormals are kept."""
    x, y = pairs(FLOATS)
    with np.errstate(all="ignore"):
        expected = function(x, y)
    assert same_bits(apply(f"{name}.f32", np.float32, x, y), expected)


def test_fma_rounds_once() -> None:
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal(400).astype(np.float32) for _ in range(2))
    z = (-x * y).astype(np.float32)  # what is left is the product's own rounding error
    z[::3] = generator.standard_normal(len(z[::3]))
    x[5], y[5], z[5] = 1e-30, 1e-15, 1e-45
    exact = [
        rounded(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))) for a, b, c in zip(x, y, z, strict=True)
    ]
    assert same_bits(apply("fma.rn.f32", np.float32, x, y, z), np.array(exact, np.float32))
    special = [np.array(v, np.float32) for v in ([np.inf, np.inf, 0], [0, 1, np.inf], [1, -np.inf, 1])]
    assert same_bits(apply("fma.rn.f32", np.float32, *special), np.array([np.nan, np.nan, np.nan]))


@pytest.mark.parametrize(("name", "function"), ARITHMETIC)
def test_double_arithmetic(name: str, function: Callable[..., np.ndarray]) -> None:
    x, y = pairs(np.append(FLOATS[np.isfinite(FLOATS)].astype(np.float64), [1 / 3, 1 + 2.0**-52, 1e300]))
    with np.errstate(all="ignore"):
        expected = function(x, y)
    for form in (name, f"{name}.rn"):
        assert np.array_equal(apply(f"{form}.f64", np.float64, x, y), expected)


def test_double_fma_rounds_once() -> None:
    """What a product loses in float64."""
    x, y = np.random.default_rng(0).standard_normal((2, 100))
    lost = [float(Fraction(a) * Fraction(b) - Fraction(a * b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert np.array_equal(apply("fma.rn.f64", np.float64, x, y, -x * y), np.array(lost))


def test_conversions_between_single_and_double() -> None:
    finite = FLOATS[np.isfinite(FLOATS)]
    assert np.array_equal(apply("cvt.f64.f32", np.float64, finite), finite.astype(np.float64))
    x = np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24, -1 / 3, 1e300, 1e-46, np.nan])
    with np.errstate(all="ignore"):
        assert same_bits(apply("cvt.rn.f32.f64", np.float32, x), x.astype(np.float32))


def test_ftz_takes_denormals_for_zeros() -> None:
    x = np.array([1e-40, -1e-40, 2e-38, 1.5e-38], np.float32)
    y = np.array([1e-40, 1.0, -1.2e-38, 0.5], np.float32)
    assert same_bits(apply("add.ftz.f32", np.float32, x, y), np.array([0.0, 1.0, 0.0, 0.5], np.float32))
    assert same_bits(apply("mul.ftz.f32", np.float32, x, y), np.array([0.0, -0.0, -0.0, 0.0], np.float32))


def test_minimum_and_maximum() -> None:
    """Of a number and a NaN the number; a negative zero is less than a positive one."""
    x = np.array([0.0, -0.0, np.nan, 1, np.nan, -np.inf], np.float32)
    y = np.array([-0.0, 0.0, 1, np.nan, np.nan, np.inf], np.float32)
    assert same_bits(apply("min.f32", np.float32, x, y), np.array([-0.0, -0.0, 1, 1, np.nan, -np.inf]))
    assert same_bits(apply("max.f32", np.float32, x, y), np.array([0.0, 0.0, 1, 1, np.nan, np.inf]))


ULPS = 2  # the manual's bound, or what it implies


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("ex2.approx.f32", np.exp2),
        ("ex2.approx.ftz.f32", np.exp2),
        ("lg2.approx.f32", np.log2),
        ("lg2.approx.ftz.f32", np.log2),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
        ("rsqrt.approx.ftz.f32", lambda x: 1 / np.sqrt(x)),
        ("sqrt.approx.f32", np.sqrt),
        ("sqrt.rn.f32", np.sqrt),
        ("sqrt.approx.ftz.f32", np.sqrt),
        ("rcp.approx.f32", np.reciprocal),
        ("rcp.approx.ftz.f32", np.reciprocal),
        ("tanh.approx.f32", np.tanh),
    ],
)
def test_approximations(name: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    x = np.concatenate([FLOATS, np.linspace(-20, 20, 32, dtype=np.float32)])
    if "ftz" in name:
        x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
    with np.errstate(all="ignore"):
        expected = function(x.astype(np.float64))
        single = expected.astype(np.float32)
    if "ftz" in name:
        single = np.where(np.abs(single) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), single), single)
    actual = apply(name, np.float32, x)
    special = ~np.isfinite(single) | (single == 0)
    assert same_bits(actual[special], single[special])
    error = np.abs(actual[~special] - expected[~special]) / np.spacing(np.abs(single[~special]))
    assert error.max() <= ULPS


def test_divisions() -> None:
    """The approximate one loses divisors beyond 2^126, as the manual says."""
    x = np.array([1, 1, np.inf, -3, 1, 0], np.float32)
    y = np.array([3, 2.0**127, 2.0**127, 7, np.inf, 0], np.float32)
    with np.errstate(all="ignore"):
        assert same_bits(apply("div.full.f32", np.float32, x, y), x / y)
        expected = np.array([x[0] / y[0], 0, np.nan, x[3] / y[3], 0, np.nan], np.float32)
    assert same_bits(apply("div.approx.f32", np.float32, x, y), expected)


def half_bits(x: np.ndarray, kind: str) -> np.ndarray:
    """By numpy, or by the definition of bfloat16: the nearest, ties to even."""
    if kind == "f16":
        with np.errstate(all="ignore"):
            raw = x.astype(np.float16).view(np.uint16)
    else:
        bits = x.view(np.uint32).astype(np.uint64)
        raw = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), raw)


def half_value(raw: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    return (raw.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_conversions_to_half(kind: str) -> None:
    generator = np.random.default_rng(0)
    random = generator.integers(0, 1 << 32, 2048, dtype=np.uint32).view(np.float32)
    x = np.concatenate([FLOATS, random, (generator.standard_normal(992) * 2.0**-14).astype(np.float32)])
    assert np.array_equal(apply(f"cvt.rn.{kind}.f32", np.uint16, x), half_bits(x, kind))
    both = apply(f"cvt.rn.{kind}x2.f32", np.uint32, x, x[::-1].copy())
    assert np.array_equal(both >> 16, half_bits(x, kind))  # the first operand goes to the upper half
    assert np.array_equal(both & 0xFFFF, half_bits(x[::-1].copy(), kind))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_conversions_from_half(kind: str) -> None:
    raw = np.arange(0, 1 << 16, 17, dtype=np.uint16)
    assert same_bits(apply(f"cvt.f32.{kind}", np.float32, raw), half_value(raw, kind))
    assert np.array_equal(apply(f"neg.{kind}", np.uint16, raw), raw ^ 0x8000)
    two = raw.astype(np.uint32) << 16 | raw
    assert np.array_equal(apply(f"neg.{kind}x2", np.uint32, two), two ^ 0x80008000)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_half_arithmetic_rounds_once(kind: str) -> None:
    x, y = pairs(half_bits(FLOATS[np.abs(FLOATS) < 1e4], kind))
    a, b = half_value(x, kind), half_value(y, kind)
    for name, exact in (("add", a + b), ("sub", a - b), ("mul", a * b)):
        assert np.array_equal(apply(f"{name}.{kind}", np.uint16, x, y), half_bits(exact, kind)), name
    z = FLOATS[np.arange(len(x)) % 5 + 2]
    assert same_bits(apply(f"add.rn.f32.{kind}", np.float32, x, z), a + z)
    assert same_bits(apply(f"sub.rn.f32.{kind}", np.float32, x, z), a - z)
    exact = [
        rounded(Fraction(float(u)) * Fraction(float(v)) + Fraction(float(w))) for u, v, w in zip(a, b, z, strict=True)
    ]
    assert same_bits(apply(f"fma.rn.f32.{kind}", np.float32, x, y, z), np.array(exact))


def test_conversion_to_tf32() -> None:
    """Ten bits behind the point; ties go away from zero."""
    ulp = 2.0**-10
    x = np.array([1, 1 + ulp / 2, -1 - ulp / 2, 1 + ulp / 2 - 2.0**-23, np.inf, np.nan, 3.402e38], np.float32)
    expected = np.array([1, 1 + ulp, -1 - ulp, 1, np.inf, np.nan, np.inf], np.float32)
    assert same_bits(apply("cvt.rna.tf32.f32", np.uint32, x).view(np.float32), expected)


@pytest.mark.parametrize("to", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_conversions(source: str, to: str) -> None:
    x = integers(source)
    assert np.array_equal(apply(f"cvt.{to}.{source}", TYPES[to], x), wrapped([int(a) for a in x], to))


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_conversions_between_floats_and_integers(kind: str) -> None:
    """Towards zero, and no further than the integers reach; NaN gives zero."""
    numbers = integers(kind)
    assert same_bits(apply(f"cvt.rn.f32.{kind}", np.float32, numbers), numbers.astype(np.float32))
    if kind.endswith("16"):
        return
    limits = np.iinfo(TYPES[kind])
    x = np.concatenate([FLOATS, np.array([2.5, -2.5, 2.0**31, -(2.0**31), 2.0**63, 2.0**64], np.float32)])
    expected = [
        0 if np.isnan(v) else max(limits.min, min(limits.max, int(v) if np.isfinite(v) else int(np.sign(v)) << 80))
        for v in x
    ]
    assert [int(v) for v in apply(f"cvt.rzi.{kind}.f32", TYPES[kind], x)] == expected


@pytest.mark.parametrize(("name", "function"), ARITHMETIC)
def test_pairs_of_floats(name: str, function: Callable[..., np.ndarray]) -> None:
    x, y = (np.random.default_rng(i).standard_normal(64).astype(np.float32) for i in range(2))
    result = apply(f"{name}.rn.f32x2", np.uint64, x.view(np.uint64), y.view(np.uint64)).view(np.float32)
    assert same_bits(result, function(x, y))
    result = apply("fma.rn.f32x2", np.uint64, *(v.view(np.uint64) for v in (x, y, x))).view(np.float32)
    assert same_bits(result, fused(x, y, x))


def test_moves_selections_and_predicates() -> None:
    x, y = np.arange(32, dtype=np.uint32), np.arange(100, 132, dtype=np.uint32)
    before = "setp.lt.u32 %p1, %r0, 5; setp.lt.u32 %p2, %r0, 9; xor.pred %p3, %p1, %p2; and.pred %p4, %p1, %p2;"
    before += "or.pred %p5, %p3, %p4; not.pred %p6, %p5; mov.pred %p7, %p6;"
    for predicate, lanes in (("%p3", x >= 5), ("%p4", x < 5), ("%p5", x < 9), ("%p7", x >= 9)):
        inside = lanes & (x < 9) if predicate == "%p3" else lanes
        result = apply("mov.b32", np.uint32, x, before=before, guard=f"@{predicate}")
        assert np.array_equal(result, np.where(inside, x, 0)), predicate
        result = apply("mov.b32", np.uint32, x, before=before, guard=f"@!{predicate}")
        assert np.array_equal(result, np.where(inside, 0, x)), predicate
    out = np.zeros(32, np.uint32)
    run(
        f"""setp.lt.u32 %p1, %r0, 7; mov.b32 %r20, 11; selp.b32 %r21, %r20, %r0, %p1;
        {lane_address(0, 4, "%d10")} st.global.b32 [%d10], %r21;""",
        [out],
    )
    assert np.array_equal(out, np.where(x < 7, 11, x))
    assert np.array_equal(y, np.arange(100, 132))


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "f32"])
def test_selections_of_any_size(kind: str) -> None:
    x, y = (np.arange(first, first + 32).astype(TYPES[kind]) for first in (1, 101))
    size, register = 8 * x.itemsize, {2: "%h", 4: "%r", 8: "%d"}[x.itemsize]
    out = np.zeros_like(x)
    lines = [f"{lane_address(i, x.itemsize, '%d10')} ld.global.b{size} {register}{20 + i}, [%d10];" for i in range(2)]
    lines += [f"setp.gt.u32 %p1, %r0, 4; selp.{kind} {register}22, {register}20, {register}21, %p1;"]
    run(
        "\n".join([*lines, lane_address(2, x.itemsize, "%d10"), f"st.global.b{size} [%d10], {register}22;"]),
        [x, y, out],
    )
    assert np.array_equal(out, np.where(np.arange(32) > 4, x, y))


def test_signs_of_floats_are_bits() -> None:
    assert np.array_equal(apply("neg.f32", np.uint32, FLOATS), FLOATS.view(np.uint32) ^ 0x80000000)
    assert np.array_equal(apply("abs.f32", np.uint32, FLOATS), FLOATS.view(np.uint32) & 0x7FFFFFFF)


def test_halves_and_registers_wider_than_their_type() -> None:
    x = np.arange(0xABCD0000, 0xABCD0020, dtype=np.uint64).astype(np.uint32)
    out, long = np.zeros(32, np.uint32), np.zeros(32, np.int64)
    run(
        f"""{lane_address(0, 4, "%d10")} ld.global.b32 %r20, [%d10];
        mov.b32 {{%h1, %h2}}, %r20; mov.b32 %r21, {{%h2, %h1}}; mov.b32 {{_, %h3}}, %r21;
        mov.b64 %d20, {{%r20, %r21}}; mov.b64 {{%r22, %r23}}, %d20; sub.s32 %r24, %r23, %r21; cvt.u32.u16 %r25, %h3;
        add.s32 %r26, %r24, %r25; cvt.s64.s32 %d21, %d20;
        {lane_address(1, 4, "%d10")} st.global.b32 [%d10], %r26;
        {lane_address(2, 8, "%d10")} st.global.b64 [%d10], %d21;""",
        [x, out, long],
    )
    assert np.array_equal(out, x & 0xFFFF)
    assert np.array_equal(long, x.view(np.int32).astype(np.int64))  # the low half of a wider source, with its sign


def test_an_unknown_instruction_is_named() -> None:
    text = ".version 8.0 .entry kernel(.param .u64 p) .reqntid 32 { .reg .b32 %r<4>; sad.u32 %r1, %r2, %r3, 4; ret; }"
    with pytest.raises(UnknownPtxError, match=r"sad\.u32.*sad\.u32 %r1, %r2, %r3, 4"):
        decode(text)
