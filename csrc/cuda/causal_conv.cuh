// The kernel of causal_conv3d of stride 1 and of upsample_conv3d, forward, for sm_90a:
//
//   raw[p, n] = bias[n] + residual[p, n] + sum over taps (i, j, k) and channels c of
//               x[p + offset + (i, j, k), c] weight[n, c, i, j, k]
//   out[p] = raw[p], or SiLU(raw[p] / rms(raw[p]) norm_weight)
//
// Of an upsampling, pixels of out that lie at the same place of the repeats of a pixel of x are a phase: p counts its
// pixels, which are those of x; it has an offset, a weight (sums of the taps that meet the same pixel of x: fewer taps
// than were given) and a descriptor of its pixels in out.
//
// A product of matrices whose left operand exists only in shared memory. A block works off tiles of 256 pixels of a
// frame and some output channels. One thread of a warp group brings boxes by the TMA: of the video, at the coordinates
// that a tap shifts, with zeros beyond the frame; and of the weight. Two more warp groups multiply 128 pixels each.
//
// The box of a tap column k has the rows of all kh taps. Tap j reads it j rows further down, which a matrix descriptor
// can say because a row of a box is whole swizzles (eight pixels of 128 bytes): so the video is read from L2 about kw
// times and not kh kw times. Columns cannot be shifted like that.

#pragma once

#include "common/silu.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"

#include <algorithm>

namespace sora {
namespace {

constexpr int kGroup = 128;  // threads of a warp group

template <class T_, int kColumns_>
struct ConvTraits {
  using T = T_;
  static constexpr int kColumns = kColumns_;           // output channels of a tile
  static constexpr int kConsumers = 2, kParts = 2;     // warp groups that multiply, and products side by side of each
  static constexpr int kRows = 64;                     // pixels of a product
  static constexpr int kPixels = kConsumers * kParts * kRows;
  static constexpr int kChannels = 64;                 // of a box: its rows are as wide as a swizzle
  static constexpr int kRowBytes = kChannels * sizeof(T);
  static constexpr int kBoxPixels = 320;               // of a box of the video with its rim, at most
  static constexpr int kVideoStages = 2;
  static constexpr int kWeightStages = std::min(8, 98304 / (kColumns * kRowBytes));
  static constexpr int kOutColumns = kColumns % 64 ? 32 : 64;  // of a box of out
  static constexpr int kThreads = (kConsumers + 1) * kGroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  static_assert(sizeof(T) == 2, "wgmma of 16-bit floats");
  static_assert(kRows == 64, "the rows of a wgmma");
  static_assert(kColumns % kOutColumns == 0, "a box of out must not reach into the next tile's channels");
  static_assert(kBoxPixels % 8 == 0 && kColumns % 8 == 0 && kRowBytes == 128, "boxes begin where a swizzle does");
  static_assert(kVideoStages >= 2 && kWeightStages >= 2, "a stage is released after the next's products");
  static_assert(kParts * kColumns / 2 + 40 <= kConsumerRegisters, "sums are in registers");
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kGroup <= 65536, "the register file");
};

constexpr int kPhases = 8;  // at most

struct ConvParams {
  const float *bias, *norm_weight;  // [N] or none
  float eps;
  bool residual, raw;  // whether there are these videos
  int C, N, kt, kh, kw;                       // taps of a phase
  int phases, factor_h, factor_w;             // of an upsampling, else 1
  int offset_t, past;                         // past: frames of the cache, which lie before x
  int reach_h, reach_w;                       // from the last place of a phase back to its first tap, in repeats
  int box_h, box_w;                           // the pixels of a tile
  int blocks, tiles_w, tiles_h, frames, tiles;
};

template <class Traits>
struct alignas(1024) ConvShared {
  using T = typename Traits::T;

  T video[Traits::kVideoStages][Traits::kBoxPixels][Traits::kChannels];
  T weight[Traits::kWeightStages][Traits::kColumns][Traits::kChannels];
  T out[Traits::kConsumers][2][Traits::kRows][Traits::kOutColumns];  // and, before, the residual
  Barrier video_full[Traits::kVideoStages], video_empty[Traits::kVideoStages];
  Barrier weight_full[Traits::kWeightStages], weight_empty[Traits::kWeightStages];
  Barrier residual_full[Traits::kConsumers][2];
};

struct Results {
  CUtensorMap of_phase[kPhases];
};

struct Videos {
  const CUtensorMap &x, &cache, &weight, &residual, &raw;
  const Results& out;
};

// Tiles of the same pixels follow each other: they find the video in L2.
struct Tile {
  int n, phase, w, h, t, b;
  int first_tap;  // in time: those before it meet frames of zeros alone

