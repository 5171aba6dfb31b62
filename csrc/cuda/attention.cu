// spacetime_attention, dense or with kv_lens, forward, for sm_90a:
//
//   out = softmax(scale * q k^T) v,   lse = ln sum exp(scale * q k^T)
//
// A block works off tiles of 128 queries of a head. One warp of a warp group brings queries, keys and values into
// shared memory as boxes by the TMA; two more warp groups, with 64 queries each, multiply in turns and keep the softmax's
// running maximum and sum. Keys and values go through rings of buffers, each with two barriers: full and empty.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace sora {
namespace {

using OptionalList = std::optional<std::vector<int64_t>>;

constexpr int kGroup = 128;  // threads of a warp group

template <class T_, int kWidth_>
struct AttentionTraits {
  using T = T_;
  static constexpr int kWidth = kWidth_;                     // of a head
  static constexpr int kConsumers = 2, kQueries = 64;        // warp groups that multiply, and the queries of each
  static constexpr int kKeys = 176, kStages = 2;             // of a tile, and tiles in a ring
  static constexpr int kColumns = kWidth % 64 ? 32 : 64;     // of a box: its rows are as wide as a swizzle
  static constexpr int kBoxes = kWidth / kColumns;           // side by side: a tile
  static constexpr int kRowBytes = kColumns * sizeof(T);
  static constexpr int kThreads = (kConsumers + 1) * kGroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  static_assert(sizeof(T) == 2, "wgmma of 16-bit floats");
  static_assert(kQueries == 64, "the rows of a wgmma");
  static_assert(kWidth % kColumns == 0 && kColumns % 16 == 0, "a product takes 16 columns of one box");
  static_assert(kKeys % 16 == 0 && kKeys <= 256, "keys are the depth of a product, and the rows of a box");
  static_assert(kQueries * kRowBytes % 1024 == 0 && kKeys * kRowBytes % 1024 == 0, "boxes begin where a swizzle does");
  static_assert(kWidth / 2 + kKeys / 2 + kKeys / 4 + 32 <= kConsumerRegisters, "out, scores and weights are in registers");
  static_assert(kConsumers == 2, "they take turns");
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kGroup <= 65536, "the register file");
};

struct AttentionParams {
  float* lse;           // [B, H, Sq]
  const void* kv_lens;  // [B], how many keys are real, of 64 bits where wide_lens; null: all
  int Sq, Sk, H, group;  // group: query heads that share a key head
  int query_tiles, tiles, wide_lens;
  float scale, scale_log2;
};

template <class Traits>
struct alignas(1024) AttentionShared {
  using T = typename Traits::T;

  T q[Traits::kConsumers][Traits::kBoxes][Traits::kQueries][Traits::kColumns];  // and, at the end of a tile, out
  T k[Traits::kStages][Traits::kBoxes][Traits::kKeys][Traits::kColumns];
  T v[Traits::kStages][Traits::kBoxes][Traits::kKeys][Traits::kColumns];
  Barrier q_full, q_empty;
  Barrier k_full[Traits::kStages], k_empty[Traits::kStages], v_full[Traits::kStages], v_empty[Traits::kStages];
  Barrier v_landed;
};

struct Tile {
  int query, head, batch, key_end, visits;

  template <class Traits>
  __device__ __forceinline__ Tile(Traits, int index, const AttentionParams& p)
      : query(index % p.query_tiles * (Traits::kConsumers * Traits::kQueries)),
        head(index / p.query_tiles % p.H),
        batch(index / p.query_tiles / p.H),
        key_end(p.Sk) {
    if (p.kv_lens) {
      const int64_t real = p.wide_lens ? __ldg(static_cast<const int64_t*>(p.kv_lens) + batch)
                                       : int64_t{__ldg(static_cast<const int*>(p.kv_lens) + batch)};
      key_end = real < 0 ? 0 : real < p.Sk ? static_cast<int>(real) : p.Sk;
    }
    visits = max(1, (key_end + Traits::kKeys - 1) / Traits::kKeys);  // of no key one, hidden, for its zeros
  }
};

