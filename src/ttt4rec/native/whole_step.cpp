// One token more of many streams through a whole TTT layer, or a whole model, in place: what whole_step.py calls.

#include <algorithm>
#include <memory>
#include <vector>

#include "layer_step.h"

namespace {

struct NormCall {  // as whole_step.py's, like the others
  const T *weight, *bias;  // without a bias the mean is left as it is: an RMS norm
  double eps;
};

struct BlockCall {
  LayerCall layer;
  int64_t taps, ffn_width, gelu;  // taps of the block's own convolution, 0 without one; gelu or swiglu
  NormCall conv_norm, mixer_norm, ffn_norm;
  const T *conv_weight, *conv_bias, *gate, *up, *up_bias, *down, *down_bias;
  T* conv;  // of the pool
};

struct ModelCall {
  int64_t num_blocks;
  const BlockCall* blocks;
  NormCall embedding_norm, norm;
  const T* table;
};

void normalise(int n, const NormCall& norm, const T* x, T* y) {
  if (norm.bias != nullptr) return layer_norm(n, x, norm.weight, norm.bias, norm.eps, y);
  rms_norm(n, x, norm.weight, norm.eps, y);
}

class BlockStep {
 public:
  explicit BlockStep(const BlockCall& call)
      : call_(call), C_(call.layer.H * D), layer_(call.layer), arena_(numbers(call)), n_(arena_.take(TOGETHER * C_)),
        z_(arena_.take(TOGETHER * C_)), gate_(arena_.take(TOGETHER * call.ffn_width)),
        up_(arena_.take(TOGETHER * call.ffn_width)) {}

  // h [rows, C] in place.
  void run(int rows, const int64_t* slots, T* h) {
    if (call_.taps > 0) {
      normed(rows, call_.conv_norm, h);
      for (int i = 0; i < rows; ++i) {
        T* context = call_.conv + slots[i] * (call_.taps - 1) * C_;
        convolve(C_, call_.taps, n_ + i * C_, context, call_.conv_weight, call_.conv_bias, z_ + i * C_);
        remember(C_, call_.taps, n_ + i * C_, context);
      }
      add(rows, h);
    }
    normed(rows, call_.mixer_norm, h);
    layer_.run(rows, slots, n_, z_);
    add(rows, h);
    normed(rows, call_.ffn_norm, h);
    feed_forward(rows);
    add(rows, h);
  }

 private:
  const BlockCall& call_;
  const int C_;
  LayerStep layer_;
  Arena arena_;
  T *n_, *z_, *gate_, *up_;

  static size_t numbers(const BlockCall& call) {
    return 2 * Arena::rounded(TOGETHER * call.layer.H * D) + 2 * Arena::rounded(TOGETHER * call.ffn_width);
  }

  void normed(int rows, const NormCall& norm, const T* h) {
    for (int i = 0; i < rows; ++i) normalise(C_, norm, h + i * C_, n_ + i * C_);
  }

  void add(int rows, T* h) const {
    for (int n = 0; n < rows * C_; n += LANES) store(h + n, load(h + n) + load(z_ + n));
  }

  // down(silu(gate(x)) ∘ up(x)), or down(gelu(up(x))) with the gelu of erf
  void feed_forward(int rows) {
    const int hidden = call_.ffn_width;
    linear(rows, C_, hidden, n_, call_.up, call_.up_bias, up_);
    if (call_.gelu) {
      for (int i = 0; i < rows * hidden; ++i) up_[i] *= T(0.5) * (1 + std::erf(up_[i] * T(0.7071067811865476)));
    } else {
      linear(rows, C_, hidden, n_, call_.gate, nullptr, gate_);
      for (int i = 0; i < rows * hidden; i += LANES) {
        const V gate = load(gate_ + i);
        store(up_ + i, load(up_ + i) * gate / (1 + exponential(-gate)));
      }
    }
    linear(rows, hidden, C_, up_, call_.down, call_.down_bias, z_);
  }
};

}  // namespace

// For whole_step.py, to be compared with its own.
TTT_EXPORT int64_t ttt_layer_call_size() { return sizeof(LayerCall); }
TTT_EXPORT int64_t ttt_norm_call_size() { return sizeof(NormCall); }
TTT_EXPORT int64_t ttt_block_call_size() { return sizeof(BlockCall); }
TTT_EXPORT int64_t ttt_model_call_size() { return sizeof(ModelCall); }

// x and y [B, C] of streams begin to end - 1 of B. Returns 1 if there is no memory, before anything has changed.
TTT_EXPORT int ttt_layer_step(const LayerCall* call, const int64_t* slots, const T* x, T* y, int64_t begin,
                              int64_t end) try {
  LayerStep step(*call);
  const int64_t C = call->H * D;
  for (int64_t i = begin; i < end; i += TOGETHER) {
    step.run(std::min<int64_t>(TOGETHER, end - i), slots + i, x + i * C, y + i * C);
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// Ids [B] to hidden states [B, C]; likewise.
TTT_EXPORT int ttt_model_step(const ModelCall* call, const int64_t* slots, const int64_t* ids, T* y, int64_t begin,
                              int64_t end) try {
  const int C = call->blocks[0].layer.H * D;
  std::vector<std::unique_ptr<BlockStep>> blocks;
  for (int64_t i = 0; i < call->num_blocks; ++i) blocks.push_back(std::make_unique<BlockStep>(call->blocks[i]));
  Arena arena(TOGETHER * C);
  T* h = arena.take(TOGETHER * C);
  for (int64_t at = begin; at < end; at += TOGETHER) {
    const int rows = std::min<int64_t>(TOGETHER, end - at);
    for (int i = 0; i < rows; ++i) normalise(C, call->embedding_norm, call->table + ids[at + i] * C, h + i * C);
    for (auto& block : blocks) block->run(rows, slots + at, h);
    for (int i = 0; i < rows; ++i) normalise(C, call->norm, h + i * C, y + (at + i) * C);
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// Whether all are from first to last.
TTT_EXPORT int ttt_are_within(const int64_t* numbers, int64_t n, int64_t first, int64_t last) {
  return std::all_of(numbers, numbers + n, [=](int64_t x) { return first <= x && x <= last; });
}

// Whether no two are equal.
TTT_EXPORT int ttt_are_different(const int64_t* numbers, int64_t n) try {
  if (n == 1) return 1;
  std::vector<int64_t> sorted(numbers, numbers + n);
  std::sort(sorted.begin(), sorted.end());
  return std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
} catch (const std::bad_alloc&) {
  return 0;
}
