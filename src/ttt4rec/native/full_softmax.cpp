// Rows of scores, one pass over memory each way: the logarithm of the sum of their exponentials, and the gradient of a
// softmax's negative log-likelihood, which takes their place. Sums go on in double after every CHUNK vectors.

#include "vectors.h"

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

}  // namespace

// For full_softmax.py, to be compared with its own.
TTT_EXPORT int64_t softmax_call_size() { return sizeof(Call); }

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
