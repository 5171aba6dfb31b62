// A plan of spacetime attention (sora_kernels/attention/plan.py) as its kernel reads it: which tiles of keys a tile of
// queries visits, and by coordinates which keys of a tile a query sees.
//
// A tile has 128 tokens, or 64: a box of the video, whose sides are powers of two, or a run of consecutive tokens, whose
// origin is ~its first token. The TMA brings both; beyond an edge of the frame a box is zero.
//
// In the backward keys own tiles too and visit queries: read queries for keys and keys for queries below.

#pragma once

#include "common/barrier.cuh"
#include "common/check.h"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "cuda/attention.cuh"

#include <bit>
#include <cstdint>
#include <vector>

namespace sora {

constexpr int kPlanColumns = 11;  // of AttentionPlan.rows

// The boxes of one side, queries or keys.
struct BoxShape {
  int w, h, t;      // sides: 2^w, 2^h, 2^t
  int start, W, H;  // the first token of the video that the descriptor shows, and its lines and frames

  __device__ __forceinline__ int last() const { return (1 << w + h + t) - 1; }  // of the tokens of a tile
};

struct PlanParams {
  const int *rows, *tiles, *reach, *heads;  // heads: those that this launch works on; null: all
  int owners, chosen, own_len;              // chosen: how many heads; own_len: tokens of the owners' side
  BoxShape own, visit;
  uint32_t repeat[3];  // along w, h, t of visited boxes, see `places`
};

// The descriptors of a tensor [B, S, heads * E] for boxes, by e, w, h, t, b, and for runs, by e, s, 0, 0, b.
struct TileMaps {
  const CUtensorMap &box, &run;
};

struct Spot {
  int t, h, w;
};

// Where token `at` of a video stands, whose lines have W and frames H lines.
__device__ __forceinline__ Spot spot(int at, int W, int H) {
  const uint32_t line = static_cast<uint32_t>(at) / static_cast<uint32_t>(W), t = line / static_cast<uint32_t>(H);
  return {static_cast<int>(t), static_cast<int>(line) - static_cast<int>(t) * H, at - static_cast<int>(line) * W};
}

// What two queries see along one axis of the video, that of the lane: lanes 0, 1 and 2 of four have w, h and t.
struct Reach {
  int lo[2], hi[2], kept[2];  // an interval, and the first `kept` tokens of the clip

  __device__ __forceinline__ Reach(const PlanParams& p, const int (&tokens)[2]) {
    const int axis = 4 - 2 * min(threadIdx.x % 4, 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int* from = p.reach + max(tokens[r], 0);
      const auto row = [&](int i) { return tokens[r] < 0 ? 0 : __ldg(from + int64_t{i} * p.own_len); };
      lo[r] = row(axis), hi[r] = row(axis + 1), kept[r] = row(6);
    }
  }
};

__device__ __forceinline__ uint32_t low_bits(int n) {
  uint32_t bit;
  asm("shl.b32 %0, %1, %2;" : "=r"(bit) : "r"(1), "r"(n));  // of 32 it gives 0, which C++ leaves open
  return bit - 1;
}

// Of keys 32 word to 32 word + 31 of a tile those with first <= j / 2^below % 2^side < last, as bits. `repeat` has a one in
// every bit where the pattern begins again.
__device__ __forceinline__ uint32_t places(int first, int last, int side, int below, uint32_t repeat, int word) {
  const int at = 32 * word & (1 << side + below) - 1;
  const int from = (min(max(first, 0), 1 << side) << below) - at, to = (min(max(last, 0), 1 << side) << below) - at;
  return (low_bits(min(max(to, 0), 32)) & ~low_bits(min(max(from, 0), 32))) * repeat;
}

struct PlanTile {
  int head, batch, key_end;
  int visits, masked;                              // of the visits the first `masked` ask coordinates
  int origin, own_start, own_end;                  // of the queries, and the tokens of their clip, or run
  int start, visit_end, stop, H, W;                // of the clip on the side of the keys; no run goes beyond stop
  const int* last;                                 // of the tiles it visits; null: none

