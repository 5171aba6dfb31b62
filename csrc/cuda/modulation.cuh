// What the kernels of modulation, forward and backward, share.

#pragma once

#include "common/check.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"

#include <algorithm>

namespace sora {
namespace {

// kWarps warps share a row of at most kMaxWidth elements, kElements per thread.
template <class T_, int kWarps_, int kElements_>
struct RowTraits {
  using T = T_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kElements = kElements_;
  static constexpr int kVec = Vec<T>::kSize;
  static constexpr int kVecs = kElements / kVec;
  static constexpr int kRowThreads = kWarps * kWarp;
  static constexpr int kRowsPerBlock = kWarps == 1 ? 4 : 1;
  static constexpr int kThreads = kRowThreads * kRowsPerBlock;
  static constexpr int kMaxWidth = kRowThreads * kElements;

  static_assert(kElements % kVec == 0, "a thread holds whole vectors");
  static_assert(kWarps == 1 || kRowsPerBlock == 1, "row_sum synchronises the block");
};

// to += the N values at `offset`; nothing where there are none.
template <int N>
__device__ __forceinline__ void add_any(const void* data, ScalarType dtype, int64_t offset, float (&to)[N]) {
  if (!data) return;
  float values[N];
  load_any(data, dtype, offset, values);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] += values[i];
}

// Sums over the threads of a row of kWarps warps, one by one, for `corrected` and `row_statistics`.
template <int kWarps>
struct EachRowSum {
  float* shared;  // kWarps values

  template <int K>
  __device__ __forceinline__ void operator()(float (&values)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] = row_sum<kWarps>(values[k], shared);
  }
};

// 1/sigma from a thread's sums of squared deviations and of deviations. What rounding left of the mean joins it: of a row
// far from zero that is more than its spread. sums: adds up one or two values over the threads of a row.
template <class RowSums>
__device__ __forceinline__ float corrected(float squares, float left, RowSums&& sums, int64_t width, bool rms, float eps,
                                           float& mean) {
  const float D = static_cast<float>(width);
  float found[2] = {squares, left}, variance;
  if (rms) {
    float one[1] = {squares};
    sums(one);
    variance = one[0] / D;
  } else {
    sums(found);
    left = found[1] / D;
    mean += left;
    variance = fmaxf(found[0] / D - left * left, 0.0f);
  }
  return 1.0f / sqrtf(variance + eps);
}

// Mean (of an RMS norm 0) and 1/sigma of a row of D values, of which a thread has vectors from column(v) on; zeros beyond.
template <int kVecs, int kVec, class Column, class RowSums>
__device__ __forceinline__ float row_statistics(const float (&values)[kVecs][kVec], const Column& column, int D,
                                                RowSums&& sums, bool rms, float eps, float& mean) {
  mean = 0.0f;
  if (!rms) {
    float sum[1] = {};
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[0] += values[v][i];
    }
    sums(sum);
    mean = sum[0] / D;
  }
  float squares = 0.0f, left = 0.0f;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (column(v) >= D) continue;  // beyond the row the zeros are not deviations
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float deviation = values[v][i] - mean;
      left += deviation, squares += deviation * deviation;
    }
  }
  return corrected(squares, left, sums, D, rms, eps, mean);
}

template <int N>
__device__ __forceinline__ void normalise(float (&values)[N], float mean, float rstd) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = (values[i] - mean) * rstd;
}

// xhat -> (xhat * weight + bias) * (1 + scale + table) + shift + table, for columns [d, d + N) of modulation row (b, f).
template <int N, class Params>
__device__ __forceinline__ void modulate(const Params& p, int64_t b, int64_t f, int d, float (&values)[N]) {
  float factor[N];
  if (p.weight) {
    load_any(p.weight.data, p.weight.dtype, d, factor);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] *= factor[i];
  }
  add_any(p.bias.data, p.bias.dtype, d, values);
#pragma unroll
  for (int i = 0; i < N; ++i) factor[i] = 1.0f;
  add_any(p.scale.data, p.scale.dtype, b * p.scale.stride_b + f * p.scale.stride_f + d, factor);
  add_any(p.scale_table.data, p.scale_table.dtype, d, factor);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] *= factor[i];
  add_any(p.shift.data, p.shift.dtype, b * p.shift.stride_b + f * p.shift.stride_f + d, values);
  add_any(p.shift_table.data, p.shift_table.dtype, d, values);
}

// Rows of `size`-byte elements of which a thread takes `vec` at a time start where its loads may.
inline bool is_aligned(const void* data, int64_t size, int64_t vec, int64_t stride_b, int64_t stride_s) {
  const int64_t bytes = std::min<int64_t>(16, vec * size);
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride_b * size % bytes == 0 && stride_s * size % bytes == 0;
}

inline int64_t size_of(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

inline bool is_aligned(const Tokens& t, int64_t size) { return is_aligned(t.data, size, 16 / size, t.stride_b, t.stride_s); }

inline bool is_aligned(const Rows& r, int64_t vec) {
  return is_aligned(r.data, size_of(r.dtype), vec, r.stride_b, r.stride_f);
}

inline bool is_aligned(const Vector& v, int64_t vec) { return is_aligned(v.data, size_of(v.dtype), vec, 0, 0); }

}  // namespace
}  // namespace sora
