// A whole layer over sequences that begin, forwards or back, in one call or phase by phase: what whole_layer.py calls.
//
// Phases come one after the other, the units of a phase in any order, by one thread or several: which of them a thread
// takes changes no number. Numbers in brackets are equations of docs/mathematics.md.

#include <algorithm>

#include "around.h"
#include "scan_call.h"

namespace {

template <class P>
struct Tensors {  // of a layer, or their gradients; null where it has none
  P output, norm_weight, norm_bias, lr_weight, lr_bias, token_offset, ln_weight, ln_bias;
  P projections[3], convolutions[4], forgetting[2], weights[4];
};

struct PassCall {  // as whole_layer.py's
  int64_t H, K, taps, hidden, gates, segment;  // taps: of convolutions; hidden: features; gates that read x; 0 without
  double most_rate, norm_eps, eps;
  int (*forward)(const ScanCall*, int64_t, int64_t), (*backward)(const ScanCall*, int64_t, int64_t);  // of the inner loop
  const T *cos, *sin;
  // of a pass
  int64_t N, total, back;
  const int64_t *starts, *lengths;
  Tensors<const T*> given;
  Tensors<T*> gradients;
  const T* x;
  T *views, *o, *y, *kept;  // [total, width], [total, C], [total, C], and what else the way back needs
  const T* dy;
  T *d_views, *d_o;     // the latter's place is that of x's gradient too
  T *inside, *outside;  // memory for a pass, of what is up to the inner loop and of what is behind
};

// C [rows, N] = A B, or C += A B; A[i][m] = a[i * row + m * column]. GROUP_OF_ROWS rows are a unit of work. Of a long sum,
// some terms at a time are summed before they are added to the others.
struct ProductCall {  // as whole_layer.py's
  int64_t rows, M, N, row, column, b_stride, c_stride;
  const T *a, *b;
  T* c;
};
constexpr int GROUP_OF_ROWS = 16, SUMMED = 256;

int64_t groups(int64_t rows) { return (rows + GROUP_OF_ROWS - 1) / GROUP_OF_ROWS; }

TTT_ONCE void multiply(const ProductCall& call, int64_t begin, int64_t end, bool added = false) {
  const Strides strides{call.row, call.column, call.b_stride, call.c_stride, call.c_stride};
  begin *= GROUP_OF_ROWS;
  end = std::min(end * GROUP_OF_ROWS, call.rows);
  for (int64_t m = 0; m < call.M; m += SUMMED) {
    const T *a = call.a + begin * call.row + m * call.column, *b = call.b + m * call.b_stride;
    const int terms = std::min<int64_t>(SUMMED, call.M - m);
    T* c = call.c + begin * call.c_stride;
    if (m == 0 && !added) {
      wide_product<From::nothing>(end - begin, call.N, terms, a, b, c, strides);
    } else {
      wide_product<From::matrix>(end - begin, call.N, terms, a, b, c, strides);
    }
  }
}

// Vectors of columns begin to end - 1 of W [rows, rows] become rows of its transpose, `width` numbers apart.
TTT_ONCE void turn_over(int64_t rows, const T* W, int64_t begin, int64_t end, int64_t width, T* out) {
  for (int64_t i = begin * LANES; i < end * LANES; i += LANES) {
    for (int64_t j = 0; j < rows; j += LANES) transpose_tile(W + i * rows + j, rows, out + j * width + i, width);
  }
}

// The sum of some terms: pairs of sums of pairs, so that roundings of many do not add up.
template <class Term>
TTT_ONCE auto sum_of(int64_t begin, int64_t end, const Term& term) -> decltype(term(0)) {
  if (end - begin > 16) {
    const int64_t half = begin + (end - begin) / 2;
    return sum_of(begin, half, term) + sum_of(half, end, term);
  }
  auto total = term(begin);
  for (int64_t i = begin + 1; i < end; ++i) total += term(i);
  return total;
}

// result [size] = the sum of parts [rows, size].
TTT_ONCE void add_up(int64_t rows, int64_t size, const T* parts, T* result) {
  int64_t n = 0;
  for (; n + LANES <= size; n += LANES) {
    store(result + n, sum_of(0, rows, [=](int64_t i) { return load(parts + i * size + n); }));
  }
  for (; n < size; ++n) result[n] = sum_of(0, rows, [=](int64_t i) { return parts[i * size + n]; });
}

// Pieces of memory one behind the other; where there is none, how much they would take.
class Pieces {
 public:
  explicit Pieces(T* begin) : begin_(begin) {}
  T* take(size_t numbers) {
    T* piece = begin_ == nullptr ? nullptr : begin_ + taken_;
    taken_ += Arena::rounded(numbers);
    return piece;
  }
  int64_t taken() const { return taken_; }

