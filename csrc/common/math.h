// Functions of one fp32 value, written so that a loop over them vectorises on every instruction set.

#pragma once

#include "common/simd.h"

namespace sora {

// e^x to 2 ulp for |x| <= 87; beyond, at least e^-87.3 and at most e^88.3. x = n ln 2 + r with |r| <= ln 2 / 2, then a
// polynomial in r.
SORA_INLINE float exponential(float x) {
  constexpr float kRound = 0x1.8p23f;  // added and subtracted, it rounds to a whole number
  const float clipped = x < -87.3f ? -87.3f : x > 88.3f ? 88.3f : x;
  const float shifted = clipped * 0x1.715476p0f + kRound;
  const float n = shifted - kRound;
  const float r = (clipped - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;
  float p = 0x1.6a3b7ep-10f;
  p = p * r + 0x1.1239f4p-7f;
  p = p * r + 0x1.5557aap-5f;
  p = p * r + 0x1.555538p-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scale = as_float((as_bits(shifted) << 23) + 0x3f800000u);
  return p * scale;
}

// Below -88 silu and its derivative vanish; x is clipped there, so that no large x meets what is left of e^x. NaN stays.
SORA_INLINE float silu(float x) {
  const float v = x < -88.0f ? -88.0f : x;
  return v / (1.0f + exponential(-v));
}

// The derivative of silu.
SORA_INLINE float silu_slope(float x) {
  const float v = x < -88.0f ? -88.0f : x;
  const float s = 1.0f / (1.0f + exponential(-v));
  return s * (1.0f + v * (1.0f - s));
}

}  // namespace sora
