// causal_conv3d, stride 1, forward, for sm_90a:
//
//   raw[p, n] = bias[n] + residual[p, n] + sum over taps (i, j, k) and channels c of
//               x[p + offset + (i, j, k), c] weight[n, c, i, j, k]
//   out[p] = raw[p], or SiLU(raw[p] / rms(raw[p]) norm_weight)
//
// A product of matrices whose left operand exists only in shared memory. A block works off tiles of 256 pixels of a
// frame and some output channels. One thread of a warp group brings boxes by the TMA: of the video, at the coordinates
// that a tap shifts, with zeros beyond the frame; and of the weight. Two more warp groups multiply 128 pixels each.
//
// The box of a tap column k has the rows of all kh taps. Tap j reads it j rows further down, which a matrix descriptor
// can say because a row of a box is whole swizzles (eight pixels of 128 bytes): so the video is read from L2 about kw
// times and not kh kw times. Columns cannot be shifted like that.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"

#include <algorithm>
#include <utility>
#include <vector>

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
  static constexpr bool kMore = kColumns <= 128;               // than a bias: more sums leave it no registers
  static constexpr int kOutBoxes = kColumns / kOutColumns;     // side by side
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

struct ConvParams {
  const float *bias, *norm_weight;  // [N] or none
  float eps;
  bool residual, raw;  // whether there are these videos
  int C, N, kt, kh, kw;
  int offset_t, offset_h, offset_w, past;  // past: frames of the cache, which lie before x
  int box_h, box_w;                        // the pixels of a tile
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

struct Videos {
  const CUtensorMap &x, &cache, &weight, &residual, &raw, &out;
};

// Tiles of the same pixels follow each other: they find the video in L2.
struct Tile {
  int n, w, h, t, b;
  int first_tap;  // in time: those before it meet frames of zeros alone

