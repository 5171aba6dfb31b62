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

// The same of one or two values at once, of a row with at most kMost warps: two are exchanged for one, which half of the
// lanes add up each. Lies in shared memory, where the sums of warps meet at two places in turns: nobody writes where
// others may still read.
template <int kMost>
class RowSums {
 public:
  // All threads of the block must call it first.
  __device__ __forceinline__ void clear() {
    if constexpr (!kFew) return;
    if (threadIdx.x < 2 * kPlaces) places_[threadIdx.x] = 0.0f;
    __syncthreads();
  }

  // turn: a thread's own, 0 at first
  template <int K>
  __device__ __forceinline__ void add(float (&values)[K], int& turn) {
    static_assert(K == 1 || K == 2);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const bool odd = K == 2 && lane % 2;
    const auto lanes = [](float sum) {
#pragma unroll
      for (int offset = kWarp / 2; offset >= K; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      return sum;
    };
    float sum = odd ? values[K - 1] : values[0];
    if constexpr (K == 2) sum += __shfl_xor_sync(0xffffffffu, odd ? values[0] : values[1], 1);
    sum = lanes(sum);
    if constexpr (kMost > 1) {
      float* const places = places_ + turn;
      turn ^= kPlaces;
      if (lane < K) places[kFew ? lane * kMost + warp : warp * K + lane] = sum;
      __syncthreads();
      if constexpr (kFew) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const float4 four = *reinterpret_cast<const float4*>(places + 4 * k);
          values[k] = (four.x + four.y) + (four.z + four.w);
        }
        return;
      }
      sum = lanes(lane < K * static_cast<int>(blockDim.x / kWarp) ? places[lane] : 0.0f);
    }
    if constexpr (K == 1) {
      values[0] = sum;
    } else {
      const float other = __shfl_xor_sync(0xffffffffu, sum, 1);
      values[0] = odd ? other : sum, values[1] = odd ? sum : other;
    }
  }

 private:
  static constexpr bool kFew = kMost == 4;  // read as vectors, zeros where there is no warp
  static constexpr int kPlaces = kFew ? 8 : kWarp;
  static_assert(2 * kMost <= kWarp && (kFew || kMost == 1 || kMost > 4));

  alignas(16) float places_[2 * kPlaces];
};

}  // namespace sora
