// What both inner models are made of, on one mini-batch of r tokens: tiles of r rows that lie in the first cache.
//
// Names follow the mathematics: Z is an inner layer's output on the keys X, G the inner loss's gradient at it, P its
// output on the queries Q. The prefix d marks the gradient of the outer loss. Numbers in brackets are equations of
// docs/mathematics.md.

#pragma once

#include <cstdlib>
#include <new>

#include "vectors.h"

// Memory for tiles and weights, taken piece by piece and given back at once.
class Arena {
 public:
  explicit Arena(size_t numbers) : begin_(static_cast<T*>(std::aligned_alloc(64, rounded(numbers) * sizeof(T)))) {
    if (begin_ == nullptr) throw std::bad_alloc();
    next_ = begin_;
  }
  ~Arena() { std::free(begin_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  T* take(size_t numbers) {
    T* piece = next_;
    next_ += rounded(numbers);
    return piece;
  }
  static size_t rounded(size_t numbers) { return (numbers + 15) / 16 * 16; }

 private:
  T *begin_, *next_;
};

enum class From { nothing, matrix, bias };  // a matrix [rows, N], often C itself; one row for all

// Rows of C = FROM + A B for ROWS rows and VECTORS vectors of columns; A[i][m] = a[i * row + m * column]. The sum is formed
// first, so that what it is added to, which may be larger by far, is rounded once.
template <From FROM, int ROWS, int VECTORS, int N>
inline void block(int M, const T* a, long row, long column, const T* b, T* c, const T* from) {
  V total[ROWS][VECTORS] = {};
  for (int m = 0; m < M; ++m) {
    V b_row[VECTORS];
#pragma GCC unroll 16
    for (int n = 0; n < VECTORS; ++n) b_row[n] = in_register(load(b + m * N + n * LANES));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const T x = a[i * row + m * column];
#pragma GCC unroll 16
      for (int n = 0; n < VECTORS; ++n) total[i][n] += x * b_row[n];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
    for (int n = 0; n < VECTORS; ++n) {
      if constexpr (FROM == From::matrix) total[i][n] += load(from + i * N + n * LANES);
      if constexpr (FROM == From::bias) total[i][n] += load(from + n * LANES);
      store(c + i * N + n * LANES, total[i][n]);
    }
  }
}

template <From FROM, int ROWS, int VECTORS, int N>
inline void blocks(int rows, int M, const T* a, long row, long column, const T* b, T* c, const T* from) {
  constexpr long FROM_ROW = FROM == From::matrix ? N : 0;
  int i = 0;
  for (; i + ROWS <= rows; i += ROWS) {
    block<FROM, ROWS, VECTORS, N>(M, a + i * row, row, column, b, c + i * N, from + i * FROM_ROW);
  }
  if constexpr (ROWS > 1) {
    if (i < rows) {
      blocks<FROM, ROWS / 2, VECTORS, N>(rows - i, M, a + i * row, row, column, b, c + i * N, from + i * FROM_ROW);
    }
  }
}

// C [rows, N] = FROM + A B, A [rows, M] with any strides, B [M, N]: the sums of a block stay in registers.
template <From FROM, int N>
inline void product(int rows, int M, const T* a, long row, long column, const T* b, T* c, const T* from) {
  constexpr int WIDTH = N / LANES, MOST = REGISTERS / 8;
  constexpr int VECTORS = WIDTH % MOST == 0 ? MOST : WIDTH % 2 == 0 ? 2 : 1;
  constexpr int ROWS = REGISTERS / 2 / VECTORS > 8 ? 8 : REGISTERS / 2 / VECTORS;
  for (int n = 0; n < N; n += VECTORS * LANES) {
    blocks<FROM, ROWS, VECTORS, N>(rows, M, a, row, column, b + n, c + n, FROM == From::nothing ? c : from + n);
  }
}

// C = A B
template <int N>
inline void set_product(int rows, int M, const T* a, long row, long column, const T* b, T* c) {
  product<From::nothing, N>(rows, M, a, row, column, b, c, c);
}

// C += A B
template <int N>
inline void add_product(int rows, int M, const T* a, long row, long column, const T* b, T* c) {
  product<From::matrix, N>(rows, M, a, row, column, b, c, c);
}

template <int N>
inline V lanes_of_dot(const T* a, const T* b) {
  V total = load(a) * load(b);
  for (int n = LANES; n < N; n += LANES) total += load(a + n) * load(b + n);
  return total;
}

template <int N>
inline T dot(const T* a, const T* b) {
  return sum(lanes_of_dot<N>(a, b));
}

// Rows whose sum is formed by itself before it is added to that of the others: roundings of long sums add up.
constexpr int GROUP = 8;

// out = from + the sum of r rows of x.
template <int N>
inline void add_rows(int r, const T* x, const T* from, T* out) {
  for (int n = 0; n < N; n += LANES) {
    V total{};
    for (int begin = 0; begin < r; begin += GROUP) {
      V group{};
      for (int i = begin; i < r && i < begin + GROUP; ++i) group += load(x + i * N + n);
      total += group;
    }
    store(out + n, load(from + n) + total);
  }
}

// total[n] += scale * x[n]
template <int N>
inline void add(T* total, const T* x, T scale = 1) {
  for (int n = 0; n < N; n += LANES) store(total + n, load(total + n) + scale * load(x + n));
}

// x of r rows, without the mean over the features, at one standard deviation.
struct Normalised {
  T *x_hat, *inverse_std;

  Normalised(Arena& arena, int K) : x_hat(arena.take(K * D)), inverse_std(arena.take(K)) {}

  void set(int r, const T* z, T eps) {
    for (int i = 0; i < r; ++i) {
      V total{}, rest{}, squares{};
      for (int n = 0; n < D; n += LANES) total += load(z + i * D + n);
      const T mean = sum(total) / D;
      for (int n = 0; n < D; n += LANES) {
        const V centred = load(z + i * D + n) - mean;
        rest += centred;
        squares += centred * centred;
        store(x_hat + i * D + n, centred);
      }
      const T rounded = sum(rest) / D;  // off the mean, which may be larger than the deviations by far
      inverse_std[i] = 1 / std::sqrt(sum(squares) / D + eps);
      for (int n = 0; n < D; n += LANES) store(x_hat + i * D + n, (load(x_hat + i * D + n) - rounded) * inverse_std[i]);
    }
  }

  // o = q + γ x̂ + β
  void write_output(int r, const T* q, const T* gamma, const T* beta, T* o) const {
    for (int i = 0; i < r; ++i) {
      for (int n = 0; n < D; n += LANES) {
        const int at = i * D + n;
        store(o + at, load(q + at) + load(gamma + n) * load(x_hat + at) + load(beta + n));
      }
    }
  }

  // out = J x, (5), of row i; the Jacobian is symmetric, so this serves both directions.
  void jacobian_product(int i, const T* x, T* out) const {
    const T* own = x_hat + i * D;
    V total{};
    for (int n = 0; n < D; n += LANES) total += load(x + n);
    const T mean = sum(total) / D, along = dot<D>(x, own) / D, r = inverse_std[i];
    for (int n = 0; n < D; n += LANES) store(out + n, r * (load(x + n) - mean - along * load(own + n)));
  }
};

// G, the inner loss's gradient at Z, and the derivative of that gradient.
struct InnerGradient {
  Normalised norm;
  T *error, *y;

  InnerGradient(Arena& arena, int K) : norm(arena, K), error(arena.take(K * D)), y(arena.take(K * D)) {}

  void set(int r, const T* Z, const T* k, const T* v, const T* gamma, const T* beta, T eps) {
    norm.set(r, Z, eps);
    for (int i = 0; i < r; ++i) {
      for (int n = 0; n < D; n += LANES) {
        const int at = i * D + n;
        const V g = load(gamma + n), target = load(v + at) - load(k + at);  // by itself: both may be larger by far
        const V e = load(norm.x_hat + at) * g + load(beta + n) - target;
        store(error + at, e);
        store(y + at, e * g);
      }
    }
  }

  // G, (6).
  void value(int r, T* G) const {
    for (int i = 0; i < r; ++i) norm.jacobian_product(i, y + i * D, G + i * D);
  }

  // dZ, de and each row's dγ from dG, (21) and (22).
  void backward(int r, const T* dG, const T* G, const T* gamma, T* dZ, T* de, T* d_gamma) const {
    for (int i = 0; i < r; ++i) {
      const long at = long(i) * D;
      const T *x_hat = norm.x_hat + at, *own_y = y + at, *own_dG = dG + at;
      const T inverse = norm.inverse_std[i];
      T dy[D], dx_hat[D];
      norm.jacobian_product(i, own_dG, dy);
      const T mean_y = dot<D>(own_y, x_hat) / D, mean_dG = dot<D>(own_dG, x_hat) / D;
      for (int n = 0; n < D; n += LANES) {
        const V g = load(gamma + n), e = g * load(dy + n);
        store(de + at + n, e);
        store(dx_hat + n, g * e - inverse * (mean_y * load(own_dG + n) + mean_dG * load(own_y + n)));
        store(d_gamma + at + n, load(dy + n) * load(error + at + n) + e * load(x_hat + n));
      }
      norm.jacobian_product(i, dx_hat, dZ + at);
      add<D>(dZ + at, x_hat, -inverse * dot<D>(own_dG, G + at) / D);
    }
  }
};

// The tanh form of gelu from one sigmoid, (14), with z, v, s and w for x, w, σ and w'.
// Beyond ±10 the sigmoid has no more digits to give, and what is left of s (1 - s) must not meet the cubes of a large z.
template <bool SLOPE, bool CURVATURE>
inline void gelu(int n, const T* z, T* value, T* slope = nullptr, T* curvature = nullptr) {
  constexpr T c = 0.7978845608028654, a = 0.044715;  // sqrt(2/π) and the cubic coefficient
  for (int i = 0; i < n; i += LANES) {
    const V given = load(z + i), low = given < -10 ? all(-10) : given, x = low > 10 ? all(10) : low, square = x * x;
    const V e = exponential(-2 * c * x * (1 + a * square)), s = 1 / (1 + e);
    store(value + i, low * s);
    if constexpr (SLOPE) {
      const V w = 2 * c * (1 + 3 * a * square), p = e * s * s, q = p * w;  // 1 - s would cancel
      store(slope + i, s + x * q);
      if constexpr (CURVATURE) store(curvature + i, 4 * (q - c * p) + (1 - 2 * s) * w * x * q);
    }
  }
}

// η[i, j] = s_i lr_j for j <= i of a block of r tokens, and the gradients of both factors. A mini-batch of up to BLOCK
// tokens is one block, which its updates need no sums for.
struct Rates {
  int r, block;          // which of the mini-batch's blocks it is
  bool last_block, complete;  // whether the mini-batch has K tokens
  T last_scale;
  const T *scale, *lr;
  T *d_scale, *d_last_scale, *d_lr;

  T eta(int i, int j) const { return scale[i] * lr[j]; }
  T last(int j) const { return last_scale * lr[j]; }
  void accumulate(int i, int j, T d_eta) const {
    d_scale[i] += d_eta * lr[j];
    d_lr[j] += d_eta * scale[i];
  }
};
