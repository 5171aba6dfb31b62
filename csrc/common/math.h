// Functions of fp32 values: F is float or a vector of floats.

#pragma once

#include "common/lanes.h"

#include <type_traits>

namespace sora {

template <class F>
using BitsOf = std::conditional_t<sizeof(F) == 4, uint32_t, typename Lanes<sizeof(F) / 4>::Bits>;

// e^x to 2 ulp for |x| <= 87; beyond, at least e^-87.3 and at most e^88.3. x = n ln 2 + r with |r| <= ln 2 / 2, then a
// polynomial in r. NaN stays.
template <class F>
SORA_INLINE F exponential(F x) {
  constexpr float kRound = 0x1.8p23f;  // added and subtracted, it rounds to a whole number
  const F above = x < -87.3f ? F{} - 87.3f : x, clipped = above > 88.3f ? F{} + 88.3f : above;
  const F shifted = clipped * 0x1.715476p0f + kRound;
  const F n = shifted - kRound;
  const F r = (clipped - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;
  F p = r * 0x1.6a3b7ep-10f + 0x1.1239f4p-7f;
  p = p * r + 0x1.5557aap-5f;
  p = p * r + 0x1.555538p-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const BitsOf<F> scale = (__builtin_bit_cast(BitsOf<F>, shifted) << 23) + 0x3f800000u;
  return p * __builtin_bit_cast(F, scale);
}

// Below -88 silu and its derivative vanish; x is clipped there, so that no large x meets what is left of e^x. NaN stays.
template <class F>
SORA_INLINE F silu(F x) {
  const F v = x < -88.0f ? F{} - 88.0f : x;
  return v / (1.0f + exponential(-v));
}

// The derivative of silu.
template <class F>
SORA_INLINE F silu_slope(F x) {
  const F v = x < -88.0f ? F{} - 88.0f : x;
  const F s = 1.0f / (1.0f + exponential(-v));
  return s * (1.0f + v * (1.0f - s));
}

}  // namespace sora
