// What the kernels of modulation, forward and backward, share.

#pragma once

#include "common/check.h"
#include "common/reduce.cuh"
#include "common/vec.cuh"

#include <algorithm>

namespace sora {
namespace {

// to += the N values at `offset`; nothing where there are none.
template <int N>
__device__ __forceinline__ void add_any(const void* data, ScalarType dtype, int64_t offset, float (&to)[N]) {
  if (!data) return;
  float values[N];
  load_any(data, dtype, offset, values);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] += values[i];
}

// 1/sigma from a thread's sums of deviations and their squares. What rounding left of the mean joins it: of a row far from
// zero that is more than its spread.
template <int kWarps>
__device__ __forceinline__ float corrected(float left, float squares, float* shared, int64_t width, bool rms,
                                           float eps, float& mean) {
  const float D = static_cast<float>(width);
  float variance = row_sum<kWarps>(squares, shared) / D;
  if (!rms) {
    left = row_sum<kWarps>(left, shared) / D;
    mean += left;
    variance = fmaxf(variance - left * left, 0.0f);
  }
  return 1.0f / sqrtf(variance + eps);
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
