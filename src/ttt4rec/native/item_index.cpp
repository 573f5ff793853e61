// The best items of hidden states, exactly, by a first pass over one byte a number. A score is one dot product, whose
// sums have a fixed order. Of item i, whose row t of the table is about s q with whole numbers q of -127 to 127,
//
//   score(h, i) <= s h·q + |h|' e,   e >= |t - s q| + rounding (|t| + |t - s q|),   |h|' >= |h|,
//
// by Cauchy and Schwarz. Only items that reach the k-th best score so far by this bound are scored.
//
// The rounding, with u = 2^-24 and C the width: the score takes each product through at most C + 5 operations, s h·q
// through C + 1, and the bound is put together by two. |h| |t| and |h| s |q| <= |h| (|t| + |t - s q|) bound what they err
// relative to, so (2C + 8) u is the factor, and 1.01 of it what becomes of (1 + u)^n for n <= 2^17. SLACK covers how e
// and |h|' themselves are rounded. FLOOR is added to both: its products with |h|, with e and with itself are more than
// what numbers too small to be normal lose by being rounded or taken for zero. Where something could overflow, and where
// h has no finite numbers, every item is scored.

#include "vectors.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <new>
#include <vector>

namespace {

constexpr int GROUP = 64, WORDS = GROUP / 4;  // items side by side, and words of four codes each
constexpr double SLACK = 1 + 0x1p-20, FLOOR = 0x1p-50, SAFE = 0x1p100;
constexpr T INFINITE = std::numeric_limits<T>::infinity();

struct Call {
  int64_t num_items, width, rows, rows_at_once, k;
  const T* table;    // [num_items + 1, width], row 0 being padding
  int32_t* codes;    // [groups, width, WORDS]: byte b of word w is that of item w + b WORDS of the group
  T *scale, *error;  // s and e, [groups, GROUP]
  double largest;    // no row of the table has a larger norm
  const T* h;        // [rows, width]
  const int64_t *seen_ends, *seen;  // items to leave out, ascending row by row, and where each row's end; or null
  T* scores;                        // [rows, k]; the first is NaN if one of the row is
  int64_t* items;
};

// In a fixed order, wherever it is called: the one way to a score.
__attribute__((noinline)) T score_of(int64_t width, const T* a, const T* b) {
  const int64_t whole = width / LANES * LANES;
  V total{}, last_a{}, last_b{};
  for (int64_t n = 0; n < whole; n += LANES) total += load(a + n) * load(b + n);
  std::memcpy(&last_a, a + whole, (width - whole) * sizeof(T));
  std::memcpy(&last_b, b + whole, (width - whole) * sizeof(T));
  total += last_a * last_b;
  return sum(total);
}

// Keys in the order of (score, earlier item): the float's bits above the item's.
inline uint64_t key_of(T score, int64_t item) {
  const T zero_is_positive = score + T(0);
  int32_t bits;
  std::memcpy(&bits, &zero_is_positive, sizeof(bits));
  bits ^= (bits >> 31) & 0x7FFFFFFF;
  return uint64_t(uint32_t(bits) ^ 0x80000000u) << 32 | uint32_t(~item);
}

inline T score_in(uint64_t key) {
  int32_t bits = int32_t(uint32_t(key >> 32) ^ 0x80000000u);
  bits ^= (bits >> 31) & 0x7FFFFFFF;
  T score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

double norm(int64_t width, const T* x) {
  double total = 0;
  for (int64_t c = 0; c < width; ++c) total += double(x[c]) * x[c];
  return std::sqrt(total);
}

// The codes of one item, with its s and e.
void encode(const Call& call, int64_t item) {
  const int64_t C = call.width, place = item % GROUP;
  const T* t = call.table + (item + 1) * C;
  int32_t* codes = call.codes + item / GROUP * C * WORDS + place % WORDS;
  T most = 0;
  for (int64_t c = 0; c < C; ++c) most = std::max(most, std::abs(t[c]));
  const bool tiny = most < T(0x1p-100);  // as good as zero: FLOOR is far more
  const T scale = tiny ? 0 : most / 127;
  double rest = 0;
  for (int64_t c = 0; c < C; ++c) {
    const long code = tiny ? 0 : std::lrint(t[c] / scale);
    const double left = t[c] - double(scale) * code;
    codes[c * WORDS] |= int32_t(uint32_t(uint8_t(code)) << (8 * (place / WORDS)));
    rest += left * left;
  }
  rest = std::sqrt(rest);
  const double rounding = 1.01 * (2 * C + 8) * 0x1p-24;
  call.scale[item] = scale;
  call.error[item] = T((rest + rounding * (norm(C, t) + rest)) * SLACK + FLOOR);
}

// Code b of every word, as numbers.
inline V decoded(Integers words, int b) { return __builtin_convertvector((words << (24 - 8 * b)) >> 24, V); }

inline Integers load_words(const int32_t* x) {
  Integers words;
  std::memcpy(&words, x, sizeof(words));
  return words;
}

// h·q of a group's items for one hidden state.
void estimate(const int32_t* codes, int64_t C, const T* h, T* out) {
  V sums[WORDS / LANES][4] = {};
  for (int64_t c = 0; c < C; ++c) {
#pragma GCC unroll 16
    for (int w = 0; w < WORDS / LANES; ++w) {
      const Integers words = load_words(codes + c * WORDS + w * LANES);
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) sums[w][b] += h[c] * decoded(words, b);
    }
  }
#pragma GCC unroll 16
  for (int w = 0; w < WORDS / LANES; ++w) {
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) store(out + b * WORDS + w * LANES, sums[w][b]);
  }
}