 private:
  T* const begin_;
  size_t taken_ = 0;
};

enum Phase {
  PREPARE, PROJECT, BEFORE, SCAN,                             // inside, forwards
  PREPARE_OUTPUT, AFTER, OUTPUT,                              // outside, forwards
  BACK_OUTPUT, BACK_AFTER, D_OUTPUT, NORM_TOTALS,             // outside, back
  AGAIN, BACK_SCAN, BACK_BEFORE, D_PROJECTIONS, D_X, TOTALS,  // inside, back
};

class Pass {
 public:
  explicit Pass(const PassCall& call)
      : call_(call), C_(call.H * D), width_(3 * C_ + call.H + call.gates), kept_(call.kept), inside_(call.inside),
        outside_(call.outside),
        maps_{{C_, call.given.projections[0], call.gradients.projections[0]},
              {C_, call.given.projections[1], call.gradients.projections[1]},
              {C_, call.given.projections[2], call.gradients.projections[2]},
              {call.H, call.given.lr_weight, call.gradients.lr_weight},
              {call.gates, call.given.forgetting[1], call.gradients.forgetting[1]}} {
    divide();
    surround();
    fill_scan();
  }

  int64_t kept() const { return kept_.taken(); }
  int64_t inside() const { return inside_.taken(); }
  int64_t outside() const { return outside_.taken(); }

  // Of a phase.
  int64_t units(int phase) const {
    switch (phase) {
      case PREPARE: return 3 * C_ / LANES;
      case PREPARE_OUTPUT: return C_ / LANES;
      case PROJECT: case OUTPUT: case BACK_OUTPUT: case D_X: return groups(call_.total);
      case SCAN: case BACK_SCAN: return call_.N * call_.H;
      case D_OUTPUT: return groups(C_);
      case D_PROJECTIONS: return 3 * groups(C_) + groups(call_.H) + groups(call_.gates);
      case NORM_TOTALS: return 1;
      case AGAIN: return call_.taps > 0 ? call_.N : 0;
      case TOTALS: return SUMS;
      default: return call_.N;
    }
  }

  // Numbers that a phase reads, about: how much work it is.
  int64_t numbers(int phase) const {
    switch (phase) {
      case PREPARE: return 3 * C_ * C_;
      case PREPARE_OUTPUT: return C_ * C_;
      case NORM_TOTALS: return 2 * call_.N * C_;
      case TOTALS: return call_.N * (sizes_[0] + sizes_[1] + sizes_[2] + sizes_[3]);
      default: return call_.total * C_;
    }
  }

  void run(int phase, int64_t begin, int64_t end) const {
    const int64_t total = call_.total;
    const T *x = call_.x, *output = call_.given.output;
    switch (phase) {
      case PREPARE: return prepare(begin, end);
      case PROJECT: return multiply({total, C_, 3 * C_, C_, 1, 3 * C_, width_, x, turned_, call_.views}, begin, end);
      case BEFORE: return each(begin, end, [](const Around& around, int64_t n) { around.before(n), around.rates(n); });
      case SCAN: return check(call_.forward(&scan_, begin, end));
      case PREPARE_OUTPUT: return turn_over(C_, output, begin, end, C_, turned_output_);
      case AFTER: return each(begin, end, [](const Around& around, int64_t n) { around.after(n); });
      case OUTPUT: return multiply({total, C_, C_, C_, 1, C_, C_, around_.h, turned_output_, call_.y}, begin, end);
      case BACK_OUTPUT: return multiply({total, C_, C_, C_, 1, C_, C_, call_.dy, output, call_.d_o}, begin, end);
      case BACK_AFTER: return each(begin, end, [](const Around& around, int64_t n) { around.back_after(n); });
      case D_OUTPUT:
        return multiply({C_, total, C_, 1, C_, C_, C_, call_.dy, around_.h, call_.gradients.output}, begin, end);
      case NORM_TOTALS:
        add_up(call_.N, C_, around_.d_norm_weight, call_.gradients.norm_weight);
        return add_up(call_.N, C_, around_.d_norm_bias, call_.gradients.norm_bias);
      case AGAIN: return each(begin, end, [](const Around& around, int64_t n) { around.before(n); });
      case BACK_SCAN: return back_scan(begin, end);
      case BACK_BEFORE: return each(begin, end, [](const Around& around, int64_t n) { around.back_before(n); });
      case D_PROJECTIONS: return d_projections(begin, end);
      case D_X: return d_x(begin, end);
      case TOTALS: return totals(begin, end);
    }
  }

