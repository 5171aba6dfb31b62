// Rows of tokens as the C++ kernels of several families treat them: widened to fp32, normalised, summed in chunks.

#pragma once

#include "common/check.h"
#include "common/loops.h"
#include "common/memory.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

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
  const float* plus = nullptr;
};

template <class T>
struct Sum {
  static SORA_INLINE void run(const Span& span, int64_t begin, int64_t end) {
    const T* from = static_cast<const T*>(span.data) + span.offset;
#pragma omp simd
    for (int64_t d = begin; d < end; ++d) span.values[d] = span.plus[d] + to_float(from[d]);
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
  with_span<Sum>({values, from.data, from.dtype, 0, values}, D);
}

// to = plus + the row, where there is one
inline void add(float* to, const float* plus, const Rows& from, int64_t b, int64_t f, int64_t D) {
  if (from) with_span<Sum>({to, from.data, from.dtype, b * from.stride_b + f * from.stride_f, plus}, D);
  else if (to != plus) std::copy_n(plus, D, to);
}

// The row itself, where it is fp32: then no copy of it is made.
inline float* in_place(const Rows& rows, float* otherwise, int64_t b, int64_t f) {
  if (!rows || rows.dtype != ScalarType::Float) return otherwise;
  return static_cast<float*>(rows.data) + b * rows.stride_b + f * rows.stride_f;
}

// Columns [d, d + n) only.
inline void store(const float* values, const Vector& to, int64_t d, int64_t n) {
  with_span<Store>({const_cast<float*>(values), to.data, to.dtype, d}, n);
}

inline void store(const float* values, const Rows& to, int64_t b, int64_t f, int64_t d, int64_t n) {
  const float* row = in_place(to, nullptr, b, f);
  if (row && values == row + d) return;
  with_span<Store>({const_cast<float*>(values), to.data, to.dtype, b * to.stride_b + f * to.stride_f + d}, n);
}

// ---- statistics of one row

// v is the row in fp32.
struct Statistics {
  const float* v;
  float mean, rstd;
};

// first(term) is the sum of term(x) over the row, which it leaves in v. `pivot` is some value of the row: the mean of what
// differs from it is exact also of a row far from zero, where rounding in the sum of x leaves more than the row's spread.
template <int V, class First>
SORA_INLINE Statistics statistics(const First& first, float pivot, const float* v, int64_t D, bool rms, float eps) {
  const float n = static_cast<float>(D);
  if (rms) return {v, 0.0f, 1.0f / std::sqrt(first([](auto x) SORA_LAMBDA { return x * x; }) / n + eps)};
  const float mean = pivot + first([=](auto x) SORA_LAMBDA { return x - pivot; }) / n;
  const float squares = sum<V>(D, [=](auto at) SORA_LAMBDA { return (at(v) - mean) * (at(v) - mean); });
  return {v, mean, 1.0f / std::sqrt(squares / n + eps)};
}

// Of 16-bit values that are close to each other the sum is exact: those need no pivot.
template <class T, class Row>
SORA_INLINE float pivot(const Row& row, int64_t D) {
  return std::is_same_v<T, float> && D > 0 ? row(At<1>{0}) : 0.0f;
}

// A row that is not fp32 is widened into `copy`.
template <int V, class T>
SORA_INLINE Statistics statistics(const T* from, float* copy, int64_t D, bool rms, float eps) {
  const float* v = copy;
  if constexpr (std::is_same_v<T, float>) v = from;
  const auto widen = [=](auto term) SORA_LAMBDA {
    return sum<V>(D, [=](auto at) SORA_LAMBDA {
      const auto x = at(from);
      if constexpr (!std::is_same_v<T, float>) at.put(copy, x);
      return term(x);
    });
  };
  return statistics<V>(widen, pivot<T>([=](auto at) SORA_LAMBDA { return at(from); }, D), v, D, rms, eps);
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
