// Vectors of scalars, as the compiler's own vector types: loads, sums, exp, transposition.
//
// Everything is compiled for one head dimension, one inner model and one scalar type, which build.py defines:
// TTT_HEAD_DIM, a multiple of 8; TTT_HIDDEN, 0 for TTT-Linear; TTT_SCALAR, float or double.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define TTT_EXPORT extern "C" __attribute__((visibility("default")))

#define TTT_ONCE __attribute__((noinline))  // compiled once, not wherever it is called, which takes the compiler long

using T = TTT_SCALAR;
constexpr int D = TTT_HEAD_DIM, F = TTT_HIDDEN;

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif

// As many lanes as fit, such that a head's features, and hidden ones, are whole vectors.
constexpr int lanes(int n) { return D % n == 0 && F % n == 0 ? n : lanes(n / 2); }
constexpr int LANES = lanes(VECTOR_BYTES / sizeof(T));

typedef T V __attribute__((vector_size(LANES * sizeof(T))));
typedef T Unaligned __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

inline V load(const T* x) { return *reinterpret_cast<const Unaligned*>(x); }
inline void store(T* x, V value) { *reinterpret_cast<Unaligned*>(x) = value; }
inline V all(T x) { return x - V{}; }

// Left to itself GCC loads x again for every use, and loads, not products, set the pace.
inline V in_register(V x) {
#if defined(__AVX__)
  asm("" : "+v"(x));
#endif
  return x;
}

// x[(i + SHIFT) mod LANES] at i.
template <int SHIFT, int... I>
inline V rotated(V x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, ((I + SHIFT) % LANES)...);
}

template <int SHIFT = LANES / 2>
inline T sum(V x) {
  if constexpr (SHIFT == 0) {
    return x[0];
  } else {
    return sum<SHIFT / 2>(x + rotated<SHIFT>(x, std::make_integer_sequence<int, LANES>{}));
  }
}

// One exchange of a transposition: lanes whose index has bit STEP change places between two rows.
template <int STEP, bool UPPER, int... I>
inline V exchanged(V a, V b, std::integer_sequence<int, I...>) {
  return UPPER ? __builtin_shufflevector(a, b, ((I & STEP) ? LANES + I : I + STEP)...)
               : __builtin_shufflevector(a, b, ((I & STEP) ? LANES + I - STEP : I)...);
}

// Lane i of the result is the sum of rows[i].
template <int STEP = LANES / 2>
inline V row_sums(V* rows) {
  if constexpr (STEP == 0) {
    return rows[0];
  } else {
    constexpr auto index = std::make_integer_sequence<int, LANES>{};
#pragma GCC unroll 16
    for (int i = 0; i < STEP; ++i) {
      const V a = rows[i], b = rows[i + STEP];
      rows[i] = exchanged<STEP, false>(a, b, index) + exchanged<STEP, true>(a, b, index);
    }
    return row_sums<STEP / 2>(rows);
  }
}

template <int STEP = LANES / 2>
inline void transpose(V (&rows)[LANES]) {
  if constexpr (STEP > 0) {
    constexpr auto index = std::make_integer_sequence<int, LANES>{};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & STEP) continue;
      const V a = rows[i], b = rows[i + STEP];
      rows[i] = exchanged<STEP, false>(a, b, index);
      rows[i + STEP] = exchanged<STEP, true>(a, b, index);
    }
    transpose<STEP / 2>(rows);
  }
}

// A tile of as many rows as columns, which are so many numbers apart in x, to its transpose in out.
inline void transpose_tile(const T* x, int64_t apart, T* out, int64_t apart_in_out) {
  V rows[LANES];
#pragma GCC unroll 16
  for (int n = 0; n < LANES; ++n) rows[n] = load(x + n * apart);
  transpose(rows);
#pragma GCC unroll 16
  for (int n = 0; n < LANES; ++n) store(out + n * apart_in_out, rows[n]);
}

// out[C][R] = x[R][C] transposed.
template <int R, int C>
inline void transpose(const T* x, T* out) {
  for (int i = 0; i < R; i += LANES) {
    for (int j = 0; j < C; j += LANES) transpose_tile(x + i * C + j, C, out + j * R + i, R);
  }
}

// x where it is within limits, which NaN is.
inline V clamped(V x, T least, T most) {
#if defined(__AVX__)
  if constexpr (sizeof(T) == 4) {  // GCC would compare and choose
    asm("vminps %2, %1, %0" : "=v"(x) : "v"(all(most)), "v"(x));
    asm("vmaxps %2, %1, %0" : "=v"(x) : "v"(all(least)), "v"(x));
    return x;
  }
#endif
  x = x > most ? all(most) : x;
  return x < least ? all(least) : x;
}

// 1 / x to 2 units in the last place, of x from 1 to 2^126. A division takes as long as ten other instructions.
inline V reciprocal(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
    V guess;
    asm("vrcp14ps %1, %0" : "=v"(guess) : "v"(x));
    return guess + guess * (1 - x * guess);
  }
#endif
  return 1 / x;
}

// exp to 2 units in the last place, of x from -87.3 to 88: exp(x) = 2^n exp(r) with |r| <= ln(2)/2, exp(r) as the polynomial
// 1 + r + ... of the sixth degree that errs the least, 4e-9.
inline V exponential_within(V x) {
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < LANES; ++i) x[i] = std::exp(x[i]);
    return x;
  } else {
    const V magic = all(12582912);  // 1.5 · 2^23: adding it rounds to an integer, which the last bits then are
    const V shifted = x * T(1.44269504) + magic, n = shifted - magic;
    const V r = x - n * T(0.693359375) + n * T(2.12194440e-4);  // ln 2 in two parts
    V p = all(T(0.00138145401));
    for (T c : {T(0.00836874537), T(0.0416683908), T(0.166665204), T(0.499999934), T(1), T(1)}) p = p * r + c;
    Integers bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 127) << 23;
    V scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return p * scale;
  }
}

// Of any x; beyond those it is exp of the nearest one.
inline V exponential(V x) { return exponential_within(sizeof(T) == 8 ? clamped(x, -800, 709) : clamped(x, -87, 88)); }