 private:
  // A linear map of x, whose outputs are columns of the views.
  struct Map {
    int64_t rows;
    const T* weight;
    T* gradient;
  };
  // A gradient as the sum of parts [rows, size].
  struct Sum {
    int64_t rows, size;
    const T* parts;
    T* gradient;
  };
  static constexpr int SUMS = 13;
  const PassCall& call_;
  const int64_t C_, width_;
  Pieces kept_, inside_, outside_;
  Surroundings around_{};
  ScanCall scan_{};
  const Map maps_[5];
  int64_t sizes_[4];  // of each weight of the inner model
  T *scale_, *inner_, *checkpoints_, *q_, *k_, *turned_, *turned_output_;
  T *d_lr_, *d_log_decay_, *d_scale_, *d_gamma_, *d_beta_, *d_weights_[4];

  // Shares the memory out. Of what all sequences add to, each has its own.
  void divide() {
    const int64_t H = call_.H, N = call_.N, total = call_.total, F = call_.hidden;
    const int64_t sizes[] = {D * (F == 0 ? D : F), F == 0 ? D : F, F * D, F == 0 ? 0 : D};
    int64_t weights = 0;
    for (int i = 0; i < 4; ++i) weights += sizes_[i] = H * sizes[i];
    around_.lr = kept_.take(total * H);
    around_.log_decay = kept_.take(forgets() ? total * H : 0);
    scale_ = kept_.take(call_.K);
    inner_ = kept_.take(total * C_);
    checkpoints_ = kept_.take(total / (call_.segment * call_.K) * weights);
    around_.h = outside_.take(total * C_);
    for (T** tokens : {&q_, &k_}) *tokens = inside_.take(call_.taps > 0 ? total * C_ : 0);
    if (!call_.back) {
      turned_ = inside_.take(3 * C_ * C_);
      turned_output_ = outside_.take(C_ * C_);
      return;
    }
    for (T** sums : {&around_.d_norm_weight, &around_.d_norm_bias}) *sums = outside_.take(N * C_);
    d_lr_ = inside_.take(total * H);
    d_log_decay_ = inside_.take(forgets() ? total * H : 0);
    around_.d_lr_bias = inside_.take(N * H);
    around_.d_forget_bias = inside_.take(N * H);
    d_scale_ = inside_.take(N * H * call_.K);
    for (T** sums : {&d_gamma_, &d_beta_}) *sums = inside_.take(N * C_);
    for (T** sums : {&around_.d_query_conv, &around_.d_key_conv}) *sums = inside_.take(N * call_.taps * C_);
    for (T** sums : {&around_.d_query_bias, &around_.d_key_bias}) *sums = inside_.take(call_.taps > 0 ? N * C_ : 0);
    for (int i = 0; i < 4; ++i) d_weights_[i] = inside_.take(N * sizes_[i]);
  }

  bool forgets() const { return call_.given.forgetting[0] != nullptr; }
  bool convolves() const { return call_.taps > 0; }

