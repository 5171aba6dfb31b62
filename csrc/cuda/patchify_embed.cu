// patch_embed3d, forward, for sm_90a:
//
//   out[p, n] = bias[n] + sum over features f of patch[p, f] weight[n, f]
//
// A product of matrices whose left operand exists only in shared memory. Results are most of its bytes, so nothing but
// they passes by: a block keeps a slice of the weight in shared memory and works off groups of 64 patches. Four warps
// gather them from the video, 4 or 2 bytes at a time, 16 bytes of features to shared memory; two more warp groups
// multiply, each a group of patches of its own, so that the products of one run beside the results of the other.
//
// Work is items (slice, patches) in that order, of which each block has an equal, contiguous share: it loads a slice
// once, twice or, of few patches, more often.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "cuda/patchify.cuh"

#include <algorithm>

namespace sora {
namespace {

constexpr int kGroup = 128;           // threads of a warp group
constexpr int kConsumers = 2;         // warp groups that multiply
constexpr int kRows = 64;             // patches of a product
constexpr int kBox = 64;              // features, or columns of out, of a box: its rows are as wide as a swizzle
constexpr int kBoxBytes = kBox * 2;   // of a row of it
constexpr int kPart = 128;            // columns of a product
constexpr int kMostFeatures = 384, kMostStages = 8;
constexpr int kThreads = (kConsumers + 1) * kGroup, kWarps = kConsumers * 4;
constexpr int kProducerRegisters = 88, kConsumerRegisters = 208, kLaunched = 65536 / kThreads / 8 * 8;
constexpr int kMemory = 227 * 1024;  // that a block can have
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunched, "else it hangs");

template <class T_, int kParts_>
struct EmbedTraits {
  using T = T_;
  static constexpr int kParts = kParts_, kColumns = kParts * kPart;  // of a slice
};

// What does not depend on the number of features. The slice of the weight [boxes][kColumns][kBox] and the patches
// [stages][boxes][kRows][kBox] follow.
template <class Traits>
struct alignas(1024) EmbedShared {
  typename Traits::T out[kWarps][2][16][kBox];
};
template <class Traits>
struct EmbedTail {  // after them
  float bias[Traits::kColumns];
  int offsets[kMostFeatures];  // of features within a patch, of each or of each second
  Barrier full[kMostStages], empty[kMostStages], weight_full, weight_empty;
};

struct EmbedParams {
  const void *video, *bias;
  ScalarType bias_dtype;
  bool pairs;  // of neighbouring pixels are read at once
  int64_t stride_b, stride_c, stride_t, stride_h, stride_w;
  int features, pt, ph, pw;
  int grid_t, grid_h, grid_w, patches, columns;
  int boxes, stages, tiles, items;
};

template <class Traits>
struct Memory {
  unsigned char* begin;
  int boxes, stages;

