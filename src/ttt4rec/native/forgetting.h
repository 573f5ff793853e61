// What a row's weights lose at the end of a mini-batch, towards the initial ones, and the gradients of that.
//
// Numbers in brackets are equations of docs/mathematics.md.

#pragma once

#include <cmath>

#include "tiles.h"

// Weights are a model's, SIZES numbers each. What is lost is known before the steps are taken, and taken off after them.
template <class Model>
class Forgetting {
 public:
  static constexpr int WEIGHTS = Model::WEIGHTS;

  static size_t numbers(bool back) {
    size_t total = 0;
    for (int size : Model::SIZES) total += Arena::rounded(size);
    return back ? 2 * total : total;
  }

  Forgetting(Arena& arena, bool back) {
    for (int i = 0; i < WEIGHTS; ++i) {
      lost_[i] = arena.take(Model::SIZES[i]);
      if (back) d_initial_[i] = arena.take(Model::SIZES[i]);
    }
  }

  // (1 - A) (W - W̄) of (40), of weights before the steps and ln A.
  void begin(T log_decay, T* const* weights, const T* const* initial) {
    const T share = -std::expm1(log_decay);
    each([&](int i, int n) { store(lost_[i] + n, share * (load(weights[i] + n) - load(initial[i] + n))); });
  }

  // Behind the steps.
  void end(T* const* weights) const {
    each([&](int i, int n) { store(weights[i] + n, load(weights[i] + n) - load(lost_[i] + n)); });
  }

  // Before the last mini-batch of a sequence.
  void start_backward() const {
    for (int i = 0; i < WEIGHTS; ++i) std::fill_n(d_initial_[i], Model::SIZES[i], T(0));
  }

  // (41): from the weights before the mini-batch and the gradients behind it. Adds to those of the initial weights,
  // and returns d ln a of every token.
  T begin_backward(T log_decay, const T* const* weights, const T* const* initial, T* const* gradients) {
    const T share = -std::expm1(log_decay);
    V total{};
    each([&](int i, int n) {
      const V dW = load(gradients[i] + n), lost = share * dW;
      total += dW * (load(weights[i] + n) - load(initial[i] + n));
      store(lost_[i] + n, lost);
      store(d_initial_[i] + n, load(d_initial_[i] + n) + lost);
    });
    return std::exp(log_decay) * sum(total);
  }

  // Gradient of a sequence's initial weights i.
  const T* d_initial(int i) const { return d_initial_[i]; }

 private:
  T *lost_[WEIGHTS], *d_initial_[WEIGHTS];

  template <class Function>
  static void each(Function at) {
    for (int i = 0; i < WEIGHTS; ++i)
      for (int n = 0; n < Model::SIZES[i]; n += LANES) at(i, n);
  }
};
