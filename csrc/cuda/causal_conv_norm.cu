// norm_silu of an RMS norm, forward:  out[p, c] = SiLU(x[p, c] / rms(x[p]) weight[c] + bias[c]),  over the channels of
// each pixel, in one pass.
//
// Channels last: some lanes of a warp have a pixel, each several 16-byte vectors of it; a warp takes pixels one after
// the other, the next one's loads issued before this one's sums, and has weight and bias in registers all the while.
// Channels first: a block has all channels of up to 64 pixels, a thread a 16-byte vector of pixels in each of several
// channels; sums of squares meet in shared memory.

#include "common/check.h"
#include "common/library.h"
#include "common/reduce.cuh"
#include "common/silu.cuh"
#include "common/stream.cuh"
#include "common/vec.cuh"

#include <algorithm>
#include <bit>
#include <type_traits>

namespace sora {
namespace {

constexpr int kMaxChannels = 1024;

struct NormSiluParams {
  const void* x;
  void* out;
  Vector weight, bias;  // of one dtype, x's or fp32
  int64_t pixels;       // of all clips; channels first, of one
  int C, log2_lanes;    // lanes: of a warp, side by side in memory
  int tiles;            // of the pixels of a clip, channels first
  float inverse, eps;   // inverse: of C
};

// kWhole: pixels fill their lanes; else channels are compared with C.
template <class T_, int kElements_, bool kWhole_>
struct NormSiluTraits {
  using T = T_;
  static constexpr int kElements = kElements_;  // of a pixel that a thread has
  static constexpr bool kWhole = kWhole_;
  static constexpr int kVec = Vec<T>::kSize;
  static constexpr int kVecs = kElements / kVec;
  static constexpr int kThreads = 128;
  // A pixel, weight and bias in fp32, and the next pixel as it lies in memory.
  static constexpr int kRegisters = 3 * kElements + kVecs * 4 + 36;
  static constexpr int kMinBlocks = 65536 / (kRegisters * kThreads);

  static_assert(kElements % kVec == 0, "a thread holds whole vectors");
  static_assert(kMinBlocks >= 3, "12 warps of a processor hide the latency of memory");
};

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kMinBlocks) void norm_silu_last_kernel(
    const __grid_constant__ NormSiluParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec, kVecs = Traits::kVecs;
  const int lane = threadIdx.x % kWarp, lanes = 1 << p.log2_lanes, between = lanes * kVec;
  const int column = (lane & lanes - 1) * kVec, of_warp = lane >> p.log2_lanes;
  const auto has = [&](int v) { return Traits::kWhole || column + v * between < p.C; };

  float weight[kVecs][kVec] = {}, bias[kVecs][kVec] = {};
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (!has(v)) continue;
    load_any(p.weight.data, p.weight.dtype, column + v * between, weight[v]);
    if (p.bias) load_any(p.bias.data, p.bias.dtype, column + v * between, bias[v]);
  }

  const int64_t step = int64_t{gridDim.x} * Traits::kThreads >> p.log2_lanes;
  int64_t first = (int64_t{blockIdx.x} * Traits::kThreads + threadIdx.x - lane) >> p.log2_lanes;  // of the warp's
  const T* from = static_cast<const T*>(p.x) + (first + of_warp) * p.C + column;
  T* to = static_cast<T*>(p.out) + (first + of_warp) * p.C + column;
  Vec<T> next[kVecs] = {};
  const auto load = [&](int64_t pixel) {
    if (pixel >= p.pixels) return;
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
      if (has(v)) next[v] = load_streaming(from + v * between);
  };
  load(first + of_warp);
  for (; first < p.pixels; first += step, to += step * p.C) {
    float values[kVecs][kVec], squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        values[v][i] = to_float(next[v].values[i]);
        squares += values[v][i] * values[v][i];
      }
    }
    from += step * p.C;
    load(first + step + of_warp);
    for (int offset = lanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    const float rstd = 1.0f / sqrtf(squares * p.inverse + p.eps);
    if (first + of_warp >= p.pixels) continue;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if (!has(v)) continue;
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[v][i] = silu(values[v][i] * rstd * weight[v][i] + bias[v][i]);
      store_vec(to + v * between, rounded<T>(values[v]));
    }
  }
}

constexpr int kMaxFirstWarps = 16, kFirstElements = 64;  // of a thread: 128 registers

