// 16-byte vectors of T, widened to fp32 after the load and rounded once at the store.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sora {

using torch::headeronly::ScalarType;

template <class T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) { return value; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <>
__device__ __forceinline__ __half from_float<__half>(float value) { return __float2half_rn(value); }

// Rounded in pairs: one by one, each takes an instruction to round and another to be put beside its neighbour.
template <class T>
__device__ __forceinline__ Vec<T> rounded(const float (&values)[Vec<T>::kSize]) {
  Vec<T> vec;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; i += 2) {
    if constexpr (std::is_same_v<T, float>)
      vec.values[i] = values[i], vec.values[i + 1] = values[i + 1];
    else if constexpr (std::is_same_v<T, __half>)
      *reinterpret_cast<__half2*>(vec.values + i) = __floats2half2_rn(values[i], values[i + 1]);
    else
      *reinterpret_cast<__nv_bfloat162*>(vec.values + i) = __floats2bfloat162_rn(values[i], values[i + 1]);
  }
  return vec;
}

// Read once and not kept in L1: tokens pass by, the modulation rows beside them are what L1 should hold.
template <class T>
__device__ __forceinline__ Vec<T> load_streaming(const T* from) {
  uint4 raw;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(from));
  return *reinterpret_cast<const Vec<T>*>(&raw);
}

// In assembly because the compiler splits an ordinary 16-byte store in four where its branches meet.
template <class T>
__device__ __forceinline__ void store_vec(T* to, const Vec<T>& vec) {
  const uint4 raw = *reinterpret_cast<const uint4*>(&vec);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
               : "memory");
}

template <class T, int N>
__device__ __forceinline__ void load_as_float(const T* from, float (&to)[N]) {
  static_assert(N % Vec<T>::kSize == 0 || Vec<T>::kSize % N == 0);
  if constexpr (N >= Vec<T>::kSize) {
#pragma unroll
    for (int i = 0; i < N; i += Vec<T>::kSize) {
      const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from + i));
      const Vec<T>& vec = *reinterpret_cast<const Vec<T>*>(&raw);
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) to[i + j] = to_float(vec.values[j]);
    }
  } else {  // four 16-bit values beside a vector of four fp32 ones
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(from));
    const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = to_float(values[j]);
  }
}

// The dtype is the same for all threads: one predictable branch instead of a kernel for each combination.
template <int N>
__device__ __forceinline__ void load_any(const void* data, ScalarType dtype, int64_t offset, float (&to)[N]) {
  if (dtype == ScalarType::Float) {
    load_as_float(static_cast<const float*>(data) + offset, to);
  } else if (dtype == ScalarType::BFloat16) {
    load_as_float(static_cast<const __nv_bfloat16*>(data) + offset, to);
  } else {
    load_as_float(static_cast<const __half*>(data) + offset, to);
  }
}

__device__ __forceinline__ float load_any(const void* data, ScalarType dtype, int64_t offset) {
  if (dtype == ScalarType::Float) return static_cast<const float*>(data)[offset];
  if (dtype == ScalarType::BFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[offset]);
  return to_float(static_cast<const __half*>(data)[offset]);
}

// N values of any dtype, on a boundary of 16 bytes or of all of them; the counterpart of load_any.
template <class T, int N>
__device__ __forceinline__ void store_as(T* to, const float (&values)[N]) {
  static_assert(N % Vec<T>::kSize == 0 || 2 * N == Vec<T>::kSize);
  if constexpr (N >= Vec<T>::kSize) {
#pragma unroll
    for (int i = 0; i < N; i += Vec<T>::kSize) {
      Vec<T> vec;
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) vec.values[j] = from_float<T>(values[i + j]);
      store_vec(to + i, vec);
    }
  } else {
    struct alignas(8) Half { T values[N]; } half;
#pragma unroll
    for (int j = 0; j < N; ++j) half.values[j] = from_float<T>(values[j]);
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(&half);
  }
}

template <int N>
__device__ __forceinline__ void store_any(void* data, ScalarType dtype, int64_t offset, const float (&values)[N]) {
  if (dtype == ScalarType::Float) {
    store_as(static_cast<float*>(data) + offset, values);
  } else if (dtype == ScalarType::BFloat16) {
    store_as(static_cast<__nv_bfloat16*>(data) + offset, values);
  } else {
    store_as(static_cast<__half*>(data) + offset, values);
  }
}

}  // namespace sora
