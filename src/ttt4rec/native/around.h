// What surrounds the inner loop in a whole layer, forwards and back. Between the products with weights, each number is read
// and written once, sequence by sequence. Numbers in brackets are equations of docs/mathematics.md.

#pragma once

#include <algorithm>

#include "dense.h"
#include "tiles.h"

// Tokens are [total, C], rates and decays [total, H]. Views [total, width] begin with one product: query, key, value, or
// with the Mamba backbone query, value, gate; their gradients end with those of the rates' z and, if gates of what is
// forgotten read the input, of the gates'. Without convolutions q and k are parts of the views, turned where they lie. What
// sequences add to a parameter's gradient is summed by each alone.
struct Surroundings {
  int64_t H, K, taps, width, stride;  // taps: of the convolutions, 0 without; stride: between tokens of q, k and their gradients
  const int64_t *starts, *lengths;  // of each sequence
  double norm_eps, most_rate;       // a rate is most_rate σ(z)
  const T *cos, *sin, *lr_weight, *lr_bias, *norm_weight, *norm_bias;
  const T *query_conv, *query_bias, *key_conv, *key_bias;  // [C, taps], [C]
  const T *forget_bias, *forget_weight;                    // [H], [H, C]; null where nothing is forgotten, or by no input
  const T* x;
  T* views;
  T *q, *k, *lr, *log_decay;
  const T* o;
  T* h;
  // backward
  const T *d_lr, *d_log_decay;
  T *d_o, *dq, *dk, *d_views;  // d_o comes as dh
  T *d_norm_weight, *d_norm_bias, *d_lr_bias, *d_forget_bias;  // [N, C], [N, C], [N, H], [N, H]
  T *d_query_conv, *d_query_bias, *d_key_conv, *d_key_bias;    // [N, taps, C], [N, C]
};

constexpr int GROUPED = 16;  // tokens whose sum is formed by itself before it is added to that of the others

class Around {
 public:
  explicit Around(const Surroundings& call)
      : call_(call), C_(call.H * D), arena_(numbers(call)), query_taps_(arena_.take(call.taps * C_)),
        key_taps_(arena_.take(call.taps * C_)), value_(arena_.take(C_)), slope_(arena_.take(C_)), x_hat_(arena_.take(C_)) {
    for (T** sums : {&first_, &second_, &third_, &fourth_}) *sums = arena_.take((call.taps + 1) * C_);
    for (int c = 0; c < C_ && call.query_conv != nullptr; ++c) {  // behind the inner loop they are not wanted
      for (int j = 0; j < call.taps; ++j) {
        query_taps_[j * C_ + c] = call.query_conv[c * call.taps + j];
        key_taps_[j * C_ + c] = call.key_conv[c * call.taps + j];
      }
    }
  }

  // q and k: convolutions (33) and rotations.
  TTT_ONCE void before(int64_t n) const {
    for (int64_t i = 0; i < call_.lengths[n]; ++i) {
      const int64_t t = call_.starts[n] + i;
      T *q = call_.q + t * call_.stride, *k = call_.k + t * call_.stride;
      if (call_.taps > 0) {
        convolve(i, t, query_taps_, call_.query_bias, q);
        convolve(i, t, key_taps_, call_.key_bias, k);
      }
      turn(i, 1, q);
      turn(i, 1, k);
    }
  }

