// causal_conv3d, stride 1, forward, for sm_90a:
//
//   out[p, n] = bias[n] + sum over taps (i, j, k) and channels c of x[p + offset + (i, j, k), c] weight[n, c, i, j, k]
//
// A product of matrices whose left operand exists only in shared memory. A block works off tiles of 256 pixels of a frame
// and some output channels. One thread of a warp group brings boxes by the TMA: of the video, at the coordinates that a
// tap shifts, with zeros beyond the frame; and of the weight. Two more warp groups multiply 128 pixels each.
//
// The box of a tap column k has the rows of all kh taps. Tap j reads it j rows further down, which a matrix descriptor
// can say because a row of a box is whole swizzles (eight pixels of 128 bytes): so the video is read from L2 about kw
// times and not kh kw times. Columns cannot be shifted like that.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

#include <algorithm>
#include <vector>

namespace sora {
namespace {

constexpr int kGroup = 128;  // threads of a warp group

template <class T_, int kColumns_>
struct ConvTraits {
  using T = T_;
  static constexpr int kColumns = kColumns_;           // output channels of a tile
  static constexpr int kConsumers = 2, kParts = 2;     // warp groups that multiply, and the products side by side of each
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
  static_assert(kBoxPixels * kRowBytes % 1024 == 0 && kColumns * kRowBytes % 1024 == 0, "boxes begin where a swizzle does");
  static_assert(kVideoStages >= 2 && kWeightStages >= 2, "a stage is released when the products of the next are issued");
  static_assert(kParts * kColumns / 2 + 40 <= kConsumerRegisters, "sums are in registers");
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kGroup <= 65536, "the register file");
};

struct ConvParams {
  const float* bias;  // [N] or none
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
  T out[Traits::kConsumers][2][Traits::kRows][Traits::kOutColumns];
  Barrier video_full[Traits::kVideoStages], video_empty[Traits::kVideoStages];
  Barrier weight_full[Traits::kWeightStages], weight_empty[Traits::kWeightStages];
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
__device__ __forceinline__ void produce(ConvShared<Traits>& shared, const CUtensorMap& x, const CUtensorMap& cache,
                                        const CUtensorMap& weight, const ConvParams& p) {
  const uint32_t box_bytes = (p.box_h + p.kh - 1) * p.box_w * Traits::kRowBytes;
  Place<Traits::kVideoStages> video;
  Place<Traits::kWeightStages> taps;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile(index, Traits::kColumns, p);
    for (int i = tile.first_tap; i < p.kt; ++i) {
      const int t = tile.t + p.offset_t + i, frame = t < 0 ? t + p.past : t;
      const CUtensorMap& from = t < 0 ? cache : x;
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
            load_box(shared.weight[taps.stage], weight, tap_full, {c, k, j, i, tile.n});
          }
        }
      }
    }
  }
}

