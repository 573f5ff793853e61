// One block of a mini-batch of TTT-Linear or TTT-MLP, forwards, replayed and back. Numbers in brackets are equations of
// docs/mathematics.md.

#pragma once

#include "dual_layer.h"

// A head's tiles of a block, [r, D] each.
struct Tokens {
  T *q, *k, *v, *o;              // o, the outputs, or dO, their gradient
  T *dq, *dk, *dv;
  const T *gamma, *beta;
  T *d_gamma, *d_beta;           // summed over the tokens
  T eps;
};

// dP of the output; scaled is a tile's memory.
inline void backward_of_output(int r, const Normalised& norm, const Tokens& t, T* scaled, T* dP) {
  for (int i = 0; i < r; ++i) {
    for (int n = 0; n < D; n += LANES) store(scaled + i * D + n, load(t.o + i * D + n) * load(t.gamma + n));
  }
  norm.jacobian_products(r, scaled, dP);
}

// What de gives k, v and β, and dO gives q, β and γ. d_gamma, the inner gradient's by row, is overwritten.
inline void add_error_and_residual(int r, const Normalised& norm, const T* de, T* d_gamma, const Tokens& t) {
  for (int i = 0; i < r; ++i) {
    add<D>(t.dk + i * D, de + i * D);
    add<D>(t.dq + i * D, t.o + i * D);
    for (int n = i * D; n < (i + 1) * D; n += LANES) {
      store(t.dv + n, -load(de + n));
      store(d_gamma + n, load(d_gamma + n) + load(t.o + n) * load(norm.x_hat + n));
    }
  }
  add_rows<D>(r, d_gamma, t.d_gamma, t.d_gamma);
  add_rows<D>(r, t.o, t.d_beta, t.d_beta);
  add_rows<D>(r, de, t.d_beta, t.d_beta);
}

template <int HIDDEN>
class InnerModel {  // TTT-MLP
 public:
  static constexpr int WEIGHTS = 4, SIZES[] = {D * HIDDEN, HIDDEN, HIDDEN * D, D}, KEPT[] = {HIDDEN, D};

  // W1, b1, W2 and b2 before a mini-batch, and what they and the kept Z1 and G2 give at a block's keys.
  struct State {
    T *weights[WEIGHTS], *X2, *slope, *curvature, *G2_W2;

    static size_t numbers(int K) {
      size_t total = 4 * Arena::rounded(rows_of_tiles(K) * HIDDEN);
      for (int size : SIZES) total += Arena::rounded(size);
      return total;
    }

    State(Arena& arena, int K) {
      for (int i = 0; i < WEIGHTS; ++i) weights[i] = arena.take(SIZES[i]);
      for (T** tile : {&X2, &slope, &curvature, &G2_W2}) *tile = arena.take(rows_of_tiles(K) * HIDDEN);
    }
  };

  static size_t numbers(int K, bool back) {
    const int R = rows_of_tiles(K);
    return DualLayer<D, HIDDEN, 0>::numbers(K, back) + DualLayer<HIDDEN, D, 2>::numbers(K, back) +
           8 * Arena::rounded(R * HIDDEN) + InnerGradient::numbers(R) + Normalised::numbers(R) + 7 * Arena::rounded(R * D);
  }

  InnerModel(Arena& arena, int K, bool back)
      : several_(K > BLOCK), first_(arena, K, back), second_(arena, K, back), inner_(arena, rows_of_tiles(K)),
        norm_(arena, rows_of_tiles(K)) {
    const int R = rows_of_tiles(K);
    for (T** tile : {&G1_, &X2_bar_, &bar_slope_, &dX2_, &dX2_bar_, &dG1_, &E_, &P1_}) *tile = arena.take(R * HIDDEN);
    for (T** tile : {&Z2_, &P2_, &dP2_, &dG2_, &dZ2_, &de_, &d_gamma_}) *tile = arena.take(R * D);
  }

  T* gradients(int i) { return i < 2 ? (i ? first_.db : first_.dW) : (i == 3 ? second_.db : second_.dW); }

