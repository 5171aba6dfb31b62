// Sixteen-bit floats, roundings, and instructions that act on every lane by itself.

#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "machine.h"

namespace ptx {

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
enum class Round { nearest, zero, down, up, away };  // away: to nearest, ties away from zero

inline f32 widen(bf16 x) { return std::bit_cast<f32>(u32(x.bits) << 16); }
inline f32 widen(f16 x) { return f32(std::bit_cast<_Float16>(x.bits)); }
template <class T>
T widen(T x) {
  return x;
}

inline f64 integral(f64 x, Round round) {
  switch (round) {
    case Round::nearest: return std::nearbyint(x);
    case Round::zero: return std::trunc(x);
    case Round::down: return std::floor(x);
    case Round::up: return std::ceil(x);
    default: return std::round(x);
  }
}

// x in a format of `precision` bits whose smallest normal number is 2^low and whose largest is `most`.
inline f64 rounded(f64 x, int precision, int low, f64 most, Round round) {
  if (x == 0 || !std::isfinite(x)) return x;
  f64 quantum = std::ldexp(1.0, std::max(std::ilogb(x), low) - precision + 1);
  f64 y = std::copysign(integral(x / quantum, round) * quantum, x);
  if (std::fabs(y) <= most) return y;
  bool inward = round == Round::zero || round == (x > 0 ? Round::down : Round::up);
  return std::copysign(inward ? most : std::numeric_limits<f64>::infinity(), x);
}

template <class T>
T narrow(f64 x, Round round = Round::nearest);
template <>
inline f64 narrow<f64>(f64 x, Round) {
  return x;
}
template <>
inline f32 narrow<f32>(f64 x, Round round) {
  return round == Round::nearest ? f32(x) : f32(rounded(x, 24, -126, std::numeric_limits<f32>::max(), round));
}
template <>
inline bf16 narrow<bf16>(f64 x, Round round) {
  if (x != x) return {0x7fff};
  return {u16(std::bit_cast<u32>(f32(rounded(x, 8, -126, 0x1.fep127, round))) >> 16)};
}
template <>
inline f16 narrow<f16>(f64 x, Round round) {
  if (x != x) return {0x7fff};
  return {std::bit_cast<u16>(_Float16(rounded(x, 11, -14, 65504, round)))};
}

template <class T>
T narrow32(f32 x);  // to nearest, quickly
template <>
inline f32 narrow32<f32>(f32 x) {
  return x;
}
template <>
inline f16 narrow32<f16>(f32 x) {
  return x != x ? f16{0x7fff} : f16{std::bit_cast<u16>(_Float16(x))};
}
template <>
inline bf16 narrow32<bf16>(f32 x) {
  u32 u = std::bit_cast<u32>(x);
  return x != x ? bf16{0x7fff} : bf16{u16((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

// a + b rounded to odd: what is rounded again to half the bits comes out as if rounded once.
inline f64 add_to_odd(f64 a, f64 b) {
  f64 sum = a + b, part = sum - a, lost = (a - (sum - part)) + (b - part);
  if (lost == 0 || !std::isfinite(sum)) return sum;
  u64 bits = std::bit_cast<u64>(sum);
  if (!(bits & 1)) bits += (lost > 0) == (sum > 0) ? 1 : -1;
  return std::bit_cast<f64>(bits);
}

inline f32 flushed(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
template <class T>
T flushed(T x) {
  return x;
}

template <class F, class D, class... S, size_t... I>
inline void apply_lanes(Warp& w, const Instruction& i, u32 mask, std::index_sequence<I...>) {
  std::tuple<const S*...> from{w.operand<S>(i, 1 + int(I))...};
  D* to = w.operand<D>(i, 0);
  D result[kLanes];
  for (int l = 0; l < kLanes; ++l) result[l] = F{}(std::get<I>(from)[l]...);
  if (mask == kAll) {
    memcpy(to, result, sizeof result);
  } else {
    for (int l = 0; l < kLanes; ++l)
      if (mask >> l & 1) to[l] = result[l];
  }
}

template <class F, class D, class... S>
Flow lanewise(Warp& w, const Instruction& i, u32 mask) {
  apply_lanes<F, D, S...>(w, i, mask, std::index_sequence_for<S...>{});
  return Flow::next;
}

// An operation D(S...) of a type-free function object.
template <class D, class... S, class F>
void define(Operations& o, const std::string& name, F) {
  o[name] = lanewise<F, D, S...>;
}

}  // namespace ptx
