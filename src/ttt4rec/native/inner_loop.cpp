// The walk over the mini-batches of every (sequence, head), forwards and back: what inner_loop.py calls. A mini-batch of
// more than BLOCK tokens is walked block by block, on the way back from its last one, after all of them were replayed.
//
// The forward reads each token once and keeps the weights in cache. Of every `segment` mini-batches but the first it
// writes down the weights before them. The walk back takes one segment after the other, from the last: it replays the
// updates, forwards, from the weights written down, holds the weights before each mini-batch of the segment in cache,
// and goes back over them; a segment with more of them than the cache takes is done in parts. So it works at the
// forward's very weights. Rows are independent of each other: which of them a thread takes changes no number.
//
// Numbers in brackets are equations of docs/mathematics.md.

#include <algorithm>
#include <cmath>
#include <vector>

#include "inner_models.h"
#include "scan_call.h"

namespace {

using Model = InnerModel<F>;
using State = Model::State;
constexpr int WEIGHTS = Model::WEIGHTS, KEPT = WEIGHTS / 2;

using Call = ScanCall;

// Copies r rows of a head between [total, H, width], from a token on, and a tile.
struct Place {
  int64_t H, token, head;
  int r;

  template <int WIDTH>
  void read(const T* x, T* tile) const {
    read<WIDTH>(x, H * WIDTH, tile);
  }
  template <int WIDTH>
  void read(const T* x, int64_t stride, T* tile) const {
    for (int i = 0; i < r; ++i) copy<WIDTH>(x + (token + i) * stride + head * WIDTH, tile + i * WIDTH);
  }
  template <int WIDTH>
  void write(const T* tile, T* x) const {
    write<WIDTH>(tile, x, H * WIDTH);
  }
  template <int WIDTH>
  void write(const T* tile, T* x, int64_t stride) const {
    for (int i = 0; i < r; ++i) copy<WIDTH>(tile + i * WIDTH, x + (token + i) * stride + head * WIDTH);
  }

  // Have the cache bring rows that are read, or written, soon: they lie apart, so it does not see them come.
  template <int WIDTH, bool WRITTEN = false>
  void expect(const T* x, int64_t stride) const {
    constexpr int LINE = 64 / sizeof(T);
    for (int i = 0; i < r; ++i) {
      for (int n = 0; n < WIDTH; n += LINE) __builtin_prefetch(x + (token + i) * stride + head * WIDTH + n, WRITTEN);
    }
  }

 private:
  // As vectors: for so few numbers calls of memmove take a multiple.
  template <int WIDTH>
  static void copy(const T* from, T* to) {
    if constexpr (WIDTH == 1) {
      *to = *from;
    } else {
      for (int n = 0; n < WIDTH; n += LANES) store(to + n, load(from + n));
    }
  }
};

// The states before several mini-batches that the walk back holds: about what the second cache takes, and some at least.
constexpr int64_t HELD_BYTES = 1 << 20, LEAST_HELD = 8;

// `room` states serve (room + times - 1 over times) mini-batches if none is replayed more than `times` times: hold them
// all (once); or go ahead, serve those behind from there with one state less, and go back to those before with one time
// less. This is how far to go ahead among that many mini-batches, more than the room.
int64_t steps_ahead(int64_t mini_batches, int64_t room) {
  int64_t served = room, with_one_less = room - 1;
  for (int64_t times = 2; served < mini_batches; ++times) {
    served = served * (room + times - 1) / times;
    with_one_less = with_one_less * (room + times - 2) / times;
  }
  return std::max<int64_t>(mini_batches - with_one_less, 1);
}

class Row {
 public:
  Row(const Call& call, int64_t states, bool back)
      : call_(call), K_(call.K), row_(row_of_tokens(rows_of_tiles(call.K))), arena_(numbers(call, states, back)),
        model_(arena_, call.K, back) {
    const int R = rows_of_tiles(K_);
    for (T** tile : {&t_.q, &t_.k, &t_.v, &t_.o, &t_.dq, &t_.dk, &t_.dv}) *tile = arena_.take(R * D);
    for (int i = 0; i < KEPT; ++i) kept_[i] = arena_.take(R * Model::KEPT[i]);
    lr_ = arena_.take(row_);
    eta_ = arena_.take(tokens_by_tokens(R));
    std::fill_n(eta_, tokens_by_tokens(R), T(0));
    d_lr_ = arena_.take(R);
    d_scale_ = arena_.take(K_);
    t_.d_gamma = arena_.take(D);
    t_.d_beta = arena_.take(D);
    t_.eps = call.eps;
    for (int64_t i = 0; i < states; ++i) states_.emplace_back(arena_, K_);
    if (call.log_decay != nullptr) {
      log_decay_ = arena_.take(K_);
      for (int i = 0; back && i < WEIGHTS; ++i) forgetting_.d_initial[i] = arena_.take(Model::SIZES[i]);
    }
  }

