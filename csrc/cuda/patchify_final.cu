// final_layer, forward, for sm_90a:
//
//   out = unpatchify((norm(x) (1 + scale) + shift) weight^T + bias)
//
// x is most of its bytes and is read once: by one loop that feeds the statistics and the product alike. With p the mean
// of a row's first 64 columns, y = x - p, m = mean(y) and 1 / r = sqrt(mean(y^2) - m^2 + eps),
//
//   out = r (sum_d y (1 + scale) weight  -  m sum_d (1 + scale) weight)  +  sum_d shift weight  +  bias
//
// A block works off tiles of 64 or 128 tokens of each of two warp groups, which share a modulation row. One thread brings
// 64 columns of x and of the weight at a time by the TMA. The two groups turn x in registers into the left operand of
// wgmma; the weight is the right one, in shared memory. Three more warps sum (1 + scale) weight and shift weight, by
// mma, while the first tile of a modulation row passes by.
//
// y (1 + scale) is rounded to the dtype of x before the product. fp16 could overflow, as nothing is normalised yet: there y
// is scaled down, by what the first 64 columns and the largest 1 + scale say.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "cuda/patchify.cuh"

#include <algorithm>
#include <type_traits>

namespace sora {
namespace {

constexpr int kGroup = 128;          // threads of a warp group
constexpr int kConsumers = 2;        // warp groups that multiply
constexpr int kRows = 64;            // tokens of a product
constexpr int kBox = 64;             // columns of x of a step: as wide as a swizzle
constexpr int kBoxBytes = kBox * 2;  // of a row of it
constexpr int kMostStages = 6;
constexpr int kThreads = (kConsumers + 1) * kGroup, kWarps = kConsumers * 4;
constexpr int kSumming = 3;  // warps that sum (1 + scale) weight and shift weight
constexpr int kProducerRegisters = 88, kConsumerRegisters = 208, kLaunched = 65536 / kThreads / 8 * 8;
constexpr int kMemory = 227 * 1024;  // that a block can have
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kLaunched, "else it hangs");

template <class T_, int kFeatures_, int kParts_>
struct FinalTraits {
  using T = T_;
  static constexpr int kFeatures = kFeatures_;  // room for them
  static constexpr int kParts = kParts_;        // products below each other of a warp group
  static constexpr int kTokens = kConsumers * kParts * kRows;
  static constexpr int kPadded = kFeatures + 2;  // a row of results: rows below each other begin in different banks
  static_assert(kFeatures % 16 == 0);
};

template <class Traits>
struct alignas(1024) FinalStage {
  typename Traits::T x[Traits::kTokens][kBox], weight[Traits::kFeatures][kBox];
};
template <class Traits>
struct FinalTail {  // after the stages
  typename Traits::T results[kWarps][16][Traits::kPadded];
  float sums[2][Traits::kFeatures];      // of (1 + scale) weight; of shift weight, and bias
  int places[Traits::kFeatures][2];      // of features that are stored together: the first, and where in the video
  float largest[kSumming + 1];           // of |1 + scale|, of those that a warp has seen; zero: they are read together
  Barrier full[kMostStages], empty[kMostStages], rows_full, rows_empty, sums_full;
};  // float factor[D], shift[D] follow

struct FinalParams {
  Rows shift, scale;
  Vector bias;
  void* out;
  int64_t stride_b, stride_c, stride_t, stride_h;  // of out
  float eps, over_width;
  bool rms;
  int D, features, channels, pt, ph, pw, together;  // together: features of neighbouring pixels, 2 or 1
  int S, grid_h, grid_w, tokens;                    // tokens of a modulation row
  int groups_of_clip, tiles_of_group, tiles, stages;
};

template <class Traits>
constexpr bool kScaled = std::is_same_v<typename Traits::T, __half>;

template <class Traits>
struct FinalMemory {
  unsigned char* begin;
  int stages, width;

