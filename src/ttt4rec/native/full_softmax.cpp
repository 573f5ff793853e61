// Rows of scores, one pass over memory each way: the logarithm of the sum of their exponentials, and the gradient of a
// softmax's negative log-likelihood, which takes their place. Sums go on in double after every CHUNK vectors.
//
// And both at once, with all products, for a sum of losses (`Total`): scores lie by tiles of items, a tile's by panels of
// hidden states, which are the lanes, so that nothing is summed across a vector. A tile's exponentials are taken once,
// relative to its own highest scores, while it lies in the first cache.

#include <algorithm>

#include "tiles.h"

// The newer name, of the same function, would ask for a system of 2019.
#if defined(__x86_64__) && defined(__GLIBC__)
asm(".symver log, log@GLIBC_2.2.5");
#elif defined(__aarch64__) && defined(__GLIBC__)
asm(".symver log, log@GLIBC_2.17");
#endif

namespace {

constexpr int CHUNK = 64;

struct Call {
  int64_t columns, stride;  // numbers in a row of scores, and from one row to the next
  T* scores;
  double* lse;
  const int64_t* column;  // of every row: that of its target, if it is among these columns
  const T* grad;
};

// The last, incomplete vector of a row; the lanes beyond its end hold FILL.
inline V load_rest(const T* x, int64_t count, T fill) {
  V value = all(fill);
  std::memcpy(&value, x, count * sizeof(T));
  return value;
}

inline T highest(const T* x, int64_t columns) {
  const int64_t whole = columns / LANES * LANES;
  V most = load_rest(x + whole, columns - whole, x[0]);
  for (int64_t n = 0; n < whole; n += LANES) {
    const V value = load(x + n);
    most = value > most ? value : most;
  }
  T found = most[0];
  for (int i = 1; i < LANES; ++i) found = most[i] > found ? most[i] : found;
  return found;
}

double log_sum_exp(const T* x, int64_t columns) {
  const T top = highest(x, columns);
  if (std::isinf(top)) return top;
  const int64_t whole = columns / LANES * LANES;
  double total = 0;
  for (int64_t n = 0; n < whole;) {
    const int64_t end = n + CHUNK * LANES < whole ? n + CHUNK * LANES : whole;
    V part{};
    for (; n < end; n += LANES) part += exponential(load(x + n) - top);
    total += sum(part);
  }
  const V rest = exponential(load_rest(x + whole, columns - whole, top) - top);
  for (int64_t i = 0; i < columns - whole; ++i) total += rest[i];
  return top + std::log(total);
}

// x := grad · (exp(x - lse) - [column of the target])
void to_gradient(T* x, int64_t columns, T lse, int64_t column, T grad) {
  const int64_t whole = columns / LANES * LANES;
  for (int64_t n = 0; n < whole; n += LANES) store(x + n, grad * exponential(load(x + n) - lse));
  const V rest = grad * exponential(load_rest(x + whole, columns - whole, lse) - lse);
  std::memcpy(x + whole, &rest, (columns - whole) * sizeof(T));
  if (0 <= column && column < columns) x[column] -= grad;
}

constexpr int TILE = 64, PANEL = 64;  // items and hidden states
constexpr int RANGES = 16;            // of tiles, shared out among threads

// The sum of losses of some hidden states, and its gradients.
struct TotalCall {
  int64_t rows, items, width;  // C, a multiple of LANES
  const T *h, *table;          // [rows, C], [items, C]
  const int64_t* column;       // [rows], each one's target among the items
  T* turned;                   // h transposed, [panels, C, PANEL], zero beyond the last hidden state
  T* scores;                   // [tiles, panels, TILE, PANEL]: exponentials, after the scores
  T *highest, *total;          // [tiles, panels, PANEL]: of a tile's scores, and the sum of exponentials relative to it
  T* parts;                    // [RANGES, rows, C], of grad_h
  double *lse, *own;           // [rows]: log of all exponentials' sum, score of the target
  T *grad_h, *grad_table;      // [rows, C], [items, C]; to the latter is added
};

class Total {
 public:
  explicit Total(const TotalCall& call)
      : call_(call), C_(call.width), panels_((call.rows + PANEL - 1) / PANEL), tiles_((call.items + TILE - 1) / TILE) {}