  void surround() {
    const auto& given = call_.given;
    Surroundings& a = around_;
    a.H = call_.H, a.K = call_.K, a.taps = call_.taps, a.width = width_, a.stride = convolves() ? C_ : width_;
    a.starts = call_.starts, a.lengths = call_.lengths;
    a.norm_eps = call_.norm_eps, a.most_rate = call_.most_rate;
    a.cos = call_.cos, a.sin = call_.sin;
    a.lr_weight = given.lr_weight, a.lr_bias = given.lr_bias;
    a.norm_weight = given.norm_weight, a.norm_bias = given.norm_bias;
    a.query_conv = given.convolutions[0], a.query_bias = given.convolutions[1];
    a.key_conv = given.convolutions[2], a.key_bias = given.convolutions[3];
    a.forget_bias = given.forgetting[0], a.forget_weight = given.forgetting[1];
    a.x = call_.x, a.views = call_.views, a.o = call_.o;
    a.q = convolves() ? q_ : call_.views, a.k = convolves() ? k_ : call_.views + C_;
    if (!call_.back) return;
    a.d_lr = d_lr_, a.d_log_decay = d_log_decay_;
    a.d_o = call_.d_o, a.d_views = call_.d_views;
    a.dq = convolves() ? q_ : call_.d_views, a.dk = convolves() ? k_ : call_.d_views + C_;  // where those were
  }

  void fill_scan() {
    const auto& given = call_.given;
    const int64_t v = convolves() ? C_ : 2 * C_;
    scan_.H = call_.H, scan_.K = call_.K, scan_.segment = call_.segment, scan_.eps = call_.eps;
    scan_.q_stride = scan_.k_stride = scan_.dq_stride = scan_.dk_stride = around_.stride;
    scan_.v_stride = scan_.dv_stride = width_;
    scan_.starts = call_.starts, scan_.lengths = call_.lengths;
    scan_.q = around_.q, scan_.k = around_.k, scan_.v = call_.views + v;
    scan_.lr = around_.lr, scan_.scale = scale_, scan_.gamma = given.ln_weight, scan_.beta = given.ln_bias;
    scan_.kept[call_.hidden == 0 ? 0 : 1] = inner_;  // not Z1, which is computed again
    scan_.checkpoints = checkpoints_, scan_.o = call_.o;
    if (forgets()) scan_.log_decay = around_.log_decay, scan_.d_log_decay = call_.back ? d_log_decay_ : nullptr;
    for (int i = 0; i < 4; ++i) scan_.weights[i] = scan_.initial[i] = given.weights[i];  // of all sequences: no strides
    if (!call_.back) return;
    scan_.grad_o = call_.d_o;
    scan_.dq = around_.dq, scan_.dk = around_.dk, scan_.dv = call_.d_views + v;
    scan_.d_lr = d_lr_, scan_.d_scale = d_scale_, scan_.d_gamma = d_gamma_, scan_.d_beta = d_beta_;
    for (int i = 0; i < 4; ++i) scan_.d_weights[i] = d_weights_[i];
  }

  static void check(int failed) {
    if (failed) throw std::bad_alloc();
  }

  template <class Work>
  void each(int64_t begin, int64_t end, const Work& work) const {
    const Around around(around_);
    for (int64_t n = begin; n < end; ++n) work(around, n);
  }

  // The projections transposed, side by side; and s, (31).
  TTT_ONCE void prepare(int64_t begin, int64_t end) const {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t map = unit * LANES / C_, vector = unit - map * C_ / LANES;
      turn_over(C_, maps_[map].weight, vector, vector + 1, 3 * C_, turned_ + map * C_);
    }
    for (int64_t i = 0; begin == 0 && i < call_.K; ++i) {
      const T scale = unbounded_scale(i);
      scale_[i] = scale < 0 ? 0 : scale;  // NaN stays
    }
  }

  // s before it is kept from being negative. At zero its gradient is the offset's still, as clamp_min has it; at NaN not.
  T unbounded_scale(int64_t i) const { return T(1) / (i + 1) + call_.given.token_offset[i]; }

