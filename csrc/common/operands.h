// What a backward does with tensors before it launches: copies what 16-byte loads cannot read, sets gradients to zero.

#pragma once

#include "common/check.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>

namespace sora {

// t, or a dense copy of it where its rows do not start where 16-byte loads may.
inline Tensor readable(const Tensor& t) {
  const int64_t size = t.scalar_type() == ScalarType::Float ? 4 : 2;
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) aligned &= t.stride(i) * size % 16 == 0;
  if (aligned) return t;
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  torch::stable::copy_(copy, t);
  return copy;
}

inline OptionalTensor readable(const OptionalTensor& t) { return t ? OptionalTensor(readable(*t)) : t; }

inline void zero(std::initializer_list<const OptionalTensor*> gradients) {
  for (const OptionalTensor* t : gradients) {
    if (!*t || !(*t)->numel()) continue;
    Tensor zeros = **t;
    torch::stable::zero_(zeros);
  }
}

}  // namespace sora