  void turn(int64_t panel) const {
    T* to = call_.turned + panel * C_ * PANEL;
    std::fill_n(to, C_ * PANEL, T(0));
    for (int64_t i = 0; i < rows_of(panel); ++i) {
      const T* h = call_.h + (panel * PANEL + i) * C_;
      for (int64_t c = 0; c < C_; ++c) to[c * PANEL + i] = h[c];
    }
  }

  // Exponentials of a tile, and its part of the sums.
  void exponentials(int64_t tile) const {
    const int64_t first = tile * TILE, items = items_of(tile);
    const T* table = call_.table + first * C_;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      T* scores = scores_of(tile, panel);
      const int64_t at = (tile * panels_ + panel) * PANEL, lanes = lanes_of(panel);
      wide_product<From::nothing>(
          items, lanes, C_, table, call_.turned + panel * C_ * PANEL, scores, {C_, 1, PANEL, PANEL, 0});
      for (int64_t i = 0; i < rows_of(panel); ++i) {
        const int64_t row = panel * PANEL + i, item = call_.column[row] - first;
        if (0 <= item && item < items) call_.own[row] = scores[item * PANEL + i];
      }
      int64_t n = 0;
      for (; n + MOST_VECTORS * LANES <= lanes; n += MOST_VECTORS * LANES) {
        exponentials_of<MOST_VECTORS>(items, scores + n, at + n);
      }
      for (; n < lanes; n += LANES) exponentials_of<1>(items, scores + n, at + n);
    }
  }

  // The logarithm of all tiles' sums.
  void log_of_sums(int64_t panel) const {
    for (int64_t n = 0; n < lanes_of(panel); n += LANES) log_of_sums_from(panel * PANEL + n);
  }

  // The scores' gradients in a range of tiles, and what they give: to the table's, and this range's part of the hidden
  // states'. They are in cache for both, and nowhere else.
  void gradients(int64_t range) const {
    alignas(64) T d_scores[TILE * PANEL];
    T* const parts = call_.parts + range * call_.rows * C_;
    std::fill_n(parts, call_.rows * C_, T(0));
    for (int64_t tile = range * tiles_ / RANGES; tile < (range + 1) * tiles_ / RANGES; ++tile) {
      const int64_t first = tile * TILE, items = items_of(tile);
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const int64_t rows = rows_of(panel), at = panel * PANEL * C_;
        gradients_of_scores(tile, panel, d_scores);
        wide_product<From::matrix>(
            items, C_, rows, d_scores, call_.h + at, call_.grad_table + first * C_, {PANEL, 1, C_, C_, C_});
        wide_product<From::matrix>(
            rows, C_, items, d_scores, call_.table + first * C_, parts + at, {1, PANEL, C_, C_, C_});
      }
    }
  }

  // The hidden states' gradients from the ranges' parts.
  void hidden(int64_t panel) const {
    const int64_t begin = panel * PANEL * C_, end = begin + rows_of(panel) * C_;
    for (int64_t n = begin; n < end; n += LANES) {
      V total = load(call_.parts + n);
      for (int range = 1; range < RANGES; ++range) total += load(call_.parts + range * call_.rows * C_ + n);
      store(call_.grad_h + n, total);
    }
  }

 private:
  const TotalCall& call_;
  const int64_t C_, panels_, tiles_;

  static V larger(V a, V b) { return a > b ? a : b; }

  int64_t items_of(int64_t tile) const { return std::min<int64_t>(TILE, call_.items - tile * TILE); }
  int64_t rows_of(int64_t panel) const { return std::min<int64_t>(PANEL, call_.rows - panel * PANEL); }
  int64_t lanes_of(int64_t panel) const { return (rows_of(panel) + LANES - 1) / LANES * LANES; }
  T* scores_of(int64_t tile, int64_t panel) const { return call_.scores + (tile * panels_ + panel) * TILE * PANEL; }

  void gradients_of_scores(int64_t tile, int64_t panel, T* out) const {
    const int64_t items = items_of(tile), rows = rows_of(panel), at = (tile * panels_ + panel) * PANEL;
    const T *scores = scores_of(tile, panel), *ahead = scores_of(tile, panel + 1);
    alignas(64) T factor[PANEL] = {};
    for (int64_t i = 0; i < rows; ++i) factor[i] = call_.lse[panel * PANEL + i];
    for (int64_t n = 0; n < lanes_of(panel); n += LANES) {
      store(factor + n, exponential(load(call_.highest + at + n) - load(factor + n)));
    }
    for (int64_t item = 0; item < items; ++item) {
#pragma GCC unroll 16
      for (int n = 0; n < PANEL; n += LANES) {
        const int64_t place = item * PANEL + n;
        __builtin_prefetch(ahead + place);
        store(out + place, load(scores + place) * load(factor + n));
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t item = call_.column[panel * PANEL + i] - tile * TILE;
      if (0 <= item && item < items) out[item * PANEL + i] -= 1;
    }
  }

  void log_of_sums_from(int64_t at) const {
    const int64_t step = panels_ * PANEL;
    V highest = load(call_.highest + at);
    for (int64_t tile = 1; tile < tiles_; ++tile) highest = larger(load(call_.highest + tile * step + at), highest);
    double sums[LANES] = {};
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const T* more = call_.highest + tile * step + at;
      const V part = load(call_.total + tile * step + at) * exponential(load(more) - highest);
      for (int i = 0; i < LANES; ++i) sums[i] += part[i];
    }
    for (int i = 0; i < LANES && at + i < call_.rows; ++i) call_.lse[at + i] = highest[i] + std::log(sums[i]);
  }

  // Of a tile and some vectors of hidden states, `at` among the sums.
  template <int VECTORS>
  void exponentials_of(int64_t items, T* scores, int64_t at) const {
    V highest[VECTORS], total[VECTORS] = {};
    for (int n = 0; n < VECTORS; ++n) highest[n] = load(scores + n * LANES);
    for (int64_t item = 1; item < items; ++item) {
#pragma GCC unroll 16
      for (int n = 0; n < VECTORS; ++n) highest[n] = larger(load(scores + item * PANEL + n * LANES), highest[n]);
    }
    for (int64_t item = 0; item < items; ++item) {
#pragma GCC unroll 16
      for (int n = 0; n < VECTORS; ++n) {
        T* x = scores + item * PANEL + n * LANES;
        const V value = exponential(load(x) - highest[n]);
        __builtin_prefetch(x + TILE * PANEL, 1);  // where the next panel's will be
        store(x, value);
        total[n] += value;
      }
    }
    for (int n = 0; n < VECTORS; ++n) {
      store(call_.highest + at + n * LANES, highest[n]);
      store(call_.total + at + n * LANES, total[n]);
    }
  }
};

