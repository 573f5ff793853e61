// One inner layer in one mini-batch. Numbers in brackets are equations of docs/mathematics.md.

#pragma once

#include <algorithm>

#include "forgetting.h"
#include "rates.h"

// Tokens between which the dual form takes pairs, and those that tiles hold. A longer mini-batch is several blocks; what a
// block reads of those before it are the sums (36). So a token costs no more, and tiles do not grow, the longer it is.
constexpr int BLOCK = 32;

inline int rows_of_tiles(int K) { return std::min(K, BLOCK); }
inline int blocks_of(int tokens) { return (tokens + BLOCK - 1) / BLOCK; }

// One inner layer, W [IN, OUT] and b [OUT], in one block: its output at queries in the dual form, and its update.
// W and b are the weights before the mini-batch, whose memory somebody else has; dW and db are the layer's own. AT is how
// many weights the layers before it have.
template <int IN, int OUT, int AT>
class DualLayer {
 public:
  T *W, *b, *dW, *db;

  // Of mini-batches of K tokens; on the way back the sums before every block are kept, forwards two of them.
  static size_t numbers(int K, bool back) {
    const int R = rows_of_tiles(K);
    return 3 * Arena::rounded(IN * OUT) + Arena::rounded(OUT) + 3 * tokens_by_tokens(R) + 4 * Arena::rounded(R * OUT) +
           Arena::rounded(R + LANES) + Arena::rounded(number_of_sums(K, back) * SUM);
  }

  DualLayer(Arena& arena, int K, bool back)
      : W(nullptr), b(nullptr), dW(arena.take(IN * OUT)), db(arena.take(OUT)), several_(K > BLOCK), back_(back),
        W_transposed_(arena.take(IN * OUT)), other_transposed_(arena.take(IN * OUT)) {
    const int R = rows_of_tiles(K);
    for (T** pairs : {&S_, &minus_A_, &dS_}) *pairs = arena.take(tokens_by_tokens(R));
    for (T** tile : {&steps_, &X_dW_, &U_, &before_}) *tile = arena.take(R * OUT);
    dots_ = arena.take(R + LANES);
    after_ = arena.take(number_of_sums(K, back) * SUM);
    gained_ = after_ + SUM;
    sums_ = gained_ + SUM;
  }

  // Z = X W + b
  void affine(int r, const T* X, T* Z) const { product<From::bias, OUT>(r, IN, X, IN, 1, W, Z, b); }

  // Wᵀ, which the products with it below take; to be called when W has changed.
  const T* transpose_weights() {
    transpose<IN, OUT>(W, W_transposed_);
    return W_transposed_;
  }

  // The sums before the next block, (36); of a mini-batch of one block nobody reads them.
  void accumulate(const Rates& rates, const T* X, const T* G) {
    if (!several_) return;
    if (rates.block == 0) std::fill_n(sums_, SUM, T(0));
    scale_rows(rates.r, rates.lr, 1, G, U_);
    add_sums(rates.r, X, U_, sum_before(rates.block), sum_before(rates.block + 1));
  }

  // P, (8) or, of a block that is not the first, (37).
  void output(const Rates& rates, const T* Q, const T* X, const T* G, T* P) {
    const int r = rates.r, row = rates.row;
    dots<IN>(r, row, Q, X, S_);
    for (int at = 0; at < r * row; at += LANES) {
      const V one_more = load(S_ + at) + 1;
      store(S_ + at, one_more);
      store(minus_A_ + at, -load(rates.eta + at) * one_more);
    }
    affine(r, Q, P);
    if (rates.block == 0) return add_product<OUT>(r, r, minus_A_, row, 1, G, P);
    const T* sum = sum_before(rates.block);
    product<From::bias, OUT>(r, IN, Q, IN, 1, sum, before_, sum + IN * OUT);
    scale_rows(r, rates.scale, -1, before_, steps_);
    add_product<OUT>(r, r, minus_A_, row, 1, G, steps_);
    for (int n = 0; n < r * OUT; n += LANES) store(P + n, load(P + n) + load(steps_ + n));  // which may be larger by far
  }

