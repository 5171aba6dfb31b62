// What one thread of spacetime attention works on: a tile of queries, and its keys block by block.
//
// Scores are kept transposed, [keys, queries]: a vector holds one key's scores with several queries, so that maxima, sums
// and masks need no work across lanes.

#pragma once

#include "common/gemm.h"
#include "common/heads.h"
#include "common/math.h"
#include "common/memory.h"
#include "cpu/attention_tiles.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace sora {
namespace {

constexpr int64_t kKeys = 128;  // of a block
constexpr int64_t kSpan = 64;   // rows of dK and dV whose pages are only touched where a part has something to add
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The heads of q that look by the same rule.
struct Rule {
  Tiles tiles;
  std::vector<int64_t> heads;
};

struct Params {
  int64_t B = 0, Sq = 0, Sk = 0, H = 0, Hk = 0, E = 0;
  Heads q, k, v, out;
  float* lse = nullptr;  // [B, H, Sq]
  std::vector<int64_t> kv_lens;
  float scale = 0;
  std::vector<Rule> rules;
  // backward
  Heads dout, dq, dk, dv;
  const float* dlse = nullptr;
  int64_t parts = 0;
  float *dk_parts = nullptr, *dv_parts = nullptr;  // [parts, B, Hk, Sk, E], zeros
  uint8_t* touched = nullptr;                      // [parts, B, Hk, spans()]: whether a part added to these rows

  int64_t group() const { return H / std::max<int64_t>(1, Hk); }
  int64_t spans() const { return (Sk + kSpan - 1) / kSpan; }
  int64_t most_tiles() const {
    size_t most = 1;
    for (const Rule& rule : rules) most = std::max(most, rule.tiles.all().size());
    return static_cast<int64_t>(most);
  }
  int64_t kv_len(int64_t b) const { return kv_lens.empty() ? Sk : kv_lens[b]; }
  int64_t head_of(int64_t part, int64_t b, int64_t h) const { return (part * B + b) * Hk + h; }
};

// e^x for x <= 0; 0 below -87, where it leaves the normal numbers. NaN stays.
template <class F>
SORA_INLINE F exp_of_negative(F x) {
  const F value = exponential(at_least(-87.0f, x));
  return x < -87.0f ? F{} : value;
}

// One thread's view of a tile and the memory it works in. Rows are padded to whole vectors, and products write whole
// tiles: what lies beyond `E`, the keys of a block and the queries is never set, and no result of it is kept. Lanes of
// queries that are not there repeat the first one's place.
template <int V, class T>
struct Workspace {
  using Vector = Floats<V>;
  typedef int32_t Integers __attribute__((vector_size(V * sizeof(int32_t)), may_alias));

  const Params& p;
  const Tiles* tiles = nullptr;      // whose tile this is
  const int64_t E, width;            // of a row, and padded
  int64_t count = 0, lanes = 0;      // queries, and padded
  int64_t token[kQueries];
  alignas(64) int32_t begin[3][kQueries], end[3][kQueries], kept[kQueries];
  std::vector<KeyRun> runs;
  const Scratch keys, scores, queries;
  float *const k, *const v, *const g;  // [kKeys, width]; g for gradients
  float *const s, *const d;            // [kKeys, lanes]

  explicit Workspace(const Params& params)
      : p(params), E(p.E), width(round_up(p.E, 2 * V)), keys(3, (kKeys + 8) * width), scores(2, (kKeys + 8) * kQueries),
        queries(7, (kQueries + 8) * width), k(keys.row(0)), v(keys.row(1)), g(keys.row(2)), s(scores.row(0)), d(scores.row(1)) {}

  void enter(const Tiles& tiles, const QueryTile& tile, int64_t b) {
    this->tiles = &tiles;
    tiles.runs(tile, p.kv_len(b), runs);
    tiles.for_each_query(tile, [&](int64_t lane, int64_t at, int64_t t, int64_t h, int64_t w) {
      token[lane] = at, count = lane + 1;
      if (tile.clip < 0) return;
      const int64_t place[3] = {t, h, w};
      for (int axis = 0; axis < 3; ++axis) {
        const Interval seen = tiles.reach(tile, axis, place[axis]);
        begin[axis][lane] = static_cast<int32_t>(seen.begin), end[axis][lane] = static_cast<int32_t>(seen.end);
      }
      kept[lane] = static_cast<int32_t>(tiles.kept(tile, t));
    });
    lanes = round_up(count, 2 * V);
    for (int64_t lane = count; lane < lanes; ++lane) {
      for (int axis = 0; axis < 3; ++axis) begin[axis][lane] = begin[axis][0], end[axis][lane] = end[axis][0];
      kept[lane] = kept[0];
    }
  }