  __device__ Tile(int index, int columns, const ConvParams& p) {
    n = index % p.blocks * columns, index /= p.blocks;
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
    for (int i = tile.first_tap; i < p.kt; ++i) {
      const int t = tile.t + p.offset_t + i, frame = t < 0 ? t + p.past : t;
      const CUtensorMap& from = t < 0 ? videos.cache : videos.x;
      for (int c = 0; c < p.C; c += Traits::kChannels) {
        for (int k = 0; k < p.kw; ++k, video.advance()) {
          Barrier& full = shared.video_full[video.stage];
          shared.video_empty[video.stage].wait(video.parity ^ 1);
          full.arrive_and_expect(box_bytes);
          load_box(shared.video[video.stage], from, full,
                   {c, tile.w + p.offset_w + k, tile.h + p.offset_h, frame, tile.b});
          for (int j = 0; j < p.kh; ++j, taps.advance()) {
            Barrier& tap_full = shared.weight_full[taps.stage];
            shared.weight_empty[taps.stage].wait(taps.parity ^ 1);
            tap_full.arrive_and_expect(sizeof shared.weight[0]);
            load_box(shared.weight[taps.stage], videos.weight, tap_full, {c, k, j, i, tile.n});
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
      d[k] = __fdividef(z, 1.0f + __expf(-z));
    }
  }
}

template <class Traits>
__device__ __forceinline__ void consume(ConvShared<Traits>& shared, const Videos& videos, const ConvParams& p) {
  constexpr int kColumns = Traits::kColumns, kParts = Traits::kParts, kRows = Traits::kRows;
  constexpr int kOutColumns = Traits::kOutColumns, kBoxes = Traits::kOutBoxes;
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
    if (Traits::kMore && p.residual && thread == 0) {
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
    if (Traits::kMore && p.residual) {
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
    if (Traits::kMore && p.raw) store(videos.raw);
    if (Traits::kMore && p.norm_weight) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) norm_silu(sums[part], tile.n, p);
    }
    store(videos.out);
  }
  if (thread == 0) wait_for_stores<0>();
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void causal_conv3d_fwd_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap cache,
    const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap residual,
    const __grid_constant__ CUtensorMap raw, const __grid_constant__ CUtensorMap out,
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

int blocks_of(int64_t size, int64_t side) { return static_cast<int>((size + side - 1) / side); }

// The shape of a tile: of those whose box with its rim fits, the one of which fewest cover a frame; then the least rim.
void choose_box(ConvParams& p, int pixels, int most, const Tensor& out) {
  int64_t best = INT64_MAX;
  for (const int w : {16, 8, 32}) {
    const int h = pixels / w, rim = (p.kh - 1) * w;
    const int64_t cost = int64_t{blocks_of(out.size(3), h)} * blocks_of(out.size(4), w) * 1024 + rim;
    if (pixels + rim <= most && cost < best) best = cost, p.box_h = h, p.box_w = w;
  }
  p.tiles_h = blocks_of(out.size(3), p.box_h), p.tiles_w = blocks_of(out.size(4), p.box_w);
}

// Of a video [B, C, T, H, W] whose channels are dense, for boxes within a frame.
CUtensorMap video_map(const char* name, const Tensor& t, int channels, int w, int h) {
  return box_map<5>(name, t, {1, 4, 3, 2, 0}, {channels, w, h, 1, 1});
}

struct Tensors {
  const Tensor &x, &cache, &weight, &residual, &raw, &out;  // out in place of a residual or raw that is not there
};

template <class Traits>
void launch(const Tensors& t, ConvParams p) {
  constexpr int kShared = sizeof(ConvShared<Traits>), kChannels = Traits::kChannels;
  choose_box(p, Traits::kPixels, Traits::kBoxPixels, t.out);
  p.blocks = blocks_of(p.N, Traits::kColumns);
  const int64_t tiles = t.out.size(0) * p.frames * p.tiles_h * p.tiles_w * p.blocks;
  SORA_CHECK(tiles <= INT32_MAX, "out: expected at most 2^31 - 1 tiles of ", Traits::kPixels, " pixels, got ",
             describe(t.out));
  p.tiles = static_cast<int>(tiles);

  const int32_t device = t.x.get_device_index();
  const DeviceGuard guard(device);
  int major = 0, processors = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  SORA_CHECK(major == 9, "expected a GPU of compute capability 9.0, got ", major, ".x");
  const auto kernel = causal_conv3d_fwd_kernel<Traits>;
  SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const int rows = p.box_h + p.kh - 1;
  const auto result_map = [&](const char* name, const Tensor& video) {
    return video_map(name, video, Traits::kOutColumns, p.box_w, Traits::kRows / p.box_w);
  };
  kernel<<<std::min(p.tiles, processors), Traits::kThreads, kShared, current_stream(device)>>>(
      video_map("x", t.x, kChannels, p.box_w, rows), video_map("cache", t.cache, kChannels, p.box_w, rows),
      box_map<5>("weight", t.weight, {1, 4, 3, 2, 0}, {kChannels, 1, 1, 1, Traits::kColumns}),
      result_map("residual", t.residual), result_map("raw", t.raw), result_map("out", t.out), p);
  SORA_CUDA_CHECK(cudaGetLastError());
}

// The channels of a tile: a further block of them reads the pixels again, which counts as 32 columns. More than a bias
// takes at most 128.
template <class T>
void launch_columns(const Tensors& t, const ConvParams& p) {
  int best = 0;
  for (const int columns : {192, 128, 96, 64, 32}) {
    if (columns > 128 && (p.residual || p.norm_weight)) continue;
    if (!best || blocks_of(p.N, columns) * (columns + 32) < blocks_of(p.N, best) * (best + 32)) best = columns;
  }
  switch (best) {
    case 192: return launch<ConvTraits<T, 192>>(t, p);
    case 128: return launch<ConvTraits<T, 128>>(t, p);
    case 96: return launch<ConvTraits<T, 96>>(t, p);
    case 64: return launch<ConvTraits<T, 64>>(t, p);
    default: return launch<ConvTraits<T, 32>>(t, p);
  }
}

// t [B, C, T, H, W], channels last, in the dtype of x.
void check_video(const char* name, const Tensor& t, const Tensor& x) {
  check_kind(name, t, x);
  SORA_CHECK(t.dim() == 5 && t.size(0) == x.size(0) && t.stride(1) == 1 && t.scalar_type() == x.scalar_type(), name,
             ": expected a video [B, C, T, H, W] like x, channels last, got ", describe(t), "; x is ", describe(x));
}

// The data of a float32 [N], or null.
const float* vector_of(const char* name, const OptionalTensor& t, const Tensor& x, int64_t N) {
  if (!t) return nullptr;
  check_kind(name, *t, x);
  SORA_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == N && t->is_contiguous(), name,
             ": expected a contiguous float32 (", N, ",), got ", describe(*t));
  return static_cast<const float*>(t->data_ptr());
}

void causal_conv3d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cache,
                       const OptionalTensor& residual, const OptionalTensor& norm_weight, std::vector<int64_t> stride,
                       bool bordered, double norm_eps, const Tensor& out, const OptionalTensor& pre) {
  SORA_CHECK(x.is_cuda() && x.dim() == 5 && weight.dim() == 5 && x.scalar_type() != ScalarType::Float,
             "x, weight: expected bfloat16 or float16 of five axes on a GPU, got ", describe(x), " and ",
             describe(weight));
  SORA_CHECK(stride == std::vector<int64_t>({1, 1, 1}), "stride: expected 1");
  check_video("x", x, x), check_video("out", out, x), check_kind("weight", weight, x);
  const int64_t C = x.size(1), N = weight.size(0), kt = weight.size(2), kh = weight.size(3), kw = weight.size(4);
  const int64_t rim_h = bordered ? kh - 1 : 0, rim_w = bordered ? kw - 1 : 0;  // that x has around out
  SORA_CHECK(weight.size(1) == C && weight.stride(1) == 1 && weight.scalar_type() == x.scalar_type() && C % 8 == 0 &&
                 N % 8 == 0 && kt <= 256 && kh <= 9 && kw <= 256 && weight.numel() > 0,
             "weight: expected (N, C, kt, kh, kw) in the dtype of x, dense in C, channels in eights, kh of at most 9, ",
             "got ", describe(weight), "; x is ", describe(x));
  SORA_CHECK(out.numel() > 0 && out.size(1) == N && out.size(2) == x.size(2) && out.size(3) + rim_h == x.size(3) &&
                 out.size(4) + rim_w == x.size(4),
             "out: expected the size of the result, got ", describe(out), "; x is ", describe(x));
  for (int axis = 2; axis < 5; ++axis)
    SORA_CHECK(x.size(axis) < 1 << 30, "x: expected fewer than 2^30 pixels an axis, got ", describe(x));
  const bool with_past = cache && kt > 1;
  if (with_past) {
    check_video("cache", *cache, x);
    SORA_CHECK(cache->size(1) == C && cache->size(2) == kt - 1 && cache->size(3) == x.size(3) &&
                   cache->size(4) == x.size(4),
               "cache: expected the kt - 1 frames before x, got ", describe(*cache), "; x is ", describe(x));
  }
  for (const auto& [name, video] : {std::pair{"residual", &residual}, std::pair{"pre", &pre}})
    if (*video) {
      check_video(name, **video, x);
      for (int axis = 1; axis < 5; ++axis)
        SORA_CHECK((*video)->size(axis) == out.size(axis), name, ": expected the size of out, got ", describe(**video));
    }
  SORA_CHECK(!norm_weight || N <= 128, "norm_weight: expected at most 128 channels, got ", N);
  SORA_CHECK(norm_weight || !pre, "pre: expected none without norm_weight");

  ConvParams p{.bias = vector_of("bias", bias, x, N), .norm_weight = vector_of("norm_weight", norm_weight, x, N)};
  p.eps = static_cast<float>(norm_eps), p.residual = residual.has_value(), p.raw = pre.has_value();
  p.C = static_cast<int>(C), p.N = static_cast<int>(N), p.frames = static_cast<int>(out.size(2));
  p.kt = static_cast<int>(kt), p.kh = static_cast<int>(kh), p.kw = static_cast<int>(kw);
  p.offset_t = 1 - p.kt, p.offset_h = bordered ? 0 : -(p.kh / 2), p.offset_w = bordered ? 0 : -(p.kw / 2);
  p.past = with_past ? p.kt - 1 : 0;
  const Tensor& before = with_past ? *cache : x;  // of x where nothing is read
  const Tensors t{x, before, weight, residual ? *residual : out, pre ? *pre : out, out};
  x.scalar_type() == ScalarType::Half ? launch_columns<__half>(t, p) : launch_columns<__nv_bfloat16>(t, p);
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_causal_conv3d_fwd_cuda", TORCH_BOX(&sora::causal_conv3d_fwd));
}