  TTT_ONCE void back_scan(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      std::fill_n(d_scale_ + i * call_.K, call_.K, T(0));
      for (T* sums : {d_gamma_, d_beta_}) std::fill_n(sums + i * D, D, T(0));
      const int64_t n = i / call_.H, head = i % call_.H;
      for (int64_t t = 0; forgets() && t < call_.lengths[n]; ++t) {
        d_log_decay_[(call_.starts[n] + t) * call_.H + head] = 0;
      }
    }
    check(call_.backward(&scan_, begin, end));
  }

  void d_projections(int64_t begin, int64_t end) const {
    int64_t column = 0, first = 0;
    for (const Map& map : maps_) {
      const int64_t last = first + groups(map.rows), from = std::max(begin, first), to = std::min(end, last);
      const T* d = call_.d_views + column;
      if (from < to) {
        multiply({map.rows, call_.total, C_, 1, width_, C_, C_, d, call_.x, map.gradient}, from - first, to - first);
      }
      column += map.rows, first = last;
    }
  }

  void d_x(int64_t begin, int64_t end) const {
    int64_t column = 0;
    for (const Map& map : maps_) {
      const T* d = call_.d_views + column;
      const ProductCall call{call_.total, map.rows, C_, width_, 1, C_, C_, d, map.weight, call_.d_o};
      if (map.rows > 0) multiply(call, begin, end, column > 0);
      column += map.rows;
    }
  }

  TTT_ONCE void totals(int64_t begin, int64_t end) const {
    const auto& d = call_.gradients;
    const int64_t N = call_.N, H = call_.H, taps = call_.taps * C_, gates = forgets() ? H : 0, C = convolves() ? C_ : 0;
    const Sum sums[SUMS] = {
        {N * H, call_.K, d_scale_, d.token_offset}, {N, C_, d_gamma_, d.ln_weight}, {N, C_, d_beta_, d.ln_bias},
        {N, H, around_.d_lr_bias, d.lr_bias}, {N, gates, around_.d_forget_bias, d.forgetting[0]},
        {N, taps, around_.d_query_conv, d.convolutions[0]}, {N, C, around_.d_query_bias, d.convolutions[1]},
        {N, taps, around_.d_key_conv, d.convolutions[2]}, {N, C, around_.d_key_bias, d.convolutions[3]},
        {N, sizes_[0], d_weights_[0], d.weights[0]}, {N, sizes_[1], d_weights_[1], d.weights[1]},
        {N, sizes_[2], d_weights_[2], d.weights[2]}, {N, sizes_[3], d_weights_[3], d.weights[3]},
    };
    for (int64_t unit = begin; unit < end; ++unit) {
      const Sum& sum = sums[unit];
      if (sum.gradient != nullptr && (sum.gradient == d.convolutions[0] || sum.gradient == d.convolutions[2])) {
        add_up_taps(sum.parts, sum.gradient);
      } else {
        add_up(sum.rows, sum.size, sum.parts, sum.gradient);
      }
      for (int64_t i = 0; unit == 0 && i < call_.K; ++i) {
        if (!(unbounded_scale(i) >= 0)) d.token_offset[i] = 0;
      }
    }
  }

  // What is summed as [taps, C] is [C, taps].
  void add_up_taps(const T* parts, T* gradient) const {
    const int64_t taps = call_.taps, size = taps * C_;
    for (int64_t i = 0; i < size; ++i) {
      gradient[i % C_ * taps + i / C_] = sum_of(0, call_.N, [=](int64_t n) { return parts[n * size + i]; });
    }
  }
};

}  // namespace

// For whole_layer.py, to be compared with its own.
TTT_EXPORT int64_t ttt_pass_call_size() { return sizeof(PassCall); }
TTT_EXPORT int64_t ttt_product_call_size() { return sizeof(ProductCall); }

// How many numbers a pass keeps, and needs for itself up to the inner loop and behind it.
TTT_EXPORT void ttt_pass_memory(const PassCall* call, int64_t* numbers) {
  const Pass pass(*call);
  numbers[0] = pass.kept(), numbers[1] = pass.inside(), numbers[2] = pass.outside();
}

// How many units a phase has, and about how many numbers it reads.
TTT_EXPORT void ttt_pass_units(const PassCall* call, int64_t phase, int64_t* numbers) {
  const Pass pass(*call);
  numbers[0] = pass.units(phase), numbers[1] = pass.numbers(phase);
}

// Units begin to end - 1 of a phase. Returns 1 if there is no memory.
TTT_EXPORT int ttt_pass_phase(const PassCall* call, int64_t phase, int64_t begin, int64_t end) try {
  Pass(*call).run(phase, begin, end);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// All of the phases first to end - 1. Returns 1 if there is no memory.
TTT_EXPORT int ttt_pass(const PassCall* call, int64_t first, int64_t end) try {
  const Pass pass(*call);
  for (int64_t phase = first; phase < end; ++phase) pass.run(phase, 0, pass.units(phase));
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// Groups of rows begin to end - 1 of a product. Returns 0.
TTT_EXPORT int ttt_product(const ProductCall* call, int64_t begin, int64_t end) {
  multiply(*call, begin, end);
  return 0;
}