  __device__ FinalStage<Traits>& stage(int i) const { return reinterpret_cast<FinalStage<Traits>*>(begin)[i]; }
  __device__ FinalTail<Traits>& tail() const { return *reinterpret_cast<FinalTail<Traits>*>(&stage(stages)); }
  __device__ float* factor() const { return reinterpret_cast<float*>(&tail() + 1); }
  __device__ float* shift() const { return factor() + width; }
};

// Of the first piece that a lane loads of 16 rows of a box, which begin at a multiple of eight: piece lane / 16 of row
// lane % 16. The swizzle takes the place of bits that are zero, so pieces 2 i further on are at this ^ 32 i.
[[maybe_unused]] __device__ __forceinline__ uint32_t address_of(const void* rows) {
  const int lane = threadIdx.x % 32;
  return swizzled<kBoxBytes>(shared_address(rows) + lane % 16 * kBoxBytes + lane / 16 * 16);
}

// Four 8 x 8 matrices, 16 rows of two pieces, as a left operand wants them.
[[maybe_unused]] __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

template <class T>
__device__ __forceinline__ float2 widen(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  else
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

// d [16, 8] += a [16, 16] b [16, 8]
template <class T>
__device__ __forceinline__ void multiply_small(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class Traits>
__device__ __forceinline__ void produce(const FinalMemory<Traits>& memory, const CUtensorMap& x,
                                        const CUtensorMap& weight, const FinalParams& p) {
  auto& tail = memory.tail();
  const Share share(p.tiles);
  RingPlace place;
  for (int tile = share.first; tile < share.last; ++tile) {
    const int group = tile / p.tiles_of_group, clip = group / p.groups_of_clip;
    const int s = group % p.groups_of_clip * p.tokens + tile % p.tiles_of_group * Traits::kTokens;
#pragma unroll 1
    for (int d = 0; d < p.D; d += kBox, place.advance(p.stages)) {
      auto& stage = memory.stage(place.stage);
      Barrier& full = tail.full[place.stage];
      tail.empty[place.stage].wait(place.parity ^ 1);
      full.arrive_and_expect(sizeof stage);
      load_box(stage.x, x, full, d, s, 0, clip);
      load_box(stage.weight, weight, full, {d, 0});
    }
  }
}

// The three warps: the rows of scale and shift to shared memory, and their products with the weight.
template <class Traits>
__device__ __forceinline__ void sum_rows(const FinalMemory<Traits>& memory, const FinalParams& p) {
  using T = typename Traits::T;
  constexpr int kTiles = (Traits::kFeatures / 16 + kSumming - 1) / kSumming;  // of 16 features, of a warp
  auto& tail = memory.tail();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) - 1, lane = threadIdx.x % 32;
  const Share share(p.tiles);
  RingPlace place;
  int group = -1;
  uint32_t parity = 0;
  for (int tile = share.first; tile < share.last; ++tile) {
    const bool sums = tile / p.tiles_of_group != group;
    if (sums) {
      group = tile / p.tiles_of_group;
      const int clip = group / p.groups_of_clip, frame = group % p.groups_of_clip;
      tail.rows_empty.wait(parity ^ 1);
      float largest = 0.0f;
      for (int d = threadIdx.x - 32; d < p.D; d += kSumming * 32) {
        const int64_t scale = clip * p.scale.stride_b + frame * p.scale.stride_f + d;
        const int64_t shift = clip * p.shift.stride_b + frame * p.shift.stride_f + d;
        const float factor = 1.0f + (p.scale ? load_any(p.scale.data, p.scale.dtype, scale) : 0.0f);
        memory.factor()[d] = factor;
        memory.shift()[d] = p.shift ? load_any(p.shift.data, p.shift.dtype, shift) : 0.0f;
        largest = fmaxf(largest, fabsf(factor));
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
      __syncwarp();  // shuffles order no memory
      if (lane == 0) tail.largest[warp] = largest, tail.rows_full.arrive();
      tail.rows_full.wait(parity);
      parity ^= 1;
    }

    float totals[kTiles][4] = {};
#pragma unroll 1
    for (int d = 0; d < p.D; d += kBox, place.advance(p.stages)) {
      tail.full[place.stage].wait(place.parity);
      if (sums) {
        // Columns of the right operand: 1 + scale and shift, each as two values of T that add up to it.
        const float* rows = (lane / 4 < 2 ? memory.factor() : memory.shift()) + d + lane % 4 * 2;
        const uint32_t begin = address_of(memory.stage(place.stage).weight);
#pragma unroll
        for (int step = 0; step < kBox / 16; ++step) {
          uint32_t b[2] = {};
          if (lane < 16) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float2 row = *reinterpret_cast<const float2*>(rows + step * 16 + i * 8);
              b[i] = pack<T>(row.x, row.y);
              const float2 high = widen<T>(b[i]);
              if (lane / 4 % 2) b[i] = pack<T>(row.x - high.x, row.y - high.y);
            }
          }
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const int feature = (i * kSumming + warp) * 16;
            if (feature >= Traits::kFeatures) break;
            uint32_t a[4];
            load_matrices(a, (begin ^ step * 32) + feature * kBoxBytes);
            multiply_small<T>(totals[i], a, b);
          }
        }
      }
      __syncwarp();
      if (lane == 0) tail.empty[place.stage].arrive();
    }
    if (sums) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int feature = (i * kSumming + warp) * 16 + lane / 4;
        if (feature < Traits::kFeatures && lane % 4 < 2) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int n = feature + 8 * r;
            const float bias = lane % 4 && p.bias && n < p.features ? load_any(p.bias.data, p.bias.dtype, n) : 0.0f;
            tail.sums[lane % 4][n] = totals[i][2 * r] + totals[i][2 * r + 1] + bias;
          }
        }
      }
      __syncwarp();
      if (lane == 0) tail.sums_full.arrive();
    }
  }
}