// kLanes side by side have vectors of the same channel; the rest of a warp, and further warps, the channels after it.
template <class T, int kLanes>
__global__ __launch_bounds__(kMaxFirstWarps* kWarp) void norm_silu_first_kernel(const __grid_constant__ NormSiluParams p) {
  constexpr int kVec = Vec<T>::kSize, kOfThread = kFirstElements / kVec, kPixels = kVec * kLanes;
  __shared__ __align__(16) float sums[kMaxFirstWarps][kPixels], rstds[kPixels];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int place = threadIdx.x % kLanes * kVec, groups = blockDim.x / kLanes, group = threadIdx.x / kLanes;
  const int b = static_cast<int>(blockIdx.x) / p.tiles, tile = static_cast<int>(blockIdx.x) - b * p.tiles;
  const int64_t pixel = int64_t{tile} * kPixels + place, between = groups * p.pixels;
  const int64_t offset = (int64_t{b} * p.C + group) * p.pixels + pixel;
  const bool inside = pixel < p.pixels;

  float values[kOfThread][kVec], squares[kVec] = {};
#pragma unroll
  for (int k = 0; k < kOfThread; ++k) {
    Vec<T> vec{};
    if (inside && group + k * groups < p.C) vec = load_streaming(static_cast<const T*>(p.x) + offset + k * between);
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[k][i] = to_float(vec.values[i]);
  }
#pragma unroll
  for (int k = 0; k < kOfThread; ++k) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) squares[i] += values[k][i] * values[k][i];
  }
#pragma unroll
  for (int distance = kLanes; distance < kWarp; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], distance);
  }
  if (lane < kLanes) {
#pragma unroll
    for (int i = 0; i < kVec; i += 4)
      *reinterpret_cast<float4*>(sums[warp] + place + i) = {squares[i], squares[i + 1], squares[i + 2], squares[i + 3]};
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPixels; i += blockDim.x) {  // one warp alone has fewer threads
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += sums[w][i];
    rstds[i] = 1.0f / sqrtf(sum * p.inverse + p.eps);
  }
  __syncthreads();
  if (!inside) return;
  float rstd[kVec];
#pragma unroll
  for (int i = 0; i < kVec; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(rstds + place + i);
    rstd[i] = four.x, rstd[i + 1] = four.y, rstd[i + 2] = four.z, rstd[i + 3] = four.w;
  }
  const auto finish = [&](const auto* weights, const auto* biases) {
    float bias[kOfThread] = {};
    if (biases) {
#pragma unroll
      for (int k = 0; k < kOfThread; ++k)
        if (group + k * groups < p.C) bias[k] = to_float(biases[group + k * groups]);
    }
    T* to = static_cast<T*>(p.out) + offset;
#pragma unroll
    for (int k = 0; k < kOfThread; ++k, to += between) {
      if (group + k * groups >= p.C) break;
      const float weight = to_float(weights[group + k * groups]);
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[k][i] = silu(values[k][i] * rstd[i] * weight + bias[k]);
      store_vec(to, rounded<T>(values[k]));
    }
  };
  if (std::is_same_v<T, float> || p.weight.dtype == ScalarType::Float)
    finish(static_cast<const float*>(p.weight.data), static_cast<const float*>(p.bias.data));
  else
    finish(static_cast<const T*>(p.weight.data), static_cast<const T*>(p.bias.data));
}

int64_t blocks_of(int64_t size, int64_t side) { return (size + side - 1) / side; }

template <class Traits>
void launch_last(const NormSiluParams& p, int processors, cudaStream_t stream) {
  const int64_t blocks = blocks_of(p.pixels << p.log2_lanes, Traits::kThreads);
  const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, processors * Traits::kMinBlocks));
  norm_silu_last_kernel<Traits><<<grid, Traits::kThreads, 0, stream>>>(p);
}

