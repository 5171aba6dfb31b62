// spacetime_attention, forward, for sm_90a:
//
//   out = softmax(scale * q k^T) v,   lse = ln sum exp(scale * q k^T)
//
// Dense, or over the tiles of keys that a plan lists for a tile of queries (attention_plan.cuh), with kv_lens or without.
// A block works off tiles of 128 queries of a head. One warp of a warp group brings queries, keys and values into
// shared memory as boxes by the TMA; two more warp groups, with 64 queries each, multiply in turns and keep the softmax's
// running maximum and sum. Keys and values go through rings of buffers, each with two barriers: full and empty.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "cuda/attention.cuh"
#include "cuda/attention_plan.cuh"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

namespace sora {
namespace {

using List = std::vector<int64_t>;

template <class T_, int kWidth_, bool kPlanned_>
struct AttentionTraits {
  using T = T_;
  static constexpr bool kPlanned = kPlanned_;
  static constexpr int kWidth = kWidth_;                     // of a head
  static constexpr int kConsumers = 2, kQueries = 64;        // warp groups that multiply, and the queries of each
  static constexpr int kKeys = kPlanned ? 128 : 176;         // of a tile
  static constexpr int kStages = kPlanned ? 3 : 2;           // tiles in a ring
  static constexpr int kColumns = kWidth % 64 ? 32 : 64;     // of a box: its rows are as wide as a swizzle
  static constexpr int kBoxes = kWidth / kColumns;           // side by side: a tile
  static constexpr int kRowBytes = kColumns * sizeof(T);
  static constexpr int kThreads = (kConsumers + 1) * kGroup;
  static constexpr int kProducerRegisters = kPlanned ? 40 : 24, kConsumerRegisters = kPlanned ? 232 : 240;

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
  PlanParams plan;

  __device__ __forceinline__ int real_keys(int batch) const {
    if (!kv_lens) return Sk;
    const int64_t real = wide_lens ? __ldg(static_cast<const int64_t*>(kv_lens) + batch)
                                   : int64_t{__ldg(static_cast<const int*>(kv_lens) + batch)};
    return real < 0 ? 0 : real < Sk ? static_cast<int>(real) : Sk;
  }
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

// A tile of queries that sees every real key, from the last tile of them to the first.
template <class Traits>
struct DenseTile {
  int query, head, batch, key_end, visits;

  __device__ __forceinline__ DenseTile(int index, const AttentionParams& p)
      : query(index % p.query_tiles * (Traits::kConsumers * Traits::kQueries)),
        head(index / p.query_tiles % p.H),
        batch(index / p.query_tiles / p.H),
        key_end(p.real_keys(batch)),
        visits(max(1, (key_end + Traits::kKeys - 1) / Traits::kKeys)) {}  // of no key one, hidden, for its zeros