  // A block forwards; the weights are updated where they are, after the mini-batch's last.
  void forward(const Rates& rates, const Tokens& t, T* const* kept, State& state) {
    const int r = rates.r;
    T *Z1 = kept[0], *G2 = kept[1];
    use(state);
    first_.affine(r, t.k, Z1);
    gelu<true, false>(r * HIDDEN, Z1, state.X2, state.slope);
    second_.affine(r, state.X2, Z2_);
    inner_.set(r, Z2_, t.k, t.v, t.gamma, t.beta, t.eps);
    inner_.value(r, G2);
    set_G1(r, G2, state);
    accumulate(rates, t.k, G2, state);
    first_.output(rates, t.q, t.k, G1_, P1_);
    gelu<false, false>(r * HIDDEN, P1_, X2_bar_);
    second_.output(rates, X2_bar_, state.X2, G2, P2_);
    if (rates.complete && rates.last_block) update(rates, t.k, G2, state, state);
    norm_.set(r, P2_, t.eps);
    norm_.write_output(r, t.q, t.gamma, t.beta, t.o);
  }

  // Z1 of a state's mini-batch, or of a block of it, with the forward's bits.
  void first_outputs(int r, const T* k, const State& state, T* Z1) {
    use(state);
    first_.affine(r, k, Z1);
  }

  // The same once more, from what was kept: the state's values, and after the last block the weights of the next one if
  // there is one.
  void replay(const Rates& rates, const T* k, T* const* kept, State& state, State* next) {
    const T *Z1 = kept[0], *G2 = kept[1];
    use(state);
    gelu<true, true>(rates.r * HIDDEN, Z1, state.X2, state.slope, state.curvature);
    set_G1(rates.r, G2, state);
    accumulate(rates, k, G2, state);
    if (next != nullptr && rates.last_block) update(rates, k, G2, state, *next);
  }

  void begin_backward() { first_.begin_backward(), second_.begin_backward(); }
  void end_backward(const Rates& rates) { first_.end_backward(rates), second_.end_backward(rates); }

  // A block's, from the last to the first, after all of them were replayed.
  void backward(const Rates& rates, const Tokens& t, T* const* kept, const State& state) {
    const int r = rates.r;
    const T* G2 = kept[1];
    // The forward's values.
    use(state);
    first_.transpose_weights();
    second_.transpose_weights();
    if (several_) {  // the state has the last block's
      gelu<true, true>(r * HIDDEN, kept[0], state.X2, state.slope, state.curvature);
      set_product<HIDDEN>(r, D, G2, D, 1, second_.transpose_weights(), state.G2_W2);
    }
    multiply(r, state.G2_W2, state.slope, G1_);
    second_.affine(r, state.X2, Z2_);
    inner_.set(r, Z2_, t.k, t.v, t.gamma, t.beta, t.eps);
    first_.output(rates, t.q, t.k, G1_, P1_);
    gelu<true, false>(r * HIDDEN, P1_, X2_bar_, bar_slope_);
    second_.output(rates, X2_bar_, state.X2, G2, P2_);
    norm_.set(r, P2_, t.eps);
    // Outputs and updates.
    backward_of_output(r, norm_, t, d_gamma_, dP2_);
    second_.backward(rates, X2_bar_, state.X2, G2, dP2_, dX2_bar_, dX2_, dG2_);
    multiply(r, dX2_bar_, bar_slope_, dX2_bar_);
    first_.backward(rates, t.q, t.k, G1_, dX2_bar_, t.dq, t.dk, dG1_);
    // G1, (26).
    multiply(r, dG1_, state.slope, E_);
    add_product<D>(r, HIDDEN, E_, HIDDEN, 1, second_.W, dG2_);
    second_.add_outer_product(r, E_, G2);
    // G2, then Z2 and Z1.
    inner_.backward(r, dG2_, G2, t.gamma, dZ2_, de_, d_gamma_);
    second_.backward_of_affine(r, state.X2, dZ2_, dX2_);
    for (int i = 0; i < r * HIDDEN; i += LANES) {
      const V curved = load(dG1_ + i) * load(state.G2_W2 + i) * load(state.curvature + i);
      store(dX2_ + i, load(dX2_ + i) * load(state.slope + i) + curved);  // dZ1
    }
    first_.backward_of_affine(r, t.k, dX2_, t.dk);
    add_error_and_residual(r, norm_, de_, d_gamma_, t);
  }

 private:
  const bool several_;
  DualLayer<D, HIDDEN, 0> first_;
  DualLayer<HIDDEN, D, 2> second_;
  InnerGradient inner_;
  Normalised norm_;
  T *G1_, *X2_bar_, *bar_slope_, *dX2_, *dX2_bar_, *dG1_, *E_, *P1_;
  T *Z2_, *P2_, *dP2_, *dG2_, *dZ2_, *de_, *d_gamma_;

  void use(const State& state) {
    first_.W = state.weights[0], first_.b = state.weights[1];
    second_.W = state.weights[2], second_.b = state.weights[3];
  }