  void forward(int64_t n, int64_t head) {
    start(n, head);
    for (int64_t m = 0; m < mini_batches(n); ++m) {
      if (m % call_.segment == 0 && m > 0) copy_weights(states_[0].weights, checkpoint(n, head, m));
      begin(n, head, m);
      for (int block = 0; block < blocks(n, m); ++block) {
        const Rates rates = read(n, head, m, block);
        place_.read<D>(call_.q, call_.q_stride, t_.q);
        place_.read<D>(call_.v, call_.v_stride, t_.v);
        expect(next(n, head, m, block));
        model_.forward(rates, t_, kept_, states_[0]);
        place_.write<D>(t_.o, call_.o);
        if (keeps_Z1()) place_.write<F>(kept_[0], call_.kept[0]);
        place_.write<D>(kept_[KEPT - 1], call_.kept[KEPT - 1]);
      }
    }
    if (call_.outgoing[0] == nullptr) return;
    for (int i = 0; i < WEIGHTS; ++i) write_weights(i, n, head, states_[0].weights[i], call_.outgoing[i]);
  }

  void backward(int64_t n, int64_t head) {
    for (int i = 0; i < WEIGHTS; ++i) {
      if (call_.grad_weights[i] == nullptr) {
        std::fill_n(model_.gradients(i), Model::SIZES[i], T(0));
        continue;
      }
      const T* given = call_.grad_weights[i] + n * call_.grad_strides[i] + head * Model::SIZES[i];
      std::copy_n(given, Model::SIZES[i], model_.gradients(i));
    }
    for (int i = 0; forgets() && i < WEIGHTS; ++i) std::fill_n(forgetting_.d_initial[i], Model::SIZES[i], T(0));
    for (int64_t end = mini_batches(n), first; end > 0; end = first) {
      first = (end - 1) / call_.segment * call_.segment;
      load(n, head, first);
      back(n, head, first, end, 0);
    }
    for (int i = 0; i < WEIGHTS; ++i) {
      T* const own = model_.gradients(i);
      if (forgets() && call_.d_initial[i] != nullptr) {
        write_weights(i, n, head, forgetting_.d_initial[i], call_.d_initial[i]);
      } else if (forgets()) {
        for (int m = 0; m < Model::SIZES[i]; ++m) own[m] += forgetting_.d_initial[i][m];
      }
      write_weights(i, n, head, own, call_.d_weights[i]);
    }
  }

 private:
  const Call& call_;
  const int K_, row_;  // row_: see row_of_tokens
  Arena arena_;
  Model model_;
  std::vector<State> states_;
  Tokens t_{};
  Place place_{};
  Forgetting forgetting_{};
  T* log_decay_ = nullptr;
  T *kept_[KEPT], *lr_, *eta_, *d_lr_, *d_scale_;  // t_.d_gamma, t_.d_beta and d_scale_ are sums of one mini-batch

