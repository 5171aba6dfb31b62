// The kernels of spacetime_attention's backward, for sm_90a. With base = lse log2(e) and delta = sum(dout out) - dlse of a
// query:
//
//   p = exp2(scale log2(e) q k^T - base),   ds = p (dout v^T - delta)
//   dq = scale ds k,   dk = scale ds^T q,   dv = p^T dout
//
// Two kernels in place of one, and seven products in place of five: a block owns 128 queries and visits the keys they see,
// or owns 128 keys and visits the queries that see them, of all heads that share them. So each gradient is summed by one
// block in one order, without atomics. x are the tokens of the scores (queries, keys), y those of their slopes (dout,
// values). Of a warp group one warp brings boxes by the TMA, visited ones into rings of buffers; two more warp groups own
// 64 tokens each. Of keys the scores are computed transposed: weights and ds are then in registers as the left operands of
// the products for dv and dk. Which tiles meet, dense or by a plan, is as in the forward (attention_plan.cuh).

#pragma once

#include "common/barrier.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"
#include "cuda/attention.cuh"
#include "cuda/attention_plan.cuh"

#include <climits>
#include <cmath>
#include <type_traits>

namespace sora {
namespace {

constexpr int visited_tokens(int width, bool of_keys, bool planned) { return planned || (of_keys && width > 64) ? 64 : 96; }

template <class T_, int kWidth_, bool kOfKeys_, bool kPlanned_>
struct BackwardTraits {
  using T = T_;
  static constexpr int kWidth = kWidth_;                  // of a head
  static constexpr bool kOfKeys = kOfKeys_;               // gradients of keys and values, or of queries
  static constexpr bool kPlanned = kPlanned_;
  static constexpr bool kGathers = kOfKeys && kPlanned;   // numbers of visited queries, which lie anywhere
  static constexpr int kConsumers = 2, kOwn = 64;         // warp groups that multiply, and the tokens that each owns
  static constexpr int kVisited = visited_tokens(kWidth, kOfKeys, kPlanned), kStages = 3;  // of a tile, and tiles in a ring
  static constexpr int kKeys = kVisited;                  // as the forward's products call them
  static constexpr int kColumns = kWidth % 64 ? 32 : 64;  // of a box: its rows are as wide as a swizzle
  static constexpr int kBoxes = kWidth / kColumns;        // side by side: a tile
  static constexpr int kRowBytes = kColumns * sizeof(T);
  static constexpr int kThreads = (kConsumers + 1) * kGroup;
  static constexpr bool kFinds = kPlanned && !kOfKeys;  // who loads also finds hidden keys of boxes: more registers
  static constexpr int kProducerRegisters = kFinds ? 40 : 24, kConsumerRegisters = kFinds ? 232 : 240;

  static_assert(sizeof(T) == 2, "wgmma of 16-bit floats");
  static_assert(kOwn == 64, "the rows of a wgmma");
  static_assert(kWidth % kColumns == 0 && kColumns % 16 == 0, "a product takes 16 columns of one box");
  static_assert(kKeys % 16 == 0 && kKeys <= 256, "they are the depth of a product, and the rows of a box");
  static_assert(kOwn * kRowBytes % 1024 == 0 && kVisited * kRowBytes % 1024 == 0, "boxes begin where a swizzle does");
  static_assert((kOfKeys + 1) * kWidth / 2 + kVisited * 5 / 4 + 24 <= kConsumerRegisters,
                "sums, scores, slopes and one of them rounded are in registers");
  static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kGroup <= 65536, "the register file");
  static_assert(!kGathers || kVisited <= kGroup - 32, "a lane beside the warp that loads has a visited query");
};

struct BackwardParams {
  const float *base, *delta;  // [B, H, padded]
  Lengths lengths;
  void *dx, *dy;  // null: not wanted; over a plan dense
  int padded, Sq, Sk, H;
  int group, shares;  // query heads whose gradients a key head sums, and those that give it shares of their own
  int wide;           // those shares: dx and dy are [B, Sk, H, E] in fp32
  int own_tiles, own_heads;  // dense
  float scale, scale_log2;
  PlanParams plan;
};

struct BackwardMaps {
  TileMaps own_x, own_y, x, y;
};

// 128 tokens that see all tokens of the other side, from the last tile of them to the first.
template <class Traits>
struct DenseOwn {
  int first, head, batch, key_end, visits;

