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

// Numbers from one row of a product's tiles to the next. A[i][m] = a[i * row + m * column].
struct Strides {
  long row, column, b, c, from;
};
template <long B, long C, long FROM>
struct FixedStrides {  // of what the compiler knows the width
  long row, column;
  static constexpr long b = B, c = C, from = FROM;
};

// Rows of C = FROM + A B for ROWS rows and VECTORS vectors of columns. The sum is formed first, so that what it is added
// to, which may be larger by far, is rounded once.
template <From FROM, int ROWS, int VECTORS, class S, class Source>
inline void block(int M, const T* a, const T* b, T* c, Source from, S s) {
  V total[ROWS][VECTORS] = {};
  for (int m = 0; m < M; ++m) {
    V b_row[VECTORS];
#pragma GCC unroll 16
    for (int n = 0; n < VECTORS; ++n) b_row[n] = in_register(load(b + m * s.b + n * LANES));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const T x = a[i * s.row + m * s.column];
#pragma GCC unroll 16
      for (int n = 0; n < VECTORS; ++n) total[i][n] += x * b_row[n];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
    for (int n = 0; n < VECTORS; ++n) {
      if constexpr (FROM == From::matrix) total[i][n] += load(from + i * s.from + n * LANES);
      if constexpr (FROM == From::bias) total[i][n] += load(from + n * LANES);
      store(c + i * s.c + n * LANES, total[i][n]);
    }
  }
}

template <From FROM, int ROWS, int VECTORS, class S, class Source>
inline void blocks(int rows, int M, const T* a, const T* b, T* c, Source from, S s) {
  int i = 0;
  for (; i + ROWS <= rows; i += ROWS) {
    block<FROM, ROWS, VECTORS>(M, a + i * s.row, b, c + i * s.c, from + i * s.from, s);
  }
  if constexpr (ROWS > 1) {
    if (i < rows) {
      blocks<FROM, ROWS / 2, VECTORS>(rows - i, M, a + i * s.row, b, c + i * s.c, from + i * s.from, s);
    }
  }
}

constexpr int MOST_VECTORS = REGISTERS / 8;  // of columns that a block has
constexpr int rows_of_block(int vectors) { return REGISTERS / 2 / vectors > 8 ? 8 : REGISTERS / 2 / vectors; }

// C [rows, N] = FROM + A B, A [rows, M] with any strides, B [M, N]: the sums of a block stay in registers.
template <From FROM, int N, class Source>
inline void product(int rows, int M, const T* a, long row, long column, const T* b, T* c, Source from) {
  constexpr int WIDTH = N / LANES, VECTORS = WIDTH % MOST_VECTORS == 0 ? MOST_VECTORS : WIDTH % 2 == 0 ? 2 : 1;
  const FixedStrides<N, N, FROM == From::matrix ? N : 0> strides{row, column};
  for (int n = 0; n < N; n += VECTORS * LANES) {
    blocks<FROM, rows_of_block(VECTORS), VECTORS>(rows, M, a, b + n, c + n, from + n, strides);
  }
}

