// The rates of a block of tokens.

#pragma once

#include "forgetting.h"

// η[i, j] = s_i lr_j for j <= i of a block of r tokens, and the gradients of both factors. A mini-batch of up to BLOCK
// tokens is one block, which its updates need no sums for.
struct Rates {
  int r, row, block;          // row: see row_of_tokens; which of the mini-batch's blocks it is
  bool last_block, complete;  // whether the mini-batch has K tokens
  T last_scale;
  const T *scale, *lr;
  T* eta;  // [r, row], zero beyond the diagonal
  T *d_scale, *d_last_scale, *d_lr;
  Forgetting* forgetting;     // null where the mini-batch's end forgets nothing

  T last(int j) const { return last_scale * lr[j]; }
  void accumulate(int i, int j, T d_eta) const {
    d_scale[i] += d_eta * lr[j];
    d_lr[j] += d_eta * scale[i];
  }
};
