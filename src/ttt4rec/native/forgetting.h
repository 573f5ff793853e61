// What weights lose at the end of a mini-batch, towards the initial ones, and the gradients of that.
//
// Numbers in brackets are equations of docs/mathematics.md.

#pragma once

#include "tiles.h"

// What (40) leaves of weights, before the steps are added: W - (1 - A) (W - W̄). It is read as if it stood in memory.
struct Left {
  const T *W, *initial;
  T share;
  Left operator+(long n) const { return {W + n, initial + n, share}; }
};
inline V load(const Left& left) {
  const V W = load(left.W);
  return W - left.share * (W - load(left.initial));
}

// Of one head's mini-batch. Weights are counted W and b of the first layer, then of the second.
struct Forgetting {
  T share;              // 1 - A
  const T* initial[4];  // W̄ and b̄
  T* d_initial[4];      // their gradients, sums over a sequence
  V along;              // lanes of Σ dW ∘ (W - W̄)

  Left left(int i, const T* W) const { return {W, initial[i], share}; }

  // (41): from weights i before the mini-batch and dW, the gradient behind it, which becomes that of what (40) left.
  void backward(int i, int size, const T* W, T* dW) {
    V own{};
    for (int n = 0; n < size; n += LANES) {
      const V given = load(dW + n), lost = share * given;
      own += given * (load(W + n) - load(initial[i] + n));
      store(dW + n, given - lost);
      store(d_initial[i] + n, load(d_initial[i] + n) + lost);
    }
    along += own;
  }
};