// What makes x to y: x scale - centre, of a thread's rows of a product, which are lane / 4 and 8 more.
struct Centre {
  float scale[2], centre[2];
};

// Of the 64 columns of a row that are there first.
template <class Traits>
__device__ __forceinline__ Centre centre_of(uint32_t begin, float largest, bool rms) {
  float2 values[2][kBox / 8];
#pragma unroll
  for (int step = 0; step < kBox / 16; ++step) {
    uint32_t a[4];
    load_matrices(a, begin ^ step * 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i % 2][step * 2 + i / 2] = widen<typename Traits::T>(a[i]);
  }
  Centre c;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = 0.0f, square = 0.0f;
    if (!rms) {
#pragma unroll
      for (const float2& v : values[r]) sum += v.x + v.y;
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    }
    c.scale[r] = 1.0f, c.centre[r] = sum / kBox;
    if constexpr (kScaled<Traits>) {
      // |x - p| < 2^17: y (1 + scale) stays below 2^16, and is 2^-8 of its size where a row is even.
#pragma unroll
      for (const float2& v : values[r]) {
        const float x = v.x - c.centre[r], y = v.y - c.centre[r];
        square += x * x + y * y;
      }
      square += __shfl_xor_sync(0xffffffffu, square, 1);
      square += __shfl_xor_sync(0xffffffffu, square, 2);
      c.scale[r] = 0x1p-8f / (fmaxf(sqrtf(square / kBox), 0x1p-5f) * fmaxf(largest / 2, 1.0f));
      c.centre[r] *= c.scale[r];
    }
  }
  return c;
}

