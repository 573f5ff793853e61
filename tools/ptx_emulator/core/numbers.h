// Number formats of PTX and how it rounds: what C++ leaves open or does otherwise.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

template <class To, class From> To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// PTX has one NaN as a result; processors keep the operand's.
inline float canonical(float x) { return x == x ? x : bits<float>(0x7FFFFFFFu); }
// A number below the smallest normal one becomes a zero of its sign.
inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

struct bf16 { u16 raw; };
struct f16 { u16 raw; };
struct f32x2 { float lo, hi; };
struct half2 { u16 lo, hi; };

inline float wide(float x) { return x; }
inline float wide(bf16 x) { return bits<float>(u32(x.raw) << 16); }
inline float wide(f16 x) {
    const u32 sign = u32(x.raw & 0x8000) << 16, exponent = x.raw >> 10 & 31, fraction = x.raw & 1023;
    if (exponent == 0) return std::copysign(std::ldexp(float(fraction), -24), bits<float>(sign));
    return bits<float>(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}

// To the nearest, ties to even.
inline bf16 to_bf16(float x) {
    const u32 raw = bits<u32>(x);
    return x == x ? bf16{u16((raw + 0x7FFF + (raw >> 16 & 1)) >> 16)} : bf16{0x7FFF};
}
inline f16 to_f16(float x) {
    const u32 raw = bits<u32>(x), sign = raw >> 16 & 0x8000, size = raw & 0x7FFFFFFF;
    if (x != x) return {0x7FFF};
    if (size >= 0x47800000) return {u16(sign | 0x7C00)};  // 65536 and more
    if (size < 0x38800000)                                // below 2^-14: multiples of 2^-24, as they come
        return {u16(sign | u32(std::nearbyint(std::ldexp(std::fabs(x), 24))))};
    return {u16(sign | (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13)};
}
// To the nearest number with ten bits behind the point, ties away from zero.
inline u32 to_tf32(float x) {
    return x == x ? (bits<u32>(x) + (std::isinf(x) ? 0 : 0x1000)) & 0xFFFFE000u : 0x7FFFFFFFu;
}
// What a matrix product makes of an operand of that kind.
inline float from_tf32(u32 raw) { return bits<float>(raw & 0xFFFFE000u); }

// Tensor cores cut sums off towards zero.
inline float towards_zero(double x) {
    const float y = float(x);
    return std::fabs(double(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : canonical(y);
}

// One number and a NaN: the number. -0 is less than +0.
inline float least(float x, float y) {
    if (x != x || y != y) return canonical(x == x ? x : y);
    return x == y ? bits<float>(bits<u32>(x) | bits<u32>(y)) : x < y ? x : y;
}
inline float greatest(float x, float y) {
    if (x != x || y != y) return canonical(x == x ? x : y);
    return x == y ? bits<float>(bits<u32>(x) & bits<u32>(y)) : x > y ? x : y;
}

// a times the reciprocal of b, which is zero beyond 2^126.
inline float approximate_quotient(float a, float b) {
    const float size = std::fabs(b);
    if (size > 0x1p126f && !std::isinf(b)) return std::isinf(a) ? canonical(NAN) : a * std::copysign(0.0f, b);
    return a / b;
}

template <class T> T quotient(T x, T y) {
    if (y == 0) return T(-1);
    if (std::is_signed_v<T> && y == T(-1)) return T(0 - std::make_unsigned_t<T>(x));
    return x / y;
}
template <class T> T remainder_of(T x, T y) {
    if (y == 0) return x;
    return std::is_signed_v<T> && y == T(-1) ? T(0) : T(x % y);
}

template <class T> T shifted_left(T x, u32 n) { return n < sizeof(T) * 8 ? T(x << n) : T(0); }
template <class T> T shifted_right(T x, u32 n) {
    constexpr u32 last = sizeof(T) * 8 - 1;
    return std::is_signed_v<T> ? T(x >> std::min(n, last)) : n > last ? T(0) : T(x >> n);
}

// `length` bits of x from `first` on; beyond its end, and of a signed one beyond the length, the sign.
inline u32 field(u32 x, u32 first, u32 length, bool is_signed) {
    first &= 255, length &= 255;
    const bool sign = is_signed && length && x >> std::min(first + length - 1, 31u) & 1;
    u32 result = 0;
    for (u32 i = 0; i < 32; ++i) result |= u32(i < length && first + i < 32 ? x >> (first + i) & 1 : sign) << i;
    return result;
}

// Four bytes of the eight of y and x, each chosen by four bits; the highest of these asks for its sign only.
inline u32 permuted(u32 x, u32 y, u32 selector) {
    const u64 bytes = u64(y) << 32 | x;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 choice = selector >> 4 * i & 15, byte = bytes >> 8 * (choice & 7) & 255;
        result |= (choice & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}