  __device__ Tile(int index, int columns, const ConvParams& p) {
    n = index % p.blocks * columns, index /= p.blocks;
    phase = index % p.phases, index /= p.phases;
    w = index % p.tiles_w * p.box_w, index /= p.tiles_w;
    h = index % p.tiles_h * p.box_h, index /= p.tiles_h;
    t = index % p.frames, b = index / p.frames;
    first_tap = min(max(-p.past - (t + p.offset_t), 0), p.kt);
  }
};

template <class Traits>
__device__ __forceinline__ void produce(ConvShared<Traits>& shared, const Videos& videos, const ConvParams& p) {
  const uint32_t box_bytes = (p.box_h + p.kh - 1) * p.box_w * Traits::kRowBytes;
  Place<Traits::kVideoStages> video;
  Place<Traits::kWeightStages> taps;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile(index, Traits::kColumns, p);
    const int h = tile.h - (p.reach_h - tile.phase / p.factor_w % p.factor_h) / p.factor_h;
    const int w = tile.w - (p.reach_w - tile.phase % p.factor_w) / p.factor_w, n = tile.phase * p.N + tile.n;
    for (int i = tile.first_tap; i < p.kt; ++i) {
      const int t = tile.t + p.offset_t + i, frame = t < 0 ? t + p.past : t;
      const CUtensorMap& from = t < 0 ? videos.cache : videos.x;
      for (int c = 0; c < p.C; c += Traits::kChannels) {
        for (int k = 0; k < p.kw; ++k, video.advance()) {
          Barrier& full = shared.video_full[video.stage];
          shared.video_empty[video.stage].wait(video.parity ^ 1);
          full.arrive_and_expect(box_bytes);
          load_box(shared.video[video.stage], from, full, {c, w + k, h, frame, tile.b});
          for (int j = 0; j < p.kh; ++j, taps.advance()) {
            Barrier& tap_full = shared.weight_full[taps.stage];
            shared.weight_empty[taps.stage].wait(taps.parity ^ 1);
            tap_full.arrive_and_expect(sizeof shared.weight[0]);
            load_box(shared.weight[taps.stage], videos.weight, tap_full, {c, k, j, i, n});  // beyond N the next phase's: not stored
          }
        }
      }
    }
  }
}

template <class Traits>
using Sums = float[Traits::kParts][Traits::kColumns / 2];

// sums += the products of kSteps times 16 channels of a box of the video and one of the weight; all before have ended.
template <class Traits, int kSteps>
__device__ __forceinline__ void multiply_boxes(Sums<Traits>& sums, uint64_t a, uint64_t b) {
  begin_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int part = 0; part < Traits::kParts; ++part) {
      const uint32_t rows = part * Traits::kRows * Traits::kRowBytes;
      Wgmma<typename Traits::T, Traits::kColumns>::add(sums[part], advance(a, rows + step * 32), advance(b, step * 32));
    }
  }
  commit_products();
  wait_for_products<1>();
}

// sums += the products of all taps and channels of a tile. A stage is released when the products after its own are
// issued: those are then in flight, and its own have ended.
template <class Traits>
__device__ __forceinline__ void multiply(Sums<Traits>& sums, ConvShared<Traits>& shared,
                                         Place<Traits::kVideoStages>& video, Place<Traits::kWeightStages>& taps,
                                         int rounds, int first_pixel, const ConvParams& p) {
  const bool releases = threadIdx.x % 32 == 0;
  int video_behind = -1, tap_behind = -1;
  for (int round = 0; round < rounds; ++round) {  // over i
    for (int c = 0; c < p.C; c += Traits::kChannels) {
      for (int k = 0; k < p.kw; ++k, video.advance()) {
        shared.video_full[video.stage].wait(video.parity);
        for (int j = 0; j < p.kh; ++j, taps.advance()) {
          const uint64_t a = matrix<Traits::kRowBytes>(shared.video[video.stage][first_pixel + j * p.box_w]);
          const uint64_t b = matrix<Traits::kRowBytes>(shared.weight[taps.stage]);
          shared.weight_full[taps.stage].wait(taps.parity);
          if (c + Traits::kChannels / 2 < p.C)
            multiply_boxes<Traits, Traits::kChannels / 16>(sums, a, b);
          else  // the rest are zeros
            multiply_boxes<Traits, Traits::kChannels / 32>(sums, a, b);
          if (releases && tap_behind >= 0) shared.weight_empty[tap_behind].arrive();
          if (releases && j == 0 && video_behind >= 0) shared.video_empty[video_behind].arrive();
          tap_behind = taps.stage;
        }
        video_behind = video.stage;
      }
    }
  }
#pragma unroll
  for (int part = 0; part < Traits::kParts; ++part) wait_for_products<0>(sums[part]);
  if (releases && rounds > 0) shared.weight_empty[tap_behind].arrive(), shared.video_empty[video_behind].arrive();
}