template <class Traits>
__device__ __forceinline__ void consume(const FinalMemory<Traits>& memory, const FinalParams& p) {
  using T = typename Traits::T;
  constexpr int kParts = Traits::kParts, kFeatures = Traits::kFeatures, kSteps = kBox / 16;
  auto& tail = memory.tail();
  // From one lane, so that the compiler knows it to be the same for all of a warp, as matrices must be.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) - 4, lane = threadIdx.x % 32;
  const int first_row = warp / 4 * kParts * kRows + warp % 4 * 16;  // of a warp, in a tile; of its next product 64 more
  auto& results = tail.results[warp];
  const Share share(p.tiles);
  RingPlace place;
  int group = -1;
  uint32_t parity = 1;
  float largest = 1.0f;
  for (int tile = share.first; tile < share.last; ++tile) {
    if (tile / p.tiles_of_group != group) {
      if (group >= 0 && lane == 0) tail.rows_empty.arrive();
      group = tile / p.tiles_of_group;
      parity ^= 1;
      tail.rows_full.wait(parity);
      if constexpr (kScaled<Traits>) largest = fmaxf(fmaxf(tail.largest[0], tail.largest[1]), tail.largest[2]);
    }

    float sums[kParts][kFeatures / 2] = {}, sum[kParts][2] = {}, square[kParts][2] = {};
    Centre centre[kParts];
#pragma unroll 1
    for (int d = 0; d < p.D; d += kBox, place.advance(p.stages)) {
      auto& stage = memory.stage(place.stage);
      tail.full[place.stage].wait(place.parity);
      const uint32_t begin = address_of(stage.x + first_row);
      if (d == 0) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          centre[part] = centre_of<Traits>(begin + part * kRows * kBoxBytes, largest, p.rms);
      }
      uint32_t a[kParts][kSteps][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const float* factor = memory.factor() + d + step * 16 + lane % 4 * 2;
        const float2 factors[2] = {*reinterpret_cast<const float2*>(factor), *reinterpret_cast<const float2*>(factor + 8)};
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          load_matrices(a[part][step], (begin ^ step * 32) + part * kRows * kBoxBytes);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int r = i % 2;
            float2 y = widen<T>(a[part][step][i]);
            if constexpr (kScaled<Traits>) {
              y.x = fmaf(y.x, centre[part].scale[r], -centre[part].centre[r]);
              y.y = fmaf(y.y, centre[part].scale[r], -centre[part].centre[r]);
            } else {
              y.x -= centre[part].centre[r], y.y -= centre[part].centre[r];
            }
            sum[part][r] += y.x, sum[part][r] += y.y;
            square[part][r] = fmaf(y.x, y.x, square[part][r]), square[part][r] = fmaf(y.y, y.y, square[part][r]);
            a[part][step][i] = pack<T>(y.x * factors[i / 2].x, y.y * factors[i / 2].y);
          }
        }
      }
      const uint64_t b = matrix<kBoxBytes>(stage.weight);
      begin_products();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          Wgmma<T, kFeatures>::add_rows(sums[part], a[part][step], advance(b, step * 32));
      }
      commit_products();
      wait_for_products<0>(reinterpret_cast<float(&)[kParts * kFeatures / 2]>(sums));
      if (lane == 0) tail.empty[place.stage].arrive();
    }

    tail.sums_full.wait(parity);
    const int first_token = tile % p.tiles_of_group * Traits::kTokens + first_row;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float mean[2], rate[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = sum[part][r], squares = square[part][r];
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
          total += __shfl_xor_sync(0xffffffffu, total, offset);
          squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        }
        mean[r] = p.rms ? 0.0f : total * p.over_width;
        const float eps = p.eps * centre[part].scale[r] * centre[part].scale[r];
        rate[r] = 1.0f / sqrtf(fmaxf(squares * p.over_width - mean[r] * mean[r], 0.0f) + eps);
      }
      __syncwarp();  // the results before have been read
#pragma unroll
      for (int i = 0; i < kFeatures / 2; i += 4) {
        const int n = 2 * i + lane % 4 * 2;
        const float2 of_scale = *reinterpret_cast<const float2*>(tail.sums[0] + n);
        const float2 of_shift = *reinterpret_cast<const float2*>(tail.sums[1] + n);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* z = sums[part] + i + 2 * r;
          *reinterpret_cast<uint32_t*>(&results[lane / 4 + 8 * r][n]) =
              pack<T>(fmaf(z[0] - mean[r] * of_scale.x, rate[r], of_shift.x),
                      fmaf(z[1] - mean[r] * of_scale.y, rate[r], of_shift.y));
        }
      }
      __syncwarp();
      // A lane has a token, and of its features each second; lanes side by side write pixels side by side.
      const int token = first_token + part * kRows + lane % 16;
      if (token < p.tokens) {
        const int s = group % p.groups_of_clip * p.tokens + token, line = s / p.grid_w;
        T* patch = static_cast<T*>(p.out) + group / p.groups_of_clip * p.stride_b +
                   line / p.grid_h * p.pt * p.stride_t + line % p.grid_h * p.ph * p.stride_h + s % p.grid_w * p.pw;
        const auto* row = reinterpret_cast<const uint16_t*>(results[lane % 16]);
        for (int i = lane / 16; i * p.together < p.features; i += 2) {
          const int n = tail.places[i][0];
          if (p.together == 2)
            *reinterpret_cast<uint32_t*>(patch + tail.places[i][1]) = row[n] | uint32_t{row[n + p.channels]} << 16;
          else
            *reinterpret_cast<uint16_t*>(patch + tail.places[i][1]) = row[n];
        }
      }
    }
  }
}

