// Functions of fp32 values: F is float or a vector of floats.

#pragma once

#include "common/lanes.h"

#include <type_traits>

namespace sora {

template <class F>
using BitsOf = std::conditional_t<sizeof(F) == 4, uint32_t, typename Lanes<sizeof(F) / 4>::Bits>;

// e^x to 2 ulp for -87.3 <= x <= 88.3; from there to 89 infinity is the other result. x = n ln 2 + r with |r| <= ln 2 / 2,
// then a polynomial in r, by Estrin's scheme: a loop over it is bound by the length of the chain from load to store.
template <class F>
SORA_INLINE F exponential(F x) {
  constexpr float kRound = 0x1.8p23f;  // added and subtracted, it rounds to a whole number
  const F shifted = x * 0x1.715476p0f + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f, r2 = r * r;
  const F upper = r2 * 0x1.6a3b7ep-10f + (r * 0x1.1239f4p-7f + 0x1.5557aap-5f);
  const F p = (upper * r2 + (r * 0x1.555538p-3f + 0x1.fffff8p-2f)) * r2 + (r + 1.0f);
  const BitsOf<F> scale = (__builtin_bit_cast(BitsOf<F>, shifted) << 23) + 0x3f800000u;
  return p * __builtin_bit_cast(F, scale);
}

// x but no less, or no more, than `bound`; NaN stays. In assembly, because GCC 12 makes a comparison and a blend of each.
template <class F>
SORA_INLINE F at_least(float bound, F x) {
#if SORA_ASSEMBLY
  if constexpr (sizeof(F) > 16) {
    asm("vmaxps %1, %2, %0" : "=v"(x) : "v"(x), "v"(F{} + bound));
    return x;
  }
#endif
  return x < bound ? F{} + bound : x;
}

template <class F>
SORA_INLINE F at_most(float bound, F x) {
#if SORA_ASSEMBLY
  if constexpr (sizeof(F) > 16) {
    asm("vminps %1, %2, %0" : "=v"(x) : "v"(x), "v"(F{} + bound));
    return x;
  }
#endif
  return x > bound ? F{} + bound : x;
}

// As in plain PyTorch, e^-x overflows below -88: what is finite becomes -0, -infinity NaN.
template <class F>
SORA_INLINE F silu(F x) {
  return x / (1.0f + exponential(-at_most(87.3f, at_least(-88.8f, x))));
}

// The derivative of silu, which vanishes below -88: x is clipped there. NaN stays.
template <class F>
SORA_INLINE F silu_slope(F x) {
  const F v = at_most(87.3f, at_least(-88.0f, x));
  const F s = 1.0f / (1.0f + exponential(-v));
  return s * (1.0f + v * (1.0f - s));
}

}  // namespace sora
