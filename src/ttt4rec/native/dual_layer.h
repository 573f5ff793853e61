// One inner layer in one mini-batch. Numbers in brackets are equations of docs/mathematics.md.

#pragma once

#include <algorithm>

#include "tiles.h"

// Tokens between which the dual form takes pairs. More of them are several blocks, and what a block reads of those before
// it are the sums (36): a token then costs no more the longer the mini-batch is.
constexpr int BLOCK = 32;

// One inner layer, W [IN, OUT] and b [OUT], in one mini-batch: its output at queries in the dual form, and its update.
// W and b are the weights before the mini-batch, whose memory somebody else has; dW and db are the layer's own.
template <int IN, int OUT>
class DualLayer {
 public:
  T *W, *b, *dW, *db;

  static size_t numbers(int K) {
    const int pairs = K * std::min(K, BLOCK), sums = blocks(K) > 1 ? blocks(K) + 2 : 0;
    return 3 * Arena::rounded(IN * OUT) + Arena::rounded(OUT) + 2 * Arena::rounded(pairs) +
           Arena::rounded(std::min(K, BLOCK) * std::min(K, BLOCK)) + 4 * Arena::rounded(K * OUT) + Arena::rounded(sums * SUM);
  }

  DualLayer(Arena& arena, int K)
      : W(nullptr), b(nullptr), dW(arena.take(IN * OUT)), db(arena.take(OUT)),
        W_transposed_(arena.take(IN * OUT)), dW_transposed_(arena.take(IN * OUT)),
        S_(arena.take(K * std::min(K, BLOCK))), minus_A_(arena.take(K * std::min(K, BLOCK))),
        dS_(arena.take(std::min(K, BLOCK) * std::min(K, BLOCK))), minus_eta_G_(arena.take(K * OUT)), X_dW_(arena.take(K * OUT)),
        U_(arena.take(K * OUT)), before_(arena.take(K * OUT)),
        sums_(arena.take(blocks(K) > 1 ? (blocks(K) + 2) * SUM : 0)), after_(sums_ + (blocks(K) + 1) * SUM) {}

  // Z = X W + b
  void affine(int r, const T* X, T* Z) const { product<From::bias, OUT>(r, IN, X, IN, 1, W, Z, b); }

  // Wᵀ, which the products with it below take; to be called when W has changed.
  const T* transpose_weights() {
    transpose<IN, OUT>(W, W_transposed_);
    return W_transposed_;
  }

  // The sums (36) at the end of every block, which output, update and backward read; one block needs none.
  void accumulate(const Rates& rates, const T* X, const T* G) {
    if (blocks(rates.r) == 1) return;
    scale_rows(rates.r, rates.lr, 1, G, U_);
    std::fill_n(sums_, SUM, T(0));
    for (int first = 0; first < rates.r; first += BLOCK) {
      const T* from = sum_before(first);
      add_sums(rows(rates.r, first), X + first * IN, U_ + first * OUT, from, sums_ + (from - sums_) + SUM);
    }
  }

  // P, (8) and, of several blocks, (37).
  void output(const Rates& rates, const T* Q, const T* X, const T* G, T* P) {
    affine(rates.r, Q, P);
    for (int first = 0; first < rates.r; first += BLOCK) {
      const int c = rows(rates.r, first);
      T *S = S_ + first * BLOCK, *minus_A = minus_A_ + first * BLOCK;
      for (int i = 0; i < c; ++i) {
        for (int j = 0; j < c; ++j) {
          S[i * c + j] = j > i ? 0 : dot<IN>(Q + (first + i) * IN, X + (first + j) * IN) + 1;
          minus_A[i * c + j] = j > i ? 0 : -rates.eta(first + i, first + j) * S[i * c + j];
        }
      }
      if (first == 0) {
        add_product<OUT>(c, c, minus_A, c, 1, G, P);
      } else {  // the sum of both first: P may be larger by far
        T *step = X_dW_, *before = before_ + first * OUT;
        product<From::bias, OUT>(c, IN, Q + first * IN, IN, 1, sum_before(first), before, sum_before(first) + IN * OUT);
        scale_rows(c, rates.scale + first, -1, before, step);
        add_product<OUT>(c, c, minus_A, c, 1, G + first * OUT, step);
        for (int n = 0; n < c * OUT; n += LANES) store(P + first * OUT + n, load(P + first * OUT + n) + load(step + n));
      }
    }
  }