  __device__ __forceinline__ explicit DenseOwn(const BackwardParams& p)
      : first(blockIdx.x % p.own_tiles * (Traits::kConsumers * Traits::kOwn)),
        head(blockIdx.x / p.own_tiles % p.own_heads),
        batch(blockIdx.x / p.own_tiles / p.own_heads),
        key_end(p.lengths.real(batch, p.Sk)),
        visits(((Traits::kOfKeys ? first < key_end ? p.Sq : 0 : key_end) + Traits::kVisited - 1) / Traits::kVisited) {}

  __device__ __forceinline__ int token(int j, const BackwardParams& p) const {
    return first + j < (Traits::kOfKeys ? p.Sk : p.Sq) ? first + j : -1;
  }
  __device__ __forceinline__ int visited(int i) const { return (visits - 1 - i) * Traits::kVisited; }
  __device__ __forceinline__ int visited_token(int tile, int j, const BackwardParams&) const { return tile + j; }
};

template <class Traits>
struct PlanOwn : PlanTile {
  __device__ __forceinline__ explicit PlanOwn(const BackwardParams& p)
      : PlanTile(blockIdx.x, p.plan, [&](int batch) { return Traits::kOfKeys ? p.Sq : p.lengths.real(batch, p.Sk); }) {
    if (Traits::kOfKeys && (origin < 0 ? ~origin : origin) >= p.lengths.real(batch, p.Sk)) visits = 0;
  }

  __device__ __forceinline__ int token(int j, const BackwardParams& p) const { return PlanTile::token(j, p.plan.own); }
  __device__ __forceinline__ int visited_token(int tile, int j, const BackwardParams& p) const {
    return key(tile, j, p.plan.visit);
  }
};

template <class Traits>
using Own = std::conditional_t<Traits::kPlanned, PlanOwn<Traits>, DenseOwn<Traits>>;

template <class Traits>
struct alignas(1024) BackwardShared {
  using T = typename Traits::T;
  using OwnBoxes = T[Traits::kBoxes][Traits::kOwn][Traits::kColumns];
  using VisitedBoxes = T[Traits::kBoxes][Traits::kVisited][Traits::kColumns];

  OwnBoxes own_x[Traits::kConsumers], own_y[Traits::kConsumers];  // and, at the end, their gradients
  VisitedBoxes x[Traits::kStages], y[Traits::kStages];
  alignas(128) float base[Traits::kStages][Traits::kVisited], delta[Traits::kStages][Traits::kVisited];  // of queries
  Own<Traits> own;  // here, for registers are few
  Barrier own_full, x_full[Traits::kStages], y_full[Traits::kStages], empty[Traits::kStages], landed;
};

template <int N>
__device__ __forceinline__ void load_line(float (&to)[N], const float* from, Barrier& full) {
  static_assert(sizeof to % 16 == 0);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(uint32_t{sizeof to}), "r"(shared_address(&full))
               : "memory");
}