template <class Traits>
__global__ __launch_bounds__(kThreads, 1) void final_layer_fwd_kernel(const __grid_constant__ CUtensorMap x,
                                                                      const __grid_constant__ CUtensorMap weight,
                                                                      const __grid_constant__ FinalParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char bytes[];
  const FinalMemory<Traits> memory{bytes, p.stages, p.D};
  auto& tail = memory.tail();
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) tail.full[i].init(1), tail.empty[i].init(kWarps + kSumming);
    tail.largest[kSumming] = 0.0f;
    tail.rows_full.init(kSumming), tail.rows_empty.init(kWarps), tail.sums_full.init(kSumming);
    publish_barriers();
  }
  for (int i = threadIdx.x; i * p.together < p.features; i += kThreads) {
    const int c = i % p.channels, cell = i / p.channels * p.together, line = cell / p.pw;
    tail.places[i][0] = cell * p.channels + c;
    tail.places[i][1] = c * p.stride_c + line / p.ph * p.stride_t + line % p.ph * p.stride_h + cell % p.pw;
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0)
      produce(memory, x, weight, p);
    else if (threadIdx.x >= 32)
      sum_rows(memory, p);
  } else {
    take_registers<kConsumerRegisters>();
    consume(memory, p);
  }
#endif
}

struct FinalTensors {
  const Tensor &x, &weight, &out;
};

template <class Traits>
int64_t tiles_of(const FinalTensors& t, const FinalParams& p) {
  return t.x.size(0) * p.groups_of_clip * blocks_of(p.tokens, Traits::kTokens);
}

template <class Traits>
void launch(const FinalTensors& t, FinalParams p, int processors) {
  const int fixed = sizeof(FinalTail<Traits>) + 2 * sizeof(float) * p.D;
  p.stages = std::min((kMemory - fixed) / static_cast<int>(sizeof(FinalStage<Traits>)), kMostStages);
  const int64_t tiles = tiles_of<Traits>(t, p);
  SORA_CHECK(tiles <= INT32_MAX, "x: expected at most 2^31 - 1 tiles of ", Traits::kTokens, " tokens, got ",
             describe(t.x));
  p.tiles = static_cast<int>(tiles), p.tiles_of_group = blocks_of(p.tokens, Traits::kTokens);
  const auto kernel = final_layer_fwd_kernel<Traits>;
  const int memory = fixed + p.stages * static_cast<int>(sizeof(FinalStage<Traits>));
  SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory));
  kernel<<<std::min(p.tiles, processors), kThreads, memory, current_stream(t.x.get_device_index())>>>(
      encode_boxes<4>("x", t.x, 0, {p.D, p.S, 1, t.x.size(0)}, {1, t.x.stride(1), 0, t.x.stride(0)},
                 {kBox, Traits::kTokens, 1, 1}),
      encode_boxes<2>("weight", t.weight, 0, {p.D, p.features}, {1, p.D}, {kBox, Traits::kFeatures}), p);
  SORA_CUDA_CHECK(cudaGetLastError());
}

