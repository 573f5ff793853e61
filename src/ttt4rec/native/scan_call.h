// What the inner loop is given, over all sequences and heads.

#pragma once

#include "vectors.h"

// Tokens are [total, H, D], rates [total, H]; weights [N, H, ...], of which strides[i] numbers lie between sequences. Of q,
// k, v and their gradients so many numbers lie between tokens: they may be parts of wider rows.
struct ScanCall {  // as inner_loop.py's
  int64_t H, K, segment;  // segment: mini-batches between two checkpoints
  int64_t q_stride, k_stride, v_stride, dq_stride, dk_stride, dv_stride;
  const int64_t *starts, *lengths;  // of each sequence
  double eps;
  const T *q, *k, *v, *lr, *scale, *gamma, *beta;
  const T* weights[4];
  int64_t strides[4];
  T* kept[2];     // Z1, which may be null: it is computed again then; and the inner gradients
  T* checkpoints;  // [total / (segment K) + 2, H, all weights], of the segment that begins in that many tokens and is not a first one
  // forward
  T *o, *outgoing[4];  // the latter may be null
  // backward
  const T *grad_o, *grad_weights[4];  // the latter may be null: zero
  int64_t grad_strides[4];
  T *dq, *dk, *dv, *d_lr, *d_scale, *d_weights[4], *d_gamma, *d_beta;  // d_scale [N, H, K], d_gamma [N, H, D]
  // where something is forgotten: ln a [total, H], the initial weights [H, ...], their gradients [N, H, ...]; where
  // sequences begin with the initial weights the latter may be null, and d_weights has them too
  const T *log_decay, *initial[4];
  T *d_log_decay, *d_initial[4];
};
