// spacetime_attention, dense, backward, for sm_90a. With base = lse log2(e) and delta = sum(dout out) - dlse of a query:
//
//   p = exp2(scale log2(e) q k^T - base),   ds = p (dout v^T - delta)
//   dq = scale ds k,   dk = scale ds^T q,   dv = p^T dout
//
// Two kernels in place of one, and seven products in place of five: a block owns 128 queries and visits all keys, or owns
// 128 keys and visits the queries of all heads that share them. So each gradient is summed by one block in one order,
// without atomics. x are the tokens of the scores (queries, keys), y those of their slopes (dout, values). One thread of a
// warp group brings boxes by the TMA, visited ones into rings of buffers; two more warp groups own 64 tokens each. Of keys
// the scores are computed transposed: weights and ds are then in registers as the left operands of the products for dv
// and dk.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "cuda/attention.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

namespace sora {
namespace {

using OptionalList = std::optional<std::vector<int64_t>>;

constexpr int kRowLanes = 8, kRowVectors = 2, kRowThreads = 128;  // of the kernel that takes queries alone

constexpr int visited_tokens(int width, bool of_keys) { return of_keys && width > 64 ? 64 : 96; }

template <class T_, int kWidth_, bool kOfKeys_>
struct BackwardTraits {
  using T = T_;
  static constexpr int kWidth = kWidth_;                  // of a head
  static constexpr bool kOfKeys = kOfKeys_;               // gradients of keys and values, or of queries
  static constexpr int kConsumers = 2, kOwn = 64;         // warp groups that multiply, and the tokens that each owns
  static constexpr int kVisited = visited_tokens(kWidth, kOfKeys), kStages = 3;  // of a tile, and tiles in a ring
  static constexpr int kKeys = kVisited;                  // as the forward's products call them
  static constexpr int kColumns = kWidth % 64 ? 32 : 64;  // of a box: its rows are as wide as a swizzle
  static constexpr int kBoxes = kWidth / kColumns;        // side by side: a tile
  static constexpr int kRowBytes = kColumns * sizeof(T);
  static constexpr int kThreads = (kConsumers + 1) * kGroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  static_assert(sizeof(T) == 2, "wgmma of 16-bit floats");
  static_assert(kOwn == 64, "the rows of a wgmma");
  static_assert(kWidth % kColumns == 0 && kColumns % 16 == 0, "a product takes 16 columns of one box");
  static_assert(kKeys % 16 == 0 && kKeys <= 256, "they are the depth of a product, and the rows of a box");
  static_assert(kOwn * kRowBytes % 1024 == 0 && kVisited * kRowBytes % 1024 == 0, "boxes begin where a swizzle does");
  static_assert((kOfKeys + 1) * kWidth / 2 + kVisited * 5 / 4 + 32 <= kConsumerRegisters,
                "sums, scores, slopes and one of them rounded are in registers");
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kGroup <= 65536, "the register file");
};

struct BackwardParams {
  const float *base, *delta;  // [B, H, padded]
  int padded, Sq, Sk, H, group;  // group: query heads that share a key head
  int own_tiles, own_heads, visited_tiles;
  bool store_x, store_y;
  float scale, scale_log2;
};

template <class Traits>
struct alignas(1024) BackwardShared {
  using T = typename Traits::T;
  using Own = T[Traits::kBoxes][Traits::kOwn][Traits::kColumns];
  using Visited = T[Traits::kBoxes][Traits::kVisited][Traits::kColumns];

  Own own_x[Traits::kConsumers], own_y[Traits::kConsumers];  // and, at the end, their gradients
  Visited x[Traits::kStages], y[Traits::kStages];
  alignas(128) float base[Traits::kStages][Traits::kVisited], delta[Traits::kStages][Traits::kVisited];  // of queries
  Barrier own_full, x_full[Traits::kStages], y_full[Traits::kStages], empty[Traits::kStages];
};

struct Owned {
  int first, head, batch;

  __device__ Owned(int tokens, const BackwardParams& p)
      : first(blockIdx.x % p.own_tiles * tokens),
        head(blockIdx.x / p.own_tiles % p.own_heads),
        batch(blockIdx.x / p.own_tiles / p.own_heads) {}
};

template <int N>
__device__ __forceinline__ void load_line(float (&to)[N], const float* from, Barrier& full) {
  static_assert(sizeof to % 16 == 0);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(uint32_t{sizeof to}), "r"(shared_address(&full))
               : "memory");
}

