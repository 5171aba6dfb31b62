// Which instruction set the C++ kernels run on, and how a kernel is compiled for each.
//
// A kernel is a struct with a static `run`, written as plain loops, every helper it calls marked SORA_INLINE. `dispatch`
// compiles it three times and picks one at run time. GCC's target_clones would do the same, but a clone cannot be
// chosen by a test, and templates cannot be cloned portably.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define SORA_INLINE inline __attribute__((always_inline))
#define SORA_LAMBDA __attribute__((always_inline))  // after the parameters of a lambda that a kernel calls

#if defined(__x86_64__)
#define SORA_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2,prefer-vector-width=512")))
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

// 16-bit floats as their bits. Both conversions are integer and fp32 arithmetic only, so that they vectorise on
// every instruction set, and round to nearest even like the hardware's.
struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

SORA_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SORA_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SORA_INLINE float to_float(float value) { return value; }

SORA_INLINE float to_float(BFloat16 value) { return as_float(uint32_t{value.bits} << 16); }

// The product by 2^112 moves the exponent's bias from 15 to 127 and makes subnormals normal; what was infinity or NaN
// then lies at or above 2^16 and gets the exponent of all ones back.
SORA_INLINE float to_float(Half value) {
  const uint32_t magnitude = uint32_t{value.bits} << 13 & 0x0fffe000u;
  const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return as_float(scaled | special | (uint32_t{value.bits} & 0x8000u) << 16);
}

template <class T>
SORA_INLINE T from_float(float value);

template <>
SORA_INLINE float from_float<float>(float value) {
  return value;
}

template <>
SORA_INLINE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
}

// Adding a power of two whose last place is the half's last place rounds in hardware, subnormals included; the two
// products first send what overflows a half to infinity.
template <>
SORA_INLINE Half from_float<Half>(float value) {
  const uint32_t bits = as_bits(value), doubled = bits + bits;
  const float clipped = (as_float(bits & 0x7fffffffu) * 0x1p112f) * 0x1p-110f;
  const uint32_t bias = doubled & 0xff000000u;
  const float rounded = as_float(((bias < 0x71000000u ? 0x71000000u : bias) >> 1) + 0x07800000u) + clipped;
  const uint32_t half = (as_bits(rounded) >> 13 & 0x7c00u) + (as_bits(rounded) & 0x0fffu);
  const uint32_t magnitude = doubled > 0xff000000u ? 0x7e00u : half;
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | magnitude)};
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
