// Queries, keys and values as the C++ kernels read and write them.

#pragma once

#include "common/check.h"

#include <cstdint>

namespace sora {

// [B, S, H, E] with a dense last axis.
struct Heads {
  void* data = nullptr;
  int64_t stride_b = 0, stride_s = 0, stride_h = 0;

  constexpr explicit operator bool() const { return data != nullptr; }

  template <class T>
  inline __attribute__((always_inline)) T* at(int64_t b, int64_t s, int64_t h) const {
    return static_cast<T*>(data) + b * stride_b + s * stride_s + h * stride_h;
  }
};

// Whether [B, S, H, E] has no gaps.
inline bool is_dense(const Tensor& t) {
  const int64_t row = t.size(2) * t.size(3);
  return t.numel() == 0 || ((t.stride(0) == t.size(1) * row || t.size(0) == 1) &&
                            (t.stride(1) == row || t.size(1) == 1) && (t.stride(2) == t.size(3) || t.size(2) == 1));
}

// t in the shape and dtype of x; `dense`: also without gaps.
inline Heads heads(const char* name, const OptionalTensor& t, const Tensor& x, bool dense = false) {
  if (!t) return {};
  check_common(name, *t, x);
  bool same = t->dim() == 4 && t->scalar_type() == x.scalar_type();
  for (int64_t i = 0; same && i < 4; ++i) same = t->size(i) == x.size(i);
  SORA_CHECK(same, name, ": expected (B, S, H, E) in the shape and dtype of ", describe(x), ", got ", describe(*t));
  SORA_CHECK(!dense || is_dense(*t), name, ": expected a contiguous tensor, got ", describe(*t));
  return {t->data_ptr(), t->stride(0), t->stride(1), t->stride(2)};
}

}  // namespace sora