  // real: of the batch's entry, how many keys there are.
  template <class Real>
  __device__ __forceinline__ PlanTile(int index, const PlanParams& p, Real real) {
    head = index / p.owners % p.chosen, batch = index / p.owners / p.chosen;
    if (p.heads) head = __ldg(p.heads + head);
    key_end = real(batch);
    const int* row = p.rows + int64_t{index % p.owners} * kPlanColumns;
    const int begin = __ldg(row), from = __ldg(row + 1), end = __ldg(row + 2);
    origin = __ldg(row + 3), own_start = __ldg(row + 4), own_end = __ldg(row + 5), start = __ldg(row + 6);
    visit_end = __ldg(row + 7), stop = __ldg(row + 8), H = __ldg(row + 9), W = __ldg(row + 10);
    visits = max(end - begin, 1);  // who sees nothing visits one tile, hidden, for its zeros
    masked = end == begin ? 1 : end - from;
    last = end == begin ? nullptr : p.tiles + end - 1;
  }

  __device__ __forceinline__ int visited(int i) const { return last ? __ldg(last - i) : start; }

  // Whether some query may not see some key of a tile. "Seen whole" was promised for keys that are all real.
  __device__ __forceinline__ bool hides(int i, const BoxShape& box) const {
    return i < masked || key_end < visit_end && key(visited(i), box.last(), box) >= key_end;
  }

  // Of the j-th query its token; -1 where there is none.
  __device__ __forceinline__ int token(int j, const BoxShape& box) const {
    if (origin < 0) return ~origin + j < own_end ? ~origin + j : -1;
    const Spot at = spot(origin - own_start, W, H);
    const int w = at.w + (j & (1 << box.w) - 1), h = at.h + (j >> box.w & (1 << box.h) - 1);
    const int found = own_start + ((at.t + (j >> box.w + box.h)) * H + h) * W + w;
    return w < W && h < H && found < own_end ? found : -1;
  }

  // The token of key j of a visited tile, beyond the edges of a frame that of a line or frame further on.
  __device__ __forceinline__ int key(int tile, int j, const BoxShape& box) const {
    if (tile < 0) return ~tile + j;
    return tile + ((j >> box.w + box.h) * H + (j >> box.w & (1 << box.h) - 1)) * W + (j & (1 << box.w) - 1);
  }

  // Of the keys of a word those that are real.
  __device__ __forceinline__ uint32_t real(int tile, const PlanParams& p, int word) const {
    const BoxShape& box = p.visit;
    if (tile < 0) return places(0, key_end - ~tile, 7, 0, 1, word);
    if (key_end <= start) return 0;
    const Spot end = spot(key_end - start, W, H), at = spot(tile - start, W, H);
    const int w = end.w - at.w, h = end.h - at.h, t = end.t - at.t;
    const auto along_w = [&](int from, int to) { return places(from, to, box.w, 0, p.repeat[0], word); };
    const auto along_h = [&](int from, int to) { return places(from, to, box.h, box.w, p.repeat[1], word); };
    const auto along_t = [&](int from, int to) { return places(from, to, box.t, box.w + box.h, p.repeat[2], word); };
    return along_t(0, t) | along_t(t, t + 1) & (along_h(0, h) | along_h(h, h + 1) & along_w(0, w));
  }