  // W and b after the mini-batch, (9); next may be where they are.
  void update(const Rates& rates, const T* X, const T* G, T* next_W, T* next_b) {
    if (blocks(rates.r) > 1) {
      const T *all = sums_ + blocks(rates.r) * SUM, last = -rates.scale[rates.K - 1];
      for (int n = 0; n < IN * OUT; n += LANES) store(next_W + n, load(W + n) + last * load(all + n));
      for (int n = 0; n < OUT; n += LANES) store(next_b + n, load(b + n) + last * load(all + IN * OUT + n));
      return;
    }
    set_minus_eta_G(rates, G);
    add_rows<OUT>(rates.r, minus_eta_G_, b, next_b);
    product<From::matrix, OUT>(IN, rates.r, X, 1, IN, minus_eta_G_, next_W, W);
  }

  // Backward of output and update together, (16) to (20): dQ, dX and dG from dP and from dW and db, which come as gradients of the
  // updated weights and become those of the weights before. W must be the weights before, transposed already.
  void backward(const Rates& rates, const T* Q, const T* X, const T* G, const T* dP, T* dQ, T* dX, T* dG) {
    const int r = rates.r;
    set_product<IN>(r, OUT, dP, OUT, 1, W_transposed_, dQ);
    for (int first = 0; first < r; first += BLOCK) {
      const int c = rows(r, first), in = first * IN, out = first * OUT;
      backward_of_pairs(rates, first, c, dP, G);
      add_product<IN>(c, c, dS_, c, 1, X + in, dQ + in);
      set_product<IN>(c, c, dS_, 1, c, Q + in, dX + in);
      set_product<OUT>(c, c, minus_A_ + first * BLOCK, 1, c, dP + out, dG + out);
    }
    if (blocks(r) > 1) backward_of_sums(rates, Q, X, G, dP, dQ, dX, dG);
    if (rates.complete()) backward_of_update(rates, X, G, dX, dG);
    add_outer(r, Q, dP);
  }

  // Backward of Z = X W + b: dX += dZ Wᵀ, dW += Xᵀ dZ, db += Σ dZ.
  void backward_of_affine(int r, const T* X, const T* dZ, T* dX) {
    add_product<IN>(r, OUT, dZ, OUT, 1, W_transposed_, dX);
    add_outer(r, X, dZ);
  }

  // dW += Xᵀ dZ, the sum over the tokens by blocks and by itself.
  void add_outer_product(int r, const T* X, const T* dZ) {
    if (blocks(r) == 1) return add_product<OUT>(IN, r, X, 1, IN, dZ, dW);
    for (int first = 0; first < r; first += BLOCK) {
      const int c = rows(r, first);
      if (first == 0) set_product<OUT>(IN, c, X, 1, IN, dZ, after_);
      else add_product<OUT>(IN, c, X + first * IN, 1, IN, dZ + first * OUT, after_);
    }
    add<IN * OUT>(dW, after_);
  }

 private:
  static constexpr int SUM = IN * OUT + OUT;  // numbers of the sums for W and for b
  T *W_transposed_, *dW_transposed_, *S_, *minus_A_, *dS_, *minus_eta_G_, *X_dW_, *U_, *before_, *sums_, *after_;

  static int blocks(int r) { return (r + BLOCK - 1) / BLOCK; }
  static int rows(int r, int first) { return std::min(r - first, BLOCK); }
  const T* sum_before(int first) const { return sums_ + first / BLOCK * SUM; }

  // out = sign scale ∘ x, by rows.
  static void scale_rows(int r, const T* scale, T sign, const T* x, T* out) {
    for (int j = 0; j < r; ++j) {
      const T own = sign * scale[j];
      for (int n = j * OUT; n < (j + 1) * OUT; n += LANES) store(out + n, own * load(x + n));
    }
  }

