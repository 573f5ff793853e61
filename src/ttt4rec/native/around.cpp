// What surrounds the inner loop in a whole layer, forwards and back: what whole_layer.py calls. Between the products with
// weights, each number is read and written once, sequence by sequence. Numbers in brackets are equations of
// docs/mathematics.md.

#include <algorithm>

#include "dense.h"
#include "tiles.h"

namespace {

// Tokens are [total, C], rates [total, H]. Views [total, 3C + H] begin with one product: query, key, value, or with the Mamba
// backbone query, value, gate; their gradients end with those of the rates' z. Without convolutions q and k are parts of
// the views, turned where they lie. What sequences add to a parameter's gradient is summed by each alone.
struct AroundCall {  // as whole_layer.py's
  int64_t H, K, taps, stride;  // taps: of the convolutions, 0 without; stride: between tokens of q, k and their gradients
  const int64_t *starts, *lengths;  // of each sequence
  double norm_eps, most_rate;       // a rate is most_rate σ(z)
  const T *cos, *sin, *lr_weight, *lr_bias, *norm_weight, *norm_bias;
  const T *query_conv, *query_bias, *key_conv, *key_bias;  // [C, taps], [C]
  const T* x;
  T* views;
  T *q, *k, *lr;
  const T* o;
  T* h;
  // backward
  const T* d_lr;
  T *d_o, *dq, *dk, *d_views;  // d_o comes as dh
  T *d_norm_weight, *d_norm_bias, *d_lr_bias;                // [N, C], [N, C], [N, H]
  T *d_query_conv, *d_query_bias, *d_key_conv, *d_key_bias;  // [N, taps, C], [N, C]
};

constexpr int GROUPED = 16;  // tokens whose sum is formed by itself before it is added to that of the others

class Around {
 public:
  explicit Around(const AroundCall& call)
      : call_(call), C_(call.H * D), W_(3 * C_ + call.H), arena_(numbers(call)), query_taps_(arena_.take(call.taps * C_)),
        key_taps_(arena_.take(call.taps * C_)), value_(arena_.take(C_)), slope_(arena_.take(C_)), x_hat_(arena_.take(C_)) {
    for (T** sums : {&first_, &second_, &third_, &fourth_}) *sums = arena_.take((call.taps + 1) * C_);
    for (int c = 0; c < C_; ++c) {
      for (int j = 0; j < call.taps; ++j) {
        query_taps_[j * C_ + c] = call.query_conv[c * call.taps + j];
        key_taps_[j * C_ + c] = call.key_conv[c * call.taps + j];
      }
    }
  }

  // q, k and lr: convolutions (33), rotations and rates (31).
  void before(int64_t n) const {
    for (int64_t i = 0; i < call_.lengths[n]; ++i) {
      const int64_t t = call_.starts[n] + i;
      T *q = call_.q + t * call_.stride, *k = call_.k + t * call_.stride;
      if (call_.taps > 0) {
        convolve(i, t, query_taps_, call_.query_bias, q);
        convolve(i, t, key_taps_, call_.key_bias, k);
      }
      turn(i, 1, q);
      turn(i, 1, k);
      for (int h = 0; h < call_.H; ++h) {
        const T z = dot(C_, call_.x + t * C_, call_.lr_weight + h * C_) + call_.lr_bias[h];
        call_.lr[t * call_.H + h] = T(call_.most_rate) / (1 + std::exp(-z));
      }
    }
  }

  // h of (34).
  void after(int64_t n) const {
    for (int64_t t = call_.starts[n]; t < call_.starts[n] + call_.lengths[n]; ++t) {
      T* h = call_.h + t * C_;
      layer_norm(C_, call_.o + t * C_, call_.norm_weight, call_.norm_bias, call_.norm_eps, h);
      if (call_.taps == 0) continue;
      gelu<false, false>(C_, gate(t), value_);
      for (int c = 0; c < C_; c += LANES) store(h + c, load(h + c) * load(value_ + c));
    }
  }

  // h once more, and (35) but for its products.
  void back_after(int64_t n) const {
    T *gamma_sum = call_.d_norm_weight + n * C_, *beta_sum = call_.d_norm_bias + n * C_;
    const int64_t end = call_.starts[n] + call_.lengths[n];
    for (int64_t begin = call_.starts[n]; begin < end; begin += GROUPED) {
      for (T* sums : {first_, second_}) std::fill_n(sums, C_, T(0));
      for (int64_t t = begin; t < end && t < begin + GROUPED; ++t) back_after_token(t, first_, second_);
      add_all(C_, gamma_sum, first_);
      add_all(C_, beta_sum, second_);
    }
  }