// The address of 16 bytes, `piece`, of a row of a box of kOutColumns. Computed anew for each box: held for all of them,
// the addresses would cost the registers of the sums.
template <class Traits>
struct Row {
  static constexpr int kBytes = Traits::kOutColumns * sizeof(typename Traits::T);
  uint32_t begin;

  template <class Box>
  __device__ __forceinline__ Row(const Box& box, int row) : begin(shared_address(box) + row * kBytes) {
    asm volatile("" : "+r"(begin));
  }
  __device__ __forceinline__ uint32_t operator[](int piece) const { return swizzled<kBytes>(begin + piece * 16); }
};

// kOutColumns of sums, from d on, rounded, in a box of 64 pixels.
template <class Traits, class Box>
__device__ __forceinline__ void store_rows(Box& to, const float* d) {
  const int lane = threadIdx.x % 32;
  const Row<Traits> row(to, threadIdx.x % kGroup / 32 * 16 + lane % 16);
#pragma unroll
  for (int n = 0; n < Traits::kOutColumns; n += 16)
    store_matrices<typename Traits::T>(row[n / 8 + lane / 16], d + n / 2);
}

// d += such a box.
template <class Traits, class Box>
__device__ __forceinline__ void add_rows(float* d, const Box& box) {
  using T = typename Traits::T;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Row<Traits> row(box, threadIdx.x % kGroup / 32 * 16 + lane / 4 + 8 * r);
#pragma unroll
    for (int i = 2 * r; i < Traits::kOutColumns / 2; i += 4) {
      T pair[2];
      asm volatile("ld.shared.b32 %0, [%1];"
                   : "=r"(reinterpret_cast<uint32_t&>(pair))
                   : "r"(row[i / 4] + lane % 4 * 4)
                   : "memory");
      d[i] += to_float(pair[0]), d[i + 1] += to_float(pair[1]);
    }
  }
}

// Values n and n + 1 of a vector of N, of which the rest are zeros.
__device__ __forceinline__ float2 load_pair_of(const float* vector, int n, int N) {
  return n < N ? float2{vector[n], vector[n + 1]} : float2{};  // a slice need not lie at a multiple of 8 bytes
}

// d [64, columns from n on] -> SiLU(d / rms(d) weight), row by row; a row is in the registers of four lanes.
template <int kValues>
__device__ __forceinline__ void norm_silu(float (&d)[kValues], int n, const ConvParams& p) {
  float scale[2] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) scale[i / 2 % 2] += d[i] * d[i];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    scale[r] += __shfl_xor_sync(0xffffffffu, scale[r], 1);
    scale[r] += __shfl_xor_sync(0xffffffffu, scale[r], 2);
    scale[r] = 1.0f / sqrtf(scale[r] / static_cast<float>(p.N) + p.eps);
  }