// sums += the products of kSteps times 16 channels of a box of the video and one of the weight; all before have ended.
template <class Traits, int kSteps>
__device__ __forceinline__ void multiply_boxes(float (&sums)[Traits::kParts][Traits::kColumns / 2], uint64_t a, uint64_t b) {
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
__device__ __forceinline__ void multiply(float (&sums)[Traits::kParts][Traits::kColumns / 2], ConvShared<Traits>& shared,
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

// kOutColumns of sums, from d on, rounded, in a box of 64 pixels.
template <class Traits, class Box>
__device__ __forceinline__ void store_rows(Box& to, const float* d) {
  constexpr int kColumns = Traits::kOutColumns;
  const int lane = threadIdx.x % 32, row = threadIdx.x % kGroup / 32 * 16 + lane % 16;
#pragma unroll
  for (int n = 0; n < kColumns; n += 16) {
    const uint32_t place = shared_address(&to[row][n + lane / 16 * 8]);
    store_matrices<typename Traits::T>(swizzled<kColumns * sizeof(typename Traits::T)>(place), d + n / 2);
  }
}

template <class Traits>
__device__ __forceinline__ void consume(ConvShared<Traits>& shared, const CUtensorMap& out, const ConvParams& p) {
  constexpr int kColumns = Traits::kColumns, kParts = Traits::kParts, kRows = Traits::kRows;
  // From one lane, so that the compiler knows it to be the same for all of a warp, as matrices must be.
  const int consumer = __shfl_sync(0xffffffffu, threadIdx.x / kGroup, 0) - 1, thread = threadIdx.x % kGroup;
  const int first_pixel = consumer * kParts * kRows;
  Place<Traits::kVideoStages> video;
  Place<Traits::kWeightStages> taps;
  int box = 0;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile(index, kColumns, p);
    float sums[kParts][kColumns / 2] = {};
    multiply<Traits>(sums, shared, video, taps, p.kt - tile.first_tap, first_pixel, p);

    if (p.bias) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 4) {
        const int n = tile.n + 2 * i + thread % 4 * 2;
        const float2 bias = n < p.N ? *reinterpret_cast<const float2*>(p.bias + n) : float2{};
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          sums[part][i] += bias.x, sums[part][i + 1] += bias.y;
          sums[part][i + 2] += bias.x, sums[part][i + 3] += bias.y;
        }
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int h = tile.h + (first_pixel + part * kRows) / p.box_w;
#pragma unroll
      for (int n = 0; n < kColumns; n += Traits::kOutColumns) {
        auto& rows = shared.out[consumer][box ^= 1];
        if (thread == 0) wait_for_stores<1>();
        sync_threads(1 + consumer, kGroup);
        store_rows<Traits>(rows, sums[part] + n / 2);
        publish_writes();
        sync_threads(1 + consumer, kGroup);
        if (thread == 0) {
          store_box(out, rows, {tile.n + n, tile.w, h, tile.t, tile.b});
          commit_stores();
        }
      }
    }
  }
  if (thread == 0) wait_for_stores<0>();
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void causal_conv3d_fwd_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap cache,
    const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap out,
    const __grid_constant__ ConvParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<ConvShared<Traits>*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = Traits::kConsumers * 4;
    for (int i = 0; i < Traits::kVideoStages; ++i) shared.video_full[i].init(1), shared.video_empty[i].init(kWarps);
    for (int i = 0; i < Traits::kWeightStages; ++i) shared.weight_full[i].init(1), shared.weight_empty[i].init(kWarps);
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Traits>(shared, x, cache, weight, p);
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume<Traits>(shared, out, p);
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

template <class Traits>
void launch(const Tensor& x, const Tensor& cache, const Tensor& weight, const Tensor& out, ConvParams p) {
  constexpr int kShared = sizeof(ConvShared<Traits>), kChannels = Traits::kChannels;
  choose_box(p, Traits::kPixels, Traits::kBoxPixels, out);
  p.blocks = blocks_of(p.N, Traits::kColumns);
  const int64_t tiles = out.size(0) * p.frames * p.tiles_h * p.tiles_w * p.blocks;
  SORA_CHECK(tiles <= INT32_MAX, "out: expected at most 2^31 - 1 tiles of ", Traits::kPixels, " pixels, got ", describe(out));
  p.tiles = static_cast<int>(tiles);

  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  int major = 0, processors = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  SORA_CHECK(major == 9, "expected a GPU of compute capability 9.0, got ", major, ".x");
  const auto kernel = causal_conv3d_fwd_kernel<Traits>;
  SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const int rows = p.box_h + p.kh - 1;
  kernel<<<std::min(p.tiles, processors), Traits::kThreads, kShared, current_stream(device)>>>(
      video_map("x", x, kChannels, p.box_w, rows), video_map("cache", cache, kChannels, p.box_w, rows),
      box_map<5>("weight", weight, {1, 4, 3, 2, 0}, {kChannels, 1, 1, 1, Traits::kColumns}),
      video_map("out", out, Traits::kOutColumns, p.box_w, Traits::kRows / p.box_w), p);
  SORA_CUDA_CHECK(cudaGetLastError());
}

// The channels of a tile: a further block of them reads the pixels again, which counts as 32 columns.
template <class T>
void launch_columns(const Tensor& x, const Tensor& cache, const Tensor& weight, const Tensor& out, const ConvParams& p) {
  int best = 0;
  for (const int columns : {192, 128, 96, 64, 32})
    if (!best || blocks_of(p.N, columns) * (columns + 32) < blocks_of(p.N, best) * (best + 32)) best = columns;
  switch (best) {
    case 192: return launch<ConvTraits<T, 192>>(x, cache, weight, out, p);
    case 128: return launch<ConvTraits<T, 128>>(x, cache, weight, out, p);
    case 96: return launch<ConvTraits<T, 96>>(x, cache, weight, out, p);
    case 64: return launch<ConvTraits<T, 64>>(x, cache, weight, out, p);
    default: return launch<ConvTraits<T, 32>>(x, cache, weight, out, p);
  }
}