  __device__ EmbedShared<Traits>& shared() const { return *reinterpret_cast<EmbedShared<Traits>*>(begin); }
  __device__ unsigned char* weight(int box) const {
    return begin + sizeof(EmbedShared<Traits>) + box * Traits::kColumns * kBoxBytes;
  }
  __device__ unsigned char* patches(int stage, int box) const {
    return weight(boxes) + (stage * boxes + box) * kRows * kBoxBytes;
  }
  __device__ EmbedTail<Traits>& tail() const { return *reinterpret_cast<EmbedTail<Traits>*>(patches(stages, 0)); }
};

// Eight features of a patch.
template <int kRun>
__device__ __forceinline__ uint4 load_features(const uint16_t* patch, const int* offsets) {
  const int4 first = *reinterpret_cast<const int4*>(offsets);
  if constexpr (kRun == 2) {
    const auto pair = [&](int offset) { return __ldg(reinterpret_cast<const uint32_t*>(patch + offset)); };
    return {pair(first.x), pair(first.y), pair(first.z), pair(first.w)};
  } else {
    const int4 last = *reinterpret_cast<const int4*>(offsets + 4);
    const auto pair = [&](int low, int high) { return __ldg(patch + low) | uint32_t{__ldg(patch + high)} << 16; };
    return {pair(first.x, first.y), pair(first.z, first.w), pair(last.x, last.y), pair(last.z, last.w)};
  }
}

[[maybe_unused]] __device__ __forceinline__ void store_shared(uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Where eight features of a patch lie in a stage: row `row` of box vector / 8.
[[maybe_unused]] __device__ __forceinline__ uint32_t address_of(uint32_t stage, int row, int vector) {
  return swizzled<kBoxBytes>(stage + vector / 8 * (kRows * kBoxBytes) + row * kBoxBytes + vector % 8 * 16);
}

// A row of a stage: of two threads each stores every second vector of eight features. Four are loaded at a time.
template <int kRun>
__device__ __forceinline__ void gather(uint32_t stage, const uint16_t* patch, const int* offsets, int row, int half,
                                       int vectors) {
  constexpr int kTogether = 4;
  for (int begin = half; begin < vectors; begin += 2 * kTogether) {
    uint4 loaded[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int vector = begin + 2 * i;
      if (vector < vectors) loaded[i] = load_features<kRun>(patch, offsets + vector * (8 / kRun));
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int vector = begin + 2 * i;
      if (vector < vectors) store_shared(address_of(stage, row, vector), loaded[i]);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void produce(const Memory<Traits>& memory, const CUtensorMap& weight, const EmbedParams& p) {
  auto& tail = memory.tail();
  const int row = threadIdx.x % kRows, half = threadIdx.x / kRows, lane = threadIdx.x % 32;
  const int vectors = p.features / 8;
  for (int stage = 0; stage < p.stages; ++stage)  // what products read beyond the last feature, by its box
    for (int vector = vectors + half; vector < p.boxes * 8; vector += 2)
      store_shared(address_of(shared_address(memory.patches(stage, 0)), row, vector), uint4{});

  const Share share(p.items);
  RingPlace place;
  int slice = -1;
  uint32_t weight_parity = 1;
  for (int item = share.first; item < share.last; ++item, place.advance(p.stages)) {
    if (item / p.tiles != slice) {
      slice = item / p.tiles;
      const int n = slice * Traits::kColumns;
      tail.weight_empty.wait(weight_parity);
      weight_parity ^= 1;
      for (int i = threadIdx.x; i < Traits::kColumns; i += kGroup)
        tail.bias[i] = p.bias && n + i < p.columns ? load_any(p.bias, p.bias_dtype, n + i) : 0.0f;
      __syncwarp();
      if (threadIdx.x == 0) {
        tail.weight_full.arrive_and_expect(p.boxes * Traits::kColumns * kBoxBytes);
#pragma unroll 1
        for (int box = 0; box < p.boxes; ++box) load_box(memory.weight(box), weight, tail.weight_full, {box * kBox, n});
      } else if (lane == 0) {
        tail.weight_full.arrive();
      }
    }
    // Beyond the last patch it is read again: those rows are not stored.
    int place_in = min(item % p.tiles * kRows + row, p.patches - 1);
    const int w = place_in % p.grid_w;
    place_in /= p.grid_w;
    const int h = place_in % p.grid_h;
    place_in /= p.grid_h;
    const int t = place_in % p.grid_t, b = place_in / p.grid_t;
    const uint16_t* patch = static_cast<const uint16_t*>(p.video) + b * p.stride_b + t * p.pt * p.stride_t +
                            h * p.ph * p.stride_h + w * p.pw * p.stride_w;
    const uint32_t stage = shared_address(memory.patches(place.stage, 0));
    tail.empty[place.stage].wait(place.parity ^ 1);
    if (p.pairs)
      gather<2>(stage, patch, tail.offsets, row, half, vectors);
    else
      gather<1>(stage, patch, tail.offsets, row, half, vectors);
    publish_writes();
    __syncwarp();
    if (lane == 0) tail.full[place.stage].arrive();
  }
}

template <class Traits>
using Sums = float[Traits::kParts][kPart / 2];

// sums += the products of kSteps times 16 features, which are a group.
template <class Traits, int kSteps>
__device__ __forceinline__ void multiply_boxes(Sums<Traits>& sums, uint64_t a, uint64_t b) {
  begin_products();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int part = 0; part < Traits::kParts; ++part)
      Wgmma<typename Traits::T, kPart>::add(sums[part], advance(a, step * 32),
                                            advance(b, part * kPart * kBoxBytes + step * 32));
  }
  commit_products();
}

template <class Traits>
__device__ __forceinline__ void consume(const Memory<Traits>& memory, const CUtensorMap& out, const EmbedParams& p) {
  auto& tail = memory.tail();
  // From one lane, so that the compiler knows it to be the same for all of a warp, as matrices must be.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) - 4, consumer = warp / 4, lane = threadIdx.x % 32;
  auto& boxes = memory.shared().out[warp];
  const Share share(p.items);
  RingPlace place;
  int slice = -1;
  uint32_t weight_parity = 0;
  for (int item = share.first; item < share.last; ++item, place.advance(p.stages)) {
    if (item / p.tiles != slice) {
      if (slice >= 0 && lane == 0) tail.weight_empty.arrive();
      slice = item / p.tiles;
      tail.weight_full.wait(weight_parity);
      weight_parity ^= 1;
    }
    if ((item - share.first) % kConsumers != consumer) continue;

    Sums<Traits> sums;
#pragma unroll
    for (int part = 0; part < Traits::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kPart / 2; i += 4) {
        const float2 bias = *reinterpret_cast<const float2*>(tail.bias + part * kPart + 2 * i + lane % 4 * 2);
        sums[part][i] = bias.x, sums[part][i + 1] = bias.y, sums[part][i + 2] = bias.x, sums[part][i + 3] = bias.y;
      }
    }
    tail.full[place.stage].wait(place.parity);
#pragma unroll 1
    for (int box = 0; box < p.boxes; ++box) {
      const uint64_t a = matrix<kBoxBytes>(memory.patches(place.stage, box)), b = matrix<kBoxBytes>(memory.weight(box));
      if (box * kBox + kBox / 2 < p.features)
        multiply_boxes<Traits, kBox / 16>(sums, a, b);
      else  // the rest are zeros
        multiply_boxes<Traits, kBox / 32>(sums, a, b);
    }
    wait_for_products<0>(reinterpret_cast<float(&)[Traits::kParts * kPart / 2]>(sums));
    if (lane == 0) tail.empty[place.stage].arrive();

    const int first_row = item % p.tiles * kRows + warp % 4 * 16;
#pragma unroll
    for (int box = 0; box < Traits::kColumns / kBox; ++box) {
      auto& rows = boxes[box % 2];
      if (lane == 0) wait_for_stores<1>();
      __syncwarp();
      // Of the 16-byte pieces of a row, whose swizzle takes the place of bits that are zero: piece 2 i is this ^ 32 i.
      uint32_t begin = swizzled<kBoxBytes>(shared_address(rows) + lane % 16 * kBoxBytes + lane / 16 * 16);
      asm volatile("" : "+r"(begin));  // addresses held for all boxes would cost the registers of the sums
      const float* d = sums[box / 2] + box % 2 * (kBox / 2);
#pragma unroll
      for (int n = 0; n < kBox; n += 16)
        store_matrices<typename Traits::T>(begin ^ n * 2, d + n / 2);
      publish_writes();
      __syncwarp();
      if (lane == 0) {
        store_box(out, rows, {slice * Traits::kColumns + box * kBox, first_row});
        commit_stores();
      }
    }
  }
  if (lane == 0) wait_for_stores<0>();
}

template <class Traits>
__global__ __launch_bounds__(kThreads, 1) void patch_embed3d_fwd_kernel(const __grid_constant__ CUtensorMap weight,
                                                                        const __grid_constant__ CUtensorMap out,
                                                                        const __grid_constant__ EmbedParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char bytes[];
  const Memory<Traits> memory{bytes, p.boxes, p.stages};
  auto& tail = memory.tail();
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) tail.full[i].init(4), tail.empty[i].init(4);
    tail.weight_full.init(4), tail.weight_empty.init(kWarps);
    publish_barriers();
  }
  const int run = p.pairs ? 2 : 1;
  for (int i = threadIdx.x; i * run < p.features; i += kThreads) {
    const int area = p.pt * p.ph * p.pw, within = i * run % area;
    tail.offsets[i] = i * run / area * p.stride_c + within / p.pw / p.ph * p.stride_t +
                      within / p.pw % p.ph * p.stride_h + within % p.pw * p.stride_w;
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    give_registers<kProducerRegisters>();
    produce(memory, weight, p);
  } else {
    take_registers<kConsumerRegisters>();
    consume(memory, out, p);
  }
#endif
}