#pragma unroll
  for (int i = 0; i < kValues; i += 4) {
    const float2 weight = load_pair_of(p.norm_weight, n + 2 * i + threadIdx.x % 4 * 2, p.N);
#pragma unroll
    for (int k = i; k < i + 4; ++k) {
      const float z = d[k] * scale[k / 2 % 2] * (k % 2 ? weight.y : weight.x);
      d[k] = silu(z);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void consume(ConvShared<Traits>& shared, const Videos& videos, const ConvParams& p) {
  constexpr int kColumns = Traits::kColumns, kParts = Traits::kParts, kRows = Traits::kRows;
  constexpr int kOutColumns = Traits::kOutColumns, kBoxes = kColumns / kOutColumns;  // side by side
  constexpr bool kMore = kColumns <= 128;  // than a bias: more sums leave it no registers
  // From one lane, so that the compiler knows it to be the same for all of a warp, as matrices must be.
  const int consumer = __shfl_sync(0xffffffffu, threadIdx.x / kGroup, 0) - 1, thread = threadIdx.x % kGroup;
  const int first_pixel = consumer * kParts * kRows;
  Place<Traits::kVideoStages> video;
  Place<Traits::kWeightStages> taps;
  Place<2> residual;
  static_assert(kParts % 2 == 0, "boxes of a residual begin a tile in the first of two places");
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile(index, kColumns, p);
    const auto row_of = [&](int box) { return tile.h + (first_pixel + box / kBoxes * kRows) / p.box_w; };
    const auto load_residual = [&](int box) {
      Barrier& full = shared.residual_full[consumer][box % 2];
      full.arrive_and_expect(sizeof shared.out[0][0]);
      load_box(shared.out[consumer][box % 2], videos.residual, full,
               {tile.n + box % kBoxes * kOutColumns, tile.w, row_of(box), tile.t, tile.b});
    };
    if (kMore && p.residual && thread == 0) {
      wait_for_stores<0>();
      load_residual(0), load_residual(1);
    }
    Sums<Traits> sums = {};
    multiply<Traits>(sums, shared, video, taps, p.kt - tile.first_tap, first_pixel, p);

    if (p.bias) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 4) {
        const float2 bias = load_pair_of(p.bias, tile.n + 2 * i + thread % 4 * 2, p.N);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          sums[part][i] += bias.x, sums[part][i + 1] += bias.y;
          sums[part][i + 2] += bias.x, sums[part][i + 3] += bias.y;
        }
      }
    }
    if (kMore && p.residual) {
#pragma unroll
      for (int box = 0; box < kParts * kBoxes; ++box, residual.advance()) {
        shared.residual_full[consumer][box % 2].wait(residual.parity);
        add_rows<Traits>(sums[box / kBoxes] + box % kBoxes * kOutColumns / 2, shared.out[consumer][box % 2]);
        if (box + 2 < kParts * kBoxes) {
          sync_threads(1 + consumer, kGroup);
          if (thread == 0) load_residual(box + 2);
        }
      }
    }
    const auto store = [&](const CUtensorMap& to) {
#pragma unroll
      for (int box = 0; box < kParts * kBoxes; ++box) {
        auto& rows = shared.out[consumer][box % 2];
        if (thread == 0) wait_for_stores<1>();
        sync_threads(1 + consumer, kGroup);
        store_rows<Traits>(rows, sums[box / kBoxes] + box % kBoxes * kOutColumns / 2);
        publish_writes();
        sync_threads(1 + consumer, kGroup);
        if (thread == 0) {
          store_box(to, rows, {tile.n + box % kBoxes * kOutColumns, tile.w, row_of(box), tile.t, tile.b});
          commit_stores();
        }
      }
    };
    if (kMore && p.raw) store(videos.raw);
    if (kMore && p.norm_weight) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) norm_silu(sums[part], tile.n, p);
    }
    store(videos.out.of_phase[tile.phase]);
  }
  if (thread == 0) wait_for_stores<0>();
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void causal_conv3d_fwd_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap cache,
    const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap residual,
    const __grid_constant__ CUtensorMap raw, const __grid_constant__ Results out,
    const __grid_constant__ ConvParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<ConvShared<Traits>*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = Traits::kConsumers * 4;
    for (int i = 0; i < Traits::kVideoStages; ++i) shared.video_full[i].init(1), shared.video_empty[i].init(kWarps);
    for (int i = 0; i < Traits::kWeightStages; ++i) shared.weight_full[i].init(1), shared.weight_empty[i].init(kWarps);
    for (auto& full : shared.residual_full) full[0].init(1), full[1].init(1);
    publish_barriers();
  }
  __syncthreads();
  const Videos videos{x, cache, weight, residual, raw, out};
  if (threadIdx.x < kGroup) {
    give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Traits>(shared, videos, p);
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume<Traits>(shared, videos, p);
  }
#endif
}

}  // namespace
}  // namespace sora