// The codes of a group as numbers [C, GROUP], for many hidden states.
void decode(const int32_t* codes, int64_t C, T* q) {
  for (int64_t n = 0; n < C * WORDS; n += LANES) {
    const Integers words = load_words(codes + n);
    for (int b = 0; b < 4; ++b) store(q + n / WORDS * GROUP + b * WORDS + n % WORDS, decoded(words, b));
  }
}

// The same for R hidden states at a time, in tiles of registers. Sums have the order of those of one.
template <int R>
void estimate(const T* q, int64_t C, const T* h, T* out) {
  constexpr int WIDE = REGISTERS == 32 ? 4 : 2;
  for (int at = 0; at < GROUP; at += WIDE * LANES) {
    V sums[R][WIDE] = {};
    for (int64_t c = 0; c < C; ++c) {
      V values[WIDE];
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) values[w] = in_register(load(q + c * GROUP + at + w * LANES));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; ++w) sums[r][w] += h[r * C + c] * values[w];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) store(out + r * GROUP + at + w * LANES, sums[r][w]);
    }
  }
}

inline bool any(Integers x) {
  uint64_t parts[sizeof(x) / sizeof(uint64_t)], some = 0;
  std::memcpy(parts, &x, sizeof(x));
  for (uint64_t part : parts) some |= part;
  return some != 0;
}

// A hidden state and its best items so far, a heap whose first key is the lowest.
struct Row {
  const T* h;
  T reach;  // |h|'; NaN: every item is scored
  T low;    // the k-th best score, or -inf
  bool nan;
  const int64_t *seen, *seen_end;
  uint64_t* keys;
  int64_t k, count;

  Row(const Call& call, int64_t row, uint64_t* memory)
      : h(call.h + row * call.width), low(-INFINITE), nan(false), seen(nullptr), seen_end(nullptr), keys(memory),
        k(call.k), count(0) {
    const double size = norm(call.width, h) * SLACK + FLOOR;
    reach = size <= SAFE && size * call.largest <= SAFE ? T(size) : std::numeric_limits<T>::quiet_NaN();
    if (call.seen == nullptr) return;
    seen = call.seen + (row == 0 ? 0 : call.seen_ends[row - 1]);
    seen_end = call.seen + call.seen_ends[row];
  }

  void push(uint64_t key) {
    if (count == k && key < keys[0]) return;
    if (count == k) std::pop_heap(keys, keys + count--, std::greater<uint64_t>());
    keys[count++] = key;
    std::push_heap(keys, keys + count, std::greater<uint64_t>());
    if (count == k) low = score_in(keys[0]);
  }

  // bounds: of a group's items, before whom all others came. They stand where h·q stood.
  void take(const Call& call, int64_t first, const T* bounds) {
    for (int j = 0; j < GROUP && first + j < call.num_items; ++j) {
      if (bounds[j] < low) continue;
      const int64_t item = first + j + 1;
      while (seen < seen_end && *seen < item) ++seen;
      if (seen < seen_end && *seen == item) continue;
      const T score = score_of(call.width, h, call.table + item * call.width);
      nan |= score != score;
      push(key_of(score, item));
    }
  }

  // What was left out comes last, with score -inf.
  void finish(const Call& call, int64_t row) {
    const int64_t* at = call.seen == nullptr || row == 0 ? call.seen : call.seen + call.seen_ends[row - 1];
    for (int64_t before = 0; at < seen_end && low == -INFINITE; before = *at++) {
      if (*at != before) push(key_of(-INFINITE, *at));
    }
    std::sort(keys, keys + count, std::greater<uint64_t>());
    for (int64_t n = 0; n < count; ++n) {
      call.scores[row * k + n] = score_in(keys[n]);
      call.items[row * k + n] = uint32_t(~uint32_t(keys[n]));
    }
    if (nan) call.scores[row * k] = std::numeric_limits<T>::quiet_NaN();
  }
};

