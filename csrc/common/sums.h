// Sums over a row of fp32 values in L1, in an order that depends on its length only.
//
// Written with vector types: `omp simd reduction` adds its lanes up one after another, which for a row of a thousand
// elements takes as long as the row itself.

#pragma once

#include "common/simd.h"

#include <cstdint>
#include <cstring>

namespace sora {

constexpr int64_t kVec16 = 16;

typedef float Vec16 __attribute__((vector_size(64)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));

// at(p): the 16 values p[i], ..., p[i + 15], or the one value p[i].
template <class V>
struct At {
  int64_t i;
  SORA_INLINE V operator()(const float* p) const {
    V v;
    std::memcpy(&v, p + i, sizeof v);
    return v;
  }
};

SORA_INLINE float sum_of_lanes(const Vec16& v) {
  const float* lanes = reinterpret_cast<const float*>(&v);
  const Vec8 octet = At<Vec8>{0}(lanes) + At<Vec8>{8}(lanes);
  const float* half = reinterpret_cast<const float*>(&octet);
  const Vec4 q = At<Vec4>{0}(half) + At<Vec4>{4}(half);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// The sum of n terms, each a function of values fetched by `at`: sum(n, [=](auto at) SORA_LAMBDA { return at(a) * at(b); }).
// Four accumulators: it is bound by loads instead of the latency of one addition, and its rounding error shrinks.
template <class Term>
SORA_INLINE float sum(int64_t n, const Term& term) {
  Vec16 s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kVec16 <= n; i += 4 * kVec16) {
    s0 += term(At<Vec16>{i});
    s1 += term(At<Vec16>{i + kVec16});
    s2 += term(At<Vec16>{i + 2 * kVec16});
    s3 += term(At<Vec16>{i + 3 * kVec16});
  }
  for (; i + kVec16 <= n; i += kVec16) s0 += term(At<Vec16>{i});
  float rest = 0;
  for (; i < n; ++i) rest += term(At<float>{i});

  return sum_of_lanes((s0 + s1) + (s2 + s3)) + rest;
}

}  // namespace sora