// A warp, whose first lane speaks to the TMA.
template <class Traits>
__device__ __forceinline__ void produce(BackwardShared<Traits>& shared, const BackwardMaps& maps, const BackwardParams& p) {
  constexpr bool kOfKeys = Traits::kOfKeys, kPlanned = Traits::kPlanned;
  constexpr uint32_t kLine = kOfKeys && !kPlanned ? sizeof shared.base[0] : 0;
  const auto& own = shared.own;
  const bool leads = threadIdx.x == 0;
  if (leads) {
    const auto load = [&](auto& to, const TileMaps& from, int c) {
      if constexpr (kPlanned) {
        const int head = kOfKeys ? own.head / p.shares : own.head;
        load_tile<Traits>(to[c], from, shared.own_full, p.plan.own, own.origin, c, head, own.batch);
      } else {
        load_boxes<Traits>(to[c], from.box, shared.own_full, own.first + c * Traits::kOwn, own.head, own.batch);
      }
    };
    shared.own_full.arrive_and_expect(sizeof shared.own_x + sizeof shared.own_y);
    for (int c = 0; c < Traits::kConsumers; ++c) load(shared.own_x, maps.own_x, c), load(shared.own_y, maps.own_y, c);
  }

  const int heads = kOfKeys ? p.group : 1, first_head = kOfKeys ? own.head * p.group : own.head / p.group;
  Place<Traits::kStages> at;
  Place<1> landed;
  for (int head = first_head; head < first_head + heads; ++head) {
    for (int i = 0; i < own.visits; ++i, at.advance()) {
      const int tile = own.visited(i);
      const bool hides = !kOfKeys && p.lengths.of && own.visited_token(tile, Traits::kVisited - 1, p) >= own.key_end;
      auto &x = shared.x[at.stage], &y = shared.y[at.stage];
      Barrier &x_full = shared.x_full[at.stage], &y_full = shared.y_full[at.stage];
      const auto load = [&](auto& to, const TileMaps& from, Barrier& full, [[maybe_unused]] auto& numbers,
                            [[maybe_unused]] const float* line) {
        full.arrive_and_expect(sizeof to + kLine);
        if constexpr (kPlanned) {
          load_tile<Traits>(to, from, full, p.plan.visit, tile, 0, head, own.batch);
        } else {
          load_boxes<Traits>(to, from.box, full, tile, head, own.batch);
          if (kOfKeys) load_line(numbers, line + (int64_t{own.batch} * p.H + head) * p.padded + tile, full);
        }
      };
      shared.empty[at.stage].wait(at.parity ^ 1);
      if (leads) {
        load(x, maps.x, hides ? shared.landed : x_full, shared.base[at.stage], p.base);
        load(y, maps.y, hides ? shared.landed : y_full, shared.delta[at.stage], p.delta);
      }
      if (hides) {  // what kv_lens hides may be no number, of which 0 times is none either
        shared.landed.wait(landed.parity);
        landed.advance();
        const auto hidden = [&](int row) { return own.visited_token(tile, row, p) >= own.key_end; };
        clear_rows<Traits>(x, hidden), clear_rows<Traits>(y, hidden);
        publish_writes();
        __syncwarp();
        if (leads) x_full.arrive(), y_full.arrive();
      }
    }
  }
}