template <void (Total::*PART)(int64_t) const>
int for_all(const TotalCall* call, int64_t begin, int64_t end) {
  const Total total(*call);
  for (int64_t n = begin; n < end; ++n) (total.*PART)(n);
  return 0;
}

}  // namespace

// For full_softmax.py, to be compared with its own.
TTT_EXPORT int64_t softmax_call_size() { return sizeof(Call); }
TTT_EXPORT int64_t softmax_total_call_size() { return sizeof(TotalCall); }

// Rows begin to end - 1. Both return 0: there is nothing to fail.
TTT_EXPORT int softmax_forward(const Call* call, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) call->lse[i] = log_sum_exp(call->scores + i * call->stride, call->columns);
  return 0;
}

TTT_EXPORT int softmax_backward(const Call* call, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    to_gradient(call->scores + i * call->stride, call->columns, T(call->lse[i]), call->column[i], call->grad[i]);
  }
  return 0;
}

// The sum of losses, in this order: of panels, tiles, panels, ranges, panels. All return 0.

TTT_EXPORT int softmax_turn(const TotalCall* call, int64_t begin, int64_t end) {
  return for_all<&Total::turn>(call, begin, end);
}

TTT_EXPORT int softmax_exponentials(const TotalCall* call, int64_t begin, int64_t end) {
  return for_all<&Total::exponentials>(call, begin, end);
}

TTT_EXPORT int softmax_log_of_sums(const TotalCall* call, int64_t begin, int64_t end) {
  return for_all<&Total::log_of_sums>(call, begin, end);
}

TTT_EXPORT int softmax_gradients(const TotalCall* call, int64_t begin, int64_t end) {
  return for_all<&Total::gradients>(call, begin, end);
}

TTT_EXPORT int softmax_hidden(const TotalCall* call, int64_t begin, int64_t end) {
  return for_all<&Total::hidden>(call, begin, end);
}
