// What surrounds the inner loop, for a few rows at a time: linear maps as nn.Linear keeps them, and norms. Widths are
// whole heads, so multiples of LANES.

#pragma once

#include "vectors.h"

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

// x̂ of (1) of docs/mathematics.md; returns r.
inline T standardise(int n, const T* x, T eps, T* x_hat) {
  V total{}, squares{};
  for (int i = 0; i < n; i += LANES) total += load(x + i);
  const T mean = sum(total) / n;
  for (int i = 0; i < n; i += LANES) {
    const V centred = load(x + i) - mean;
    squares += centred * centred;
  }
  const T inverse = 1 / std::sqrt(sum(squares) / n + eps);
  for (int i = 0; i < n; i += LANES) store(x_hat + i, (load(x + i) - mean) * inverse);
  return inverse;
}

// x̂ ∘ γ + β
inline void layer_norm(int n, const T* x, const T* gamma, const T* beta, T eps, T* y) {
  standardise(n, x, eps, y);
  for (int i = 0; i < n; i += LANES) store(y + i, load(y + i) * load(gamma + i) + load(beta + i));
}

// A pair of features (2i, 2i + 1) of a head is a complex number, its rotation a product with cos + i sin; with the sign -1
// it is undone.
inline void rotate(const T* cos, const T* sin, T sign, T* x) {
  for (int i = 0; i < D / 2; ++i) {
    const T even = x[2 * i], odd = x[2 * i + 1], turn = sign * sin[i];
    x[2 * i] = even * cos[i] - odd * turn;
    x[2 * i + 1] = odd * cos[i] + even * turn;
  }
}

// x / √(mean(x²) + eps) ∘ γ
inline void rms_norm(int n, const T* x, const T* gamma, T eps, T* y) {
  const T inverse = 1 / std::sqrt(dot(n, x, x) / n + eps);
  for (int i = 0; i < n; i += LANES) store(y + i, load(x + i) * inverse * load(gamma + i));
}

// A causal depthwise convolution at the newest input x, y_t = b + Σ_j w_j x_{t - (taps - 1) + j}; w [n, taps], and the
// context has the taps - 1 inputs before.
inline void convolve(int n, int taps, const T* x, const T* context, const T* weight, const T* bias, T* y) {
  for (int i = 0; i < n; ++i) {
    const T* w = weight + i * taps;
    T total = bias[i] + w[taps - 1] * x[i];
    for (int j = taps - 2; j >= 0; --j) total += w[j] * context[j * n + i];
    y[i] = total;
  }
}

// The context after x.
inline void remember(int n, int taps, const T* x, T* context) {
  if (taps < 2) return;
  std::memmove(context, context + n, (taps - 2) * n * sizeof(T));
  std::memcpy(context + (taps - 2) * n, x, n * sizeof(T));
}
