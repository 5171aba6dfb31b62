// Vectors of V floats, V being what a register of the instruction set holds: a vector type wider than that lives in
// memory. For kernels that say what stays in registers; elsewhere plain loops serve (simd.h).

#pragma once

#include "common/simd.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sora {

// The unaligned types must be named where memory is read or written: `auto` drops their attributes, and the compiler then
// takes the address for one of a whole vector's alignment.
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
  const typename Lanes<V>::UnalignedWords& words = *static_cast<const typename Lanes<V>::UnalignedWords*>(from);
#if SORA_ASSEMBLY
  if constexpr (V > 4) {
    typename Lanes<V>::Bits bits;
    asm("vpmovzxwd %1, %0" : "=v"(bits) : "m"(words));
    return bits;
  }
#endif
  return __builtin_convertvector(words, typename Lanes<V>::Bits);
}

// The CPU's own conversion of halves: every one with AVX2 has it.
#if SORA_ASSEMBLY
template <int V, class T>
constexpr bool has_conversion = V > 4 && std::is_same_v<T, Half>;

template <int V>
struct Halves {
  using Words = typename Lanes<V>::Words;

  static SORA_INLINE Floats<V> decode(Words words) {
    Floats<V> x;
    asm("vcvtph2ps %1, %0" : "=v"(x) : "vm"(words));
    return x;
  }

  static SORA_INLINE Words encode(Floats<V> x) {
    Words words;
    asm("vcvtps2ph $0, %1, %0" : "=vm"(words) : "v"(x));
    return words;
  }
};
#else
template <int V, class T>
constexpr bool has_conversion = false;

template <int V>
struct Halves;
#endif

// V values of any dtype as fp32, and rounded back.
template <int V, class T>
SORA_INLINE Floats<V> fetch(const T* from) {
  using Lane = Lanes<V>;
  if constexpr (sizeof(T) == 4) return *reinterpret_cast<const typename Lane::Unaligned*>(from);
  else if constexpr (has_conversion<V, T>) return Halves<V>::decode(*reinterpret_cast<const typename Lane::UnalignedWords*>(from));
  else return decode<Floats<V>>(T{}, widen<V>(from));
}

template <int V, class T>
SORA_INLINE void put(T* to, const Floats<V>& x) {
  using Lane = Lanes<V>;
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<typename Lane::Unaligned*>(to) = x;
  } else if constexpr (has_conversion<V, T>) {
    *reinterpret_cast<typename Lane::UnalignedWords*>(to) = Halves<V>::encode(x);
  } else {
    const auto bits = encode<typename Lane::Bits>(T{}, x);
    *reinterpret_cast<typename Lane::UnalignedWords*>(to) = __builtin_convertvector(bits, typename Lane::Words);
  }
}

// As it is after `put`.
template <int V, class T>
SORA_INLINE Floats<V> rounded(const Floats<V>& x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (has_conversion<V, T>) return Halves<V>::decode(Halves<V>::encode(x));
  else return decode<Floats<V>>(T{}, encode<typename Lanes<V>::Bits>(T{}, x));
}

// 2V neighbours. Eight 16-bit results fill half a register: with AVX2 two halves take as long to pack as one.
template <int V, class T>
SORA_INLINE void put_both(T* to, const Floats<V>& x, const Floats<V>& y) {
#if SORA_ASSEMBLY
  if constexpr (std::is_same_v<T, BFloat16> && V == 8) {
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

}  // namespace sora
