// One mini-batch of TTT-Linear or TTT-MLP, forwards and back. The formulas stand in docs/kernels.md.

#pragma once

#include "tiles.h"

// A head's tiles of a mini-batch, [r, D] each.
struct Tokens {
  T *q, *k, *v, *o;              // o, the outputs, or dO, their gradient
  T *dq, *dk, *dv;
  const T *gamma, *beta;
  T *d_gamma, *d_beta;
  T eps;
};

// dP, and dγ, dβ of the output.
inline void backward_of_output(int r, const Normalised& norm, const Tokens& t, T* dP) {
  for (int i = 0; i < r; ++i) {
    T scaled[D];
    for (int n = 0; n < D; n += LANES) {
      const int at = i * D + n;
      const V dO = load(t.o + at);
      store(scaled + n, dO * load(t.gamma + n));
      store(t.d_gamma + n, load(t.d_gamma + n) + dO * load(norm.x_hat + at));
      store(t.d_beta + n, load(t.d_beta + n) + dO);
    }
    norm.jacobian_product(i, scaled, dP + i * D);
  }
}

// What d(LN(Z) - (v - k)) gives k, v and β, and dO gives q.
inline void add_error_and_residual(int r, const T* de, const Tokens& t) {
  for (int i = 0; i < r; ++i) {
    add<D>(t.dk + i * D, de + i * D);
    add<D>(t.d_beta, de + i * D);
    add<D>(t.dq + i * D, t.o + i * D);
    for (int n = 0; n < D; n += LANES) store(t.dv + i * D + n, -load(de + i * D + n));
  }
}

template <int HIDDEN>
class InnerModel {  // TTT-MLP
 public:
  static constexpr int LAYERS = 2, KEPT[] = {HIDDEN, D};

  static size_t numbers(int K) {
    return DualLayer<D, HIDDEN>::numbers(K) + DualLayer<HIDDEN, D>::numbers(K) + 12 * Arena::rounded(K * HIDDEN) +
           12 * Arena::rounded(K * D) + 2 * Arena::rounded(K);
  }

  InnerModel(Arena& arena, int K)
      : first(arena, K), second(arena, K), inner_(arena, K), norm_(arena, K) {
    for (T** tile : {&X2_, &slope_, &curvature_, &U_, &G1_, &X2_bar_, &bar_slope_, &dX2_, &dX2_bar_, &dG1_, &dU_, &P1_}) {
      *tile = arena.take(K * HIDDEN);
    }
    for (T** tile : {&Z2_, &P2_, &dP2_, &dG2_, &dZ2_, &de_}) *tile = arena.take(K * D);
  }

  DualLayer<D, HIDDEN> first;
  DualLayer<HIDDEN, D> second;

  T* weights(int i) { return i < 2 ? (i ? first.b : first.W) : (i == 3 ? second.b : second.W); }
  T* gradients(int i) { return i < 2 ? (i ? first.db : first.dW) : (i == 3 ? second.db : second.dW); }
  static constexpr int SIZES[] = {D * HIDDEN, HIDDEN, HIDDEN * D, D};

  void forward(const Rates& rates, const Tokens& t, T* const* kept) {
    const int r = rates.r;
    T *Z1 = kept[0], *G2 = kept[1];
    first.affine(r, t.k, Z1);
    gelu<true, false>(r * HIDDEN, Z1, X2_, slope_);
    second.affine(r, X2_, Z2_);
    inner_.set(r, Z2_, t.k, t.v, t.gamma, t.beta, t.eps);
    inner_.value(r, G2);
    set_G1(r, G2);
    first.output(rates, t.q, t.k, G1_, P1_);
    gelu<false, false>(r * HIDDEN, P1_, X2_bar_);
    second.output(rates, X2_bar_, X2_, G2, P2_);
    if (rates.complete()) {
      first.update(rates, t.k, G1_, 1);
      second.update(rates, X2_, G2, 1);
    }
    norm_.set(r, P2_, t.eps);
    norm_.write_output(r, t.q, t.gamma, t.beta, t.o);
  }