// A lane for each query of a visited tile brings its base and delta.
template <class Traits>
__device__ __forceinline__ void gather(BackwardShared<Traits>& shared, int lane, const BackwardParams& p) {
  const auto& own = shared.own;
  Place<Traits::kStages> at;
  for (int head = own.head * p.group; head < (own.head + 1) * p.group; ++head) {
    const int64_t line = (int64_t{own.batch} * p.H + head) * p.padded;
    for (int i = 0; i < own.visits; ++i, at.advance()) {
      const int query = own.visited_token(own.visited(i), lane, p);
      const bool real = query < p.Sq;
      const float base = real ? p.base[line + query] : INFINITY, delta = real ? p.delta[line + query] : 0.0f;
      shared.empty[at.stage].wait(at.parity ^ 1);
      shared.base[at.stage][lane] = base, shared.delta[at.stage][lane] = delta;
      __syncwarp();
      if (lane % 32 == 0) shared.x_full[at.stage].arrive();
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

// Two rows of sums, as they are, to their tokens in [B, Sk, H, E].
template <class Traits, int N>
__device__ __forceinline__ void store_wide(void* to, const float (&sums)[N], const int (&tokens)[2], const PlanTile& own,
                                           const BackwardParams& p) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (tokens[r] < 0) continue;
    float* const row = static_cast<float*>(to) + ((int64_t{own.batch} * p.Sk + tokens[r]) * p.H + own.head) * Traits::kWidth;
#pragma unroll
    for (int i = 2 * r; i < N; i += 4)
      *reinterpret_cast<float2*>(row + 2 * i - 4 * r + threadIdx.x % 4 * 2) = float2{sums[i], sums[i + 1]};
  }
}

template <class Traits>
__device__ __forceinline__ void consume(BackwardShared<Traits>& shared, const CUtensorMap& dx, const CUtensorMap& dy,
                                        const BackwardParams& p) {
  using T = typename Traits::T;
  using Exp = Softmax<Traits::kVisited / 2>;
  constexpr bool kOfKeys = Traits::kOfKeys, kPlanned = Traits::kPlanned;
  constexpr int kVisited = Traits::kVisited;
  const int consumer = threadIdx.x / kGroup - 1, thread = threadIdx.x % kGroup, lane = thread % 32;
  const auto& own = shared.own;
  const int row = consumer * Traits::kOwn + thread / 32 * 16 + lane / 4;  // and 8 further down
  const int tokens[2] = {own.token(row, p), own.token(row + 8, p)}, rounds = own.visits * (kOfKeys ? p.group : 1);
  auto &own_x = shared.own_x[consumer], &own_y = shared.own_y[consumer];
  float sum_x[Traits::kWidth / 2] = {}, sum_y[Traits::kWidth / 2] = {}, scores[kVisited / 2], slopes[kVisited / 2];
  uint32_t weights[kVisited / 4], weighted[kVisited / 4];

  float base[2] = {INFINITY, INFINITY}, delta[2] = {};
  if (!kOfKeys) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t at = (int64_t{own.batch} * p.H + own.head) * p.padded + tokens[r];
      if (tokens[r] >= 0) base[r] = p.base[at], delta[r] = p.delta[at];
    }
  }

  shared.own_full.wait(0);
  Place<Traits::kStages> at;
  uint32_t before = 0;  // the stage of the round before
  for (int round = 0, visit = 0; round < rounds; ++round, before = at.stage, at.advance()) {
    [[maybe_unused]] bool hides;
    [[maybe_unused]] uint32_t see[2][kVisited / 32];
    if constexpr (kPlanned) {  // before there are scores, whose registers it needs
      hides = own.hides(visit, p.plan.visit);
      if (hides) own.see(see, own.visited(visit), Reach(p.plan, tokens), p.plan);
      visit = visit + 1 < own.visits ? visit + 1 : 0;
    }
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
    if constexpr (kPlanned) {
      if (hides) mask(scores, see);
    } else if (!kOfKeys && round == 0) {  // of no key the score is 0, and its weight may be infinite
      mask(scores, own.visited(0), own.key_end);
    }
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
  const int real = kOfKeys ? p.lengths.real(own.batch, p.Sk) : INT_MAX;  // what kv_lens hides has gradients of 0
#pragma unroll
  for (int i = 0; i < Traits::kWidth / 2; ++i) {
    const bool hidden = tokens[i / 2 % 2] >= real;
    sum_x[i] = hidden ? 0.0f : sum_x[i] * p.scale;
    if (hidden) sum_y[i] = 0.0f;
  }
  if constexpr (kOfKeys && kPlanned) {
    if (p.wide) {
      if (p.dx) store_wide<Traits>(p.dx, sum_x, tokens, own, p);
      if (p.dy) store_wide<Traits>(p.dy, sum_y, tokens, own, p);
      return;
    }
  }
  store_rows<Traits>(own_x, sum_x);
  if constexpr (kOfKeys) store_rows<Traits>(own_y, sum_y);
  if constexpr (!kPlanned) publish_writes();
  sync_threads(1 + consumer, kGroup);
  if constexpr (kPlanned) {
    const int first = consumer * Traits::kOwn, heads = kOfKeys ? p.H / p.group : p.H;
    if (p.dx) copy_rows<Traits>(p.dx, own_x, own, first, p.plan, heads);
    if (kOfKeys && p.dy) copy_rows<Traits>(p.dy, own_y, own, first, p.plan, heads);
  } else if (thread == 0) {
    const int first = own.first + consumer * Traits::kOwn;
    for (int box = 0; box < Traits::kBoxes; ++box) {
      const int column = box * Traits::kColumns;
      if (p.dx) store_box(dx, own_x[box], column, first, own.head, own.batch);
      if (kOfKeys && p.dy) store_box(dy, own_y[box], column, first, own.head, own.batch);
    }
    commit_stores();
    wait_for_stores<0>();
  }
}

template <class Traits>
__device__ __forceinline__ void differentiate(const BackwardMaps& maps, const CUtensorMap& dx, const CUtensorMap& dy,
                                              const BackwardParams& p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<Traits>*>(memory);
  constexpr int kGatherers = Traits::kGathers ? Traits::kVisited : 0;
  if (threadIdx.x == 0) {
    shared.own = Own<Traits>(p);
    shared.own_full.init(1), shared.landed.init(2);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      shared.x_full[stage].init(1 + kGatherers / 32), shared.y_full[stage].init(1);
      shared.empty[stage].init(Traits::kConsumers * 4);  // warps
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    give_registers<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) {
      produce<Traits>(shared, maps, p);
    } else if (const int lane = threadIdx.x - 32; lane < kGatherers) {
      gather<Traits>(shared, lane, p);
    }
  } else {
    take_registers<Traits::kConsumerRegisters>();
    consume<Traits>(shared, dx, dy, p);
  }
#endif
}

}  // namespace
}  // namespace sora