template <class Traits, class Boxes>
__device__ __forceinline__ void load_boxes(Boxes& to, const CUtensorMap& map, Barrier& full, int s, int h, int b) {
#pragma unroll
  for (int box = 0; box < Traits::kBoxes; ++box) load_box(to[box], map, full, box * Traits::kColumns, s, h, b);
}

// Rows from `first` on, by a warp.
template <class Traits, class Boxes>
__device__ __forceinline__ void clear_rows(Boxes& boxes, int first) {
#pragma unroll
  for (int box = 0; box < Traits::kBoxes; ++box)
    for (int at = first * Traits::kRowBytes + threadIdx.x % 32 * 16; at < int(sizeof boxes[0]); at += 32 * 16)
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(shared_address(boxes[box]) + at), "r"(0) : "memory");
}

// A warp, whose first lane speaks to the TMA.
template <class Traits>
__device__ __forceinline__ void produce(AttentionShared<Traits>& shared, const CUtensorMap& q, const CUtensorMap& k,
                                        const CUtensorMap& v, const AttentionParams& p) {
  constexpr int kConsumers = Traits::kConsumers, kQueries = Traits::kQueries, kKeys = Traits::kKeys;
  const bool leads = threadIdx.x == 0;
  Place<Traits::kStages> at;
  Place<1> tiles, landed;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x, tiles.advance()) {
    const Tile tile(Traits(), index, p);
    const int head = tile.head / p.group;
    for (int i = 0; i < tile.visits; ++i, at.advance()) {
      const int key = (tile.visits - 1 - i) * kKeys;
      Barrier &k_full = shared.k_full[at.stage], &v_full = shared.v_full[at.stage];
      shared.k_empty[at.stage].wait(at.parity ^ 1);
      if (leads) {
        k_full.arrive_and_expect(sizeof shared.k[0]);
        load_boxes<Traits>(shared.k[at.stage], k, k_full, key, head, tile.batch);
      }
      shared.v_empty[at.stage].wait(at.parity ^ 1);
      const bool hides = tile.key_end < min(key + kKeys, p.Sk);
      if (leads) {
        Barrier& full = hides ? shared.v_landed : v_full;
        full.arrive_and_expect(sizeof shared.v[0]);
        load_boxes<Traits>(shared.v[at.stage], v, full, key, head, tile.batch);
      }
      if (i == 0) {
        // After the first keys and values, which need not wait for the results of the tile before to have left.
        shared.q_empty.wait(tiles.parity ^ 1);
        if (leads) {
          shared.q_full.arrive_and_expect(sizeof shared.q);
          for (int c = 0; c < kConsumers; ++c)
            load_boxes<Traits>(shared.q[c], q, shared.q_full, tile.query + c * kQueries, tile.head, tile.batch);
        }
      }
      if (hides) {  // what kv_lens hides may be no number, of which 0 times is none either
        shared.v_landed.wait(landed.parity);
        landed.advance();
        clear_rows<Traits>(shared.v[at.stage], tile.key_end - key);
        publish_writes();
        __syncwarp();
        if (leads) v_full.arrive();
      }
    }
  }
}

// A thread holds N values of two rows, shared with the three lanes beside it: values 4 i + 2 r and the next are of row r.
template <int N>
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, decay[2];

  static __device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  // scores -> exp2(factor (scores - top)); what was summed before is to be multiplied by decay.
  __device__ __forceinline__ void weigh(float (&scores)[N], float factor) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float new_top = top[r];
#pragma unroll
      for (int i = 2 * r; i < N; i += 4) new_top = fmaxf(new_top, fmaxf(scores[i], scores[i + 1]));
      new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 1));
      new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 2));
      const float shift = new_top == -INFINITY ? 0.0f : new_top * factor;  // inf - inf would be NaN
      decay[r] = exp2_approx(fmaf(top[r], factor, -shift));
      sum[r] *= decay[r];
      top[r] = new_top;
#pragma unroll
      for (int i = 2 * r; i < N; i += 4) {
#pragma unroll
        for (int n = i; n < i + 2; ++n) sum[r] += scores[n] = exp2_approx(fmaf(scores[n], factor, -shift));
      }
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    }
  }
};

template <int N>
__device__ __forceinline__ void multiply_rows(float (&d)[N], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) d[i] *= by[i / 2 % 2];
}