  static size_t numbers(const Call& call, int64_t states, bool back) {
    const int K = call.K, R = rows_of_tiles(K);
    size_t forgetting = call.log_decay == nullptr ? 0 : Arena::rounded(K);
    for (int i = 0; back && forgetting > 0 && i < WEIGHTS; ++i) forgetting += Arena::rounded(Model::SIZES[i]);
    return Model::numbers(K, back) + states * State::numbers(K) + 8 * Arena::rounded(R * D) + Arena::rounded(R * F) +
           Arena::rounded(R) + Arena::rounded(row_of_tokens(R)) + tokens_by_tokens(R) + Arena::rounded(K) +
           2 * Arena::rounded(D) + forgetting;
  }

  bool forgets() const { return call_.log_decay != nullptr; }

  // Before the steps of mini-batch m, or before the way back over it: what its end forgets. A short one forgets nothing.
  void begin(int64_t n, int64_t head, int64_t m) {
    if (!forgets() || tokens(n, m) < K_) return;
    forgetting_.share = -std::expm1(log_decay(n, head, m));
    forgetting_.along = V{};
    for (int i = 0; i < WEIGHTS; ++i) forgetting_.initial[i] = call_.initial[i] + head * Model::SIZES[i];
  }

  // ln A
  T log_decay(int64_t n, int64_t head, int64_t m) {
    Place{call_.H, call_.starts[n] + m * K_, head, K_}.read<1>(call_.log_decay, log_decay_);
    T total = 0;
    for (int i = 0; i < K_; ++i) total += log_decay_[i];
    return total;
  }

  // d ln a of every token of a mini-batch, (41), behind the way back over it.
  void write_d_log_decay(int64_t n, int64_t head, int64_t m) {
    if (!forgets() || tokens(n, m) < K_) return;
    const T d = std::exp(log_decay(n, head, m)) * sum(forgetting_.along);
    std::fill_n(log_decay_, K_, d);
    Place{call_.H, call_.starts[n] + m * K_, head, K_}.write<1>(log_decay_, call_.d_log_decay);
  }

  bool keeps_Z1() const { return F > 0 && call_.kept[0] != nullptr; }

  int64_t mini_batches(int64_t n) const { return (call_.lengths[n] + K_ - 1) / K_; }

  // Tokens and blocks of mini-batch m.
  int tokens(int64_t n, int64_t m) const { return std::min<int64_t>(K_, call_.lengths[n] - m * K_); }
  int blocks(int64_t n, int64_t m) const { return blocks_of(tokens(n, m)); }

  // Of mini-batch m, the first of a segment. A segment that is not its sequence's first comes after a whole one, so no
  // two of them begin among the same `segment K` tokens.
  T* checkpoint(int64_t n, int64_t head, int64_t m) const {
    int64_t size = 0;
    for (int each : Model::SIZES) size += each;
    const int64_t slot = (call_.starts[n] + m * K_) / (call_.segment * K_) - 1;
    return call_.checkpoints + (slot * call_.H + head) * size;
  }

  static void copy_weights(T* const* weights, T* to) {
    for (int i = 0; i < WEIGHTS; to += Model::SIZES[i++]) std::copy_n(weights[i], Model::SIZES[i], to);
  }

  void start(int64_t n, int64_t head) {
    for (int i = 0; i < WEIGHTS; ++i) {
      const T* given = call_.weights[i] + n * call_.strides[i] + head * Model::SIZES[i];
      std::copy_n(given, Model::SIZES[i], states_[0].weights[i]);
    }
  }

  // The weights before mini-batch `first` of a segment, into states_[0].
  void load(int64_t n, int64_t head, int64_t first) {
    if (first == 0) return start(n, head);
    const T* from = checkpoint(n, head, first);
    for (int i = 0; i < WEIGHTS; from += Model::SIZES[i++]) std::copy_n(from, Model::SIZES[i], states_[0].weights[i]);
  }