template <class Traits>
__device__ __forceinline__ void produce(BackwardShared<Traits>& shared, const CUtensorMap& own_x, const CUtensorMap& own_y,
                                        const CUtensorMap& x, const CUtensorMap& y, const BackwardParams& p) {
  const Owned own(Traits::kConsumers * Traits::kOwn, p);
  constexpr uint32_t kLine = Traits::kOfKeys ? sizeof shared.base[0] : 0;
  const int heads = Traits::kOfKeys ? p.group : 1, first_head = Traits::kOfKeys ? own.head * p.group : own.head / p.group;
  shared.own_full.arrive_and_expect(sizeof shared.own_x + sizeof shared.own_y);
  for (int c = 0; c < Traits::kConsumers; ++c) {
    load_boxes<Traits>(shared.own_x[c], own_x, shared.own_full, own.first + c * Traits::kOwn, own.head, own.batch);
    load_boxes<Traits>(shared.own_y[c], own_y, shared.own_full, own.first + c * Traits::kOwn, own.head, own.batch);
  }
  Place<Traits::kStages> at;
  for (int head = first_head; head < first_head + heads; ++head) {
    for (int j = p.visited_tiles - 1; j >= 0; --j, at.advance()) {
      const int first = j * Traits::kVisited;
      const int64_t line = (int64_t{own.batch} * p.H + head) * p.padded + first;
      shared.empty[at.stage].wait(at.parity ^ 1);
      shared.x_full[at.stage].arrive_and_expect(sizeof shared.x[0] + kLine);
      load_boxes<Traits>(shared.x[at.stage], x, shared.x_full[at.stage], first, head, own.batch);
      if (Traits::kOfKeys) load_line(shared.base[at.stage], p.base + line, shared.x_full[at.stage]);
      shared.y_full[at.stage].arrive_and_expect(sizeof shared.y[0] + kLine);
      load_boxes<Traits>(shared.y[at.stage], y, shared.y_full[at.stage], first, head, own.batch);
      if (Traits::kOfKeys) load_line(shared.delta[at.stage], p.delta + line, shared.y_full[at.stage]);
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void round_to(uint32_t (&to)[N / 2], const float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) to[i] = pack<T>(d[2 * i], d[2 * i + 1]);
}

// What value n of four (columns n % 2, rows n / 2) of the i-th eight columns is taken with: one number a query.
template <bool kOfKeys>
struct Queries {
  float2 pair;

  __device__ __forceinline__ Queries(const float* line, const float (&rows)[2], int i)
      : pair(kOfKeys ? *reinterpret_cast<const float2*>(line + 8 * i + threadIdx.x % 4 * 2)
                     : float2{rows[0], rows[1]}) {}
  __device__ __forceinline__ float operator[](int n) const { return (kOfKeys ? n % 2 : n / 2) ? pair.y : pair.x; }
};

template <class Traits>
__device__ __forceinline__ void consume(BackwardShared<Traits>& shared, const CUtensorMap& dx, const CUtensorMap& dy,
                                        const BackwardParams& p) {
  using T = typename Traits::T;
  using Exp = Softmax<Traits::kVisited / 2>;
  constexpr bool kOfKeys = Traits::kOfKeys;
  constexpr int kVisited = Traits::kVisited;
  const int consumer = threadIdx.x / kGroup - 1, thread = threadIdx.x % kGroup, lane = thread % 32;
  const Owned own(Traits::kConsumers * Traits::kOwn, p);
  const int first = own.first + consumer * Traits::kOwn, rounds = p.visited_tiles * (kOfKeys ? p.group : 1);
  auto &own_x = shared.own_x[consumer], &own_y = shared.own_y[consumer];
  float sum_x[Traits::kWidth / 2] = {}, sum_y[Traits::kWidth / 2] = {}, scores[kVisited / 2], slopes[kVisited / 2];
  uint32_t weights[kVisited / 4], weighted[kVisited / 4];

  float base[2] = {INFINITY, INFINITY}, delta[2] = {};
  if (!kOfKeys) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first + thread / 32 * 16 + lane / 4 + 8 * r;
      const int64_t at = (int64_t{own.batch} * p.H + own.head) * p.padded + query;
      if (query < p.Sq) base[r] = p.base[at], delta[r] = p.delta[at];
    }
  }

  shared.own_full.wait(0);
  Place<Traits::kStages> at;
  uint32_t before = 0;  // the stage of the round before
  for (int round = 0; round < rounds; ++round, before = at.stage, at.advance()) {
    shared.x_full[at.stage].wait(at.parity);
    begin_products();
    multiply_keys<Traits>(scores, own_x, shared.x[at.stage]);
    commit_products();
    shared.y_full[at.stage].wait(at.parity);
    begin_products();
    multiply_keys<Traits>(slopes, own_y, shared.y[at.stage]);
    commit_products();
    wait_for_products<1>(scores);  // and for all of the round before
    if (round > 0 && lane == 0) shared.empty[before].arrive();
#pragma unroll
    for (int i = 0; i < kVisited / 8; ++i) {
      const Queries<kOfKeys> of(shared.base[at.stage], base, i);
#pragma unroll
      for (int n = 0; n < 4; ++n) scores[4 * i + n] = Exp::exp2_approx(fmaf(scores[4 * i + n], p.scale_log2, -of[n]));
    }
    if constexpr (kOfKeys) {
      round_to<T>(weights, scores);
      begin_products();
      multiply_values<Traits>(sum_y, weights, shared.y[at.stage]);
      commit_products();
      wait_for_products<1>(slopes);
    } else {
      if (round == 0) {  // the last keys: those beyond Sk have scores of 0, whose weights may be infinite
        const int column = (p.visited_tiles - 1) * kVisited + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < kVisited / 2; ++i)
          if (column + i / 4 * 8 + i % 2 >= p.Sk) scores[i] = 0.0f;
      }
      wait_for_products<0>(slopes);
    }
#pragma unroll
    for (int i = 0; i < kVisited / 8; ++i) {
      const Queries<kOfKeys> of(shared.delta[at.stage], delta, i);
#pragma unroll
      for (int n = 0; n < 4; ++n) slopes[4 * i + n] = scores[4 * i + n] * (slopes[4 * i + n] - of[n]);
    }
    round_to<T>(weighted, slopes);
    begin_products();
    multiply_values<Traits>(sum_x, weighted, shared.x[at.stage]);
    commit_products();
    if constexpr (kOfKeys) wait_for_products<1>(sum_y);  // else its weights hold registers that the next scores need
  }

  wait_for_products<0>(sum_x);