// Bounds in the place of h·q; whether one reaches low. NaN reaches anything.
inline bool bound(const Call& call, int64_t first, T reach, T low, T* at) {
  Integers some{};
  for (int n = 0; n < GROUP; n += LANES) {
    const V most = load(at + n) * load(call.scale + first + n) + reach * load(call.error + first + n);
    some |= ~(most < low);
    store(at + n, most);
  }
  return any(some);
}

template <int R>
void advance(const Call& call, int64_t group, const T* q, Row* rows) {
  T at[R * GROUP];
  estimate<R>(q, call.width, rows->h, at);
  for (int r = 0; r < R; ++r) {
    const bool reaches = bound(call, group * GROUP, rows[r].reach, rows[r].low, at + r * GROUP);
    if (reaches) rows[r].take(call, group * GROUP, at + r * GROUP);
  }
}

void advance(const Call& call, int64_t group, Row& row) {
  T at[GROUP];
  estimate(call.codes + group * call.width * WORDS, call.width, row.h, at);
  if (bound(call, group * GROUP, row.reach, row.low, at)) row.take(call, group * GROUP, at);
}

void search(const Call& call, int64_t begin, int64_t end) {
  const int64_t count = end - begin, groups = (call.num_items + GROUP - 1) / GROUP;
  std::vector<uint64_t> keys(count * call.k);
  std::vector<Row> rows;
  rows.reserve(count);
  for (int64_t r = 0; r < count; ++r) rows.emplace_back(call, begin + r, keys.data() + r * call.k);
  std::vector<T> q(count == 1 ? 0 : call.width * GROUP);
  for (int64_t group = 0; group < groups; ++group) {
    if (count == 1) {
      advance(call, group, rows[0]);
      continue;
    }
    decode(call.codes + group * call.width * WORDS, call.width, q.data());
    int64_t r = 0;
    for (; r + 6 <= count; r += 6) advance<6>(call, group, q.data(), &rows[r]);
    for (; r + 2 <= count; r += 2) advance<2>(call, group, q.data(), &rows[r]);
    for (; r < count; ++r) advance<1>(call, group, q.data(), &rows[r]);
  }
  for (int64_t r = 0; r < count; ++r) rows[r].finish(call, begin + r);
}

}  // namespace

// For item_index.py, to be compared with its own.
TTT_EXPORT int64_t index_call_size() { return sizeof(Call); }

// Codes, zeros before, of the groups begin to end - 1.
TTT_EXPORT int index_items(const Call* call, int64_t begin, int64_t end) {
  const int64_t last = std::min(end * GROUP, call->num_items);
  for (int64_t item = begin * GROUP; item < last; ++item) encode(*call, item);
  return 0;
}

// The best items of rows_at_once hidden states, once for each number from begin to end - 1. Returns 1 if there is no
// memory.
TTT_EXPORT int index_search(const Call* call, int64_t begin, int64_t end) try {
  for (int64_t n = begin; n < end; ++n) {
    search(*call, n * call->rows_at_once, std::min(call->rows, (n + 1) * call->rows_at_once));
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// Pairs (row, item) as Call has them. Returns 1 if a row or an item is not one.
TTT_EXPORT int index_seen(const int64_t* rows, const int64_t* items, int64_t pairs, int64_t num_rows, int64_t num_items,
                          int64_t* ends, int64_t* seen) {
  std::fill(ends, ends + num_rows, 0);
  for (int64_t p = 0; p < pairs; ++p) {
    if (rows[p] < 0 || rows[p] >= num_rows || items[p] < 1 || items[p] > num_items) return 1;
    ++ends[rows[p]];
  }
  int64_t before = 0;
  for (int64_t row = 0; row < num_rows; ++row) before += std::exchange(ends[row], before);
  for (int64_t p = 0; p < pairs; ++p) seen[ends[rows[p]]++] = items[p];  // beginnings become ends
  for (int64_t row = 0; row < num_rows; ++row) std::sort(seen + (row == 0 ? 0 : ends[row - 1]), seen + ends[row]);
  return 0;
}

// For tests: of the first hidden state, the score and the bound of every item, each [groups, GROUP].
TTT_EXPORT int index_bounds(const Call* call, T* scores, T* bounds) {
  Row row(*call, 0, nullptr);
  for (int64_t first = 0; first < call->num_items; first += GROUP) {
    estimate(call->codes + first * call->width / 4, call->width, call->h, bounds + first);
    bound(*call, first, row.reach, row.low, bounds + first);
    const int64_t last = std::min(first + GROUP, call->num_items);
    for (int64_t i = first; i < last; ++i) {
      scores[i] = score_of(call->width, call->h, call->table + (i + 1) * call->width);
    }
  }
  return 0;
}