  // Back over mini-batches first to end - 1. states_[at] has the weights before them and stays; those behind it are free.
  TTT_ONCE void back(int64_t n, int64_t head, int64_t first, int64_t end, int64_t at) {
    for (int64_t room = states_.size() - at, middle; end - first > room; end = middle) {
      middle = first + steps_ahead(end - first, room);
      for (int64_t m = first; m < middle; ++m) replay(n, head, m, states_[at + (m > first)], &states_[at + 1]);
      back(n, head, middle, end, at + 1);
    }
    State* const own = &states_[at];
    for (int64_t m = first, i = 0; m < end; ++m, ++i) replay(n, head, m, own[i], m + 1 < end ? &own[i + 1] : nullptr);
    for (int64_t m = end - 1; m >= first; --m) {
      if (K_ > BLOCK && m < end - 1) replay(n, head, m, own[m - first], nullptr);  // for its blocks' sums
      backward(n, head, m, own[m - first]);
    }
  }

  TTT_ONCE void replay(int64_t n, int64_t head, int64_t m, State& state, State* next_state) {
    if (next_state != nullptr) begin(n, head, m);
    for (int block = 0; block < blocks(n, m); ++block) {
      const Rates rates = read(n, head, m, block);
      read_kept(rates, state, true);
      const Place coming = next(n, head, m, block);
      coming.expect<D>(call_.k, call_.k_stride);
      if (keeps_Z1()) coming.expect<F>(call_.kept[0], call_.H * F);
      coming.expect<D>(call_.kept[KEPT - 1], call_.H * D);
      model_.replay(rates, t_.k, kept_, state, next_state);
    }
  }

  TTT_ONCE void backward(int64_t n, int64_t head, int64_t m, const State& state) {
    for (T* sum : {t_.d_gamma, t_.d_beta}) std::fill_n(sum, D, T(0));
    std::fill_n(d_scale_, K_, T(0));
    begin(n, head, m);
    model_.begin_backward();
    Rates rates{};
    for (int block = blocks(n, m) - 1; block >= 0; --block) {
      rates = read(n, head, m, block);
      place_.read<D>(call_.q, call_.q_stride, t_.q);
      place_.read<D>(call_.v, call_.v_stride, t_.v);
      place_.read<D>(call_.grad_o, t_.o);
      read_kept(rates, state, K_ > BLOCK);
      expect_back(previous(n, head, m, block));
      std::fill_n(d_lr_, rates.r, T(0));
      model_.backward(rates, t_, kept_, state);
      place_.write<D>(t_.dq, call_.dq, call_.dq_stride);
      place_.write<D>(t_.dk, call_.dk, call_.dk_stride);
      place_.write<D>(t_.dv, call_.dv, call_.dv_stride);
      place_.write<1>(d_lr_, call_.d_lr);
    }
    model_.end_backward(rates);
    write_d_log_decay(n, head, m);
    const int64_t at = n * call_.H + head;
    add<D>(call_.d_gamma + at * D, t_.d_gamma);
    add<D>(call_.d_beta + at * D, t_.d_beta);
    for (int i = 0; i < tokens(n, m); ++i) call_.d_scale[at * K_ + i] += d_scale_[i];
  }

  // Of a block of mini-batch m, without rows if there is none.
  Place place(int64_t n, int64_t head, int64_t m, int block) const {
    const int64_t first = block * BLOCK, rest = m < 0 ? 0 : std::min<int64_t>(K_, call_.lengths[n] - m * K_) - first;
    return {call_.H, call_.starts[n] + m * K_ + first, head, int(std::max<int64_t>(std::min<int64_t>(BLOCK, rest), 0))};
  }