  // The views' gradients, (32), but for v's and the gate's: turned back, and through the convolutions.
  void back_before(int64_t n) const {
    const int64_t start = call_.starts[n], length = call_.lengths[n];
    for (int64_t begin = 0; begin < length; begin += GROUPED) {
      std::fill_n(first_, call_.H, T(0));
      for (int64_t i = begin; i < length && i < begin + GROUPED; ++i) back_before_token(i, start + i, first_);
      for (int h = 0; h < call_.H; ++h) call_.d_lr_bias[n * call_.H + h] += first_[h];
    }
    if (call_.taps > 0) back_convolutions(n);
  }

 private:
  const AroundCall& call_;
  const int C_, W_;
  Arena arena_;
  T *query_taps_, *key_taps_, *value_, *slope_, *x_hat_, *first_, *second_, *third_, *fourth_;

  static size_t numbers(const AroundCall& call) {
    const int C = call.H * D;
    return 2 * Arena::rounded(call.taps * C) + 3 * Arena::rounded(C) + 4 * Arena::rounded((call.taps + 1) * C);
  }

  const T* gate(int64_t t) const { return call_.views + t * W_ + 2 * C_; }

  // Rotates all heads of a sequence's i-th token, or turns them back.
  void turn(int64_t i, T sign, T* x) const {
    const int64_t place = i % call_.K * (D / 2);
    for (int at = 0; at < C_; at += D) rotate(call_.cos + place, call_.sin + place, sign, x + at);
  }

  void back_before_token(int64_t i, int64_t t, T* d_bias) const {
    T* dz = call_.d_views + t * W_ + 3 * C_;
    for (int h = 0; h < call_.H; ++h) {
      const T lr = call_.lr[t * call_.H + h];
      dz[h] = call_.most_rate == 0 ? 0 : call_.d_lr[t * call_.H + h] * lr * (1 - lr / T(call_.most_rate));
      d_bias[h] += dz[h];
    }
    turn(i, -1, call_.dq + t * call_.stride);
    turn(i, -1, call_.dk + t * call_.stride);
  }

  // From dq and dk, turned back already.
  void back_convolutions(int64_t n) const {
    const int64_t start = call_.starts[n], length = call_.lengths[n], taps = call_.taps * C_;
    for (int64_t i = 0; i < length; ++i) {
      T* d = call_.d_views + (start + i) * W_;
      std::fill_n(d, C_, T(0));
      back_convolve(i, length, start, query_taps_, call_.dq, d);
      back_convolve(i, length, start, key_taps_, call_.dk, d);
    }
    for (int64_t begin = 0; begin < length; begin += GROUPED) {
      for (T* sums : {first_, second_, third_, fourth_}) std::fill_n(sums, taps, T(0));
      for (int64_t i = begin; i < length && i < begin + GROUPED; ++i) {
        add_taps(i, start + i, call_.dq, first_, second_);
        add_taps(i, start + i, call_.dk, third_, fourth_);
      }
      add_all(taps, call_.d_query_conv + n * taps, first_);
      add_all(C_, call_.d_query_bias + n * C_, second_);
      add_all(taps, call_.d_key_conv + n * taps, third_);
      add_all(C_, call_.d_key_bias + n * C_, fourth_);
    }
  }

  // Of a sequence's i-th token, t of all; before the first there are zeros.
  void convolve(int64_t i, int64_t t, const T* taps, const T* bias, T* y) const {
    const int64_t back = call_.taps - 1;
    for (int c = 0; c < C_; c += LANES) {
      V total = load(bias + c);
      for (int64_t j = std::max<int64_t>(back - i, 0); j <= back; ++j) {
        total += load(taps + j * C_ + c) * load(call_.views + (t - back + j) * W_ + c);
      }
      store(y + c, total);
    }
  }

  void back_convolve(int64_t i, int64_t length, int64_t start, const T* taps, const T* dy, T* d) const {
    const int64_t back = call_.taps - 1;
    for (int c = 0; c < C_; c += LANES) {
      V total{};
      for (int64_t j = back; j >= 0 && i + back - j < length; --j) {
        total += load(taps + j * C_ + c) * load(dy + (start + i + back - j) * C_ + c);
      }
      store(d + c, load(d + c) + total);
    }
  }

  void add_taps(int64_t i, int64_t t, const T* dy, T* d_taps, T* d_bias) const {
    const int64_t back = call_.taps - 1;
    for (int c = 0; c < C_; c += LANES) {
      const V d = load(dy + t * C_ + c);
      store(d_bias + c, load(d_bias + c) + d);
      for (int64_t j = std::max<int64_t>(back - i, 0); j <= back; ++j) {
        T* sum = d_taps + j * C_ + c;
        store(sum, load(sum) + d * load(call_.views + (t - back + j) * W_ + c));
      }
    }
  }

