// Which instruction set the C++ kernels run on, and how a kernel is compiled for each.
//
// A kernel is a struct with a static `run`, written as plain loops, every helper it calls marked SORA_INLINE. `dispatch`
// compiles it three times and picks one at run time. GCC's target_clones would do the same, but a clone cannot be
// chosen by a test, and templates cannot be cloned portably.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>

#define SORA_INLINE inline __attribute__((always_inline))
#define SORA_LAMBDA __attribute__((always_inline))  // after the parameters of a lambda that a kernel calls

// Clang does not take wide registers in the assembly of inlined functions, nor an attribute with an option it lacks.
#if defined(__x86_64__) && !defined(__clang__)
#define SORA_ASSEMBLY 1
#define SORA_PREFER_512 ",prefer-vector-width=512"
#else
#define SORA_ASSEMBLY 0
#define SORA_PREFER_512
#endif

#if defined(__x86_64__)
#define SORA_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2" SORA_PREFER_512)))
#define SORA_AVX2 __attribute__((target("avx2,fma,bmi2")))
#else
#define SORA_AVX512
#define SORA_AVX2
#endif

namespace sora {

enum class Isa { baseline, avx2, avx512 };

// The best set this machine has, or the one named by SORA_KERNELS_CPU_ISA (baseline, avx2, avx512).
Isa isa();

// Whether products of bf16 pairs (AVX512_BF16) may be used: not where SORA_KERNELS_CPU_ISA names the set.
bool has_bf16_products();

template <class Kernel, class Params>
SORA_AVX512 void run_avx512(const Params& params, int64_t begin, int64_t end) {
  Kernel::run(params, begin, end);
}

template <class Kernel, class Params>
SORA_AVX2 void run_avx2(const Params& params, int64_t begin, int64_t end) {
  Kernel::run(params, begin, end);
}

template <class Kernel, class Params>
void run_baseline(const Params& params, int64_t begin, int64_t end) {
  Kernel::run(params, begin, end);
}

template <class Kernel, class Params>
void dispatch(const Params& params, int64_t begin, int64_t end) {
  switch (isa()) {
    case Isa::avx512: return run_avx512<Kernel>(params, begin, end);
    case Isa::avx2: return run_avx2<Kernel>(params, begin, end);
    case Isa::baseline: return run_baseline<Kernel>(params, begin, end);
  }
}

// 16-bit floats as their bits. The conversions are integer and fp32 arithmetic only, so that they vectorise on every
// instruction set, and round to nearest even like the hardware's.
struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

SORA_INLINE float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
SORA_INLINE uint32_t as_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

// The value whose 16 bits are the lower half of `bits`, and back. F is float and Bits uint32_t, or both are vectors of them.
template <class F, class Bits>
SORA_INLINE F decode(BFloat16, Bits bits) {
  return __builtin_bit_cast(F, bits << 16);
}

// The product by 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal; what was infinity or NaN
// then lies at or above 2^16 and gets the exponent of all ones back.
template <class F, class Bits>
SORA_INLINE F decode(Half, Bits bits) {
  const Bits magnitude = bits << 13 & 0x0fffe000u;
  const Bits scaled = __builtin_bit_cast(Bits, __builtin_bit_cast(F, magnitude) * 0x1p112f);
  const Bits special = magnitude >= 0x0f800000u ? Bits{} + 0x7f800000u : Bits{};
  return __builtin_bit_cast(F, scaled | special | (bits & 0x8000u) << 16);
}

template <class Bits, class F>
SORA_INLINE Bits encode(BFloat16, F value) {
  const Bits bits = __builtin_bit_cast(Bits, value);
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return value != value ? Bits{} + 0x7fc0u : rounded;
}

// Adding a power of two whose last place is the half's last place rounds in hardware, subnormals included; the two
// products first send what overflows a half to infinity.
template <class Bits, class F>
SORA_INLINE Bits encode(Half, F value) {
  const Bits bits = __builtin_bit_cast(Bits, value), doubled = bits + bits;
  const F clipped = (__builtin_bit_cast(F, bits & 0x7fffffffu) * 0x1p112f) * 0x1p-110f;
  const Bits bias = doubled & 0xff000000u;
  const Bits power = ((bias < 0x71000000u ? Bits{} + 0x71000000u : bias) >> 1) + 0x07800000u;
  const Bits rounded = __builtin_bit_cast(Bits, __builtin_bit_cast(F, power) + clipped);
  const Bits half = (rounded >> 13 & 0x7c00u) + (rounded & 0x0fffu);
  const Bits magnitude = doubled > 0xff000000u ? Bits{} + 0x7e00u : half;
  return (bits >> 16 & 0x8000u) | magnitude;
}

SORA_INLINE float to_float(float value) { return value; }

template <class T>
SORA_INLINE float to_float(T value) {
  return decode<float>(T{}, uint32_t{value.bits});
}

template <class T>
SORA_INLINE T from_float(float value) {
  return {static_cast<uint16_t>(encode<uint32_t>(T{}, value))};
}

template <>
SORA_INLINE float from_float<float>(float value) {
  return value;
}

// f(a value of the C++ type of this dtype)
template <class F>
void with_dtype(torch::headeronly::ScalarType dtype, const F& f) {
  switch (dtype) {
    case torch::headeronly::ScalarType::BFloat16: return f(BFloat16{});
    case torch::headeronly::ScalarType::Half: return f(Half{});
    default: return f(float{});
  }
}

}  // namespace sora