// Keys, the first of which is `first`, from key_end on.
template <int N>
__device__ __forceinline__ void mask(float (&scores)[N], int first, int key_end) {
  const int column = first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (column + i / 4 * 8 + i % 2 >= key_end) scores[i] = -INFINITY;
}

// d = q k^T
template <class Traits, class Q, class K, int N>
__device__ __forceinline__ void multiply_keys(float (&d)[N], const Q& q, const K& k) {
  using Product = Wgmma<typename Traits::T, Traits::kKeys>;
  const uint64_t a = matrix<Traits::kRowBytes>(q), b = matrix<Traits::kRowBytes>(k);
#pragma unroll
  for (int e = 0; e < Traits::kWidth; e += 16) {
    const int box = e / Traits::kColumns, bytes = e % Traits::kColumns * 2;
    const uint64_t left = advance(a, box * sizeof q[0] + bytes), right = advance(b, box * sizeof k[0] + bytes);
    e ? Product::add(d, left, right) : Product::first(d, left, right);
  }
}

// d += weights v
template <class Traits, class V, int N>
__device__ __forceinline__ void multiply_values(float (&d)[N], const uint32_t* weights, const V& v) {
  const uint64_t b = matrix<Traits::kRowBytes>(v, sizeof v[0]);
#pragma unroll
  for (int s = 0; s < Traits::kKeys; s += 16)
    Wgmma<typename Traits::T, Traits::kWidth>::add_columns(d, weights + s / 4, advance(b, s * Traits::kRowBytes));
}

// out in registers -> 16-bit boxes in shared memory, four 8 x 8 matrices at a time.
template <class Traits, class Boxes, int N>
__device__ __forceinline__ void store_rows(Boxes& to, const float (&out)[N]) {
  using T = typename Traits::T;
  const int lane = threadIdx.x % 32, row = threadIdx.x % kGroup / 32 * 16 + lane % 16;
#pragma unroll
  for (int e = 0; e < Traits::kWidth; e += 16) {
    const T* place = &to[e / Traits::kColumns][row][e % Traits::kColumns + lane / 16 * 8];
    store_matrices<T>(swizzled<Traits::kRowBytes>(shared_address(place)), out + e / 2);
  }
}

// Two consumers issue their products in turns: while those of one run, the other computes its softmax.
struct Turns {
  int consumer;

  __device__ __forceinline__ explicit Turns(int consumer) : consumer(consumer) {
    if (consumer == 1) pass();  // 0 begins
  }
  __device__ __forceinline__ void wait() const { sync_threads(3 + consumer, 2 * kGroup); }
  __device__ __forceinline__ void pass() const { arrive_threads(3 + (consumer ^ 1), 2 * kGroup); }
};