#pragma unroll
  for (float& sum : sum_x) sum *= p.scale;
  store_rows<Traits>(own_x, sum_x);
  if constexpr (kOfKeys) store_rows<Traits>(own_y, sum_y);
  publish_writes();
  sync_threads(1 + consumer, kGroup);
  if (thread == 0) {
    for (int box = 0; box < Traits::kBoxes; ++box) {
      const int column = box * Traits::kColumns;
      if (p.store_x) store_box(dx, own_x[box], column, first, own.head, own.batch);
      if (kOfKeys && p.store_y) store_box(dy, own_y[box], column, first, own.head, own.batch);
    }
    commit_stores();
    wait_for_stores<0>();
  }
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void attention_bwd_kernel(
    const __grid_constant__ CUtensorMap own_x, const __grid_constant__ CUtensorMap own_y,
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y, const __grid_constant__ CUtensorMap dx,
    const __grid_constant__ CUtensorMap dy, const __grid_constant__ BackwardParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<Traits>*>(memory);
  if (threadIdx.x == 0) {
    shared.own_full.init(1);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      shared.x_full[stage].init(1), shared.y_full[stage].init(1);
      shared.empty[stage].init(Traits::kConsumers * 4);  // warps
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Traits>(shared, own_x, own_y, x, y, p);
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume<Traits>(shared, dx, dy, p);
  }
#endif
}

struct RowsParams {
  const void *out, *dout;
  int64_t out_strides[3], dout_strides[3];  // of b, s, h
  const float *lse, *dlse;                  // [B, H, Sq]; dlse may be null
  float *base, *delta;                      // [B, H, padded]
  int padded, Sq, H, width;
  int blocks;  // of a head
};

// Eight lanes a query: base and delta; +inf and 0 beyond Sq, and +inf where a query saw nothing: p is then 0.
template <class T>
__global__ __launch_bounds__(kRowThreads) void attention_bwd_rows_kernel(const __grid_constant__ RowsParams p) {
  constexpr int kRows = kRowThreads / kRowLanes;
  const int head = blockIdx.x / p.blocks, query = blockIdx.x % p.blocks * kRows + threadIdx.x / kRowLanes;
  const int lane = threadIdx.x % kRowLanes, column = lane * Vec<T>::kSize;
  const bool real = query < p.Sq;
  float sum = 0.0f;
  if (real) {
    const int b = head / p.H, h = head % p.H;
    const auto at = [&](const void* heads, const int64_t (&strides)[3]) {
      return static_cast<const T*>(heads) + b * strides[0] + query * strides[1] + h * strides[2] + column;
    };
    const T *out = at(p.out, p.out_strides), *dout = at(p.dout, p.dout_strides);
    Vec<T> left[kRowVectors] = {}, right[kRowVectors] = {};
#pragma unroll
    for (int n = 0; n < kRowVectors; ++n) {
      const int further = n * kRowLanes * Vec<T>::kSize;
      if (column + further < p.width) left[n] = load_streaming(out + further), right[n] = load_streaming(dout + further);
    }
#pragma unroll
    for (int n = 0; n < kRowVectors; ++n)
#pragma unroll
      for (int i = 0; i < Vec<T>::kSize; ++i) sum = fmaf(to_float(left[n].values[i]), to_float(right[n].values[i]), sum);
  }
#pragma unroll
  for (int offset = kRowLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane != 0) return;
  float base = INFINITY;
  if (real) {
    const int64_t row = int64_t{head} * p.Sq + query;
    const float lse = p.lse[row];
    if (lse != -INFINITY) base = lse * 1.4426950408889634f;
    if (p.dlse) sum -= p.dlse[row];
  }
  const int64_t row = int64_t{head} * p.padded + query;
  p.base[row] = base, p.delta[row] = sum;
}

