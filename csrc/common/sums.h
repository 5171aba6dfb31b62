// Sums over a row of fp32 values in L1, in an order that depends on its length only.
//
// Written with vector types: `omp simd reduction` adds its lanes up one after another, which for a row of a thousand
// elements takes as long as the row itself.

#pragma once

#include "common/simd.h"

#include <cstdint>
#include <cstring>

namespace sora {

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only, never by a calling convention

constexpr int64_t kLanes = 16;

typedef float Lanes __attribute__((vector_size(64)));
typedef float Octet __attribute__((vector_size(32)));
typedef float Quartet __attribute__((vector_size(16)));

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

SORA_INLINE float sum_of_lanes(const Lanes& v) {
  const float* lanes = reinterpret_cast<const float*>(&v);
  const Octet octet = At<Octet>{0}(lanes) + At<Octet>{8}(lanes);
  const float* half = reinterpret_cast<const float*>(&octet);
  const Quartet q = At<Quartet>{0}(half) + At<Quartet>{4}(half);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// The sum of n terms, each a function of values fetched by `at`: sum(n, [=](auto at) SORA_LAMBDA { return at(a) * at(b); }).
// Four accumulators: it is bound by loads instead of the latency of one addition, and its rounding error shrinks.
template <class Term>
SORA_INLINE float sum(int64_t n, const Term& term) {
  Lanes s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += term(At<Lanes>{i});
    s1 += term(At<Lanes>{i + kLanes});
    s2 += term(At<Lanes>{i + 2 * kLanes});
    s3 += term(At<Lanes>{i + 3 * kLanes});
  }
  for (; i + kLanes <= n; i += kLanes) s0 += term(At<Lanes>{i});
  float rest = 0;
  for (; i < n; ++i) rest += term(At<float>{i});

  return sum_of_lanes((s0 + s1) + (s2 + s3)) + rest;
}

}  // namespace sora