  // Of two queries, the same for four lanes, the keys that each sees.
  template <int kWords>
  __device__ __forceinline__ void see(uint32_t (&bits)[2][kWords], int tile, const Reach& reach, const PlanParams& p) const {
    const BoxShape& box = p.visit;
    if (tile < 0) {
      const int first = ~tile, end = first < start ? start : stop;  // text before the video ends with it
#pragma unroll
      for (int i = 0; i < 2 * kWords; ++i) {
        // Text after the video is before all frames.
        const int last = first >= visit_end ? end : min(end, start + reach.kept[i / kWords]);
        bits[i / kWords][i % kWords] = places(0, last - first, 7, 0, 1, i % kWords);
      }
    } else {
      const Spot first = spot(tile - start, W, H);
      const int axis = threadIdx.x % 4;
      const int at = axis == 0 ? first.w : axis == 1 ? first.h : first.t;
      const int side = axis == 0 ? box.w : axis == 1 ? box.h : box.t;
      const int below = axis == 0 ? 0 : axis == 1 ? box.w : box.w + box.h;
      const uint32_t repeat = axis == 0 ? p.repeat[0] : axis == 1 ? p.repeat[1] : p.repeat[2];
#pragma unroll
      for (int i = 0; i < 2 * kWords; ++i) {
        const int r = i / kWords;
        uint32_t found = places(reach.lo[r] - at, reach.hi[r] - at, side, below, repeat, i % kWords);
        found &= __shfl_xor_sync(0xffffffffu, found, 1);
        bits[r][i % kWords] = found & __shfl_xor_sync(0xffffffffu, found, 2);
      }
    }
    if (key(tile, box.last(), box) >= key_end) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const uint32_t real_keys = real(tile, p, word);
        bits[0][word] &= real_keys, bits[1][word] &= real_keys;
      }
    }
  }
};

// Scores of keys that a query does not see.
template <int N, int kWords>
__device__ __forceinline__ void mask(float (&scores)[N], const uint32_t (&see)[2][kWords]) {
  static_assert(N == 16 * kWords);
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    uint32_t own[2];  // the bits of a thread's keys
#pragma unroll
    for (int r = 0; r < 2; ++r) own[r] = see[r][word] >> threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (!(own[i / 2 % 2] & 1u << i / 4 * 8 + i % 2)) scores[16 * word + i] = -INFINITY;
  }
}

// Tile `origin` of a side; of queries the first or the second half.
template <class Traits, class To>
__device__ __forceinline__ void load_tile(To& to, const TileMaps& maps, Barrier& full, const BoxShape& box, int origin,
                                          int half, int head, int batch) {
  int at[5] = {head * Traits::kWidth, 0, 0, 0, batch};
  if (origin < 0) {
    at[1] = ~origin + 64 * half;
  } else {
    const Spot first = spot(origin - box.start, box.W, box.H);
    at[1] = first.w, at[2] = first.h, at[3] = first.t;
    if (half) {  // of the first axis that is longer than 1, so that rows keep their order
      at[3] += (1 << box.t) / 2, at[2] += box.t ? 0 : (1 << box.h) / 2, at[1] += box.t || box.h ? 0 : 64;
    }
  }
#pragma unroll
  for (int i = 0; i < Traits::kBoxes; ++i, at[0] += Traits::kColumns) load_box(to[i], origin < 0 ? maps.run : maps.box, full, at);
}

// The rows of an owner's tile from `first` on to where their tokens are in [B, own_len, heads, E], by a warp group. A box of
// the TMA would end at an edge of the tensor, not at that of a packed clip.
template <class Traits, class Boxes>
__device__ __forceinline__ void copy_rows(void* to, const Boxes& from, const PlanTile& tile, int first, const PlanParams& p,
                                          int heads) {
  using T = typename Traits::T;
  constexpr int kRows = 64, kVec = Vec<T>::kSize, kPieces = Traits::kWidth / kVec;
  static_assert(sizeof from == sizeof(T) * kRows * Traits::kWidth && kRows * kPieces % kGroup == 0);
  T* const rows = static_cast<T*>(to) + (int64_t{tile.batch} * p.own_len * heads + tile.head) * Traits::kWidth;
#pragma unroll 2
  for (int i = threadIdx.x % kGroup; i < kRows * kPieces; i += kGroup) {
    const int row = i / kPieces, column = i % kPieces * kVec, token = tile.token(first + row, p.own);
    if (token < 0) continue;
    const T* place = &from[column / Traits::kColumns][row][column % Traits::kColumns];
    store_vec(rows + int64_t{token} * heads * Traits::kWidth + column,
              load_shared<T>(swizzled<Traits::kRowBytes>(shared_address(place))));
  }
}

// What a launch over a plan is given; its tensors are null for dense attention.
struct Plan {
  using Sides = std::vector<int64_t>;

