// Vectors of V floats, V being what a register of the instruction set holds: a vector type wider than that lives in
// memory. For kernels that say what stays in registers; elsewhere plain loops serve (simd.h).

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
  typedef uint32_t Bits __attribute__((vector_size(V * sizeof(uint32_t))));
  typedef uint16_t Words __attribute__((vector_size(V * sizeof(uint16_t))));
  typedef uint16_t UnalignedWords __attribute__((vector_size(V * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));
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

// V 16-bit words, each in 32 bits. In assembly, because GCC 12 makes five instructions of the conversion.
template <int V>
SORA_INLINE typename Lanes<V>::Bits widen(const void* from) {
  const auto& words = *static_cast<const typename Lanes<V>::UnalignedWords*>(from);
#if defined(__x86_64__)
  if constexpr (V > 4) {
    typename Lanes<V>::Bits bits;
    asm("vpmovzxwd %1, %0" : "=v"(bits) : "m"(words));
    return bits;
  }
#endif
  return __builtin_convertvector(words, typename Lanes<V>::Bits);
}

// V values of any dtype as fp32, and rounded back.
template <int V, class T>
SORA_INLINE Floats<V> fetch(const T* from) {
  if constexpr (sizeof(T) == 2) return decode<Floats<V>>(T{}, widen<V>(from));
  else return *reinterpret_cast<const typename Lanes<V>::Unaligned*>(from);
}

template <int V, class T>
SORA_INLINE void put(T* to, const Floats<V>& x) {
  using Lane = Lanes<V>;
  if constexpr (sizeof(T) == 2) {
    const auto bits = encode<typename Lane::Bits>(T{}, x);
    *reinterpret_cast<typename Lane::UnalignedWords*>(to) = __builtin_convertvector(bits, typename Lane::Words);
  } else {
    *reinterpret_cast<typename Lane::Unaligned*>(to) = x;
  }
}

// 2V neighbours. Eight 16-bit results fill half a register: with AVX2 two halves take as long to pack as one.
template <int V, class T>
SORA_INLINE void put_both(T* to, const Floats<V>& x, const Floats<V>& y) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 2 && V == 8) {
    const auto a = encode<typename Lanes<V>::Bits>(T{}, x), b = encode<typename Lanes<V>::Bits>(T{}, y);
    typename Lanes<2 * V>::Words words;
    asm("vpackusdw %2, %1, %0\n\tvpermq $0xd8, %0, %0" : "=x"(words) : "x"(a), "x"(b));
    *reinterpret_cast<typename Lanes<2 * V>::UnalignedWords*>(to) = words;
    return;
  }
#endif
  put<V>(to, x), put<V>(to + V, y);
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
  return fetch<V>(from);
}

template <int V, class T>
SORA_INLINE void write(T* to, const Floats<V>& x, int64_t n) {
  T whole[V];
  put<V>(n < V ? whole : to, x);
  if (n < V) std::copy_n(whole, n, to);
}

// V interleaved pairs, of which the first n exist. Two 16-bit neighbours are taken apart in the 32-bit lane in which
// they arrive: the first lies in its lower half, as on every machine this is built for.
template <int V, class T>
SORA_INLINE void read_pairs(const T* from, int64_t n, Floats<V>& a, Floats<V>& b) {
  T whole[2 * V];
  if (n < V) std::fill(std::copy_n(from, 2 * n, whole), whole + 2 * V, T{}), from = whole;
  if constexpr (sizeof(T) == 2) {
    typename Lanes<V>::Bits both;
    std::memcpy(&both, from, sizeof both);
    a = decode<Floats<V>>(T{}, both & 0xffffu), b = decode<Floats<V>>(T{}, both >> 16);
  } else {
    alignas(64) float x[V], y[V];
#pragma omp simd
    for (int j = 0; j < V; ++j) x[j] = from[2 * j], y[j] = from[2 * j + 1];
    a = fetch<V>(x), b = fetch<V>(y);
  }
}

template <int V, class T>
SORA_INLINE void write_pairs(T* to, const Floats<V>& a, const Floats<V>& b, int64_t n) {
  T whole[2 * V];
  T* all = n < V ? whole : to;
  if constexpr (sizeof(T) == 2) {
    using Bits = typename Lanes<V>::Bits;
    const Bits both = encode<Bits>(T{}, a) | encode<Bits>(T{}, b) << 16;
    std::memcpy(all, &both, sizeof both);
  } else {
    alignas(64) float x[V], y[V];
    put<V>(x, a), put<V>(y, b);
#pragma omp simd
    for (int j = 0; j < V; ++j) all[2 * j] = x[j], all[2 * j + 1] = y[j];
  }
  if (n < V) std::copy_n(whole, 2 * n, to);
}

}  // namespace sora
