// What both directions of qk_norm_rope share: angles, and where the channels of a thread lie.

#pragma once

#include "common/check.h"
#include "common/rotation.h"

#include <algorithm>

namespace sora {
namespace {

constexpr int kMaxSteps = 256;  // pairs whose angles are computed: their steps are kernel parameters, of 4 KiB at most

// As common/rotation.h's steps are meant, and csrc/cpu/qknorm_rope_heads.h computes them: of 2^32 phases to a turn, a
// quadrant, and a rest of at most an eighth of a turn (Cephes, S. Moshier).
__device__ __forceinline__ void cos_sin(uint32_t phase, float& cosine, float& sine) {
  const uint32_t quadrant = (phase + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int32_t>(phase - (quadrant << 30))) * 1.4629180792671596e-9f;
  const float z = x * x;
  const float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float c = 1.0f - 0.5f * z +
                  z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const bool odd = quadrant & 1u;
  cosine = __uint_as_float(__float_as_uint(odd ? s : c) ^ ((quadrant + 1u) & 2u) << 30);
  sine = __uint_as_float(__float_as_uint(odd ? c : s) ^ (quadrant & 2u) << 30);
}

// Of a token in the grid.
struct Position {
  int64_t t, h, w;

  template <class Params>
  static __device__ __forceinline__ Position of(const Params& p, int s) {
    s += p.start - p.first;
    const int row = s / p.grid_w;
    return {row / p.grid_h + p.origin[0], row % p.grid_h + p.origin[1], s % p.grid_w + p.origin[2]};
  }

  // of 2^32 to a turn
  template <class Params>
  __device__ __forceinline__ uint32_t phase(const Params& p, int pair, uint64_t step) const {
    const int64_t position = pair < p.split_t ? t : pair < p.split_th ? h : w;
    return static_cast<uint32_t>(position * step >> 32);
  }
};

// Where a thread's two vectors lie in a head, and which of its pairs they hold.
struct Place {
  int columns[2], pairs[2];
  bool turns[2];

  template <int kVec, class Params>
  static __device__ __forceinline__ Place of(const Params& p, int j) {
    const int half = p.E / 2;
    if (p.interleaved) return {{j, half + j}, {j / 2, (half + j) / 2}, {j < 2 * p.pairs, half + j < 2 * p.pairs}};
    const bool turns = j < p.pairs;  // beyond the pairs that turn follow those that do not, halves again
    return {{turns ? j : p.pairs + j, (turns ? p.pairs : half) + j}, {j, j + kVec / 2}, {turns, turns}};
  }
};

// All vectors of a tensor of these strides, in bytes, start on a boundary of so many bytes.
inline bool aligned(const void* data, int64_t boundary, std::initializer_list<int64_t> strides = {}) {
  const auto whole = [&](int64_t stride) { return stride % boundary == 0; };
  return reinterpret_cast<uintptr_t>(data) % boundary == 0 && std::all_of(strides.begin(), strides.end(), whole);
}

template <class Params>
void set_angles(Params& p, const Rotation& r) {
  SORA_CHECK(p.pairs <= kMaxSteps, "axes: expected at most ", kMaxSteps, " rotary pairs, got ", p.pairs);
  std::copy_n(r.steps.begin(), p.pairs, p.steps);
  std::copy_n(r.origin, 3, p.origin);
  p.steps_count = p.pairs, p.start = static_cast<int>(r.start);
  p.grid_h = static_cast<int>(r.grid[1]), p.grid_w = static_cast<int>(r.grid[2]);
  p.split_t = static_cast<int>(r.split[0]), p.split_th = static_cast<int>(r.split[0] + r.split[1]);
}

}  // namespace
}  // namespace sora
