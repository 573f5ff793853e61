// What surrounds the inner loop, for a few rows at a time: linear maps as nn.Linear keeps them, and norms. Widths are
// whole heads, so multiples of LANES.

#pragma once

#include "vectors.h"

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

// Y [rows, out] = X [rows, in] Wᵀ + bias, W [out, in]. Rows come innermost: what is read of W serves them all.
inline void linear(int rows, int in, int out, const T* X, const T* W, const T* bias, T* Y) {
  for (int o = 0; o < out; o += LANES) {
    for (int i = 0; i < rows; ++i) {
      V sums[LANES] = {};
      for (int n = 0; n < in; n += LANES) {
        const V x = in_register(load(X + i * in + n));
#pragma GCC unroll 16
        for (int j = 0; j < LANES; ++j) sums[j] += x * load(W + (o + j) * in + n);
      }
      const V y = row_sums(sums);
      store(Y + i * out + o, bias == nullptr ? y : y + load(bias + o));
    }
  }
}

inline T dot(int n, const T* a, const T* b) {
  V total{};
  for (int i = 0; i < n; i += LANES) total += load(a + i) * load(b + i);
  return sum(total);
}

// (x - mean) / √(var + eps) ∘ γ + β
inline void layer_norm(int n, const T* x, const T* gamma, const T* beta, T eps, T* y) {
  V total{}, squares{};
  for (int i = 0; i < n; i += LANES) total += load(x + i);
  const T mean = sum(total) / n;
  for (int i = 0; i < n; i += LANES) {
    const V centred = load(x + i) - mean;
    squares += centred * centred;
  }
  const T inverse = 1 / std::sqrt(sum(squares) / n + eps);
  for (int i = 0; i < n; i += LANES) store(y + i, (load(x + i) - mean) * inverse * load(gamma + i) + load(beta + i));
}