  __device__ __forceinline__ int visited(int i) const { return (visits - 1 - i) * Traits::kKeys; }
};

template <class Traits>
__device__ __forceinline__ auto tile_of(int index, const AttentionParams& p) {
  if constexpr (Traits::kPlanned) {
    return PlanTile(index, p.plan, [&](int batch) { return p.real_keys(batch); });
  } else {
    return DenseTile<Traits>(index, p);
  }
}

template <class Traits, class Boxes>
__device__ __forceinline__ void load_boxes(Boxes& to, const CUtensorMap& map, Barrier& full, int s, int h, int b) {
#pragma unroll
  for (int box = 0; box < Traits::kBoxes; ++box) load_box(to[box], map, full, box * Traits::kColumns, s, h, b);
}

// Rows become zeros, by a warp.
template <class Traits, class Boxes, class Which>
__device__ __forceinline__ void clear_rows(Boxes& boxes, Which which) {
  constexpr int kPieces = Traits::kRowBytes / 16;
#pragma unroll 1  // few registers are left to a warp that loads
  for (int box = 0; box < Traits::kBoxes; ++box)
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < Traits::kKeys * kPieces; i += 32)
      if (which(i / kPieces))
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(shared_address(boxes[box]) + 16 * i), "r"(0) : "memory");
}

// A warp, whose first lane speaks to the TMA.
template <class Traits>
__device__ __forceinline__ void produce(AttentionShared<Traits>& shared, const TileMaps& q, const TileMaps& k,
                                        const TileMaps& v, const AttentionParams& p) {
  constexpr int kQueries = Traits::kQueries, kKeys = Traits::kKeys;
  const bool leads = threadIdx.x == 0;
  Place<Traits::kStages> at;
  Place<1> tiles, landed;
  for (int index = blockIdx.x; index < p.tiles; index += gridDim.x, tiles.advance()) {
    const auto tile = tile_of<Traits>(index, p);
    const int head = tile.head / p.group;
    const auto load_keys = [&](auto& to, const TileMaps& maps, Barrier& full, int key) {
      full.arrive_and_expect(sizeof to);
      if constexpr (Traits::kPlanned) {
        load_tile<Traits>(to, maps, full, p.plan.visit, key, 0, head, tile.batch);
      } else {
        load_boxes<Traits>(to, maps.box, full, key, head, tile.batch);
      }
    };
    const auto token = [&](int key, int row) {
      if constexpr (Traits::kPlanned) return tile.key(key, row, p.plan.visit);
      return key + row;
    };
    for (int i = 0; i < tile.visits; ++i, at.advance()) {
      const int key = tile.visited(i);
      const bool hides = p.kv_lens && token(key, kKeys - 1) >= tile.key_end;
      shared.k_empty[at.stage].wait(at.parity ^ 1);
      if (leads) load_keys(shared.k[at.stage], k, shared.k_full[at.stage], key);
      shared.v_empty[at.stage].wait(at.parity ^ 1);
      if (leads) load_keys(shared.v[at.stage], v, hides ? shared.v_landed : shared.v_full[at.stage], key);
      if (i == 0) {
        // After the first keys and values, which need not wait for the results of the tile before to have left.
        shared.q_empty.wait(tiles.parity ^ 1);
        if (leads) {
          shared.q_full.arrive_and_expect(sizeof shared.q);
          for (int c = 0; c < Traits::kConsumers; ++c) {
            if constexpr (Traits::kPlanned) {
              load_tile<Traits>(shared.q[c], q, shared.q_full, p.plan.own, tile.origin, c, tile.head, tile.batch);
            } else {
              load_boxes<Traits>(shared.q[c], q.box, shared.q_full, tile.query + c * kQueries, tile.head, tile.batch);
            }
          }
        }
      }
      if (hides) {  // what kv_lens hides may be no number, of which 0 times is none either
        shared.v_landed.wait(landed.parity);
        landed.advance();
        clear_rows<Traits>(shared.v[at.stage], [&](int row) { return token(key, row) >= tile.key_end; });
        publish_writes();
        __syncwarp();
        if (leads) shared.v_full[at.stage].arrive();
      }
    }
  }
}

// The rows of a tile's queries from `first` on to where their tokens are in out, by a warp group. A box of the TMA would
// end at an edge of the tensor, not at that of a packed clip.
template <class Traits, class Boxes>
__device__ __forceinline__ void copy_rows(const Boxes& from, const PlanTile& tile, int first, const AttentionParams& p) {
  using T = typename Traits::T;
  constexpr int kVec = Vec<T>::kSize, kPieces = Traits::kWidth / kVec;
  static_assert(Traits::kQueries * kPieces % kGroup == 0);
  T* const to = static_cast<T*>(p.plan.out) + (int64_t{tile.batch} * p.Sq * p.H + tile.head) * Traits::kWidth;
#pragma unroll 2
  for (int i = threadIdx.x % kGroup; i < Traits::kQueries * kPieces; i += kGroup) {
    const int row = i / kPieces, column = i % kPieces * kVec, token = tile.token(first + row, p.plan.own);
    if (token < 0) continue;
    const T* place = &from[column / Traits::kColumns][row][column % Traits::kColumns];
    store_vec(to + int64_t{token} * p.H * Traits::kWidth + column,
              load_shared<T>(swizzled<Traits::kRowBytes>(shared_address(place))));
  }
}

template <class Traits>
struct Reached {
  __device__ __forceinline__ Reached(const AttentionParams&, int, int) {}
};
template <class T, int kWidth>
struct Reached<AttentionTraits<T, kWidth, true>> {
  const Reach rows[2];
  __device__ __forceinline__ Reached(const AttentionParams& p, int first, int second)
      : rows{Reach(p.plan, first), Reach(p.plan, second)} {}
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
    const auto tile = tile_of<Traits>(index, p);
    const int row = consumer * kQueries + thread / 32 * 16 + lane / 4;  // and 8 further down
    float out[Traits::kWidth / 2] = {}, scores[kKeys / 2];
    uint32_t weights[kKeys / 4];
    Softmax<kKeys / 2> softmax;
    const auto round_weights = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) weights[i] = pack<typename Traits::T>(scores[2 * i], scores[2 * i + 1]);
    };

    const auto query = [&](int r) {
      if constexpr (Traits::kPlanned) {
        return tile.token(row + 8 * r, p.plan.own);
      } else {
        return tile.query + row + 8 * r < p.Sq ? tile.query + row + 8 * r : -1;
      }
    };
    const Reached<Traits> reach(p, query(0), query(1));

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
    if constexpr (Traits::kPlanned) {
      if (tile.hides(0, p.plan.visit)) tile.mask(scores, tile.visited(0), reach.rows, p.plan);
    } else {
      mask(scores, tile.visited(0), tile.key_end);
    }
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
      if constexpr (Traits::kPlanned) {
        if (tile.hides(i, p.plan.visit)) tile.mask(scores, tile.visited(i), reach.rows, p.plan);
      }
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
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = softmax.sum[r];
      inverse[r] = sum == 0.0f ? 1.0f : 1.0f / sum;  // all scores -inf
      const int token = query(r);
      if (lane % 4 == 0 && token >= 0) {
        p.lse[(int64_t{tile.batch} * p.H + tile.head) * p.Sq + token] = softmax.top[r] * p.scale + __logf(sum);
      }
    }
    multiply_rows(out, inverse);
    store_rows<Traits>(q, out);
    publish_writes();
    sync_threads(1 + consumer, kGroup);
    if constexpr (Traits::kPlanned) {
      copy_rows<Traits>(q, tile, consumer * kQueries, p);
      sync_threads(1 + consumer, kGroup);
      if (thread == 0) shared.q_empty.arrive();
    } else if (thread == 0) {
      for (int box = 0; box < Traits::kBoxes; ++box)
        store_box(out_map, q[box], box * Traits::kColumns, tile.query + consumer * kQueries, tile.head, tile.batch);
      commit_stores();
      wait_for_stores<0>();
      shared.q_empty.arrive();
    }
  }
  if (consumer == 0) turns.wait();  // leaves no arrival behind
}

