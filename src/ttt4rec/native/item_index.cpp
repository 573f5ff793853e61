// The best items of hidden states, exactly, by a first pass over one byte a number. A score is one dot product, whose
// sums have a fixed order. Of item i, row t of the table is about s q, and the hidden state h about r p, with whole
// numbers q and p. Then h·t = (r p)·(s q) + (h - r p)·(s q) + h·(t - s q), and by Cauchy and Schwarz
//
//   score(h, i) <= r s p·q + m n + |h|' e,   m >= |h - r p|,  n >= |s q|,  e >= |t - s q| + rounding,  |h|' >= |h|.
//
// Only items that reach the k-th best score so far by this bound are scored.
//
// The rounding, with u = 2^-24 and C the width: the score takes each product through at most C + 5 operations. p·q is
// exact, and the bound takes it through five, which err relative to |r p| |s q| <= 3 |h| n; a number of h is missed by
// half a step of at least |h| / MOST. So (C + 20) u (|t| + |t - s q|) is in e, and 1.01 of it what becomes of (1 + u)^n
// for n <= 2^17. SLACK covers how m, n, e and |h|' themselves are rounded. FLOOR is added to e and |h|': its products
// with |h|, with e and with itself are more than what numbers too small to be normal lose by being rounded or taken for
// zero. Where something could overflow, and where h has no finite numbers, every item is scored.

#include "vectors.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <new>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 64;  // items side by side
constexpr double SLACK = 1 + 0x1p-20, FLOOR = 0x1p-50, SAFE = 0x1p100;
constexpr T INFINITE = std::numeric_limits<T>::infinity();

struct Call {
  int64_t num_items, width, rows, rows_at_once, k;
  const T* table;    // [num_items + 1, width], row 0 being padding
  uint32_t* codes;   // [groups, words, GROUP], with q + 128 of four numbers in a word, or 0 beyond the width
  T *scale, *size, *error;  // s, n and e, [groups, GROUP]
  double largest;    // no row of the table has a larger norm
  const T* h;        // [rows, width]
  const int64_t *seen_ends, *seen;  // items to leave out, ascending row by row, and where each row's end; or null
  T* scores;                        // [rows, k]; the first is NaN if one of the row is
  int64_t* items;