  void back_after_token(int64_t t, T* d_gamma, T* d_beta) const {
    const int64_t at = t * C_;
    const T *o = call_.o + at, *gamma = call_.norm_weight, *beta = call_.norm_bias;
    T *h = call_.h + at, *d_o = call_.d_o + at;
    const T inverse = standardise(C_, o, call_.norm_eps, x_hat_);
    if (call_.taps > 0) gelu<true, false>(C_, gate(t), value_, slope_);
    T* d_gate = call_.taps > 0 ? call_.d_views + t * W_ + 2 * C_ : nullptr;
    V total{}, along{};
    for (int c = 0; c < C_; c += LANES) {
      const V x_hat = load(x_hat_ + c), normed = load(gamma + c) * x_hat + load(beta + c);
      V dn = load(d_o + c);
      if (call_.taps > 0) {
        store(d_gate + c, dn * normed * load(slope_ + c));
        store(h + c, normed * load(value_ + c));
        dn *= load(value_ + c);
      } else {
        store(h + c, normed);
      }
      store(d_gamma + c, load(d_gamma + c) + dn * x_hat);
      store(d_beta + c, load(d_beta + c) + dn);
      const V dx_hat = load(gamma + c) * dn;
      total += dx_hat;
      along += dx_hat * x_hat;
      store(d_o + c, dx_hat);
    }
    const T mean = sum(total) / C_, slant = sum(along) / C_;
    for (int c = 0; c < C_; c += LANES) {
      store(d_o + c, inverse * (load(d_o + c) - mean - slant * load(x_hat_ + c)));
    }
  }

  static void add_all(int n, T* total, const T* x) {
    for (int c = 0; c < n; c += LANES) store(total + c, load(total + c) + load(x + c));
  }
};

// C [rows, N] = A B, N a multiple of LANES; A[i][m] = a[i * row + m * column]. GROUP_OF_ROWS rows are a part of the work.
// Of a long sum, some terms at a time are summed before they are added to the others.
struct ProductCall {
  int64_t rows, M, N, row, column, b_stride, c_stride;
  const T *a, *b;
  T* c;
};
constexpr int GROUP_OF_ROWS = 16, SUMMED = 256;

void multiply(const ProductCall& call, int64_t begin, int64_t end) {
  const Strides strides{call.row, call.column, call.b_stride, call.c_stride, call.c_stride};
  for (int64_t m = 0; m < call.M; m += SUMMED) {
    const T *a = call.a + begin * call.row + m * call.column, *b = call.b + m * call.b_stride;
    const int terms = std::min<int64_t>(SUMMED, call.M - m);
    T* c = call.c + begin * call.c_stride;
    if (m == 0) {
      wide_product<From::nothing>(end - begin, call.N, terms, a, b, c, strides);
    } else {
      wide_product<From::matrix>(end - begin, call.N, terms, a, b, c, strides);
    }
  }
}

template <void (Around::*PART)(int64_t) const>
int for_all(const AroundCall* call, int64_t begin, int64_t end) try {
  const Around around(*call);
  for (int64_t n = begin; n < end; ++n) (around.*PART)(n);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // namespace

// For whole_layer.py, to be compared with its own.
TTT_EXPORT int64_t ttt_around_call_size() { return sizeof(AroundCall); }
TTT_EXPORT int64_t ttt_product_call_size() { return sizeof(ProductCall); }

// Sequences begin to end - 1 of N. Each returns 1 if there is no memory.
TTT_EXPORT int ttt_before(const AroundCall* call, int64_t begin, int64_t end) {
  return for_all<&Around::before>(call, begin, end);
}

TTT_EXPORT int ttt_after(const AroundCall* call, int64_t begin, int64_t end) {
  return for_all<&Around::after>(call, begin, end);
}

TTT_EXPORT int ttt_back_after(const AroundCall* call, int64_t begin, int64_t end) {
  return for_all<&Around::back_after>(call, begin, end);
}

TTT_EXPORT int ttt_back_before(const AroundCall* call, int64_t begin, int64_t end) {
  return for_all<&Around::back_before>(call, begin, end);
}

// Groups of rows begin to end - 1. Returns 0.
TTT_EXPORT int ttt_product(const ProductCall* call, int64_t begin, int64_t end) {
  multiply(*call, begin * GROUP_OF_ROWS, std::min(end * GROUP_OF_ROWS, call->rows));
  return 0;
}
