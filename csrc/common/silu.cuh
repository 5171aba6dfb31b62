// SiLU in fp32.

#pragma once

namespace sora {

// z / (1 + exp(-z)), without the special cases of subnormal numbers, which were half of the instructions. Of -inf: NaN.
__device__ __forceinline__ float silu(float z) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return z * s;
}

}  // namespace sora
