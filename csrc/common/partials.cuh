// Reductions over the programs of a kernel: each leaves fp32 partials in rows of its own, which a second kernel adds up in a
// fixed order, so that every run gives the same bits.

#pragma once

#include "common/check.h"
#include "common/reduce.cuh"
#include "common/stream.cuh"
#include "common/vec.cuh"

#include <algorithm>

namespace sora {
namespace {

constexpr int kMostSums = 8;  // of one launch
constexpr int kSumWarps = 8, kSumBlocks = 4;  // on a processor; left to itself, ptxas spills a word on sm_80 to fit more

// A gradient, (b, f) of it the sum of partial [rows, count, D] over count, with row = b * F + f.
struct Sum {
  const float* partial;
  Rows to;
  int rows, F, count;
};

struct Sums {
  Sum of[kMostSums];
  int count, D;

  void add(const float* partial, const Rows& to, int64_t rows, int F, int64_t of_row) {
    if (to) of[count++] = {partial, to, static_cast<int>(rows), F, static_cast<int>(of_row)};
  }
};

// Each of eight warps adds up every eighth row of partials, then the block their sums.
__global__ __launch_bounds__(kSumWarps* kWarp, kSumBlocks) void sum_partials_kernel(const __grid_constant__ Sums p) {
  __shared__ float4 sums[kSumWarps][kWarp];
  const Sum& own = p.of[blockIdx.y];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, blocks = (p.D + 4 * kWarp - 1) / (4 * kWarp);
  const int d = (blockIdx.x % blocks * kWarp + lane) * 4, row = blockIdx.x / blocks;
  if (row >= own.rows) return;
  float4 sum = {};
  if (d < p.D) {
    for (int i = warp; i < own.count; i += kSumWarps) {
      const int64_t at = (int64_t{row} * own.count + i) * p.D + d;
      const float4 value = __ldg(reinterpret_cast<const float4*>(own.partial + at));
      sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || d >= p.D) return;
#pragma unroll
  for (int i = 1; i < kSumWarps; ++i) {
    const float4 value = sums[i][lane];
    sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
  }
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
  store_any(own.to.data, own.to.dtype, row / own.F * own.to.stride_b + row % own.F * own.to.stride_f + d, values);
}

inline void sum_partials(const Sums& sums, cudaStream_t stream) {
  if (sums.count == 0) return;
  int most = 0;
  for (int i = 0; i < sums.count; ++i) most = std::max(most, sums.of[i].rows);
  const dim3 grid(static_cast<unsigned>((sums.D + 4 * kWarp - 1) / (4 * kWarp) * int64_t{most}), sums.count);
  sum_partials_kernel<<<grid, kSumWarps * kWarp, 0, stream>>>(sums);
}

}  // namespace
}  // namespace sora