  int64_t words() const { return (width + 3) / 4; }
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

// Whole numbers of -most to most that times the scale are about x, one after the other to `keep`; how far they miss.
template <class Keep>
double encode(int64_t C, const T* x, int most, T* scale, Keep keep) {
  T largest = 0;
  for (int64_t c = 0; c < C; ++c) largest = std::max(largest, std::abs(x[c]));
  const bool tiny = largest < T(0x1p-100);  // as good as zero: FLOOR is far more
  *scale = tiny ? 0 : largest / T(most);
  double rest = 0;
  for (int64_t c = 0; c < C; ++c) {
    const long code = tiny ? 0 : std::min<long>(most, std::max<long>(-most, std::lrint(x[c] / *scale)));
    const double left = x[c] - double(*scale) * code;
    rest += left * left;
    keep(c, code);
  }
  return std::sqrt(rest);
}

// The codes of one item, with its s, n and e.
void encode(const Call& call, int64_t item) {
  const int64_t C = call.width;
  const T* t = call.table + (item + 1) * C;
  uint32_t* codes = call.codes + item / GROUP * call.words() * GROUP + item % GROUP;
  const double rest = encode(C, t, 127, call.scale + item, [=](int64_t c, long code) {
    codes[c / 4 * GROUP] |= uint32_t(code + 128) << (8 * (c % 4));
  });
  const double size = norm(C, t) + rest, rounding = 1.01 * (C + 20) * 0x1p-24;
  call.size[item] = T(size * SLACK);
  call.error[item] = T((rest + rounding * size) * SLACK + FLOOR);
}

typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint32_t UnalignedWords __attribute__((vector_size(LANES * sizeof(uint32_t)), aligned(4), may_alias));

// sums + (q + 128) p, four to a word. p, of -MOST to MOST, is such that no step saturates.
#if defined(__AVX512VNNI__)
constexpr int MOST = 127;
inline Words add_products(Words sums, Words q, Words p) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(q), "v"(p));  // GCC would copy every sum after its intrinsic
  return sums;
}
#elif defined(__AVX512BW__)
constexpr int MOST = 64;
inline Words add_products(Words sums, Words q, Words p) {
  const __m512i pairs = _mm512_maddubs_epi16(__m512i(q), __m512i(p));
  return sums + Words(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr int MOST = 64;
inline Words add_products(Words sums, Words q, Words p) {
  const __m256i pairs = _mm256_maddubs_epi16(__m256i(q), __m256i(p));
  return sums + Words(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
constexpr int MOST = 127;
inline Words add_products(Words sums, Words q, Words p) {
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) sums += (q >> (8 * b) & 255) * Words(Integers(p << (24 - 8 * b)) >> 24);
  return sums;
}
#endif

inline Words load_words(const uint32_t* x) { return *reinterpret_cast<const UnalignedWords*>(x); }

// p·q of a group's items for R hidden states, in tiles of registers. What 128 p adds was taken away before.
template <int R, class Row>
void estimate(const uint32_t* q, int64_t words, const Row* rows, T* out) {
  constexpr int WIDE = REGISTERS == 32 ? 4 : 2;
  for (int at = 0; at < GROUP; at += WIDE * LANES) {
    Words sums[R][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) sums[r][w] = rows[r].begin - Words{};
    }
    for (int64_t c = 0; c < words; ++c) {
      Words values[WIDE];
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) values[w] = load_words(q + c * GROUP + at + w * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; ++w) sums[r][w] = add_products(sums[r][w], values[w], rows[r].p[c] - Words{});
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < WIDE; ++w) {
        store(out + r * GROUP + at + w * LANES, __builtin_convertvector(Integers(sums[r][w]), V));
      }
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
  uint32_t* p;     // four numbers in a word, 0 beyond the width
  uint32_t begin;  // -128 times the sum of p
  T scale, miss;   // r and m
  T reach;         // |h|'; NaN: every item is scored
  T low;           // the k-th best score, or -inf
  bool nan;
  const int64_t *seen, *seen_end;
  uint64_t* keys;
  int64_t k, count;

  // codes: memory for p, zeros.
  Row(const Call& call, int64_t row, uint64_t* memory, uint32_t* codes)
      : h(call.h + row * call.width), p(codes), begin(0), scale(0), miss(0), low(-INFINITE), nan(false), seen(nullptr),
        seen_end(nullptr), keys(memory), k(call.k), count(0) {
    const double size = norm(call.width, h) * SLACK + FLOOR;
    const bool safe = size <= SAFE && size * call.largest <= SAFE;
    reach = safe ? T(size) : std::numeric_limits<T>::quiet_NaN();
    if (safe) {
      miss = T(SLACK * encode(call.width, h, MOST, &scale, [this](int64_t c, long code) {
        p[c / 4] |= uint32_t(uint8_t(code)) << (8 * (c % 4));
        begin -= uint32_t(128 * code);
      }));
    }
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

// Bounds in the place of p·q; whether one reaches low. NaN reaches anything.
inline bool bound(const Call& call, int64_t first, const Row& row, T* at) {
  Integers some{};
  for (int n = 0; n < GROUP; n += LANES) {
    const V s = load(call.scale + first + n), size = load(call.size + first + n), e = load(call.error + first + n);
    const V most = load(at + n) * row.scale * s + row.miss * size + row.reach * e;  // r p·q never overflows
    some |= ~(most < row.low);
    store(at + n, most);
  }
  return any(some);
}

template <int R>
void advance(const Call& call, int64_t group, Row* rows) {
  T at[R * GROUP];
  estimate<R>(call.codes + group * call.words() * GROUP, call.words(), rows, at);
  for (int r = 0; r < R; ++r) {
    if (bound(call, group * GROUP, rows[r], at + r * GROUP)) rows[r].take(call, group * GROUP, at + r * GROUP);
  }
}

void search(const Call& call, int64_t begin, int64_t end) {
  const int64_t count = end - begin, groups = (call.num_items + GROUP - 1) / GROUP;
  std::vector<uint64_t> keys(count * call.k);
  std::vector<uint32_t> codes(count * call.words());
  std::vector<Row> rows;
  rows.reserve(count);
  for (int64_t r = 0; r < count; ++r) {
    rows.emplace_back(call, begin + r, keys.data() + r * call.k, codes.data() + r * call.words());
  }
  for (int64_t group = 0; group < groups; ++group) {
    int64_t r = 0;
    for (; r + 6 <= count; r += 6) advance<6>(call, group, &rows[r]);
    for (; r + 2 <= count; r += 2) advance<2>(call, group, &rows[r]);
    for (; r < count; ++r) advance<1>(call, group, &rows[r]);
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
  std::vector<uint32_t> codes(call->words());
  const Row row(*call, 0, nullptr, codes.data());
  for (int64_t first = 0; first < call->num_items; first += GROUP) {
    estimate<1>(call->codes + first * call->words(), call->words(), &row, bounds + first);
    bound(*call, first, row, bounds + first);
    const int64_t last = std::min(first + GROUP, call->num_items);
    for (int64_t i = first; i < last; ++i) {
      scores[i] = score_of(call->width, call->h, call->table + (i + 1) * call->width);
    }
  }
  return 0;
}