  void backward(const Rates& rates, const Tokens& t, T* const* kept) {
    const int r = rates.r;
    const T *Z1 = kept[0], *G2 = kept[1];
    // Rebuild the weights before the mini-batch, and the forward's values at them.
    gelu<true, true>(r * HIDDEN, Z1, X2_, slope_, curvature_);
    if (rates.complete()) second.update(rates, X2_, G2, -1);
    set_G1(r, G2);
    if (rates.complete()) first.update(rates, t.k, G1_, -1);
    first.transpose_weights();
    second.affine(r, X2_, Z2_);
    inner_.set(r, Z2_, t.k, t.v, t.gamma, t.beta, t.eps);
    first.output(rates, t.q, t.k, G1_, P1_);
    gelu<true, false>(r * HIDDEN, P1_, X2_bar_, bar_slope_);
    second.output(rates, X2_bar_, X2_, G2, P2_);
    norm_.set(r, P2_, t.eps);
    // Outputs and updates.
    backward_of_output(r, norm_, t, dP2_);
    second.backward(rates, X2_bar_, X2_, G2, dP2_, dX2_bar_, dX2_, dG2_);
    multiply(r, dX2_bar_, bar_slope_, dX2_bar_);
    first.backward(rates, t.q, t.k, G1_, dX2_bar_, t.dq, t.dk, dG1_);
    // G1 = U ∘ gelu'(Z1) and U = G2 W2ᵀ.
    multiply(r, dG1_, slope_, dU_);
    product<From::itself, D>(r, HIDDEN, dU_, HIDDEN, 1, second.W, dG2_);
    product<From::itself, D>(HIDDEN, r, dU_, 1, HIDDEN, G2, second.dW);
    // G2, then Z2 and Z1.
    inner_.backward(r, dG2_, G2, t.gamma, dZ2_, de_, t.d_gamma);
    second.backward_of_affine(r, X2_, dZ2_, dX2_);
    for (int i = 0; i < r * HIDDEN; i += LANES) {
      const V curved = load(dG1_ + i) * load(U_ + i) * load(curvature_ + i);
      store(dX2_ + i, load(dX2_ + i) * load(slope_ + i) + curved);  // dZ1
    }
    first.backward_of_affine(r, t.k, dX2_, t.dk);
    add_error_and_residual(r, de_, t);
  }

 private:
  InnerGradient inner_;
  Normalised norm_;
  T *X2_, *slope_, *curvature_, *U_, *G1_, *X2_bar_, *bar_slope_, *dX2_, *dX2_bar_, *dG1_, *dU_, *P1_;
  T *Z2_, *P2_, *dP2_, *dG2_, *dZ2_, *de_;

  static void multiply(int r, const T* a, const T* b, T* out) {
    for (int i = 0; i < r * HIDDEN; i += LANES) store(out + i, load(a + i) * load(b + i));
  }

  // G1 = U ∘ gelu'(Z1), U = G2 W2ᵀ
  void set_G1(int r, const T* G2) {
    product<From::nothing, HIDDEN>(r, D, G2, D, 1, second.transpose_weights(), U_);
    multiply(r, U_, slope_, G1_);
  }
};

template <>
class InnerModel<0> {  // TTT-Linear
 public:
  static constexpr int LAYERS = 1, KEPT[] = {D};

  static size_t numbers(int K) {
    return DualLayer<D, D>::numbers(K) + 10 * Arena::rounded(K * D) + 2 * Arena::rounded(K);
  }

  InnerModel(Arena& arena, int K) : layer(arena, K), inner_(arena, K), norm_(arena, K) {
    for (T** tile : {&Z_, &P_, &dP_, &dG_, &dZ_, &de_}) *tile = arena.take(K * D);
  }

  DualLayer<D, D> layer;

  T* weights(int i) { return i ? layer.b : layer.W; }
  T* gradients(int i) { return i ? layer.db : layer.dW; }
  static constexpr int SIZES[] = {D * D, D};

  void forward(const Rates& rates, const Tokens& t, T* const* kept) {
    const int r = rates.r;
    T* G = kept[0];
    layer.affine(r, t.k, Z_);
    inner_.set(r, Z_, t.k, t.v, t.gamma, t.beta, t.eps);
    inner_.value(r, G);
    layer.output(rates, t.q, t.k, G, P_);
    if (rates.complete()) layer.update(rates, t.k, G, 1);
    norm_.set(r, P_, t.eps);
    norm_.write_output(r, t.q, t.gamma, t.beta, t.o);
  }

  void backward(const Rates& rates, const Tokens& t, T* const* kept) {
    const int r = rates.r;
    const T* G = kept[0];
    // Rebuild the weights before the mini-batch, and the forward's values at them.
    if (rates.complete()) layer.update(rates, t.k, G, -1);
    layer.transpose_weights();
    layer.affine(r, t.k, Z_);
    inner_.set(r, Z_, t.k, t.v, t.gamma, t.beta, t.eps);
    layer.output(rates, t.q, t.k, G, P_);
    norm_.set(r, P_, t.eps);
    // Output and update, then G, then Z.
    backward_of_output(r, norm_, t, dP_);
    layer.backward(rates, t.q, t.k, G, dP_, t.dq, t.dk, dG_);
    inner_.backward(r, dG_, G, t.gamma, dZ_, de_, t.d_gamma);
    layer.backward_of_affine(r, t.k, dZ_, t.dk);
    add_error_and_residual(r, de_, t);
  }

 private:
  InnerGradient inner_;
  Normalised norm_;
  T *Z_, *P_, *dP_, *dG_, *dZ_, *de_;
};