// The same of any number N of columns, a multiple of LANES; what comes from a matrix is C itself.
template <From FROM, int VECTORS = MOST_VECTORS>
inline void wide_product(int rows, int N, int M, const T* a, const T* b, T* c, Strides s) {
  int n = 0;
  for (; n + VECTORS * LANES <= N; n += VECTORS * LANES) {
    blocks<FROM, rows_of_block(VECTORS), VECTORS>(rows, M, a, b + n, c + n, c + n, s);
  }
  if constexpr (VECTORS > 1) {
    if (n < N) wide_product<FROM, VECTORS / 2>(rows, N - n, M, a, b + n, c + n, s);
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

// out[i] = the sum across part(i), for `count` of them; `out` has room for whole vectors. Many at a time cost a fraction.
template <class Part>
inline void sums(int count, const Part& part, T* out) {
  if (count < LANES / 4) {
    for (int i = 0; i < count; ++i) out[i] = sum(part(i));
    return;
  }
  for (int i = 0; i < count; i += LANES) {
    V rows[LANES];
#pragma GCC unroll 16
    for (int n = 0; n < LANES; ++n) rows[n] = i + n < count ? part(i + n) : V{};
    store(out + i, row_sums(rows));
  }
}

// A matrix of tokens by tokens of a mini-batch of K has rows so long that a vector has a whole number of them, or they of it.
inline int row_of_tokens(int K) {
  int row = 1;
  while (row < K && row < LANES) row *= 2;
  return (K + row - 1) / row * row;
}
inline size_t tokens_by_tokens(int K) { return Arena::rounded(K * row_of_tokens(K)); }

// out[i, j] = a_i · b_j for j <= i, else 0, of r rows.
template <int N>
TTT_ONCE void dots(int r, int row, const T* a, const T* b, T* out) {
  int i = 0, j = 0;
  for (int at = 0; at < r * row; at += LANES) {
    V products[LANES];
#pragma GCC unroll 16
    for (int n = 0; n < LANES; ++n) {
      products[n] = i < r && j <= i ? lanes_of_dot<N>(a + i * N, b + j * N) : V{};
      if (++j == row) j = 0, ++i;
    }
    store(out + at, row_sums(products));
  }
}

template <int N>
inline T dot(const T* a, const T* b) {
  return sum(lanes_of_dot<N>(a, b));
}

// Rows whose sum is formed by itself before it is added to that of the others: roundings of long sums add up.
constexpr int GROUP = 8;

// out = from + the sum of r rows of x.
template <int N, class Source>
inline void add_rows(int r, const T* x, Source from, T* out) {
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

  static size_t numbers(int K) { return Arena::rounded(K * D) + Arena::rounded(K) + Arena::rounded(2 * K + LANES); }

  Normalised(Arena& arena, int K)
      : x_hat(arena.take(K * D)), inverse_std(arena.take(K)), sums_(arena.take(2 * K + LANES)) {}

  void set(int r, const T* z, T eps) {
    sums(r, [&](int i) { return features(z + i * D); }, sums_);
    for (int i = 0; i < r; ++i) {
      const T mean = sums_[i] / D;
      for (int n = i * D; n < (i + 1) * D; n += LANES) store(x_hat + n, load(z + n) - mean);
    }
    // The mean of what is left was rounded off the mean, which may be larger than the deviations by far.
    sums(2 * r, [&](int i) { return i < r ? features(x_hat + i * D) : squares(x_hat + (i - r) * D); }, sums_);
    for (int i = 0; i < r; i += LANES) {
      T inverse[LANES];
      store(inverse, load(sums_ + r + i) / D + eps);
      for (int n = 0; n < LANES; ++n) inverse[n] = 1 / std::sqrt(inverse[n]);
      for (int n = 0; n < LANES && i + n < r; ++n) inverse_std[i + n] = inverse[n];
    }
    for (int i = 0; i < r; ++i) {
      const T rounded = sums_[i] / D, inverse = inverse_std[i];
      for (int n = i * D; n < (i + 1) * D; n += LANES) store(x_hat + n, (load(x_hat + n) - rounded) * inverse);
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

  // out = J x, (5), of every row, out being another tile; the Jacobian is symmetric, so this serves both directions.
  void jacobian_products(int r, const T* x, T* out) const {
    sums(2 * r, [&](int i) { return i < r ? features(x + i * D) : along(x, i - r); }, sums_);
    for (int i = 0; i < r; ++i) jacobian_product(i, x + i * D, sums_[i] / D, sums_[r + i] / D, out + i * D);
  }

  // Of row i, whose mean and whose mean along x̂ are known.
  void jacobian_product(int i, const T* x, T mean, T slant, T* out) const {
    const T inverse = inverse_std[i];
    for (int n = 0; n < D; n += LANES) {
      store(out + n, inverse * (load(x + n) - mean - slant * load(x_hat + i * D + n)));
    }
  }

  V along(const T* x, int i) const { return lanes_of_dot<D>(x + i * D, x_hat + i * D); }

  static V features(const T* x) {
    V total = load(x);
    for (int n = LANES; n < D; n += LANES) total += load(x + n);
    return total;
  }

 private:
  T* sums_;

  static V squares(const T* x) { return lanes_of_dot<D>(x, x); }
};

// G, the inner loss's gradient at Z, and the derivative of that gradient.
struct InnerGradient {
  Normalised norm;
  T *error, *y;

  static size_t numbers(int K) {
    return Normalised::numbers(K) + 3 * Arena::rounded(K * D) + Arena::rounded(4 * K + LANES);
  }

  InnerGradient(Arena& arena, int K)
      : norm(arena, K), error(arena.take(K * D)), y(arena.take(K * D)), dx_hat_(arena.take(K * D)),
        sums_(arena.take(4 * K + LANES)) {}

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
  void value(int r, T* G) const { norm.jacobian_products(r, y, G); }

  // dZ, de and each row's dγ from dG, (21) and (22).
  void backward(int r, const T* dG, const T* G, const T* gamma, T* dZ, T* de, T* d_gamma) const {
    const auto part = [&](int i) {
      const int at = i % r;
      if (i < r) return Normalised::features(dG + at * D);
      if (i < 2 * r) return norm.along(dG, at);
      return i < 3 * r ? norm.along(y, at) : lanes_of_dot<D>(dG + at * D, G + at * D);
    };
    sums(4 * r, part, sums_);
    for (int i = 0; i < r; ++i) {
      const long at = long(i) * D;
      const T *x_hat = norm.x_hat + at, *own_y = y + at, *own_dG = dG + at;
      const T inverse = norm.inverse_std[i], mean_dG = sums_[r + i] / D, mean_y = sums_[2 * r + i] / D;
      T dy[D];
      norm.jacobian_product(i, own_dG, sums_[i] / D, mean_dG, dy);
      for (int n = 0; n < D; n += LANES) {
        const V g = load(gamma + n), e = g * load(dy + n);
        store(de + at + n, e);
        store(dx_hat_ + at + n, g * e - inverse * (mean_y * load(own_dG + n) + mean_dG * load(own_y + n)));
        store(d_gamma + at + n, load(dy + n) * load(error + at + n) + e * load(x_hat + n));
      }
    }
    norm.jacobian_products(r, dx_hat_, dZ);
    for (int i = 0; i < r; ++i) add<D>(dZ + i * D, norm.x_hat + i * D, -norm.inverse_std[i] * sums_[3 * r + i] / D);
  }

 private:
  T *dx_hat_, *sums_;
};

// The tanh form of gelu from one sigmoid, (14), with z, v, s and w for x, w, σ and w'.
// Beyond ±10 the sigmoid has no more digits to give, and what is left of s (1 - s) must not meet the cubes of a large z.
template <bool SLOPE, bool CURVATURE>
TTT_ONCE void gelu(int n, const T* z, T* value, T* slope = nullptr, T* curvature = nullptr) {
  constexpr T c = 0.7978845608028654, a = 0.044715;  // sqrt(2/π) and the cubic coefficient
  for (int i = 0; i < n; i += LANES) {
    const V given = load(z + i), x = clamped(given, -10, 10), square = x * x;
    const V e = exponential_within(-2 * c * x * (1 + a * square)), s = reciprocal(1 + e);
    store(value + i, (given < -10 ? x : given) * s);
    if constexpr (SLOPE) {
      const V w = 2 * c * (1 + 3 * a * square), p = e * s * s, q = p * w;  // 1 - s would cancel
      store(slope + i, s + x * q);
      if constexpr (CURVATURE) store(curvature + i, 4 * (q - c * p) + (1 - 2 * s) * w * x * q);
    }
  }
}
