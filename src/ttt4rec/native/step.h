// One token more of a stream and head, in place. The record of a stream and head is that of inner_models.py: [W; b] of
// every layer, then K rows, one for each token of the mini-batch so far. Numbers in brackets are
// equations of docs/mathematics.md.

#pragma once

#include "forgetting.h"

namespace {

// Where the parts of a record begin: [W; b] of every layer, then the rows; in a row X and U of every layer, v, lr, ln a.
constexpr int WEIGHTS_AT[] = {TTT_WEIGHTS_AT}, ROW_AT[] = {TTT_ROW_AT};
constexpr int LAYERS = F ? 2 : 1, ROWS_AT = WEIGHTS_AT[LAYERS], V_AT = ROW_AT[2 * LAYERS], LR_AT = ROW_AT[2 * LAYERS + 1];
constexpr int DECAY_AT = ROW_AT[2 * LAYERS + 2];
constexpr int ROW = TTT_ROW;  // numbers from one row to the next

struct DecayCall {        // as step.py's, of layers that forget
  const T* log_decay;     // ln a [B, H]; null: nothing is forgotten
  const T* initial[4];    // W and b of every layer, a head's numbers side by side
  int64_t strides[4];     // numbers from one head to the next
};

struct StepCall {  // as step.py's
  int64_t H, K, record;       // numbers in a record
  const int64_t *slots, *offset;  // of every stream: its place in the pool, and its tokens in the mini-batch so far
  double eps;
  const T *q, *k, *v, *lr, *scale, *gamma, *beta;  // tokens [B, H, D], rates [B, H]
  T *records, *o;
  DecayCall decay;
};

// x W + b of one row, in several sums so that they need not wait for each other.
template <int IN, int OUT>
inline void affine(const T* x, const T* W, const T* b, T* out) {
  constexpr int VECTORS = OUT / LANES % 4 == 0 ? 4 : OUT / LANES % 2 == 0 ? 2 : 1, SUMS = 8 / VECTORS;
  static_assert(IN % SUMS == 0);
  for (int n = 0; n < OUT; n += VECTORS * LANES) {
    V total[SUMS][VECTORS] = {};
    for (int m = 0; m < IN; m += SUMS) {
#pragma GCC unroll 8
      for (int i = 0; i < SUMS; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) total[i][j] += x[m + i] * load(W + (m + i) * OUT + n + j * LANES);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      V all = load(b + n + j * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < SUMS; ++i) all += total[i][j];
      store(out + n + j * LANES, all);
    }
  }
}

// Inner layer i of a record: W [IN, OUT] and b [OUT], and of the first row its inputs X and its steps U.
template <int IN, int OUT>
struct Layer {
  T *W, *b, *X, *U;

  Layer(T* record, int i)
      : W(record + WEIGHTS_AT[i]), b(W + IN * OUT), X(record + ROWS_AT + ROW_AT[2 * i]),
        U(record + ROWS_AT + ROW_AT[2 * i + 1]) {}

  void affine(const T* x, T* out) const { ::affine<IN, OUT>(x, W, b, out); }

  // (30)
  void output(int i, T s, const T* x, T* out) const {
    affine(x, out);
    for (int j = 0; j <= i; ++j) add<OUT>(out, U + j * ROW, -s * (dot<IN>(x, X + j * ROW) + 1));
  }

  void forget(T share, const T* initial_W, const T* initial_b) const {
    for (int n = 0; n < IN * OUT; n += LANES) store(W + n, load(Left{W, initial_W, share} + n));
    for (int n = 0; n < OUT; n += LANES) store(b + n, load(Left{b, initial_b, share} + n));
  }

  // (9)
  void update(int K, T s_last, T* scaled) const {
    for (int j = 0; j < K; ++j) {
      for (int n = 0; n < OUT; n += LANES) store(scaled + j * OUT + n, -s_last * load(U + j * ROW + n));
    }
    add_rows<OUT>(K, scaled, b, b);
    add_product<OUT>(IN, K, X, 1, ROW, scaled, W);
  }
};

class Step {
 public:
  explicit Step(const StepCall& call)
      : call_(call), K_(call.K), arena_(numbers(call.K)), inner_(arena_, 1), norm_(arena_, 1),
        scaled_(arena_.take(K_ * (F > D ? F : D))), transposed_(arena_.take(F * D)) {}

