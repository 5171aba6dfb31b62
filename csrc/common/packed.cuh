// 16 bytes of T that stay packed in registers for a while, before they are widened.

#pragma once

#include "common/vec.cuh"

namespace sora {

// load_streaming where `here`, else zeros, without a branch; as four words.
__device__ __forceinline__ uint4 load_packed(const void* from, bool here) {
  uint4 raw;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(raw.x), "=&r"(raw.y), "=&r"(raw.z), "=&r"(raw.w)
      : "l"(from), "r"(static_cast<int>(here)));
  return raw;
}

// Two values at a time, from words: of values one by one the compiler makes a register each, as long as they are needed.
template <class T>
__device__ __forceinline__ void widen(const uint4& packed, float (&to)[Vec<T>::kSize]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      to[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    } else {
      to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

}  // namespace sora