  // W and b after a mini-batch, (9), of the last block's rates; next may be where they are.
  void update(const Rates& rates, const T* X, const T* G, T* next_W, T* next_b) {
    if (const Forgetting* forgetting = rates.forgetting) {
      update(rates, X, G, forgetting->left(AT, W), forgetting->left(AT + 1, b), next_W, next_b);
    } else {
      update<const T*>(rates, X, G, W, b, next_W, next_b);
    }
  }

  // Before the last block of a mini-batch.
  void begin_backward() {
    if (several_) std::fill_n(after_, 2 * SUM, T(0));
  }

  // Backward of output and update together, (16) to (20), or with blocks (38) and (39): dQ, dX and dG from dP and from dW
  // and db, which come as gradients of the updated weights. W must be the weights before, transposed already.
  void backward(const Rates& rates, const T* Q, const T* X, const T* G, const T* dP, T* dQ, T* dX, T* dG) {
    const int r = rates.r, row = rates.row;
    dots<OUT>(r, row, dP, G, dS_);  // -dA
    for (int i = 0; i < r; ++i) {
      for (int j = 0; j <= i; ++j) rates.accumulate(i, j, -dS_[i * row + j] * S_[i * row + j]);
    }
    for (int at = 0; at < r * row; at += LANES) store(dS_ + at, -load(dS_ + at) * load(rates.eta + at));
    set_product<IN>(r, OUT, dP, OUT, 1, W_transposed_, dQ);
    add_product<IN>(r, r, dS_, row, 1, X, dQ);
    set_product<IN>(r, r, dS_, 1, row, Q, dX);
    set_product<OUT>(r, r, minus_A_, 1, row, dP, dG);
    if (several_) backward_of_sums(rates, Q, X, G, dP, dQ, dX, dG);
    if (rates.complete) backward_of_update(rates, X, G, dX, dG);
    if (!several_) backward_of_forgetting(rates);
    add_outer(r, Q, dP);
  }

  // Backward of Z = X W + b: dX += dZ Wᵀ, dW += Xᵀ dZ, db += Σ dZ.
  void backward_of_affine(int r, const T* X, const T* dZ, T* dX) {
    add_product<IN>(r, OUT, dZ, OUT, 1, W_transposed_, dX);
    add_outer(r, X, dZ);
  }

  // dW += Xᵀ dZ. All blocks of a mini-batch read dW, so what they add waits for end_backward.
  void add_outer_product(int r, const T* X, const T* dZ) {
    add_product<OUT>(IN, r, X, 1, IN, dZ, several_ ? gained_ : dW);
  }

  // After the first block, of its rates: dW and db become gradients of the weights before the mini-batch.
  void end_backward(const Rates& rates) {
    if (!several_) return;
    backward_of_forgetting(rates);
    add<IN * OUT>(dW, gained_);
    add<OUT>(db, gained_ + IN * OUT);
  }

 private:
  static constexpr int SUM = IN * OUT + OUT;  // numbers of the sums for W and for b
  const bool several_, back_;
  T *W_transposed_, *other_transposed_, *S_, *minus_A_, *dS_, *steps_, *X_dW_, *U_, *before_, *after_, *gained_, *sums_, *dots_;

  static int number_of_sums(int K, bool back) { return K <= BLOCK ? 0 : back ? blocks_of(K) + 3 : 4; }
  T* sum_before(int block) const { return sums_ + (back_ ? block : block & 1) * SUM; }

  template <class Source>
  void update(const Rates& rates, const T* X, const T* G, Source W, Source b, T* next_W, T* next_b) {
    if (several_) {
      const T* all = sum_before(rates.block + 1);
      for (int n = 0; n < IN * OUT; n += LANES) store(next_W + n, load(W + n) - rates.last_scale * load(all + n));
      for (int n = 0; n < OUT; n += LANES) store(next_b + n, load(b + n) - rates.last_scale * load(all + IN * OUT + n));
    } else {
      scale_rows(rates.r, rates.lr, -rates.last_scale, G, steps_);
      add_rows<OUT>(rates.r, steps_, b, next_b);
      product<From::matrix, OUT>(IN, rates.r, X, 1, IN, steps_, next_W, W);
    }
  }