  void run(int64_t i) {
    const int64_t stream = i / call_.H, head = i % call_.H;
    q_ = call_.q + i * D, k_ = call_.k + i * D, v_ = call_.v + i * D, lr_ = call_.lr[i];
    gamma_ = call_.gamma + head * D, beta_ = call_.beta + head * D;
    head_ = head, log_decay_ = call_.decay.log_decay ? call_.decay.log_decay[i] : 0;
    place_ = call_.offset[stream];
    s_ = call_.scale[place_];
    T* record = call_.records + (call_.slots[stream] * call_.H + head) * call_.record;
    T P[D];
    if constexpr (F == 0) {
      linear(record, P);
    } else {
      mlp(record, P);
    }
    norm_.set(1, P, call_.eps);
    norm_.write_output(1, q_, gamma_, beta_, call_.o + i * D);
  }

 private:
  const StepCall& call_;
  const int K_;
  Arena arena_;
  InnerGradient inner_;
  Normalised norm_;
  T *scaled_, *transposed_;
  const T *q_, *k_, *v_, *gamma_, *beta_;
  T lr_, s_, log_decay_;
  int64_t head_;
  int place_;

  static size_t numbers(int K) {
    return InnerGradient::numbers(1) + Normalised::numbers(1) + Arena::rounded(K * (F > D ? F : D)) + Arena::rounded(F * D);
  }

  bool last() const { return place_ == K_ - 1; }

  // The token's steps U, from the inner model's output Z at its key.
  void inner_gradient(const T* Z, T* U) {
    inner_.set(1, Z, k_, v_, gamma_, beta_, call_.eps);
    inner_.value(1, U);
    for (int n = 0; n < D; n += LANES) store(U + n, lr_ * load(U + n));
  }

  void write_token(T* record) const {
    T* row = record + ROWS_AT + place_ * ROW;
    std::memcpy(row + ROW_AT[0], k_, D * sizeof(T));
    std::memcpy(row + V_AT, v_, D * sizeof(T));
    row[LR_AT] = lr_;
    row[DECAY_AT] = log_decay_;
  }

  const T* initial(int i) const { return call_.decay.initial[i] + head_ * call_.decay.strides[i]; }

  // 1 - A of the mini-batch that is complete.
  T share_lost(const T* record) const {
    T total = 0;
    for (int j = 0; j < K_; ++j) total += record[ROWS_AT + j * ROW + DECAY_AT];
    return -std::expm1(total);
  }

  void linear(T* record, T* P) {
    Layer<D, D> layer(record, 0);
    T Z[D];
    layer.affine(k_, Z);
    write_token(record);
    inner_gradient(Z, layer.U + place_ * ROW);
    layer.output(place_, s_, q_, P);
    if (!last()) return;
    if (call_.decay.log_decay) layer.forget(share_lost(record), initial(0), initial(1));
    layer.update(K_, s_, scaled_);
  }

  void mlp(T* record, T* P) {
    constexpr int HIDDEN = F ? F : D;  // as a template's argument it may not be 0
    Layer<D, HIDDEN> first(record, 0);
    Layer<HIDDEN, D> second(record, 1);
    T *U1 = first.U + place_ * ROW, *X2 = second.X + place_ * ROW, *U2 = second.U + place_ * ROW;
    T Z1[HIDDEN], slope[HIDDEN], X2_bar[HIDDEN], Z2[D];
    first.affine(k_, Z1);
    gelu<true, false>(F, Z1, X2, slope);
    second.affine(X2, Z2);
    write_token(record);
    inner_gradient(Z2, U2);
    transpose<HIDDEN, D>(second.W, transposed_);
    set_product<HIDDEN>(1, D, U2, D, 1, transposed_, U1);
    for (int n = 0; n < F; n += LANES) store(U1 + n, load(U1 + n) * load(slope + n));
    first.output(place_, s_, q_, Z1);
    gelu<false, false>(F, Z1, X2_bar);
    second.output(place_, s_, X2_bar, P);
    if (!last()) return;
    if (call_.decay.log_decay) {
      const T share = share_lost(record);
      first.forget(share, initial(0), initial(1));
      second.forget(share, initial(2), initial(3));
    }
    first.update(K_, s_, scaled_);
    second.update(K_, s_, scaled_);
  }
};

}  // namespace