  const OptionalTensor &heads, &rows, &tiles, &reach;
  const Sides &own_box, &visit_box, &own_size, &visit_size;
  int64_t own_start, visit_start;
};

inline BoxShape box_shape(const char* name, const Plan::Sides& box, const Plan::Sides& size, int64_t start, int tokens) {
  SORA_CHECK(box.size() == 3 && size.size() == 3 && box[0] * box[1] * box[2] == tokens, name,
             ": expected three sides, powers of two, of a box of ", tokens, " tokens");
  const auto log = [&](int64_t side) { return std::countr_zero(static_cast<uint64_t>(side)); };
  return {log(box[2]), log(box[1]), log(box[0]), int(start), int(size[2]), int(size[1])};
}

inline const int* plan_table(const char* name, const OptionalTensor& t, const Tensor& q) {
  if (!t) return nullptr;
  SORA_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous() && t->get_device_index() == q.get_device_index(), name,
             ": expected a contiguous int32 table on the device of q, got ", describe(*t));
  return static_cast<const int*>(t->data_ptr());
}

// own: a tensor of the side that owns tiles.
inline PlanParams plan_params(const Plan& plan, const Tensor& own, int visited_tokens) {
  SORA_CHECK(plan.rows && plan.tiles && plan.reach, "rows, tiles, reach: expected all tables of a plan");
  SORA_CHECK(plan.rows->dim() == 2 && plan.rows->size(1) == kPlanColumns && plan.reach->dim() == 2 &&
                 plan.reach->size(0) == 7 && plan.reach->size(1) == own.size(1),
             "rows, reach: expected (owners, ", kPlanColumns, ") and (7, ", own.size(1), "), got ", describe(*plan.rows),
             " and ", describe(*plan.reach));
  PlanParams p{.rows = plan_table("rows", plan.rows, own), .tiles = plan_table("tiles", plan.tiles, own),
               .reach = plan_table("reach", plan.reach, own), .heads = plan_table("heads", plan.heads, own)};
  p.owners = static_cast<int>(plan.rows->size(0)), p.own_len = static_cast<int>(own.size(1));
  p.chosen = static_cast<int>(plan.heads ? plan.heads->numel() : own.size(2));
  p.own = box_shape("own_box", plan.own_box, plan.own_size, plan.own_start, 128);
  p.visit = box_shape("visit_box", plan.visit_box, plan.visit_size, plan.visit_start, visited_tokens);
  const int periods[3] = {p.visit.w, p.visit.w + p.visit.h, 7};
  for (int i = 0; i < 3; ++i) p.repeat[i] = periods[i] < 5 ? 0xffffffffu / ((1u << (1 << periods[i])) - 1) : 1;
  return p;
}

// Of x [B, S, heads, E], heads side by side, what a plan calls boxes: [B, T, H, W, heads * E] from token `start` on.
inline CUtensorMap tile_map(const char* name, const Tensor& x, int64_t start, const Plan::Sides& size, int columns,
                            const Plan::Sides& box) {
  SORA_CHECK(x.size(2) == 1 || x.stride(2) == x.size(3), name, ": expected heads side by side, got ", describe(x));
  const int64_t b = x.stride(0), s = x.stride(1), H = size[1], W = size[2];
  return encode_boxes<5>(name, x, start * s, {x.size(2) * x.size(3), W, H, size[0], x.size(0)}, {1, s, W * s, H * W * s, b},
                         {columns, int(box[2]), int(box[1]), int(box[0]), 1});
}

// The same for runs of tokens, where T and H are 1.
inline CUtensorMap run_map(const char* name, const Tensor& x, int columns, int tokens) {
  return tile_map(name, x, 0, {1, 1, x.size(1)}, columns, {1, 1, tokens});
}

// A box of 128 tokens halved along its first axis that is longer than 1: what each of two warp groups owns.
inline Plan::Sides half_box(Plan::Sides box) {
  for (int64_t& side : box)
    if (side > 1) {
      side /= 2;
      break;
    }
  return box;
}

}  // namespace sora