  static void multiply(int r, const T* a, const T* b, T* out) {
    for (int i = 0; i < r * HIDDEN; i += LANES) store(out + i, load(a + i) * load(b + i));
  }

  // (12)
  void set_G1(int r, const T* G2, State& state) {
    set_product<HIDDEN>(r, D, G2, D, 1, second_.transpose_weights(), state.G2_W2);
    multiply(r, state.G2_W2, state.slope, G1_);
  }

  void accumulate(const Rates& rates, const T* k, const T* G2, const State& state) {
    first_.accumulate(rates, k, G1_);
    second_.accumulate(rates, state.X2, G2);
  }

  void update(const Rates& rates, const T* k, const T* G2, const State& state, const State& next) {
    first_.update(rates, k, G1_, next.weights[0], next.weights[1]);
    second_.update(rates, state.X2, G2, next.weights[2], next.weights[3]);
  }
};

template <>
class InnerModel<0> {  // TTT-Linear
 public:
  static constexpr int WEIGHTS = 2, SIZES[] = {D * D, D}, KEPT[] = {D};

  struct State {  // W1 and b1 before a mini-batch
    T* weights[WEIGHTS];

    static size_t numbers(int) { return Arena::rounded(D * D) + Arena::rounded(D); }

    State(Arena& arena, int) : weights{arena.take(D * D), arena.take(D)} {}
  };

  static size_t numbers(int K, bool back) {
    const int R = rows_of_tiles(K);
    return DualLayer<D, D, 0>::numbers(K, back) + InnerGradient::numbers(R) + Normalised::numbers(R) + 7 * Arena::rounded(R * D);
  }

  InnerModel(Arena& arena, int K, bool back)
      : layer_(arena, K, back), inner_(arena, rows_of_tiles(K)), norm_(arena, rows_of_tiles(K)) {
    for (T** tile : {&Z_, &P_, &dP_, &dG_, &dZ_, &de_, &d_gamma_}) *tile = arena.take(rows_of_tiles(K) * D);
  }

  T* gradients(int i) { return i ? layer_.db : layer_.dW; }

  void forward(const Rates& rates, const Tokens& t, T* const* kept, State& state) {
    const int r = rates.r;
    T* G = kept[0];
    use(state);
    layer_.affine(r, t.k, Z_);
    inner_.set(r, Z_, t.k, t.v, t.gamma, t.beta, t.eps);
    inner_.value(r, G);
    layer_.accumulate(rates, t.k, G);
    layer_.output(rates, t.q, t.k, G, P_);
    if (rates.complete && rates.last_block) layer_.update(rates, t.k, G, layer_.W, layer_.b);
    norm_.set(r, P_, t.eps);
    norm_.write_output(r, t.q, t.gamma, t.beta, t.o);
  }

  void first_outputs(int, const T*, const State&, T*) {}  // there are none beside Z

  void replay(const Rates& rates, const T* k, T* const* kept, State& state, State* next) {
    use(state);
    layer_.accumulate(rates, k, kept[0]);
    if (next == nullptr || !rates.last_block) return;
    layer_.update(rates, k, kept[0], next->weights[0], next->weights[1]);
  }

  void begin_backward() { layer_.begin_backward(); }
  void end_backward(const Rates& rates) { layer_.end_backward(rates); }

  void backward(const Rates& rates, const Tokens& t, T* const* kept, const State& state) {
    const int r = rates.r;
    const T* G = kept[0];
    // The forward's values.
    use(state);
    layer_.transpose_weights();
    layer_.affine(r, t.k, Z_);
    inner_.set(r, Z_, t.k, t.v, t.gamma, t.beta, t.eps);
    layer_.output(rates, t.q, t.k, G, P_);
    norm_.set(r, P_, t.eps);
    // Output and update, then G, then Z.
    backward_of_output(r, norm_, t, d_gamma_, dP_);
    layer_.backward(rates, t.q, t.k, G, dP_, t.dq, t.dk, dG_);
    inner_.backward(r, dG_, G, t.gamma, dZ_, de_, d_gamma_);
    layer_.backward_of_affine(r, t.k, dZ_, t.dk);
    add_error_and_residual(r, norm_, de_, d_gamma_, t);
  }

 private:
  DualLayer<D, D, 0> layer_;
  InnerGradient inner_;
  Normalised norm_;
  T *Z_, *P_, *dP_, *dG_, *dZ_, *de_, *d_gamma_;

  void use(const State& state) { layer_.W = state.weights[0], layer_.b = state.weights[1]; }
};