  // out = sign scale ∘ x, by rows.
  static void scale_rows(int r, const T* scale, T sign, const T* x, T* out) {
    for (int j = 0; j < r; ++j) {
      const T own = sign * scale[j];
      for (int n = j * OUT; n < (j + 1) * OUT; n += LANES) store(out + n, own * load(x + n));
    }
  }

  // total = from + [Xᵀ Y; Σ Y] of r rows.
  static void add_sums(int r, const T* X, const T* Y, const T* from, T* total) {
    product<From::matrix, OUT>(IN, r, X, 1, IN, Y, total, from);
    add_rows<OUT>(r, Y, from + IN * OUT, total + IN * OUT);
  }

  void backward_of_sums(const Rates& rates, const T* Q, const T* X, const T* G, const T* dP, T* dQ, T* dX, T* dG) {
    const int r = rates.r;
    scale_rows(r, rates.scale, -1, dP, steps_);
    if (rates.block > 0) {
      transpose<IN, OUT>(sum_before(rates.block), other_transposed_);
      add_product<IN>(r, OUT, steps_, OUT, 1, other_transposed_, dQ);
      sums(r, [&](int i) { return lanes_of_dot<OUT>(dP + i * OUT, before_ + i * OUT); }, dots_);
      for (int i = 0; i < r; ++i) rates.d_scale[i] -= dots_[i];
    }
    if (!rates.last_block) {
      scale_rows(r, rates.lr, 1, G, U_);
      transpose<IN, OUT>(after_, other_transposed_);
      add_product<IN>(r, OUT, U_, OUT, 1, other_transposed_, dX);
      product<From::bias, OUT>(r, IN, X, IN, 1, after_, X_dW_, after_ + IN * OUT);
      sums(r, [&](int j) { return lanes_of_dot<OUT>(X_dW_ + j * OUT, G + j * OUT); }, dots_);
      for (int j = 0; j < r; ++j) {
        rates.d_lr[j] += dots_[j];
        add<OUT>(dG + j * OUT, X_dW_ + j * OUT, rates.lr[j]);
      }
    }
    add_sums(r, Q, steps_, after_, after_);
  }

  void backward_of_update(const Rates& rates, const T* X, const T* G, T* dX, T* dG) {
    product<From::bias, OUT>(rates.r, IN, X, IN, 1, dW, X_dW_, db);
    scale_rows(rates.r, rates.lr, -rates.last_scale, G, steps_);
    transpose<IN, OUT>(dW, other_transposed_);
    add_product<IN>(rates.r, OUT, steps_, OUT, 1, other_transposed_, dX);
    sums(rates.r, [&](int j) { return lanes_of_dot<OUT>(X_dW_ + j * OUT, G + j * OUT); }, dots_);
    T d_last = 0;
    for (int j = 0; j < rates.r; ++j) {
      const T d_eta = -dots_[j];
      d_last += d_eta * rates.lr[j];
      rates.d_lr[j] += d_eta * rates.last_scale;
      add<OUT>(dG + j * OUT, X_dW_ + j * OUT, -rates.last(j));
    }
    *rates.d_last_scale += d_last;
  }

  // When nothing reads the gradients of the updated weights any more.
  void backward_of_forgetting(const Rates& rates) {
    if (rates.forgetting == nullptr) return;
    rates.forgetting->backward(AT, IN * OUT, W, dW);
    rates.forgetting->backward(AT + 1, OUT, b, db);
  }

  void add_outer(int r, const T* X, const T* dZ) {
    add_outer_product(r, X, dZ);
    T* total = several_ ? gained_ + IN * OUT : db;
    add_rows<OUT>(r, dZ, total, total);
  }
};
