// What the kernels of patches share.

#pragma once

#include <cstdint>

namespace sora {
namespace {

// A use of a ring whose size is known when the kernel runs.
struct RingPlace {
  uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ void advance(uint32_t stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// The tiles of a block, of all: [first, last).
struct Share {
  int first, last;

  __device__ explicit Share(int tiles)
      : first(int64_t{tiles} * blockIdx.x / gridDim.x), last(int64_t{tiles} * (blockIdx.x + 1) / gridDim.x) {}
};

inline int blocks_of(int64_t size, int64_t side) { return static_cast<int>((size + side - 1) / side); }

}  // namespace
}  // namespace sora