template <class Traits>
void launch(const Tensor& video, const Tensor& weight, const Tensor& out, EmbedParams p) {
  constexpr int kFixed = sizeof(EmbedShared<Traits>) + sizeof(EmbedTail<Traits>);
  const int of_weight = p.boxes * Traits::kColumns * kBoxBytes, of_stage = p.boxes * kRows * kBoxBytes;
  p.stages = std::min((kMemory - kFixed - of_weight) / of_stage, kMostStages);
  const int64_t items = int64_t{p.tiles} * blocks_of(p.columns, Traits::kColumns);
  SORA_CHECK(items <= INT32_MAX, "out: expected at most 2^31 - 1 tiles, got ", describe(out));
  p.items = static_cast<int>(items);

  const int32_t device = video.get_device_index();
  const DeviceGuard guard(device);
  int major = 0, processors = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  SORA_CHECK(major == 9, "expected a GPU of compute capability 9.0, got ", major, ".x");
  const auto kernel = patch_embed3d_fwd_kernel<Traits>;
  const int memory = kFixed + of_weight + p.stages * of_stage;
  SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory));
  const auto map = [](const char* name, const Tensor& t, int64_t rows, int64_t width, int side) {
    return encode_boxes<2>(name, t, 0, {width, rows}, {1, width}, {kBox, side});
  };
  kernel<<<std::min(p.items, processors), kThreads, memory, current_stream(device)>>>(
      map("weight", weight, p.columns, p.features, Traits::kColumns), map("out", out, p.patches, p.columns, 16), p);
  SORA_CUDA_CHECK(cudaGetLastError());
}

