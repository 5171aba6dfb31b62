// Weights and activations as the products of gemm.h read them.

#pragma once

#include "common/gemm.h"

#include <type_traits>

namespace sora {

// Two bf16 values in the place of one float: with AVX512_BF16 a product of bf16 operands does two steps of k at a time.
SORA_INLINE float pair(BFloat16 first, BFloat16 second) {
  return as_float(uint32_t{first.bits} | uint32_t{second.bits} << 16);
}

// Packs B from a weight of any dtype: element (k, n) at data[k * stride_k + n * stride_n].
struct PackParams {
  const void* data;
  int64_t depth, columns, stride_k, stride_n;
  float* packed;
  bool pairs = false;
};

template <class T>
struct Pack {
  static SORA_INLINE void run(const PackParams& p, int64_t begin, int64_t end) {  // panels
    const int64_t width = 2 * lanes(), step = p.pairs ? 2 : 1, rows = (p.depth + step - 1) / step;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * width, n = std::min(width, p.columns - first);
      const T* from = static_cast<const T*>(p.data) + first * p.stride_n;
      float* to = p.packed + first * rows;
      for (int64_t k = 0; k < p.depth; k += step, to += width, from += step * p.stride_k) {
        if constexpr (std::is_same_v<T, BFloat16>) {
          const int64_t next = k + 1 < p.depth ? p.stride_k : -1;
          if (p.pairs) {
            for (int64_t j = 0; j < n; ++j) to[j] = pair(from[j * p.stride_n], next < 0 ? T{} : from[j * p.stride_n + next]);
          }
        }
        if (!p.pairs) {
          for (int64_t j = 0; j < n; ++j) to[j] = to_float(from[j * p.stride_n]);
        }
        std::fill(to + n, to + width, 0.0f);
      }
    }
  }
};

}  // namespace sora