  // Of the block behind one, and of that before.
  Place next(int64_t n, int64_t head, int64_t m, int block) const {
    return block + 1 < blocks(n, m) ? place(n, head, m, block + 1) : place(n, head, m + 1, 0);
  }
  Place previous(int64_t n, int64_t head, int64_t m, int block) const {
    return block > 0 ? place(n, head, m, block - 1) : place(n, head, m - 1, blocks_of(K_) - 1);
  }

  void expect(const Place& coming) const {
    coming.expect<D>(call_.q, call_.q_stride);
    coming.expect<D>(call_.k, call_.k_stride);
    coming.expect<D>(call_.v, call_.v_stride);
    coming.expect<D, true>(call_.o, call_.H * D);
    if (keeps_Z1()) coming.expect<F, true>(call_.kept[0], call_.H * F);
    coming.expect<D, true>(call_.kept[KEPT - 1], call_.H * D);
  }

  void expect_back(const Place& coming) const {
    coming.expect<D>(call_.q, call_.q_stride);
    coming.expect<D>(call_.v, call_.v_stride);
    coming.expect<D>(call_.grad_o, call_.H * D);
    coming.expect<D, true>(call_.dq, call_.dq_stride);
    coming.expect<D, true>(call_.dk, call_.dk_stride);
    coming.expect<D, true>(call_.dv, call_.dv_stride);
  }

  // k and the rates of a block of mini-batch m.
  Rates read(int64_t n, int64_t head, int64_t m, int block) {
    const int first = block * BLOCK, all = tokens(n, m);
    place_ = place(n, head, m, block);
    t_.gamma = call_.gamma + head * D;
    t_.beta = call_.beta + head * D;
    place_.read<D>(call_.k, call_.k_stride, t_.k);
    place_.read<1>(call_.lr, lr_);
    const T* scale = call_.scale + first;
    for (int i = 0; i < place_.r; ++i) {
      for (int j = 0; j < row_; ++j) eta_[i * row_ + j] = j > i ? 0 : scale[i] * lr_[j];
    }
    return {place_.r, row_, block, first + place_.r == all, all == K_, call_.scale[K_ - 1], scale, lr_, eta_,
            d_scale_ + first, d_scale_ + K_ - 1, d_lr_, forgets() && all == K_ ? &forgetting_ : nullptr};
  }

  // What was kept of the block that was read; Z1, if it is wanted, is computed again where it was not.
  void read_kept(const Rates& rates, const State& state, bool Z1) {
    place_.read<D>(call_.kept[KEPT - 1], kept_[KEPT - 1]);
    if (F == 0 || !Z1) return;
    if (keeps_Z1()) {
      place_.read<F>(call_.kept[0], kept_[0]);
    } else {
      model_.first_outputs(rates.r, t_.k, state, kept_[0]);
    }
  }

  void write_weights(int i, int64_t n, int64_t head, const T* from, T* to) const {
    std::copy_n(from, Model::SIZES[i], to + (n * call_.H + head) * Model::SIZES[i]);
  }
};

}  // namespace

// For inner_loop.py, to be compared with its own.
TTT_EXPORT int64_t ttt_call_size() { return sizeof(Call); }

// Rows begin to end - 1 of the N · H (sequence, head) pairs. Returns 1 if there is no memory.
TTT_EXPORT int ttt_forward(const Call* call, int64_t begin, int64_t end) try {
  Row row(*call, 1, false);
  for (int64_t i = begin; i < end; ++i) row.forward(i / call->H, i % call->H);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

TTT_EXPORT int ttt_backward(const Call* call, int64_t begin, int64_t end) try {
  int64_t longest = 0;
  for (int64_t i = begin; i < end; ++i) longest = std::max(longest, call->lengths[i / call->H]);
  const int64_t fit = HELD_BYTES / (State::numbers(call->K) * sizeof(T)), room = std::max(fit, LEAST_HELD);
  Row row(*call, std::min({(longest + call->K - 1) / call->K, call->segment, room}), true);
  for (int64_t i = begin; i < end; ++i) row.backward(i / call->H, i % call->H);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
