// Sums over the threads of a row, in a fixed order: every run gives the same bits, and every thread gets the result.

#pragma once

namespace sora {

constexpr int kWarp = 32;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// kWarps warps of one block share a row; `shared` is theirs alone. All threads of the block must call it.
template <int kWarps>
__device__ __forceinline__ float row_sum(float value, float* shared) {
  value = warp_sum(value);
  if constexpr (kWarps == 1) return value;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();  // the previous sum has been read by all
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  return warp_sum(lane < kWarps ? shared[lane] : 0.0f);
}

}  // namespace sora