// Of tiles of 128 and of 256 tokens, those with which the block that has most to read has less: of x, and of the weight.
template <class T>
void launch_features(const FinalTensors& t, const FinalParams& p, int processors) {
  using Low = FinalTraits<T, 64, 1>;
  using High = FinalTraits<T, 64, 2>;
  const auto most = [&](int64_t tiles, int tokens) { return (tiles + processors - 1) / processors * (tokens + 64); };
  if (p.features > 128) return launch<FinalTraits<T, 192, 1>>(t, p, processors);
  if (p.features > 64) return launch<FinalTraits<T, 128, 1>>(t, p, processors);
  if (most(tiles_of<High>(t, p), High::kTokens) < most(tiles_of<Low>(t, p), Low::kTokens))
    return launch<High>(t, p, processors);
  launch<Low>(t, p, processors);
}

void final_layer_fwd(const Tensor& x, const OptionalTensor& shift, const OptionalTensor& scale, const Tensor& weight,
                     const OptionalTensor& bias, int64_t T, int64_t H, int64_t W, bool rms, double eps,
                     const Tensor& out) {
  Shape shape = shape_of("x", x);
  SORA_CHECK(x.is_cuda() && x.scalar_type() != ScalarType::Float && shape.D > 0 && shape.D % kBox == 0 &&
                 shape.D <= 8192 && shape.rows() > 0 && shape.S < 1 << 30,
             "x: expected bfloat16 or float16 on a GPU, a multiple of ", kBox, " columns, at most 8192, got ", describe(x));
  FinalParams p{.shift = rows("shift", shift, x, shape), .scale = rows("scale", scale, x, shape)};
  p.groups_of_clip = static_cast<int>(shape.modulation_rows()), p.tokens = static_cast<int>(shape.rows_per_modulation());
  check_kind("weight", weight, x), check_kind("out", out, x);
  SORA_CHECK(weight.dim() == 2 && weight.size(1) == shape.D && weight.is_contiguous() && weight.size(0) > 0 &&
                 weight.size(0) <= 192 && weight.scalar_type() == x.scalar_type(),
             "weight: expected (N, ", shape.D, "), contiguous, in the dtype of x, N of at most 192, got ", describe(weight));
  const int64_t N = weight.size(0);
  SORA_CHECK(out.dim() == 5 && out.is_contiguous() && out.scalar_type() == x.scalar_type() && T > 0 && H > 0 && W > 0 &&
                 T * H * W == shape.S && out.size(0) == shape.B && out.size(2) % T == 0 && out.size(3) % H == 0 &&
                 out.size(4) % W == 0 && out.numel() == shape.rows() * N,
             "out: expected the video of ", N, " features a token, contiguous, got ", describe(out), "; x is ", describe(x));
  if (bias) {
    check_kind("bias", *bias, x);
    SORA_CHECK(bias->numel() == N && bias->is_contiguous(), "bias: expected a contiguous (", N, ",), got ",
               describe(*bias));
    p.bias = {bias->data_ptr(), bias->scalar_type()};
  }
  p.out = out.data_ptr(), p.stride_b = out.stride(0), p.stride_c = out.stride(1), p.stride_t = out.stride(2);
  p.stride_h = out.stride(3), p.eps = static_cast<float>(eps), p.over_width = 1.0f / static_cast<float>(shape.D);
  p.rms = rms, p.D = static_cast<int>(shape.D), p.features = static_cast<int>(N);
  p.channels = out.size(1), p.pt = out.size(2) / T, p.ph = out.size(3) / H, p.pw = out.size(4) / W;
  p.together = p.pw % 2 == 0 ? 2 : 1;
  p.S = static_cast<int>(shape.S), p.grid_h = static_cast<int>(H), p.grid_w = static_cast<int>(W);
  SORA_CHECK(out.numel() / shape.B <= INT32_MAX, "out: expected clips of fewer than 2^31 values, got ", describe(out));

  const int32_t device = x.get_device_index();
  const DeviceGuard guard(device);
  int major = 0, processors = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  SORA_CHECK(major == 9, "expected a GPU of compute capability 9.0, got ", major, ".x");
  const FinalTensors t{x, weight, out};
  x.scalar_type() == ScalarType::Half ? launch_features<__half>(t, p, processors)
                                      : launch_features<__nv_bfloat16>(t, p, processors);
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_final_layer_fwd_cuda", TORCH_BOX(&sora::final_layer_fwd));
}
