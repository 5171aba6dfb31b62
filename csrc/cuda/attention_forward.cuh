// The kernel of spacetime_attention's forward, for sm_90a:
//
//   out = softmax(scale * q k^T) v,   lse = ln sum exp(scale * q k^T)
//
// Dense, or over the tiles of keys that a plan lists for a tile of queries (attention_plan.cuh), with kv_lens or without.
// A block works off tiles of 128 queries of a head. One warp of a warp group brings queries, keys and values into
// shared memory as boxes by the TMA; two more warp groups, with 64 queries each, multiply in turns and keep the softmax's
// running maximum and sum. Keys and values go through rings of buffers, each with two barriers: full and empty.

#pragma once

#include "common/barrier.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "cuda/attention.cuh"
#include "cuda/attention_plan.cuh"

#include <cmath>

namespace sora {
namespace {

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
  float* lse;       // [B, H, Sq]
  void* out;        // [B, Sq, H, E], dense, over a plan
  Lengths lengths;
  int Sq, Sk, H, group;  // group: query heads that share a key head
  int query_tiles, tiles;
  float scale, scale_log2;
  PlanParams plan;
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
        key_end(p.lengths.real(batch, p.Sk)),
        visits(max(1, (key_end + Traits::kKeys - 1) / Traits::kKeys)) {}  // of no key one, hidden, for its zeros

  __device__ __forceinline__ int visited(int i) const { return (visits - 1 - i) * Traits::kKeys; }
};

template <class Traits>
__device__ __forceinline__ auto tile_of(int index, const AttentionParams& p) {
  if constexpr (Traits::kPlanned) {
    return PlanTile(index, p.plan, [&](int batch) { return p.lengths.real(batch, p.Sk); });
  } else {
    return DenseTile<Traits>(index, p);
  }
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
      const bool hides = p.lengths.of && token(key, kKeys - 1) >= tile.key_end;
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

// Scores of the i-th tile that is visited, of keys that a query does not see.
template <int N>
__device__ __forceinline__ void hide(float (&scores)[N], int i, const PlanTile& tile, const int (&queries)[2],
                                     const PlanParams& p) {
  if (!tile.hides(i, p.visit)) return;
  uint32_t see[2][N / 16];
  tile.see(see, tile.visited(i), Reach(p, queries), p);
  mask(scores, see);
}

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
    const int queries[2] = {query(0), query(1)};

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
      hide(scores, 0, tile, queries, p.plan);
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
        hide(scores, i, tile, queries, p.plan);
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
      const int token = queries[r];
      if (lane % 4 == 0 && token >= 0) {
        p.lse[(int64_t{tile.batch} * p.H + tile.head) * p.Sq + token] = softmax.top[r] * p.scale + __logf(sum);
      }
    }
    multiply_rows(out, inverse);
    store_rows<Traits>(q, out);
    publish_writes();
    sync_threads(1 + consumer, kGroup);
    if constexpr (Traits::kPlanned) {
      copy_rows<Traits>(p.out, q, tile, consumer * kQueries, p.plan, p.H);
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

}  // namespace
}  // namespace sora