template <class Traits>
__device__ __forceinline__ void attend(const TileMaps& q, const TileMaps& k, const TileMaps& v, const CUtensorMap& out,
                                       const AttentionParams& p) {
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

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void attention_fwd_kernel(
    const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
    const __grid_constant__ CUtensorMap out, const __grid_constant__ AttentionParams p) {
  attend<Traits>({q, q}, {k, k}, {v, v}, out, p);
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void attention_plan_fwd_kernel(
    const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
    const __grid_constant__ CUtensorMap q_run, const __grid_constant__ CUtensorMap k_run,
    const __grid_constant__ CUtensorMap v_run, const __grid_constant__ AttentionParams p) {
  attend<Traits>({q, q_run}, {k, k_run}, {v, v_run}, q, p);
}

// Of heads [B, S, H, E], for boxes of so many columns of E and rows of S.
CUtensorMap head_map(const char* name, const Tensor& t, int columns, int rows) {
  return box_map<4>(name, t, {3, 1, 2, 0}, {columns, rows, 1, 1});
}

// Of x [B, S, heads, E], heads side by side, what a plan calls boxes: [B, T, H, W, heads * E] from token `start` on; for
// runs T and H are 1.
CUtensorMap tile_map(const char* name, const Tensor& x, int64_t start, const List& size, int columns, const List& box) {
  const int64_t b = x.stride(0), s = x.stride(1), H = size[1], W = size[2];
  return encode_boxes<5>(name, x, start * s, {x.size(2) * x.size(3), W, H, size[0], x.size(0)}, {1, s, W * s, H * W * s, b},
                         {columns, int(box[2]), int(box[1]), int(box[0]), 1});
}

// What the plan of a launch is; its tensors are null for dense attention.
struct Plan {
  const OptionalTensor &heads, &rows, &tiles, &reach;
  const List &own_box, &visit_box, &own_size, &visit_size;
  int64_t own_start, visit_start;
};

BoxShape box_shape(const char* name, const List& box, const List& size, int64_t start) {
  SORA_CHECK(box.size() == 3 && size.size() == 3 && box[0] * box[1] * box[2] == 128, name,
             ": expected three sides, powers of two, of a box of 128 tokens");
  const auto log = [&](int64_t side) { return std::countr_zero(static_cast<uint64_t>(side)); };
  return {log(box[2]), log(box[1]), log(box[0]), int(start), int(size[2]), int(size[1])};
}

template <class Traits>
void launch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, AttentionParams p, const Plan& plan) {
  constexpr int kQueries = Traits::kQueries, kKeys = Traits::kKeys, kColumns = Traits::kColumns;
  constexpr int kBlockQueries = Traits::kConsumers * kQueries, kShared = sizeof(AttentionShared<Traits>);
  p.query_tiles = (p.Sq + kBlockQueries - 1) / kBlockQueries;
  const int64_t tiles = q.size(0) * (Traits::kPlanned ? int64_t{p.plan.owners} * p.plan.chosen : int64_t{p.H} * p.query_tiles);
  SORA_CHECK(tiles <= INT32_MAX, "q: expected at most 2^31 - 1 tiles of ", kBlockQueries, " queries, got ", describe(q));
  p.tiles = static_cast<int>(tiles);

  const int32_t device = q.get_device_index();
  const DeviceGuard guard(device);
  int major = 0, processors = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  SORA_CHECK(major == 9, "expected a GPU of compute capability 9.0, got ", major, ".x");
  const int blocks = std::min(p.tiles, processors);
  const cudaStream_t stream = current_stream(device);
  if constexpr (Traits::kPlanned) {
    List half = plan.own_box;
    for (int64_t& side : half)
      if (side > 1) {
        side /= 2;
        break;
      }
    const auto boxes = [&](const char* name, const Tensor& x, int64_t start, const List& size, const List& box) {
      return tile_map(name, x, start, size, kColumns, box);
    };
    const auto runs = [&](const char* name, const Tensor& x, int rows) {
      return tile_map(name, x, 0, {1, 1, x.size(1)}, kColumns, {1, 1, rows});
    };
    const auto kernel = attention_plan_fwd_kernel<Traits>;
    SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    kernel<<<blocks, Traits::kThreads, kShared, stream>>>(
        boxes("q", q, plan.own_start, plan.own_size, half), boxes("k", k, plan.visit_start, plan.visit_size, plan.visit_box),
        boxes("v", v, plan.visit_start, plan.visit_size, plan.visit_box), runs("q", q, kQueries), runs("k", k, kKeys),
        runs("v", v, kKeys), p);
  } else {
    const auto kernel = attention_fwd_kernel<Traits>;
    SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    kernel<<<blocks, Traits::kThreads, kShared, stream>>>(
        head_map("q", q, kColumns, kQueries), head_map("k", k, kColumns, kKeys), head_map("v", v, kColumns, kKeys),
        head_map("out", out, kColumns, kQueries), p);
  }
  SORA_CUDA_CHECK(cudaGetLastError());
}

template <class T, bool kPlanned>
void launch_width(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const AttentionParams& p,
                  const Plan& plan) {
  switch (q.size(3)) {
    case 64: return launch<AttentionTraits<T, 64, kPlanned>>(q, k, v, out, p, plan);
    case 96: return launch<AttentionTraits<T, 96, kPlanned>>(q, k, v, out, p, plan);
    default: return launch<AttentionTraits<T, 128, kPlanned>>(q, k, v, out, p, plan);
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

const int* table(const char* name, const OptionalTensor& t, const Tensor& q) {
  if (!t) return nullptr;
  SORA_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous() && t->get_device_index() == q.get_device_index(), name,
             ": expected a contiguous int32 table on the device of q, got ", describe(*t));
  return static_cast<const int*>(t->data_ptr());
}

PlanParams plan_params(const Plan& plan, const Tensor& q, const Tensor& k, const Tensor& out) {
  const int64_t Sq = q.size(1), E = q.size(3);
  SORA_CHECK(plan.rows && plan.tiles && plan.reach, "rows, tiles, reach: expected all tables of a plan");
  SORA_CHECK(plan.rows->dim() == 2 && plan.rows->size(1) == kPlanColumns && plan.reach->dim() == 2 &&
                 plan.reach->size(0) == 7 && plan.reach->size(1) == Sq,
             "rows, reach: expected (owners, ", kPlanColumns, ") and (7, ", Sq, "), got ", describe(*plan.rows), " and ",
             describe(*plan.reach));
  for (const Tensor* x : {&q, &k})
    SORA_CHECK(x->size(2) == 1 || x->stride(2) == E, "q, k, v: expected heads side by side, got ", describe(*x));
  PlanParams p{.rows = table("rows", plan.rows, q), .tiles = table("tiles", plan.tiles, q),
               .reach = table("reach", plan.reach, q), .heads = table("heads", plan.heads, q), .out = out.data_ptr()};
  p.owners = static_cast<int>(plan.rows->size(0)), p.Sq = static_cast<int>(Sq);
  p.chosen = static_cast<int>(plan.heads ? plan.heads->numel() : q.size(2));
  p.own = box_shape("own_box", plan.own_box, plan.own_size, plan.own_start);
  p.visit = box_shape("visit_box", plan.visit_box, plan.visit_size, plan.visit_start);
  const int periods[3] = {p.visit.w, p.visit.w + p.visit.h, 7};
  for (int i = 0; i < 3; ++i)  // of 2^n keys, of which a thread has a quarter
    p.repeat[i] = periods[i] < 3   ? 0xffu / ((1u << (1 << periods[i])) - 1)
                  : periods[i] < 7 ? 0xffffffffu / ((1u << (1 << (periods[i] - 2))) - 1)
                                   : 1;
  return p;
}

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& kv_lens,
                   const OptionalTensor& heads, const OptionalTensor& rows, const OptionalTensor& tiles,
                   const OptionalTensor& reach, List own_box, List visit_box, List own_size, List visit_size,
                   int64_t own_start, int64_t visit_start, double scale, const Tensor& out, const Tensor& lse) {
  SORA_CHECK(q.dim() == 4 && k.dim() == 4, "q, k: expected (B, S, H, E), got ", describe(q), " and ", describe(k));
  const int64_t Sq = q.size(1), Sk = k.size(1), H = q.size(2), Hk = k.size(2), E = q.size(3);
  SORA_CHECK(q.is_cuda() && (E == 64 || E == 96 || E == 128) && q.scalar_type() != ScalarType::Float,
             "q: expected bfloat16 or float16 heads of 64, 96 or 128 on a GPU, got ", describe(q));
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
  const Plan plan{heads, rows, tiles, reach, own_box, visit_box, own_size, visit_size, own_start, visit_start};
  const bool half = q.scalar_type() == ScalarType::Half;
  if (rows) {
    SORA_CHECK(v.size(2) == 1 || v.stride(2) == E, "v: expected heads side by side, got ", describe(v));
    SORA_CHECK(out.is_contiguous(), "out: expected a contiguous tensor, got ", describe(out));
    p.plan = plan_params(plan, q, k, out);
    half ? launch_width<__half, true>(q, k, v, out, p, plan) : launch_width<__nv_bfloat16, true>(q, k, v, out, p, plan);
  } else {
    half ? launch_width<__half, false>(q, k, v, out, p, plan) : launch_width<__nv_bfloat16, false>(q, k, v, out, p, plan);
  }
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_spacetime_attention_fwd_cuda_launch", TORCH_BOX(&sora::attention_fwd));
}
