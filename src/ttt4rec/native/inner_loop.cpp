// The walk over the mini-batches of every (sequence, head), forwards and back: what calls.py calls.
//
// A walk reads each token once and keeps the weights in cache. Rows are independent of each other: which of them a
// thread takes changes no number.

#include <algorithm>

#include "inner_models.h"

namespace {

using Model = InnerModel<F>;
constexpr int WEIGHTS = 2 * Model::LAYERS, KEPT = Model::LAYERS;

// Tokens are [total, H, D], rates [total, H]; weights [N, H, ...], of which strides[i] numbers lie between sequences.
struct Call {
  int64_t H, K;
  const int64_t *starts, *lengths;  // of each sequence
  double eps;
  const T *q, *k, *v, *lr, *scale, *gamma, *beta;
  const T* weights[4];
  int64_t strides[4];
  T* kept[2];
  // forward
  T *o, *outgoing[4];
  // backward: weights are the outgoing ones
  const T *grad_o, *grad_weights[4];
  int64_t grad_strides[4];
  T *dq, *dk, *dv, *d_lr, *d_scale, *d_weights[4], *d_gamma, *d_beta;  // d_scale [N, H, K], d_gamma [N, H, D]
};

// Copies r rows of a head between [total, H, width], from a token on, and a tile.
struct Place {
  int64_t H, token, head;
  int r;

  void read(const T* x, int width, T* tile) const {
    for (int i = 0; i < r; ++i) std::copy_n(x + at(i) * width, width, tile + i * width);
  }
  void write(const T* tile, int width, T* x) const {
    for (int i = 0; i < r; ++i) std::copy_n(tile + i * width, width, x + at(i) * width);
  }
  int64_t at(int i) const { return (token + i) * H + head; }
};

class Row {
 public:
  explicit Row(const Call& call)
      : call_(call), K_(call.K), arena_(numbers(call.K)), model_(arena_, call.K) {
    for (T** tile : {&t_.q, &t_.k, &t_.v, &t_.o, &t_.dq, &t_.dk, &t_.dv}) *tile = arena_.take(K_ * D);
    for (int i = 0; i < KEPT; ++i) kept_[i] = arena_.take(K_ * Model::KEPT[i]);
    lr_ = arena_.take(K_);
    d_lr_ = arena_.take(K_);
    t_.eps = call.eps;
  }

  void forward(int64_t n, int64_t head) {
    start(n, head);
    for (int64_t first = 0; first < call_.lengths[n]; first += K_) {
      const Rates rates = read(n, head, first);
      model_.forward(rates, t_, kept_);
      place_.write(t_.o, D, call_.o);
      for (int i = 0; i < KEPT; ++i) place_.write(kept_[i], Model::KEPT[i], call_.kept[i]);
    }
    for (int i = 0; i < WEIGHTS; ++i) write_weights(i, n, head, model_.weights(i), call_.outgoing[i]);
  }

  void backward(int64_t n, int64_t head) {
    start(n, head);
    const int64_t at = n * call_.H + head;
    t_.d_gamma = call_.d_gamma + at * D;
    t_.d_beta = call_.d_beta + at * D;
    for (int i = 0; i < WEIGHTS; ++i) {
      const T* given = call_.grad_weights[i] + n * call_.grad_strides[i] + head * Model::SIZES[i];
      std::copy_n(given, Model::SIZES[i], model_.gradients(i));
    }
    const int64_t length = call_.lengths[n];
    for (int64_t first = (length - 1) / K_ * K_; length > 0 && first >= 0; first -= K_) {
      Rates rates = read(n, head, first);
      rates.d_scale = call_.d_scale + at * K_;
      place_.read(call_.grad_o, D, t_.o);
      for (int i = 0; i < KEPT; ++i) place_.read(call_.kept[i], Model::KEPT[i], kept_[i]);
      std::fill_n(d_lr_, rates.r, T(0));
      model_.backward(rates, t_, kept_);
      place_.write(t_.dq, D, call_.dq);
      place_.write(t_.dk, D, call_.dk);
      place_.write(t_.dv, D, call_.dv);
      place_.write(d_lr_, 1, call_.d_lr);
    }
    for (int i = 0; i < WEIGHTS; ++i) write_weights(i, n, head, model_.gradients(i), call_.d_weights[i]);
  }

 private:
  const Call& call_;
  const int K_;
  Arena arena_;
  Model model_;
  Tokens t_{};
  Place place_{};
  T *kept_[KEPT], *lr_, *d_lr_;

  static size_t numbers(int K) {
    return Model::numbers(K) + 8 * Arena::rounded(K * D) + Arena::rounded(K * F) + 2 * Arena::rounded(K);
  }

  void start(int64_t n, int64_t head) {
    t_.gamma = call_.gamma + head * D;
    t_.beta = call_.beta + head * D;
    for (int i = 0; i < WEIGHTS; ++i) {
      const T* given = call_.weights[i] + n * call_.strides[i] + head * Model::SIZES[i];
      std::copy_n(given, Model::SIZES[i], model_.weights(i));
    }
  }

  Rates read(int64_t n, int64_t head, int64_t first) {
    const int r = std::min<int64_t>(K_, call_.lengths[n] - first);
    place_ = {call_.H, call_.starts[n] + first, head, r};
    place_.read(call_.q, D, t_.q);
    place_.read(call_.k, D, t_.k);
    place_.read(call_.v, D, t_.v);
    place_.read(call_.lr, 1, lr_);
    return {K_, r, call_.scale, lr_, nullptr, d_lr_};
  }

  void write_weights(int i, int64_t n, int64_t head, const T* from, T* to) const {
    std::copy_n(from, Model::SIZES[i], to + (n * call_.H + head) * Model::SIZES[i]);
  }
};

}  // namespace

// Rows begin to end - 1 of the N · H (sequence, head) pairs. Returns 1 if there is no memory.
extern "C" int ttt_forward(const Call* call, int64_t begin, int64_t end) try {
  Row row(*call);
  for (int64_t i = begin; i < end; ++i) row.forward(i / call->H, i % call->H);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

extern "C" int ttt_backward(const Call* call, int64_t begin, int64_t end) try {
  Row row(*call);
  for (int64_t i = begin; i < end; ++i) row.backward(i / call->H, i % call->H);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
