// One token more of a few streams through a whole TTT layer, in place. The mathematics is that of the operators
// projection, convolution, token_step and output.

#pragma once

#include "dense.h"
#include "step.h"

namespace {

struct LayerCall {  // as whole_step.py's
  int64_t H, K, record, taps, adapt;  // taps: of the Mamba backbone's convolutions; 0 with the Transformer's
  double eps, norm_eps, base_lr, lr_scale, max_inner_step;
  const T *cos, *sin, *token_offset;                // [K, D/2], [K]
  const T *query, *key, *value, *gate, *output;     // [C, C]; key or gate, as the backbone has it
  const T *query_conv, *query_bias, *key_conv, *key_bias;  // [C, taps], [C]
  const T *lr_weight, *lr_bias;                     // [H, C], [H]
  const T *gamma, *beta, *norm_weight, *norm_bias;  // of the inner norm [H, D], of the outer one [C]
  T *records, *conv;                                // of the pool
  int64_t* position;
  const T *forget_bias, *forget_weight;  // of what is forgotten [H], [H, C]; null: nothing, and whatever the input is
  const T* initial[4];                   // the initial weights [H, ...]
};

constexpr int TOGETHER = 16;  // streams, for which a row of weights is read once

class LayerStep {
 public:
  explicit LayerStep(const LayerCall& call)
      : call_(call), C_(call.H * D), arena_(numbers(call)), q_(arena_.take(TOGETHER * C_)),
        k_(arena_.take(TOGETHER * C_)), v_(arena_.take(TOGETHER * C_)), gate_(arena_.take(TOGETHER * C_)),
        o_(arena_.take(TOGETHER * C_)), lr_(arena_.take(TOGETHER * call.H)), scale_(arena_.take(call.K)),
        log_decay_(arena_.take(TOGETHER * call.H)),
        inner_{call.H, call.K, call.record, nullptr, offset_, call.eps, q_, k_, v_, lr_, scale_,
               call.gamma, call.beta, call.records, o_, decay()},
        step_(inner_) {
    for (int i = 0; i < call.K; ++i) {  // s_i = max(0, 1/(i+1) + τ_i)
      const T s = T(1) / (i + 1) + call.token_offset[i];
      scale_[i] = s > 0 ? s : 0;
    }
  }

  // x and y of at most TOGETHER streams [rows, C].
  void run(int rows, const int64_t* slots, const T* x, T* y) {
    for (int i = 0; i < rows; ++i) offset_[i] = call_.position[slots[i]]++ % call_.K;
    linear(rows, C_, C_, x, call_.value, nullptr, v_);
    if (call_.taps == 0) {
      linear(rows, C_, C_, x, call_.query, nullptr, q_);
      linear(rows, C_, C_, x, call_.key, nullptr, k_);
    } else {
      linear(rows, C_, C_, x, call_.gate, nullptr, gate_);
      linear(rows, C_, C_, x, call_.query, nullptr, o_);
      for (int i = 0; i < rows; ++i) {
        T* context = call_.conv + slots[i] * (call_.taps - 1) * C_;
        const T* x_i = o_ + i * C_;
        convolve(C_, call_.taps, x_i, context, call_.query_conv, call_.query_bias, q_ + i * C_);
        convolve(C_, call_.taps, x_i, context, call_.key_conv, call_.key_bias, k_ + i * C_);
        remember(C_, call_.taps, x_i, context);
      }
    }
    for (int i = 0; i < rows; ++i) {
      const T *cos = call_.cos + offset_[i] * (D / 2), *sin = call_.sin + offset_[i] * (D / 2);
      for (int at = i * C_; at < (i + 1) * C_; at += D) {
        rotate(cos, sin, 1, q_ + at);
        rotate(cos, sin, 1, k_ + at);
      }
      for (int h = 0; h < call_.H; ++h) lr_[i * call_.H + h] = rate(x + i * C_, k_ + i * C_, h);
      if (call_.forget_bias) {
        for (int h = 0; h < call_.H; ++h) log_decay_[i * call_.H + h] = log_decay(x + i * C_, h);
      }
    }
    inner_.slots = slots;
    for (int i = 0; i < rows * call_.H; ++i) step_.run(i);
    for (int i = 0; i < rows; ++i) {
      layer_norm(C_, o_ + i * C_, call_.norm_weight, call_.norm_bias, call_.norm_eps, q_ + i * C_);
      if (call_.taps > 0) {
        gelu<false, false>(C_, gate_ + i * C_, k_);
        for (int n = 0; n < C_; n += LANES) store(q_ + i * C_ + n, load(q_ + i * C_ + n) * load(k_ + n));
      }
    }
    linear(rows, C_, C_, q_, call_.output, nullptr, y);
  }

 private:
  const LayerCall& call_;
  const int C_;
  Arena arena_;
  T *q_, *k_, *v_, *gate_, *o_, *lr_, *scale_, *log_decay_;
  int64_t offset_[TOGETHER];
  StepCall inner_;
  Step step_;

  static size_t numbers(const LayerCall& call) {
    return 5 * Arena::rounded(TOGETHER * call.H * D) + 2 * Arena::rounded(TOGETHER * call.H) + Arena::rounded(call.K);
  }

  DecayCall decay() const {
    DecayCall decay{};
    if (!call_.forget_bias) return decay;
    constexpr int HIDDEN = F ? F : D;
    decay.log_decay = log_decay_;
    const int64_t strides[] = {D * HIDDEN, HIDDEN, HIDDEN * D, D};
    for (int i = 0; i < 2 * LAYERS; ++i) decay.initial[i] = call_.initial[i], decay.strides[i] = strides[i];
    return decay;
  }

  // ln a of layers/forgetting.py; who does not learn does not forget.
  T log_decay(const T* x, int h) const {
    if (!call_.adapt) return 0;
    const T logit = call_.forget_bias[h] + (call_.forget_weight ? dot(C_, x, call_.forget_weight + h * C_) : 0);
    return -std::log1p(std::exp(-std::abs(logit))) - (logit > 0 ? logit : 0);
  }

  // The rate, (31) of docs/mathematics.md, at most max_inner_step / (1 + |k|²).
  T rate(const T* x, const T* k, int h) const {
    if (!call_.adapt) return 0;
    const T logit = dot(C_, x, call_.lr_weight + h * C_) + call_.lr_bias[h];
    T lr = T(call_.base_lr) / (1 + std::exp(-logit)) / D;
    if (std::isfinite(call_.max_inner_step)) {
      const T most = T(call_.max_inner_step) / (1 + dot(D, k + h * D, k + h * D));
      lr = most < lr ? most : lr;
    }
    return lr * T(call_.lr_scale);
  }
};

}  // namespace
