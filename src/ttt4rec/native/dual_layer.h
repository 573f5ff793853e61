// One inner layer in one mini-batch. Numbers in brackets are equations of docs/mathematics.md.

#pragma once

#include <algorithm>

#include "tiles.h"

// Tokens between which the dual form takes pairs, and those that tiles hold. A longer mini-batch is several blocks; what a
// block reads of those before it are the sums (36). So a token costs no more, and tiles do not grow, the longer it is.
constexpr int BLOCK = 32;

inline int rows_of_tiles(int K) { return std::min(K, BLOCK); }
inline int blocks_of(int tokens) { return (tokens + BLOCK - 1) / BLOCK; }

// One inner layer, W [IN, OUT] and b [OUT], in one block: its output at queries in the dual form, and its update.
// W and b are the weights before the mini-batch, whose memory somebody else has; dW and db are the layer's own.
template <int IN, int OUT>
class DualLayer {
 public:
  T *W, *b, *dW, *db;

  // Of mini-batches of K tokens; on the way back the sums before every block are kept, forwards two of them.
  static size_t numbers(int K, bool back) {
    const int R = rows_of_tiles(K);
    return 3 * Arena::rounded(IN * OUT) + Arena::rounded(OUT) + 3 * Arena::rounded(R * R) + 4 * Arena::rounded(R * OUT) +
           Arena::rounded(sums(K, back) * SUM);
  }

  DualLayer(Arena& arena, int K, bool back)
      : W(nullptr), b(nullptr), dW(arena.take(IN * OUT)), db(arena.take(OUT)), several_(K > BLOCK), back_(back),
        W_transposed_(arena.take(IN * OUT)), other_transposed_(arena.take(IN * OUT)) {
    const int R = rows_of_tiles(K);
    for (T** pairs : {&S_, &minus_A_, &dS_}) *pairs = arena.take(R * R);
    for (T** tile : {&steps_, &X_dW_, &U_, &before_}) *tile = arena.take(R * OUT);
    after_ = arena.take(sums(K, back) * SUM);
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
    const int r = rates.r;
    for (int i = 0; i < r; ++i) {
      for (int j = 0; j < r; ++j) {
        S_[i * r + j] = j > i ? 0 : dot<IN>(Q + i * IN, X + j * IN) + 1;
        minus_A_[i * r + j] = j > i ? 0 : -rates.eta(i, j) * S_[i * r + j];
      }
    }
    affine(r, Q, P);
    if (rates.block == 0) return add_product<OUT>(r, r, minus_A_, r, 1, G, P);
    const T* sum = sum_before(rates.block);
    product<From::bias, OUT>(r, IN, Q, IN, 1, sum, before_, sum + IN * OUT);
    scale_rows(r, rates.scale, -1, before_, steps_);
    add_product<OUT>(r, r, minus_A_, r, 1, G, steps_);
    for (int n = 0; n < r * OUT; n += LANES) store(P + n, load(P + n) + load(steps_ + n));  // which may be larger by far
  }

  // W and b after a mini-batch, (9), of the last block's rates; next may be where they are.
  void update(const Rates& rates, const T* X, const T* G, T* next_W, T* next_b) {
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

  // Before the last block of a mini-batch.
  void begin_backward() {
    if (several_) std::fill_n(after_, 2 * SUM, T(0));
  }

  // Backward of output and update together, (16) to (20), or with blocks (38) and (39): dQ, dX and dG from dP and from dW
  // and db, which come as gradients of the updated weights. W must be the weights before, transposed already.
  void backward(const Rates& rates, const T* Q, const T* X, const T* G, const T* dP, T* dQ, T* dX, T* dG) {
    const int r = rates.r;
    for (int i = 0; i < r; ++i) {
      for (int j = 0; j < r; ++j) {
        const T dA = j > i ? 0 : -dot<OUT>(dP + i * OUT, G + j * OUT);
        dS_[i * r + j] = dA * rates.eta(i, j);
        if (j <= i) rates.accumulate(i, j, dA * S_[i * r + j]);
      }
    }
    set_product<IN>(r, OUT, dP, OUT, 1, W_transposed_, dQ);
    add_product<IN>(r, r, dS_, r, 1, X, dQ);
    set_product<IN>(r, r, dS_, 1, r, Q, dX);
    set_product<OUT>(r, r, minus_A_, 1, r, dP, dG);
    if (several_) backward_of_sums(rates, Q, X, G, dP, dQ, dX, dG);
    if (rates.complete) backward_of_update(rates, X, G, dX, dG);
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

  // After the first block: dW and db become gradients of the weights before the mini-batch.
  void end_backward() {
    if (!several_) return;
    add<IN * OUT>(dW, gained_);
    add<OUT>(db, gained_ + IN * OUT);
  }

 private:
  static constexpr int SUM = IN * OUT + OUT;  // numbers of the sums for W and for b
  const bool several_, back_;
  T *W_transposed_, *other_transposed_, *S_, *minus_A_, *dS_, *steps_, *X_dW_, *U_, *before_, *after_, *gained_, *sums_;

  static int sums(int K, bool back) { return K <= BLOCK ? 0 : back ? blocks_of(K) + 3 : 4; }
  T* sum_before(int block) const { return sums_ + (back_ ? block : block & 1) * SUM; }

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
      for (int i = 0; i < r; ++i) rates.d_scale[i] -= dot<OUT>(dP + i * OUT, before_ + i * OUT);
    }
    if (!rates.last_block) {
      scale_rows(r, rates.lr, 1, G, U_);
      transpose<IN, OUT>(after_, other_transposed_);
      add_product<IN>(r, OUT, U_, OUT, 1, other_transposed_, dX);
      product<From::bias, OUT>(r, IN, X, IN, 1, after_, X_dW_, after_ + IN * OUT);
      for (int j = 0; j < r; ++j) {
        rates.d_lr[j] += dot<OUT>(X_dW_ + j * OUT, G + j * OUT);
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
    T d_last = 0;
    for (int j = 0; j < rates.r; ++j) {
      const T d_eta = -dot<OUT>(X_dW_ + j * OUT, G + j * OUT);
      d_last += d_eta * rates.lr[j];
      rates.d_lr[j] += d_eta * rates.last_scale;
      add<OUT>(dG + j * OUT, X_dW_ + j * OUT, -rates.last(j));
    }
    *rates.d_last_scale += d_last;
  }

  void add_outer(int r, const T* X, const T* dZ) {
    add_outer_product(r, X, dZ);
    T* total = several_ ? gained_ + IN * OUT : db;
    add_rows<OUT>(r, dZ, total, total);
  }
};