struct Named {
  const char* name;
  const Tensor& tensor;
};

template <class Traits>
void launch(const Named& own_x, const Named& own_y, const Named& x, const Named& y, const OptionalTensor& dx,
            const OptionalTensor& dy, BackwardParams p, cudaStream_t stream) {
  if (!dx && !dy) return;
  constexpr int kBlock = Traits::kConsumers * Traits::kOwn, kShared = sizeof(BackwardShared<Traits>);
  const Tensor &owner = own_x.tensor, &visited = x.tensor;
  p.own_tiles = static_cast<int>((owner.size(1) + kBlock - 1) / kBlock);
  p.own_heads = static_cast<int>(owner.size(2));
  p.visited_tiles = static_cast<int>((visited.size(1) + Traits::kVisited - 1) / Traits::kVisited);
  p.store_x = dx.has_value(), p.store_y = dy.has_value();
  const int64_t blocks = owner.size(0) * p.own_heads * p.own_tiles;
  SORA_CHECK(blocks <= INT32_MAX, own_x.name, ": expected at most 2^31 - 1 tiles of ", kBlock, " tokens, got ",
             describe(owner));
  const auto map = [](const Named& t, int rows) { return head_map(t.name, t.tensor, Traits::kColumns, rows); };
  const CUtensorMap to_x = map({"dx", dx ? *dx : *dy}, Traits::kOwn), to_y = map({"dy", dy ? *dy : *dx}, Traits::kOwn);
  const auto kernel = attention_bwd_kernel<Traits>;
  SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, kShared, stream>>>(
      map(own_x, Traits::kOwn), map(own_y, Traits::kOwn), map(x, Traits::kVisited), map(y, Traits::kVisited), to_x, to_y, p);
  SORA_CUDA_CHECK(cudaGetLastError());
}

struct Operands {
  const Tensor &dout, &q, &k, &v, &out, &lse;
  const OptionalTensor &dlse, &dq, &dk, &dv;
};

template <class T, int kWidth>
void launch_all(const Operands& o, BackwardParams p, cudaStream_t stream) {
  using OfQueries = BackwardTraits<T, kWidth, false>;
  using OfKeys = BackwardTraits<T, kWidth, true>;
  p.padded = (p.Sq + OfKeys::kVisited - 1) / OfKeys::kVisited * OfKeys::kVisited;
  const int64_t rows = o.q.size(0) * p.H * p.padded;
  const Tensor scratch = torch::stable::new_empty(o.q, {2 * rows}, ScalarType::Float);
  float* base = static_cast<float*>(scratch.data_ptr());
  p.base = base, p.delta = base + rows;

  RowsParams r{.out = o.out.data_ptr(), .dout = o.dout.data_ptr()};
  for (int axis = 0; axis < 3; ++axis) r.out_strides[axis] = o.out.stride(axis), r.dout_strides[axis] = o.dout.stride(axis);
  r.lse = static_cast<const float*>(o.lse.data_ptr());
  r.dlse = o.dlse ? static_cast<const float*>(o.dlse->data_ptr()) : nullptr;
  r.base = base, r.delta = base + rows, r.padded = p.padded, r.Sq = p.Sq, r.H = p.H, r.width = kWidth;
  constexpr int kRows = kRowThreads / kRowLanes;
  static_assert(OfKeys::kVisited % kRows == 0, "a block has queries of one head");
  static_assert(kWidth <= kRowLanes * kRowVectors * Vec<T>::kSize, "a query's lanes hold it");
  r.blocks = p.padded / kRows;
  const int64_t blocks = rows / kRows;
  SORA_CHECK(blocks <= INT32_MAX, "q: expected fewer than 2^34 queries of all heads, got ", describe(o.q));
  attention_bwd_rows_kernel<T><<<static_cast<unsigned>(blocks), kRowThreads, 0, stream>>>(r);
  SORA_CUDA_CHECK(cudaGetLastError());
  const Named q{"q", o.q}, k{"k", o.k}, v{"v", o.v}, dout{"dout", o.dout};
  launch<OfQueries>(q, dout, k, v, o.dq, OptionalTensor{}, p, stream);
  launch<OfKeys>(k, v, q, dout, o.dk, o.dv, p, stream);
}

