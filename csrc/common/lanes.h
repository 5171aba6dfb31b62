// Vectors of V floats, for kernels that must say what stays in registers. Elsewhere plain loops serve (simd.h).

#pragma once

#include "common/simd.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace sora {

template <int V>
struct Lanes {
  typedef float Type __attribute__((vector_size(V * sizeof(float))));
  typedef float Unaligned __attribute__((vector_size(V * sizeof(float)), aligned(sizeof(float)), may_alias));
};

// Floats of a vector of the instruction set that runs.
inline int64_t lanes() { return isa() == Isa::avx512 ? 16 : isa() == Isa::avx2 ? 8 : 4; }

// `dispatch` of simd.h for kernels that are written for V floats to a vector: Kernel<V, T>.
template <template <int, class> class Kernel, class T, class Params>
void dispatch_lanes(const Params& params, int64_t begin, int64_t end) {
  switch (isa()) {
    case Isa::avx512: return run_avx512<Kernel<16, T>>(params, begin, end);
    case Isa::avx2: return run_avx2<Kernel<8, T>>(params, begin, end);
    case Isa::baseline: return run_baseline<Kernel<4, T>>(params, begin, end);
  }
}

template <int V>
using Floats = typename Lanes<V>::Type;

template <int V>
SORA_INLINE Floats<V> fetch(const float* from) {
  return *reinterpret_cast<const typename Lanes<V>::Unaligned*>(from);
}

template <int V>
SORA_INLINE void put(float* to, const Floats<V>& x) {
  *reinterpret_cast<typename Lanes<V>::Unaligned*>(to) = x;
}

template <int V>
SORA_INLINE float sum(const Floats<V>& x) {
  if constexpr (V == 4) {
    return (x[0] + x[2]) + (x[1] + x[3]);
  } else {
    Floats<V / 2> lower, upper;
    std::memcpy(&lower, &x, sizeof lower);
    std::memcpy(&upper, reinterpret_cast<const char*>(&x) + sizeof lower, sizeof upper);
    return sum<V / 2>(lower + upper);
  }
}

// V channels side by side, of which the first n exist.
template <int V, class T>
SORA_INLINE Floats<V> read(const T* from, int64_t n) {
  T whole[V];
  if (n < V) std::fill(std::copy_n(from, n, whole), whole + V, T{}), from = whole;
  alignas(64) float x[V];
#pragma omp simd
  for (int j = 0; j < V; ++j) x[j] = to_float(from[j]);
  return fetch<V>(x);
}

template <int V, class T>
SORA_INLINE void write(T* to, const Floats<V>& values, int64_t n) {
  T whole[V];
  alignas(64) float x[V];
  put<V>(x, values);
  T* all = n < V ? whole : to;
#pragma omp simd
  for (int j = 0; j < V; ++j) all[j] = from_float<T>(x[j]);
  if (n < V) std::copy_n(whole, n, to);
}

// V interleaved pairs, of which the first n exist. Two 16-bit neighbours are taken apart in the 32-bit lane in which
// they arrive: the first lies in its lower half, as on every machine this is built for.
template <int V, class T>
SORA_INLINE void read_pairs(const T* from, int64_t n, Floats<V>& a, Floats<V>& b) {
  T whole[2 * V];
  if (n < V) std::fill(std::copy_n(from, 2 * n, whole), whole + 2 * V, T{}), from = whole;
  alignas(64) float x[V], y[V];
#pragma omp simd
  for (int j = 0; j < V; ++j) {
    if constexpr (sizeof(T) == 2) {
      uint32_t both;
      std::memcpy(&both, from + 2 * j, sizeof both);
      x[j] = to_float(T{static_cast<uint16_t>(both)}), y[j] = to_float(T{static_cast<uint16_t>(both >> 16)});
    } else {
      x[j] = from[2 * j], y[j] = from[2 * j + 1];
    }
  }
  a = fetch<V>(x), b = fetch<V>(y);
}

template <int V, class T>
SORA_INLINE void write_pairs(T* to, const Floats<V>& a, const Floats<V>& b, int64_t n) {
  T whole[2 * V];
  alignas(64) float x[V], y[V];
  put<V>(x, a), put<V>(y, b);
  T* all = n < V ? whole : to;
#pragma omp simd
  for (int j = 0; j < V; ++j) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t both = from_float<T>(x[j]).bits | uint32_t{from_float<T>(y[j]).bits} << 16;
      std::memcpy(all + 2 * j, &both, sizeof both);
    } else {
      all[2 * j] = x[j], all[2 * j + 1] = y[j];
    }
  }
  if (n < V) std::copy_n(whole, 2 * n, to);
}

}  // namespace sora