  // total = from + [Xᵀ Y; Σ Y] of c rows.
  static void add_sums(int c, const T* X, const T* Y, const T* from, T* total) {
    product<From::matrix, OUT>(IN, c, X, 1, IN, Y, total, from);
    add_rows<OUT>(c, Y, from + IN * OUT, total + IN * OUT);
  }

  void set_minus_eta_G(const Rates& rates, const T* G) {
    scale_rows(rates.r, rates.lr, -rates.scale[rates.K - 1], G, minus_eta_G_);
  }

  // dS of a block's pairs, and what they give the rates, (16) and (29).
  void backward_of_pairs(const Rates& rates, int first, int c, const T* dP, const T* G) {
    const T* S = S_ + first * BLOCK;
    for (int i = 0; i < c; ++i) {
      for (int j = 0; j < c; ++j) {
        const T dA = j > i ? 0 : -dot<OUT>(dP + (first + i) * OUT, G + (first + j) * OUT);
        dS_[i * c + j] = dA * rates.eta(first + i, first + j);
        if (j <= i) rates.accumulate(first + i, first + j, dA * S[i * c + j]);
      }
    }
  }

  // What blocks read of those before them, backwards, (38) and (39).
  void backward_of_sums(const Rates& rates, const T* Q, const T* X, const T* G, const T* dP, T* dQ, T* dX, T* dG) {
    T *steps = minus_eta_G_, *transposed = dW_transposed_;
    scale_rows(rates.r, rates.scale, -1, dP, steps);
    for (int first = BLOCK; first < rates.r; first += BLOCK) {
      transpose<IN, OUT>(sum_before(first), transposed);
      add_product<IN>(rows(rates.r, first), OUT, steps + first * OUT, OUT, 1, transposed, dQ + first * IN);
    }
    for (int i = BLOCK; i < rates.r; ++i) rates.d_scale[i] -= dot<OUT>(dP + i * OUT, before_ + i * OUT);
    std::fill_n(after_, SUM, T(0));
    for (int first = (blocks(rates.r) - 2) * BLOCK; first >= 0; first -= BLOCK) {
      const int next = first + BLOCK, in = first * IN, out = first * OUT;
      add_sums(rows(rates.r, next), Q + next * IN, steps + next * OUT, after_, after_);
      transpose<IN, OUT>(after_, transposed);
      add_product<IN>(BLOCK, OUT, U_ + out, OUT, 1, transposed, dX + in);
      product<From::bias, OUT>(BLOCK, IN, X + in, IN, 1, after_, X_dW_, after_ + IN * OUT);
      for (int j = 0; j < BLOCK; ++j) {
        rates.d_lr[first + j] += dot<OUT>(X_dW_ + j * OUT, G + out + j * OUT);
        add<OUT>(dG + out + j * OUT, X_dW_ + j * OUT, rates.lr[first + j]);
      }
    }
  }

  void backward_of_update(const Rates& rates, const T* X, const T* G, T* dX, T* dG) {
    product<From::bias, OUT>(rates.r, IN, X, IN, 1, dW, X_dW_, db);
    set_minus_eta_G(rates, G);
    transpose<IN, OUT>(dW, dW_transposed_);
    add_product<IN>(rates.r, OUT, minus_eta_G_, OUT, 1, dW_transposed_, dX);
    T d_last = 0;
    for (int j = 0; j < rates.r; ++j) {
      const T d_eta = -dot<OUT>(X_dW_ + j * OUT, G + j * OUT);
      d_last += d_eta * rates.lr[j];
      rates.d_lr[j] += d_eta * rates.scale[rates.K - 1];
      add<OUT>(dG + j * OUT, X_dW_ + j * OUT, -rates.last(j));
    }
    rates.d_scale[rates.K - 1] += d_last;
  }

  void add_outer(int r, const T* X, const T* dZ) {
    add_outer_product(r, X, dZ);
    add_rows<OUT>(r, dZ, db, db);
  }
};