template <class Traits>
__device__ __forceinline__ void consume(AttentionShared<Traits>& shared, const CUtensorMap& out_map,
                                        const AttentionParams& p) {
  constexpr int kKeys = Traits::kKeys, kQueries = Traits::kQueries;
  const int consumer = threadIdx.x / kGroup - 1, thread = threadIdx.x % kGroup, lane = thread % 32;
  const Turns turns(consumer);
  auto& q = shared.q[consumer];
  Place<Traits::kStages> at_k, at_v;
  Place<1> tiles;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x, tiles.advance()) {
    const Tile tile(Traits(), index, p);
    float out[Traits::kWidth / 2] = {}, scores[kKeys / 2];
    uint32_t weights[kKeys / 4];
    Softmax<kKeys / 2> softmax;
    const auto round_weights = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) weights[i] = pack<typename Traits::T>(scores[2 * i], scores[2 * i + 1]);
    };

    shared.q_full.wait(tiles.parity);
    shared.k_full[at_k.stage].wait(at_k.parity);
    turns.wait();
    begin_products();
    multiply_keys<Traits>(scores, q, shared.k[at_k.stage]);
    commit_products();
    turns.pass();
    wait_for_products<0>(scores);
    if (lane == 0) shared.k_empty[at_k.stage].arrive();
    at_k.advance();
    mask(scores, (tile.visits - 1) * kKeys, tile.key_end);
    softmax.weigh(scores, p.scale_log2);
    round_weights();

    // The scores of a tile are multiplied before the values of the one before it, so that its softmax does not wait
    // for these.
    for (int i = 1; i < tile.visits; ++i) {
      shared.k_full[at_k.stage].wait(at_k.parity);
      turns.wait();
      begin_products();
      multiply_keys<Traits>(scores, q, shared.k[at_k.stage]);
      commit_products();
      shared.v_full[at_v.stage].wait(at_v.parity);
      begin_products();
      multiply_values<Traits>(out, weights, shared.v[at_v.stage]);
      commit_products();
      turns.pass();
      wait_for_products<1>(scores);
      if (lane == 0) shared.k_empty[at_k.stage].arrive();
      at_k.advance();
      softmax.weigh(scores, p.scale_log2);
      wait_for_products<0>(out);
      if (lane == 0) shared.v_empty[at_v.stage].arrive();
      at_v.advance();
      multiply_rows(out, softmax.decay);
      round_weights();
    }

    shared.v_full[at_v.stage].wait(at_v.parity);
    begin_products();
    multiply_values<Traits>(out, weights, shared.v[at_v.stage]);
    commit_products();
    wait_for_products<0>(out);
    if (lane == 0) shared.v_empty[at_v.stage].arrive();
    at_v.advance();

    softmax.finish();
    const int first = tile.query + consumer * kQueries;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = softmax.sum[r];
      const int query = first + thread / 32 * 16 + lane / 4 + 8 * r;
      inverse[r] = sum == 0.0f ? 1.0f : 1.0f / sum;  // all scores -inf
      if (lane % 4 == 0 && query < p.Sq) {
        p.lse[(int64_t{tile.batch} * p.H + tile.head) * p.Sq + query] = softmax.top[r] * p.scale + __logf(sum);
      }
    }
    multiply_rows(out, inverse);
    store_rows<Traits>(q, out);
    publish_writes();
    sync_threads(1 + consumer, kGroup);
    if (thread == 0) {
      for (int box = 0; box < Traits::kBoxes; ++box)
        store_box(out_map, q[box], box * Traits::kColumns, first, tile.head, tile.batch);
      commit_stores();
      wait_for_stores<0>();
      shared.q_empty.arrive();
    }
  }
  if (consumer == 0) turns.wait();  // leaves no arrival behind
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void attention_fwd_kernel(
    const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
    const __grid_constant__ CUtensorMap out, const __grid_constant__ AttentionParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<AttentionShared<Traits>*>(memory);
  if (threadIdx.x == 0) {
    shared.q_full.init(1), shared.q_empty.init(Traits::kConsumers), shared.v_landed.init(1);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      constexpr int kWarps = Traits::kConsumers * 4;
      shared.k_full[stage].init(1), shared.k_empty[stage].init(kWarps);
      shared.v_full[stage].init(1), shared.v_empty[stage].init(kWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) produce<Traits>(shared, q, k, v, p);
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume<Traits>(shared, out, p);
  }
#endif
}

// Of heads [B, S, H, E], for boxes of so many columns of E and rows of S.
CUtensorMap head_map(const char* name, const Tensor& t, int columns, int rows) {
  return box_map<4>(name, t, {3, 1, 2, 0}, {columns, rows, 1, 1});
}

template <class Traits>
void launch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, AttentionParams p) {
  constexpr int kQueries = Traits::kQueries, kKeys = Traits::kKeys, kColumns = Traits::kColumns;
  constexpr int kBlockQueries = Traits::kConsumers * kQueries, kShared = sizeof(AttentionShared<Traits>);
  p.query_tiles = (p.Sq + kBlockQueries - 1) / kBlockQueries;
  const int64_t tiles = q.size(0) * p.H * p.query_tiles;
  SORA_CHECK(tiles <= INT32_MAX, "q: expected at most 2^31 - 1 tiles of ", kBlockQueries, " queries, got ", describe(q));
  p.tiles = static_cast<int>(tiles);

  const int32_t device = q.get_device_index();
  const DeviceGuard guard(device);
  int major = 0, processors = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  SORA_CHECK(major == 9, "expected a GPU of compute capability 9.0, got ", major, ".x");
  const auto kernel = attention_fwd_kernel<Traits>;
  SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  kernel<<<std::min(p.tiles, processors), Traits::kThreads, kShared, current_stream(device)>>>(
      head_map("q", q, kColumns, kQueries), head_map("k", k, kColumns, kKeys), head_map("v", v, kColumns, kKeys),
      head_map("out", out, kColumns, kQueries), p);
  SORA_CUDA_CHECK(cudaGetLastError());
}