void patch_embed3d_fwd(const Tensor& video, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& pos,
                       const Tensor& out) {
  SORA_CHECK(video.is_cuda() && video.dim() == 5 && weight.dim() == 5 && video.scalar_type() != ScalarType::Float,
             "video, weight: expected bfloat16 or float16 of five axes on a GPU, got ", describe(video), " and ",
             describe(weight));
  SORA_CHECK(!pos, "pos: expected none");
  check_kind("video", video, video, "video"), check_kind("weight", weight, video, "video");
  check_kind("out", out, video, "video");
  const int64_t D = weight.size(0), K = D ? weight.numel() / D : 0;
  SORA_CHECK(weight.size(1) == video.size(1) && weight.scalar_type() == video.scalar_type() && weight.is_contiguous() &&
                 K > 0 && K % 8 == 0 && K <= kMostFeatures && D % 8 == 0 && D < INT32_MAX,
             "weight: expected (D, C, pt, ph, pw), contiguous, in the dtype of video, D and the features of a patch in ",
             "eights, at most ", kMostFeatures, ", got ", describe(weight), "; video is ", describe(video));
  EmbedParams p{.video = video.data_ptr()};
  int64_t patches = video.size(0), reach = 0;
  for (int axis = 1; axis < 5; ++axis) {
    SORA_CHECK(video.stride(axis) >= 0, "video: expected no negative strides, got ", describe(video));
    if (axis > 1) {
      SORA_CHECK(video.size(axis) % weight.size(axis) == 0, "video: expected multiples of the patch, got ",
                 describe(video), "; weight is ", describe(weight));
      patches *= video.size(axis) / weight.size(axis);
    }
    reach += (weight.size(axis) - 1) * video.stride(axis);
  }
  SORA_CHECK(out.dim() == 3 && out.numel() > 0 && out.numel() == patches * D && out.size(2) == D &&
                 out.is_contiguous() && out.scalar_type() == video.scalar_type() && patches < 1 << 30,
             "out: expected the size of the result, contiguous, in the dtype of video, fewer than 2^30 patches, got ",
             describe(out), "; video is ", describe(video));
  SORA_CHECK(reach <= INT32_MAX, "video: expected a patch within 2^31 elements, got ", describe(video));
  if (bias) {
    check_kind("bias", *bias, video, "video");
    SORA_CHECK(bias->numel() == D && bias->is_contiguous(), "bias: expected a contiguous (", D, ",), got ",
               describe(*bias));
    p.bias = bias->data_ptr(), p.bias_dtype = bias->scalar_type();
  }
  p.stride_b = video.stride(0), p.stride_c = video.stride(1), p.stride_t = video.stride(2);
  p.stride_h = video.stride(3), p.stride_w = video.stride(4);
  p.features = static_cast<int>(K), p.columns = static_cast<int>(D), p.patches = static_cast<int>(patches);
  p.pt = weight.size(2), p.ph = weight.size(3), p.pw = weight.size(4);
  p.grid_t = video.size(2) / p.pt, p.grid_h = video.size(3) / p.ph, p.grid_w = video.size(4) / p.pw;
  const bool even = (p.stride_b | p.stride_c | p.stride_t | p.stride_h) % 2 == 0;
  p.pairs = even && p.pw % 2 == 0 && p.stride_w == 1 && reinterpret_cast<uintptr_t>(p.video) % 4 == 0;
  p.boxes = blocks_of(K, kBox), p.tiles = blocks_of(patches, kRows);
  const bool wide = D > kPart && p.boxes <= 3;  // two products side by side; of more features no room is left
  const auto run = [&](auto one, auto two) {
    wide ? launch<decltype(two)>(video, weight, out, p) : launch<decltype(one)>(video, weight, out, p);
  };
  if (video.scalar_type() == ScalarType::Half)
    run(EmbedTraits<__half, 1>{}, EmbedTraits<__half, 2>{});
  else
    run(EmbedTraits<__nv_bfloat16, 1>{}, EmbedTraits<__nv_bfloat16, 2>{});
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_patch_embed3d_fwd_cuda", TORCH_BOX(&sora::patch_embed3d_fwd));
}