  SORA_INLINE void load_rows(const Heads& from, int64_t b, int64_t h, float* to) const {
    for (int64_t m = 0; m < count; ++m) widen(from.at<const T>(b, token[m], h), to + m * width);
    std::fill(to + count * width, to + lanes * width, 0.0f);
  }

  SORA_INLINE void widen(const T* from, float* to) const {
#pragma omp simd
    for (int64_t e = 0; e < E; ++e) to[e] = to_float(from[e]);
  }

  // Rows [lanes, width] as the panels [lanes / 2V, E, 2V] of their transpose, times `scale`: that of the scores is taken
  // here, for of a hidden key's -infinity a scale below zero would make +infinity.
  SORA_INLINE void transpose(const float* rows, float* panels, float scale) const {
    for (int64_t m = 0; m < lanes; ++m) {
      float* to = panels + m / (2 * V) * (2 * V) * E + m % (2 * V);
      for (int64_t e = 0; e < E; ++e) to[e * 2 * V] = rows[m * width + e] * scale;
    }
  }

  struct Piece {
    const KeyRun* run;
    int64_t offset, first, count;  // keys [offset, offset + count) of the run are rows [first, first + count)
  };
  std::vector<Piece> pieces;
  int64_t run = 0, offset = 0;         // where the next block begins

  // Back to the first of the tile's keys.
  void rewind() { run = offset = 0; }

  // Copies the next keys' rows; returns how many, 0 after the last.
  SORA_INLINE int64_t load_block(int64_t b, int64_t h) {
    int64_t n = 0;
    pieces.clear();
    while (n < kKeys && run < static_cast<int64_t>(runs.size())) {
      const int64_t first = runs[run].token + offset, some = std::min(runs[run].count - offset, kKeys - n);
      for (int64_t i = 0; i < some; ++i) {
        const int64_t key = tiles->key(first + i);
        widen(p.k.at<const T>(b, key, h), k + (n + i) * width);
        widen(p.v.at<const T>(b, key, h), v + (n + i) * width);
      }
      pieces.push_back({&runs[run], offset, n, some});
      offset += some, n += some;
      if (offset == runs[run].count) ++run, offset = 0;
    }
    return n;
  }

  // Scores of what is not seen become -infinity.
  SORA_INLINE void mask() {
    for (const Piece& piece : pieces) {
      if (!piece.run->masked) continue;
      const int32_t t = static_cast<int32_t>(piece.run->t), h = static_cast<int32_t>(piece.run->h);
      for (int64_t l = 0; l < lanes; l += V) {
        const Integers keep = t < integers(kept + l);
        const Integers row = (t >= integers(begin[0] + l)) & (t < integers(end[0] + l)) &
                             (h >= integers(begin[1] + l)) & (h < integers(end[1] + l));
        const Integers &from = integers(begin[2] + l), &to = integers(end[2] + l);
        for (int64_t i = 0; i < piece.count; ++i) {
          const int32_t w = static_cast<int32_t>(piece.run->w + piece.offset + i);
          float* score = s + (piece.first + i) * lanes + l;
          const Integers seen = keep | (row & (w >= from) & (w < to));
          put<V>(score, seen != 0 ? fetch<V>(score) : Vector{} - kInfinity);
        }
      }
    }
  }

  // [n, lanes] = rows of keys times panels of queries
  SORA_INLINE void multiply_keys(const float* rows, const float* panels, int64_t n, float* to) const {
    multiply<V, false>({rows, width}, packed_panels(panels, E), n, lanes, E, to, lanes, false);
  }

  // [lanes, width] += (weights [n, lanes])^T times rows of keys
  SORA_INLINE void multiply_weights(const float* weights, const float* rows, int64_t n, float* to) const {
    multiply<V, true>({weights, lanes}, row_panels(rows, width), lanes, E, n, to, width, true);
  }

  // The block's rows of to [Sk, E] += weights [n, lanes] times rows of queries
  SORA_INLINE void add_to_keys(const float* weights, const float* rows, int64_t n, float* to) const {
    const bool side_by_side = pieces.size() == 1 && !tiles->dilated();
    const bool direct = side_by_side && n % Tile<V>::kRows == 0 && E == width;  // whole tiles, one below another
    float* const sum = direct ? to + (pieces[0].run->token + pieces[0].offset) * E : g;
    multiply<V, false>({weights, lanes}, row_panels(rows, width), n, width, lanes, sum, width, direct);
    if (direct) return;
    for (const Piece& piece : pieces) {
      for (int64_t i = 0; i < piece.count; ++i) {
        float* row = to + tiles->key(piece.run->token + piece.offset + i) * E;
        const float* from = g + (piece.first + i) * width;
#pragma omp simd
        for (int64_t e = 0; e < E; ++e) row[e] += from[e];
      }
    }
  }

 private:
  static SORA_INLINE const Integers& integers(const int32_t* at) { return *reinterpret_cast<const Integers*>(at); }
};

}  // namespace
}  // namespace sora