template <class T>
void launch_width(const Operands& o, const BackwardParams& p, cudaStream_t stream) {
  switch (o.q.size(3)) {
    case 64: return launch_all<T, 64>(o, p, stream);
    case 96: return launch_all<T, 96>(o, p, stream);
    default: return launch_all<T, 128>(o, p, stream);
  }
}

void check_sums(const char* name, const Tensor& t, const Tensor& q) {
  check_kind(name, t, q, "q");
  SORA_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == q.size(0) * q.size(2) * q.size(1),
             name, ": expected a contiguous float32 (B, H, Sq), got ", describe(t));
}

// The rows kernel reads vectors of 16 bytes; of the others box_map asks the same.
void check_vectors(const char* name, const Tensor& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis) aligned &= t.size(axis) <= 1 || t.stride(axis) % 8 == 0;
  SORA_CHECK(aligned, name, ": expected data and strides at multiples of 16 bytes, got ", describe(t));
}

void attention_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out, const Tensor& lse, const OptionalTensor& kv_lens, OptionalList grids,
                   OptionalList /*window*/, std::vector<int64_t> /*stride*/, std::vector<int64_t> /*dilation*/,
                   std::vector<int64_t> /*causal*/, int64_t /*sink*/, int64_t /*text_len*/, bool /*text_first*/,
                   double scale, bool /*deterministic: as it always is*/, const OptionalTensor& dq,
                   const OptionalTensor& dk, const OptionalTensor& dv) {
  SORA_CHECK(q.dim() == 4 && k.dim() == 4, "q, k: expected (B, S, H, E), got ", describe(q), " and ", describe(k));
  const int64_t Sq = q.size(1), Sk = k.size(1), H = q.size(2), Hk = k.size(2), E = q.size(3);
  SORA_CHECK(q.is_cuda() && (E == 64 || E == 96 || E == 128) && q.scalar_type() != ScalarType::Float,
             "q: expected bfloat16 or float16 heads of 64, 96 or 128 on a GPU, got ", describe(q));
  SORA_CHECK(!kv_lens && !grids, "kv_lens, grids: expected none, for dense attention");
  SORA_CHECK(q.numel() > 0 && k.numel() > 0 && H % Hk == 0, "k: expected keys, in a number of heads that divides ", H,
             ", got ", describe(k));
  SORA_CHECK(scale > 0, "scale: expected a number above 0, got ", scale);
  check_heads("q", q, q, Sq, H), check_heads("dout", dout, q, Sq, H), check_heads("out", out, q, Sq, H);
  check_heads("k", k, q, Sk, Hk), check_heads("v", v, q, Sk, Hk);
  if (dq) check_heads("dq", *dq, q, Sq, H);
  if (dk) check_heads("dk", *dk, q, Sk, Hk);
  if (dv) check_heads("dv", *dv, q, Sk, Hk);
  check_sums("lse", lse, q);
  if (dlse) check_sums("dlse", *dlse, q);
  check_vectors("out", out), check_vectors("dout", dout);
  SORA_CHECK(std::max(Sq, Sk) <= INT32_MAX / 2, "q, k: expected fewer than 2^30 tokens, got ", describe(q), " and ",
             describe(k));

  const int32_t device = q.get_device_index();
  const DeviceGuard guard(device);
  int major = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SORA_CHECK(major == 9, "expected a GPU of compute capability 9.0, got ", major, ".x");
  BackwardParams p{};
  p.Sq = static_cast<int>(Sq), p.Sk = static_cast<int>(Sk), p.H = static_cast<int>(H), p.group = static_cast<int>(H / Hk);
  p.scale = static_cast<float>(scale), p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  const Operands o{dout, q, k, v, out, lse, dlse, dq, dk, dv};
  const cudaStream_t stream = current_stream(device);
  q.scalar_type() == ScalarType::Half ? launch_width<__half>(o, p, stream) : launch_width<__nv_bfloat16>(o, p, stream);
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_spacetime_attention_bwd_cuda", TORCH_BOX(&sora::attention_bwd));
}