  // Rates (31), and ln a of (42).
  void rates(int64_t n) const {
    for (int64_t t = call_.starts[n]; t < call_.starts[n] + call_.lengths[n]; ++t) {
      for (int h = 0; h < call_.H; ++h) {
        const T z = logit(t, h, call_.lr_weight, call_.lr_bias);
        call_.lr[t * call_.H + h] = T(call_.most_rate) / (1 + std::exp(-z));
        if (call_.forget_bias == nullptr) continue;
        const T f = logit(t, h, call_.forget_weight, call_.forget_bias);
        call_.log_decay[t * call_.H + h] = -(std::log1p(std::exp(-std::abs(f))) + (f < 0 ? 0 : f));
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
    for (T* sum : {gamma_sum, beta_sum}) std::fill_n(sum, C_, T(0));
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
    T *rates = call_.d_lr_bias + n * call_.H, *gates = call_.d_forget_bias;
    std::fill_n(rates, call_.H, T(0));
    if (gates != nullptr) std::fill_n(gates += n * call_.H, call_.H, T(0));
    for (int64_t begin = 0; begin < length; begin += GROUPED) {
      for (T* sums : {first_, second_}) std::fill_n(sums, call_.H, T(0));
      for (int64_t i = begin; i < length && i < begin + GROUPED; ++i) back_before_token(i, start + i, first_, second_);
      for (int h = 0; h < call_.H; ++h) rates[h] += first_[h];
      for (int h = 0; gates != nullptr && h < call_.H; ++h) gates[h] += second_[h];
    }
    if (call_.taps > 0) back_convolutions(n);
  }

 private:
  const Surroundings& call_;
  const int C_;
  Arena arena_;
  T *query_taps_, *key_taps_, *value_, *slope_, *x_hat_, *first_, *second_, *third_, *fourth_;

  static size_t numbers(const Surroundings& call) {
    const int C = call.H * D;
    return 2 * Arena::rounded(call.taps * C) + 3 * Arena::rounded(C) + 4 * Arena::rounded((call.taps + 1) * C);
  }

  const T* gate(int64_t t) const { return call_.views + t * call_.width + 2 * C_; }

  // Rotates all heads of a sequence's i-th token, or turns them back.
  TTT_ONCE void turn(int64_t i, T sign, T* x) const {
    const int64_t place = i % call_.K * (D / 2);
    for (int at = 0; at < C_; at += D) rotate(call_.cos + place, call_.sin + place, sign, x + at);
  }

  // Of a token and head; without a weight the input is not read.
  T logit(int64_t t, int h, const T* weight, const T* bias) const {
    return weight == nullptr ? bias[h] : dot(C_, call_.x + t * C_, weight + h * C_) + bias[h];
  }

  void back_before_token(int64_t i, int64_t t, T* d_bias, T* d_gate_bias) const {
    T* dz = call_.d_views + t * call_.width + 3 * C_;
    for (int h = 0; h < call_.H; ++h) {
      const int64_t at = t * call_.H + h;
      const T lr = call_.lr[at];
      dz[h] = call_.most_rate == 0 ? 0 : call_.d_lr[at] * lr * (1 - lr / T(call_.most_rate));
      d_bias[h] += dz[h];
      if (call_.forget_bias == nullptr) continue;
      const T df = call_.d_log_decay[at] * std::expm1(call_.log_decay[at]);
      d_gate_bias[h] += df;
      if (call_.forget_weight != nullptr) dz[call_.H + h] = df;
    }
    turn(i, -1, call_.dq + t * call_.stride);
    turn(i, -1, call_.dk + t * call_.stride);
  }

  // From dq and dk, turned back already.
  void back_convolutions(int64_t n) const {
    const int64_t start = call_.starts[n], length = call_.lengths[n], taps = call_.taps * C_;
    for (T* sum : {call_.d_query_conv, call_.d_key_conv}) std::fill_n(sum + n * taps, taps, T(0));
    for (T* sum : {call_.d_query_bias, call_.d_key_bias}) std::fill_n(sum + n * C_, C_, T(0));
    for (int64_t i = 0; i < length; ++i) {
      T* d = call_.d_views + (start + i) * call_.width;
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
        total += load(taps + j * C_ + c) * load(call_.views + (t - back + j) * call_.width + c);
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
        store(sum, load(sum) + d * load(call_.views + (t - back + j) * call_.width + c));
      }
    }
  }

  void back_after_token(int64_t t, T* d_gamma, T* d_beta) const {
    const int64_t at = t * C_;
    const T *o = call_.o + at, *gamma = call_.norm_weight, *beta = call_.norm_bias;
    T *h = call_.h + at, *d_o = call_.d_o + at;
    const T inverse = standardise(C_, o, call_.norm_eps, x_hat_);
    if (call_.taps > 0) gelu<true, false>(C_, gate(t), value_, slope_);
    T* d_gate = call_.taps > 0 ? call_.d_views + t * call_.width + 2 * C_ : nullptr;
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