template <class T>
void launch_width(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const AttentionParams& p) {
  switch (q.size(3)) {
    case 64: return launch<AttentionTraits<T, 64>>(q, k, v, out, p);
    case 96: return launch<AttentionTraits<T, 96>>(q, k, v, out, p);
    default: return launch<AttentionTraits<T, 128>>(q, k, v, out, p);
  }
}

// t [B, S, H, E] with the dtype of q.
void check_heads(const char* name, const Tensor& t, const Tensor& q, int64_t S, int64_t H) {
  check_common(name, t, q);
  SORA_CHECK(t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) == S && t.size(2) == H && t.size(3) == q.size(3) &&
                 t.scalar_type() == q.scalar_type(),
             name, ": expected (B, S, H, E) = (", q.size(0), ", ", S, ", ", H, ", ", q.size(3), ") in the dtype of q, got ",
             describe(t), "; q is ", describe(q));
}

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& kv_lens, OptionalList grids,
                   OptionalList /*window*/, std::vector<int64_t> /*stride*/, std::vector<int64_t> /*dilation*/,
                   std::vector<int64_t> /*causal*/, int64_t /*sink*/, int64_t /*text_len*/, bool /*text_first*/,
                   double scale, const Tensor& out, const Tensor& lse) {
  SORA_CHECK(q.dim() == 4 && k.dim() == 4, "q, k: expected (B, S, H, E), got ", describe(q), " and ", describe(k));
  const int64_t Sq = q.size(1), Sk = k.size(1), H = q.size(2), Hk = k.size(2), E = q.size(3);
  SORA_CHECK(q.is_cuda() && (E == 64 || E == 96 || E == 128) && q.scalar_type() != ScalarType::Float,
             "q: expected bfloat16 or float16 heads of 64, 96 or 128 on a GPU, got ", describe(q));
  SORA_CHECK(!grids, "grids: expected none, for attention to all real keys");
  SORA_CHECK(q.numel() > 0 && k.numel() > 0 && H % Hk == 0, "k: expected keys, in a number of heads that divides ", H,
             ", got ", describe(k));
  SORA_CHECK(scale > 0, "scale: expected a number above 0, got ", scale);
  check_heads("q", q, q, Sq, H), check_heads("out", out, q, Sq, H);
  check_heads("k", k, q, Sk, Hk), check_heads("v", v, q, Sk, Hk);
  SORA_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.numel() == q.size(0) * H * Sq,
             "lse: expected a contiguous float32 (B, H, Sq), got ", describe(lse));
  SORA_CHECK(std::max(Sq, Sk) <= INT32_MAX / 2, "q, k: expected fewer than 2^30 tokens, got ", describe(q), " and ",
             describe(k));

  AttentionParams p{.lse = static_cast<float*>(lse.data_ptr())};
  if (kv_lens) {
    p.wide_lens = kv_lens->scalar_type() == ScalarType::Long;
    SORA_CHECK((p.wide_lens || kv_lens->scalar_type() == ScalarType::Int) && kv_lens->is_contiguous() &&
                   kv_lens->dim() == 1 && kv_lens->size(0) == q.size(0) && kv_lens->is_cuda() &&
                   kv_lens->get_device_index() == q.get_device_index(),
               "kv_lens: expected a contiguous int32 or int64 (B,) on the device of q, got ", describe(*kv_lens));
    p.kv_lens = kv_lens->data_ptr();
  }
  p.Sq = static_cast<int>(Sq), p.Sk = static_cast<int>(Sk), p.H = static_cast<int>(H);
  p.group = static_cast<int>(H / Hk);
  p.scale = static_cast<float>(scale), p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  q.scalar_type() == ScalarType::Half ? launch_width<__half>(q, k, v, out, p) : launch_width<__nv_bfloat16>(q, k, v, out, p);
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_spacetime_attention_fwd_cuda", TORCH_BOX(&sora::attention_fwd));
}