template <class T>
void launch(NormSiluParams p, int64_t clips, bool last, int processors, cudaStream_t stream) {
  constexpr int kVec = Vec<T>::kSize;
  if (last) {
    // The most elements of a thread with which a pixel fills at least four lanes, or all; else 32 and a rest.
    const int least = std::min(2, std::countr_zero(static_cast<unsigned>(p.C / kVec)));
    for (const int elements : {32, 24, 16, 8}) {
      const int lanes = p.C / elements;
      p.log2_lanes = std::countr_zero(static_cast<unsigned>(lanes));
      if (p.C % elements || lanes != 1 << p.log2_lanes || p.log2_lanes < least || lanes > kWarp) continue;
      switch (elements) {
        case 32: return launch_last<NormSiluTraits<T, 32, true>>(p, processors, stream);
        case 24: return launch_last<NormSiluTraits<T, 24, true>>(p, processors, stream);
        case 16: return launch_last<NormSiluTraits<T, 16, true>>(p, processors, stream);
        default: return launch_last<NormSiluTraits<T, 8, true>>(p, processors, stream);
      }
    }
    p.log2_lanes = std::bit_width(static_cast<unsigned>(blocks_of(p.C, 32) - 1));
    return launch_last<NormSiluTraits<T, 32, false>>(p, processors, stream);
  }
  const auto launch_first = [&]<int kLanes> {
    constexpr int kPixels = kVec * kLanes;
    const int64_t tiles = blocks_of(p.pixels, kPixels), warps = blocks_of(p.C, kWarp / kLanes * (kFirstElements / kVec));
    SORA_CHECK(clips * tiles <= INT32_MAX, "x: expected at most 2^31 - 1 blocks of ", kPixels, " pixels");
    p.tiles = static_cast<int>(tiles);
    norm_silu_first_kernel<T, kLanes>
        <<<static_cast<unsigned>(clips * tiles), static_cast<unsigned>(warps * kWarp), 0, stream>>>(p);
  };
  // All channels of 128 bytes of pixels fit a block, or of 64.
  if (p.C <= kMaxFirstWarps * 4 * (kFirstElements / kVec))
    launch_first.template operator()<8>();
  else
    launch_first.template operator()<4>();
}

// The strides of a dense video whose axes lie in this order, the last side by side.
bool is_dense(const Tensor& t, const int (&order)[5]) {
  int64_t expected = 1;
  for (int i = 4; i >= 0; --i) {
    if (t.size(order[i]) != 1 && t.stride(order[i]) != expected) return false;
    expected *= t.size(order[i]);
  }
  return true;
}

void norm_silu_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t groups, double eps,
                   const Tensor& out) {
  SORA_CHECK(x.is_cuda() && x.dim() == 5, "x: expected a video [B, C, T, H, W] on a GPU, got ", describe(x));
  check_kind("x", x, x), check_kind("out", out, x);
  SORA_CHECK(groups == 0, "groups: expected 0, for an RMS norm, got ", groups);
  for (int axis = 0; axis < 5; ++axis)
    SORA_CHECK(out.dim() == 5 && out.size(axis) == x.size(axis) && out.scalar_type() == x.scalar_type(),
               "out: expected the shape and dtype of x, got ", describe(out), "; x is ", describe(x));
  const int64_t C = x.size(1), pixels = x.size(2) * x.size(3) * x.size(4), vec = x.scalar_type() == ScalarType::Float ? 4 : 8;
  const bool last = is_dense(x, {0, 2, 3, 4, 1}) && is_dense(out, {0, 2, 3, 4, 1});
  SORA_CHECK(last || (is_dense(x, {0, 1, 2, 3, 4}) && is_dense(out, {0, 1, 2, 3, 4})),
             "x, out: expected dense videos, both channels last or both channels first, got ", describe(x), " and ",
             describe(out));
  SORA_CHECK(C <= kMaxChannels && (last ? C : pixels) % vec == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0,
             "x: expected at most ", kMaxChannels, " channels, of channels-last videos in multiples of ", vec,
             ", of others so many pixels, at a multiple of 16 bytes, got ", describe(x));
  const auto vector = [&](const char* name, const OptionalTensor& t) -> Vector {
    if (!t) return {};
    check_kind(name, *t, x);
    SORA_CHECK(t->numel() == C && t->is_contiguous() && reinterpret_cast<uintptr_t>(t->data_ptr()) % 16 == 0, name,
               ": expected (", C, ",), contiguous, at a multiple of 16 bytes, got ", describe(*t));
    SORA_CHECK((t->scalar_type() == x.scalar_type() || t->scalar_type() == ScalarType::Float) &&
                   t->scalar_type() == weight.scalar_type(),
               name, ": expected the dtype of x or float32, as weight and bias both have, got ", describe(*t));
    return {t->data_ptr(), t->scalar_type()};
  };
  NormSiluParams p{.x = x.data_ptr(), .out = out.data_ptr(), .weight = vector("weight", weight), .bias = vector("bias", bias)};
  if (x.numel() == 0) return;
  p.pixels = last ? x.size(0) * pixels : pixels, p.C = static_cast<int>(C);
  p.inverse = 1.0f / static_cast<float>(C), p.eps = static_cast<float>(eps);

  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  int processors = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const cudaStream_t stream = current_stream(device);
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: launch<__nv_bfloat16>(p, x.size(0), last, processors, stream); break;
    case ScalarType::Half: launch<__half>(p, x.size(0), last, processors, stream); break;
    default: launch<float>(p, x.size(0), last, processors, stream);
  }
  SORA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_norm_silu_fwd_cuda", TORCH_BOX(&sora::norm_silu_fwd));
}
