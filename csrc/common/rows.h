// Rows of tokens as the C++ kernels of several families treat them: widened to fp32, normalised, summed in chunks.

#pragma once

#include "common/check.h"
#include "common/memory.h"
#include "common/simd.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace sora {

template <class T>
SORA_INLINE T* row_of(const Tokens& t, int64_t b, int64_t s) {
  return static_cast<T*>(t.data) + b * t.stride_b + s * t.stride_s;
}

inline void advise_huge_pages(const Tokens& t, const Shape& shape, int64_t element_size) {
  const bool contiguous = t.stride_s == shape.D && (shape.B == 1 || t.stride_b == shape.S * shape.D);
  if (t && contiguous) sora::advise_huge_pages(t.data, shape.rows() * shape.D * element_size);
}

// ---- rows of any dtype, widened to fp32 and back

struct Span {
  float* values;
  void* data;
  ScalarType dtype;
  int64_t offset;
};

template <class T>
struct Accumulate {
  static SORA_INLINE void run(const Span& span, int64_t begin, int64_t end) {
    const T* from = static_cast<const T*>(span.data) + span.offset;
#pragma omp simd
    for (int64_t d = begin; d < end; ++d) span.values[d] += to_float(from[d]);
  }
};

template <class T>
struct Store {
  static SORA_INLINE void run(const Span& span, int64_t begin, int64_t end) {
    T* to = static_cast<T*>(span.data) + span.offset;
#pragma omp simd
    for (int64_t d = begin; d < end; ++d) to[d] = from_float<T>(span.values[d]);
  }
};

template <template <class> class Kernel>
void with_span(const Span& span, int64_t length) {
  if (span.data) with_dtype(span.dtype, [&](auto t) { dispatch<Kernel<decltype(t)>>(span, 0, length); });
}

inline void add(float* values, const Vector& from, int64_t D) {
  with_span<Accumulate>({values, from.data, from.dtype, 0}, D);
}

inline void add(float* values, const Rows& from, int64_t b, int64_t f, int64_t D) {
  with_span<Accumulate>({values, from.data, from.dtype, b * from.stride_b + f * from.stride_f}, D);
}

// Columns [d, d + n) only.
inline void store(const float* values, const Vector& to, int64_t d, int64_t n) {
  with_span<Store>({const_cast<float*>(values), to.data, to.dtype, d}, n);
}

inline void store(const float* values, const Rows& to, int64_t b, int64_t f, int64_t d, int64_t n) {
  with_span<Store>({const_cast<float*>(values), to.data, to.dtype, b * to.stride_b + f * to.stride_f + d}, n);
}

// ---- statistics of one fp32 row

// Four accumulators of one vector each: the sum is bound by loads instead of the latency of one addition, and its
// rounding error shrinks with them.
SORA_INLINE float sum_of_squared_deviations(const float* v, int64_t n, float centre, bool square) {
  const int64_t q = n / 64 * 16;
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  if (square) {
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < q; ++i) {
      const float a = v[i] - centre, b = v[q + i] - centre, c = v[2 * q + i] - centre, d = v[3 * q + i] - centre;
      s0 += a * a, s1 += b * b, s2 += c * c, s3 += d * d;
    }
#pragma omp simd reduction(+ : s0)
    for (int64_t i = 4 * q; i < n; ++i) s0 += (v[i] - centre) * (v[i] - centre);
  } else {
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < q; ++i) s0 += v[i], s1 += v[q + i], s2 += v[2 * q + i], s3 += v[3 * q + i];
#pragma omp simd reduction(+ : s0)
    for (int64_t i = 4 * q; i < n; ++i) s0 += v[i];
  }
  return (s0 + s1) + (s2 + s3);
}

struct Statistics {
  float mean, rstd;
};

SORA_INLINE Statistics statistics(const float* v, int64_t D, bool rms, float eps) {
  const float mean = rms ? 0.0f : sum_of_squared_deviations(v, D, 0.0f, false) / static_cast<float>(D);
  const float variance = sum_of_squared_deviations(v, D, mean, true) / static_cast<float>(D);
  return {mean, 1.0f / std::sqrt(variance + eps)};
}

// ---- chunks of tokens for a backward
//
// Borders depend on the sizes only, never on the number of threads. Either a chunk is one of `parts` pieces of a
// modulation row's tokens, or it holds `groups` whole rows' tokens. `target` chunks are aimed at, of `least` tokens or
// more; at most twice as many result.
struct Chunking {
  int64_t all_groups, group_rows, parts = 1, groups = 1, part_rows = 0;

  Chunking(const Shape& shape, int64_t target, int64_t least)
      : all_groups(shape.B * shape.modulation_rows()), group_rows(shape.rows_per_modulation()), part_rows(group_rows) {
    const int64_t rows = std::max(least, (shape.rows() + target - 1) / target);
    if (group_rows > rows) {
      parts = (group_rows + rows - 1) / rows;
      part_rows = (group_rows + parts - 1) / parts;
    } else {
      groups = rows / std::max<int64_t>(group_rows, 1);
    }
  }

  int64_t chunks() const { return parts > 1 ? all_groups * parts : (all_groups + groups - 1) / groups; }
};

}  // namespace sora