// t [B, C, T, H, W], channels last, in the dtype of x.
void check_video(const char* name, const Tensor& t, const Tensor& x) {
  check_kind(name, t, x);
  SORA_CHECK(t.dim() == 5 && t.size(0) == x.size(0) && t.stride(1) == 1 && t.scalar_type() == x.scalar_type(), name,
             ": expected a video [B, C, T, H, W] like x, channels last, got ", describe(t), "; x is ", describe(x));
}

void causal_conv3d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cache,
                       const OptionalTensor& residual, const OptionalTensor& norm_weight, std::vector<int64_t> stride,
                       bool bordered, double /*norm_eps*/, const Tensor& out, const OptionalTensor& pre) {
  SORA_CHECK(x.is_cuda() && x.dim() == 5 && weight.dim() == 5 && x.scalar_type() != ScalarType::Float,
             "x, weight: expected bfloat16 or float16 of five axes on a GPU, got ", describe(x), " and ", describe(weight));
  SORA_CHECK(!residual && !norm_weight && !pre, "residual, norm_weight, pre: expected none");
  SORA_CHECK(stride == std::vector<int64_t>({1, 1, 1}), "stride: expected 1");
  check_video("x", x, x), check_video("out", out, x), check_kind("weight", weight, x);
  const int64_t C = x.size(1), N = weight.size(0), kt = weight.size(2), kh = weight.size(3), kw = weight.size(4);
  const int64_t rim_h = bordered ? kh - 1 : 0, rim_w = bordered ? kw - 1 : 0;  // that x has around out
  SORA_CHECK(weight.size(1) == C && weight.stride(1) == 1 && weight.scalar_type() == x.scalar_type() && C % 8 == 0 && N % 8 == 0 && kt <= 256 &&
                 kh <= 9 && kw <= 256 && weight.numel() > 0,
             "weight: expected (N, C, kt, kh, kw) in the dtype of x, dense in C, channels in eights, kh of at most 9, got ",
             describe(weight), "; x is ", describe(x));
  SORA_CHECK(out.numel() > 0 && out.size(1) == N && out.size(2) == x.size(2) && out.size(3) + rim_h == x.size(3) &&
                 out.size(4) + rim_w == x.size(4),
             "out: expected the size of the result, got ", describe(out), "; x is ", describe(x));
  for (int axis = 2; axis < 5; ++axis)
    SORA_CHECK(x.size(axis) < 1 << 30, "x: expected fewer than 2^30 pixels an axis, got ", describe(x));
  if (cache) {
    check_video("cache", *cache, x);
    SORA_CHECK(cache->size(1) == C && cache->size(2) == kt - 1 && cache->size(3) == x.size(3) && cache->size(4) == x.size(4),
               "cache: expected the kt - 1 frames before x, got ", describe(*cache), "; x is ", describe(x));
  }
  if (bias) {
    check_kind("bias", *bias, x);
    SORA_CHECK(bias->scalar_type() == ScalarType::Float && bias->numel() == N && bias->is_contiguous(),
               "bias: expected a contiguous float32 (", N, ",), got ", describe(*bias));
  }

  const bool with_past = cache && kt > 1;
  ConvParams p{.bias = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr};
  p.C = static_cast<int>(C), p.N = static_cast<int>(N), p.frames = static_cast<int>(out.size(2));
  p.kt = static_cast<int>(kt), p.kh = static_cast<int>(kh), p.kw = static_cast<int>(kw);
  p.offset_t = 1 - p.kt, p.offset_h = bordered ? 0 : -(p.kh / 2), p.offset_w = bordered ? 0 : -(p.kw / 2);
  p.past = with_past ? p.kt - 1 : 0;
  const Tensor& before = with_past ? *cache : x;  // of x where nothing is read
  x.scalar_type() == ScalarType::Half ? launch_columns<__half>(x, before, weight, out, p)
                                      : launch_columns<__nv_bfloat16>(x, before, weight, out, p);
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_causal_conv3d_fwd_cuda", TORCH_BOX(&sora::causal_conv3d_fwd));
}
