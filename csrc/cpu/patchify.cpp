// The two ends of the transformer on a CPU: patch_embed3d, unpatchify3d, final_layer, forward and backward, and
// video_to_uint8, the end of a decoder.
//
// A video is a matrix of tokens by features: the element of token s of clip b and of feature n lies at
// token(b, s) + features[n], whatever the strides of the video. Patches are gathered straight into a product and results
// scattered straight out of one; a matrix of patches never exists in memory. Both ends are then made of three products
// of a block of tokens that lies in cache, `small` [rows, K] beside `wide` [rows, D], both fp32:
//
//   widen    wide  = small W     patch_embed3d forward     d norm of final_layer
//   narrow   small = wide Wt     final_layer forward       dvideo of patch_embed3d
//   outer    dW   += smallt wide both weight gradients
//
// Where video and weight are bf16 and the CPU multiplies pairs of bf16, patch_embed3d leaves its blocks bf16: the same
// exact products, summed in fp32, at twice the rate. final_layer does not: its norm is not a bf16 number.
//
// Bytes that must move (T: one element of tokens or video; the weights, packed once per call, are left out):
//   patch_embed3d   forward   video + out                  backward   dout + video + dvideo + dpos
//   final_layer     forward   x + out                      backward   dout + 2 x (x is read, dx is written)
//   unpatchify3d    tokens + out, each way
//   video_to_uint8  video + a byte per value
// and that is what the kernels move, once each, beyond the partial sums of the weight gradients (see Sums).

#include "common/check.h"
#include "common/gemm.h"
#include "common/memory.h"
#include "common/pack.h"
#include "common/rows.h"
#include "cpu/patchify_video.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace sora {
namespace {

// ---- blocks of tokens

// Tokens of a block: whole tiles of every instruction set, and a `wide` of some 400 KB, part of an L2. Weights that no L2
// holds are read, and their gradients added to, once per block: then blocks are as long as can be.
int64_t block_rows(int64_t length, int64_t weights) {
  if (weights > int64_t{1} << 20) return 96;
  return std::clamp<int64_t>(98304 / std::max<int64_t>(length, 1) / 24 * 24, 24, 96);
}

// Zeros, so that what lies beyond the last column, read and never used, costs no time as a denormal would.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t length) : scratch_(rows, length) {
    if (rows > 0) std::fill_n(scratch_.row(0), rows * ld(), 0.0f);
  }
  SORA_INLINE float* row(int64_t i) const { return scratch_.row(i); }
  SORA_INLINE int64_t ld() const { return scratch_.stride(); }
  SORA_INLINE operator Block() const { return {row(0), ld()}; }

 private:
  Scratch scratch_;
};

template <int V>
Matrix small_block(int64_t rows, int64_t K) {
  return Matrix(rows, round_up(K, Tile<V>::kColumns) + Tile<V>::kRows);
}

// An odd number of cache lines apart, so that the same columns of many rows do not compete for the same lines of L1.
int64_t wide_ld(int64_t D) { return round_up(D, 32) + 16; }

// A weight gradient [K, wide_ld(D)] (+)= smallt wide. `small` goes by in strips that stay in L2 while the columns of `wide`
// run past: of a K in the thousands the whole would come from further away for each panel of columns.
template <int V>
SORA_INLINE void add_outer(Block small, Panels wide, int64_t K, int64_t D, int64_t rows, float* to, bool add,
                           bool pairs = false) {
  constexpr int64_t kStrip = 384;  // whole tiles of every instruction set
  for (int64_t k = 0; k < K; k += kStrip) {
    const Block strip{small.data + k, small.ld};
    multiply<V, true>(strip, wide, std::min(kStrip, K - k), D, rows, to + k * wide_ld(D), wide_ld(D), add, pairs);
  }
}

Scratch pack(const Tensor& weight, int64_t depth, int64_t columns, int64_t stride_k, int64_t stride_n,
             bool pairs = false) {
  Scratch packed(1, packed_size(depth, columns));
  const PackParams p{weight.data_ptr(), depth, columns, stride_k, stride_n, packed.row(0), pairs};
  const int64_t width = 2 * lanes(), grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(depth * width, 1));
  with_dtype(weight.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(0, (columns + width - 1) / width, grain, [&](int64_t begin, int64_t end) {
      dispatch<Pack<decltype(t)>>(p, begin, end);
    });
  });
  return packed;
}

// Blocks of a forward worth waking a thread for.
int64_t block_grain(int64_t rows, int64_t K, int64_t D) {
  return std::max<int64_t>(1, 524288 / std::max<int64_t>(rows * K * D, 1));
}

// ---- sums over tokens
//
// A chunk of tokens leaves fp32 partial sums: a weight gradient [K, ld], and rows. A second pass adds those in the order
// of the chunks: the result is the same bits however many threads ran.

constexpr int64_t kMinRows = 64;  // of a chunk

// At most 32 chunks, of 64 MiB altogether, but no fewer than 4 to share among threads.
int64_t target_chunks(int64_t K, int64_t D) {
  return std::clamp<int64_t>((int64_t{1} << 24) / std::max<int64_t>(K * D, 1), 4, 32);
}

// rows x columns sums, each of `chunks` partials, go to row * stride_row + column * stride_column.
struct Sums {
  const float* partials;
  int64_t chunks, chunk_size, ld, rows, columns;
  void* to;
  ScalarType dtype;
  int64_t stride_row, stride_column;
};

constexpr int64_t kSumColumns = 64;  // of one task

template <class T>
struct AddPartials {
  static SORA_INLINE void run(const Sums& p, int64_t begin, int64_t end) {
    float sum[kSumColumns];
    for (int64_t column = begin * kSumColumns; column < std::min(end * kSumColumns, p.columns); column += kSumColumns) {
      const int64_t n = std::min(kSumColumns, p.columns - column);
      for (int64_t row = 0; row < p.rows; ++row) {
        std::fill_n(sum, kSumColumns, 0.0f);
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
          const float* from = p.partials + chunk * p.chunk_size + row * p.ld + column;
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) sum[i] += from[i];
        }
        T* to = static_cast<T*>(p.to) + row * p.stride_row + column * p.stride_column;
        for (int64_t i = 0; i < n; ++i) to[i * p.stride_column] = from_float<T>(sum[i]);
      }
    }
  }
};

void add_partials(const Sums& p) {
  if (!p.to) return;
  with_dtype(p.dtype, [&](auto t) {
    torch::stable::parallel_for(0, (p.columns + kSumColumns - 1) / kSumColumns, 1, [&](int64_t begin, int64_t end) {
      dispatch<AddPartials<decltype(t)>>(p, begin, end);
    });
  });
}

// The sum of a block joins that of its chunk: short sums first keep the rounding error of long ones small.
SORA_INLINE void add_columns(const Matrix& from, int64_t rows, int64_t columns, float* block, float* sum) {
  std::fill_n(block, columns, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = from.row(r);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) block[i] += row[i];
  }
  for (int64_t i = 0; i < columns; ++i) sum[i] += block[i];
}

// ---- patch_embed3d

struct EmbedParams {
  Shape shape;
  int64_t K = 0;
  Patches video, dvideo;
  const float* weight = nullptr;  // packed
  bool pairs = false;             // products of bf16 as they are: the same sums in fp32, without widening first
  Vector bias;
  Rows pos, dpos;  // a row per token
  Tokens out, dout;
  // Backward: chunks of chunk_rows rows. Where clips share pos, those of one token follow each other.
  bool clips_inside = false;
  int64_t chunk_rows = 0, chunk_size = 0;
  float* partials = nullptr;  // [chunks, chunk_size]: dweight [K, wide_ld(D)], dbias
  bool dweight = false, dbias = false;

  int64_t dbias_at() const { return dweight ? round_up(K, 24) * wide_ld(shape.D) : 0; }

  SORA_INLINE std::pair<int64_t, int64_t> token(int64_t row) const {
    if (clips_inside) return {row % shape.B, row / shape.B};
    return {row / shape.S, row % shape.S};
  }
};

template <int V, class T>
struct EmbedForward {
  static SORA_INLINE void run(const EmbedParams& p, int64_t begin, int64_t end) {
    const bool pairs = std::is_same_v<T, BFloat16> && p.pairs;
    const int64_t D = p.shape.D, K = p.K, size = block_rows(std::max(D, K), K * D), depth = pairs ? (K + 1) / 2 : K;
    const Matrix small = small_block<V>(size, K), wide(size, wide_ld(D)), bias(1, D);
    add(bias.row(0), p.bias, D);
    for (int64_t first = begin * size; first < std::min(end * size, p.shape.rows()); first += size) {
      const int64_t rows = std::min(size, p.shape.rows() - first);
      for (int64_t r = 0; r < rows; ++r) {
        const auto [b, s] = p.token(first + r);
        pairs ? p.video.gather_pairs(b, s, small.row(r)) : p.video.gather<T>(b, s, small.row(r));
      }
      multiply<V, false>(small, packed_panels(p.weight, depth), rows, D, depth, wide.row(0), wide.ld(), false, pairs);
      for (int64_t r = 0; r < rows; ++r) {
        const auto [b, s] = p.token(first + r);
        add(wide.row(r), p.pos, b, s, D);
        const float *from = wide.row(r), *plus = bias.row(0);
        T* to = row_of<T>(p.out, b, s);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) to[d] = from_float<T>(from[d] + plus[d]);
      }
    }
  }
};

template <int V, class T>
struct EmbedBackward {
  static SORA_INLINE void run(const EmbedParams& p, int64_t begin, int64_t end) {
    const bool pairs = std::is_same_v<T, BFloat16> && p.pairs;
    const int64_t D = p.shape.D, K = p.K, size = block_rows(D, K * D), half = pairs ? 2 : 1, depth = (D + half - 1) / half;
    // With pairs, `wide` holds those of dout along a token, `turned` those of two tokens, for the sum over tokens.
    const Matrix small = small_block<V>(size, K), wide(size, wide_ld(depth)), sums(3, D);
    const Matrix turned(pairs ? size / 2 : 0, wide_ld(D));
    const Matrix& terms = pairs ? turned : wide;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t start = chunk * p.chunk_rows, stop = std::min(start + p.chunk_rows, p.shape.rows());
      float* dweight = p.partials + chunk * p.chunk_size;
      float* dbias = dweight + p.dbias_at();
      if (p.dbias) std::fill_n(dbias, D, 0.0f);
      for (int64_t first = start; first < stop; first += size) {
        const int64_t rows = std::min(size, stop - first);
        std::fill_n(sums.row(0), D, 0.0f);
        for (int64_t r = 0; r < rows; ++r) {
          const auto [b, s] = p.token(first + r);
          const T* from = row_of<const T>(p.dout, b, s);
          if (pairs) {
            if (p.dvideo) std::memcpy(wide.row(r), from, D * sizeof(T));
          } else {
            widen(from, wide.row(r), D);
          }
          if (p.dbias || p.dpos) sum_token(p, from, b, s, sums);
          if (p.dweight && !pairs) p.video.gather<T>(b, s, small.row(r));
        }
        if (p.dbias) {  // short sums first keep the rounding error of long ones small
          for (int64_t d = 0; d < D; ++d) dbias[d] += sums.row(0)[d];
        }
        if (p.dweight) {
          if constexpr (std::is_same_v<T, BFloat16>) {
            if (pairs) pair_tokens(p, first, rows, small, turned);
          }
          add_outer<V>(small, row_panels(terms.row(0), terms.ld()), K, D, (rows + half - 1) / half, dweight, first > start,
                       pairs);
        }
        if (p.dvideo) {
          multiply<V, false>(wide, packed_panels(p.weight, depth), rows, K, depth, small.row(0), small.ld(), false,
                             pairs);
          for (int64_t r = 0; r < rows; ++r) {
            const auto [b, s] = p.token(first + r);
            p.dvideo.scatter<T>(b, s, small.row(r));
          }
        }
      }
    }
  }

  static SORA_INLINE void widen(const T* from, float* to, int64_t D) {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) to[d] = to_float(from[d]);
  }

  // sums: dbias of this block, dpos of the clips so far, this token.
  static SORA_INLINE void sum_token(const EmbedParams& p, const T* from, int64_t b, int64_t s, const Matrix& sums) {
    const int64_t D = p.shape.D;
    float *dbias = sums.row(0), *dpos = sums.row(1), *dout = sums.row(2);
    widen(from, dout, D);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) dbias[d] += dout[d];
    if (!p.dpos) return;
    if (!p.clips_inside) return store(dout, p.dpos, b, s, 0, D);
    if (b == 0) std::fill_n(dpos, D, 0.0f);  // a chunk holds all clips of a token
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) dpos[d] += dout[d];
    if (b == p.shape.B - 1) store(dpos, p.dpos, 0, s, 0, D);
  }

  static SORA_INLINE void pair_tokens(const EmbedParams& p, int64_t first, int64_t rows, const Matrix& small,
                                      const Matrix& turned) {
    const int64_t D = p.shape.D, K = p.K, *features = p.video.features.data();
    for (int64_t r = 0; r < rows; r += 2) {
      const bool second = r + 1 < rows;
      const auto [b, s] = p.token(first + r);
      const auto [c, t] = p.token(first + r + second);
      const auto *a0 = row_of<const BFloat16>(p.dout, b, s), *a1 = row_of<const BFloat16>(p.dout, c, t);
      const auto* v0 = static_cast<const BFloat16*>(p.video.data) + p.video.token(b, s);
      const auto* v1 = static_cast<const BFloat16*>(p.video.data) + p.video.token(c, t);
      float *to = turned.row(r / 2), *patch = small.row(r / 2);
      for (int64_t k = 0; k < K; ++k) patch[k] = pair(v0[features[k]], second ? v1[features[k]] : BFloat16{});
      if (second) {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) to[d] = pair(a0[d], a1[d]);
      } else {
        for (int64_t d = 0; d < D; ++d) to[d] = pair(a0[d], BFloat16{});
      }
    }
  }
};

// ---- final_layer
//
//   h = xhat * (1 + scale) + shift,  y = h Wt + bias; backward, with dh = dy W and sums over the tokens of a modulation row:
//   dW = dyt h,  dbias = sum dy,  dshift = sum dh,  dscale = sum dh * xhat,  dx = norm backward of dh * (1 + scale)

struct FinalParams {
  Shape shape;
  int64_t N = 0;
  Tokens x, dx;
  Rows shift, scale, dshift, dscale;
  Patches video;                  // out, or dout
  const float* weight = nullptr;  // packed
  Vector bias;
  bool rms = false;
  float eps = 0;
  const Chunking* chunking = nullptr;
  int64_t chunk_size = 0;
  float* partials = nullptr;  // [chunks, chunk_size]: dweight [N, wide_ld(D)], dbias [N], dshift [D], dscale [D]
  bool dweight = false, dbias = false;

  bool wants_dh() const { return dx || dshift || dscale; }
  int64_t dbias_at() const { return dweight ? round_up(N, 24) * wide_ld(shape.D) : 0; }
  int64_t dshift_at() const { return dbias_at() + round_up(N, 16); }
  int64_t dscale_at() const { return dshift_at() + round_up(shape.D, 16); }
};

// The modulation of a group of tokens in fp32, loaded when the group changes.
class ModulationRow {
 public:
  explicit ModulationRow(const FinalParams& p) : p_(p), rows_(2, p.shape.D) {}

  SORA_INLINE void load(int64_t group) {
    if (group == group_) return;
    group_ = group;
    const int64_t D = p_.shape.D, b = group / p_.shape.modulation_rows(), f = group % p_.shape.modulation_rows();
    std::fill_n(scale, D, 1.0f), std::fill_n(shift, D, 0.0f);
    add(scale, p_.scale, b, f, D), add(shift, p_.shift, b, f, D);
  }

 private:
  const FinalParams& p_;
  Matrix rows_;
  int64_t group_ = -1;

 public:
  float* const scale = rows_.row(0);  // 1 + scale
  float* const shift = rows_.row(1);
};

template <int V, class T>
SORA_INLINE float normalise(const FinalParams& p, int64_t row, float* xhat) {
  const int64_t D = p.shape.D;
  const T* x = row_of<const T>(p.x, row / p.shape.S, row % p.shape.S);
  each<V>(D, [=](auto at) SORA_LAMBDA { at.put(xhat, at(x)); });
  const auto [mean, rstd] = statistics<V>(xhat, D, p.rms, p.eps);
  each<V>(D, [=, mean = mean, rstd = rstd](auto at) SORA_LAMBDA { at.put(xhat, (at(xhat) - mean) * rstd); });
  return rstd;
}

template <int V>
SORA_INLINE void modulate(const ModulationRow& m, const float* xhat, float* h, int64_t D) {
  const float *scale = m.scale, *shift = m.shift;
  each<V>(D, [=](auto at) SORA_LAMBDA { at.put(h, at(xhat) * at(scale) + at(shift)); });
}

template <int V, class T>
struct FinalForward {
  static SORA_INLINE void run(const FinalParams& p, int64_t begin, int64_t end) {
    const int64_t S = p.shape.S, D = p.shape.D, N = p.N, G = p.shape.rows_per_modulation(), size = block_rows(D, N * D);
    const Matrix small = small_block<V>(size, N), wide(size, wide_ld(D)), bias(1, N);
    add(bias.row(0), p.bias, N);
    ModulationRow m(p);
    for (int64_t first = begin * size; first < std::min(end * size, p.shape.rows()); first += size) {
      const int64_t rows = std::min(size, p.shape.rows() - first);
      for (int64_t r = 0; r < rows; ++r) {
        m.load((first + r) / G);
        normalise<V, T>(p, first + r, wide.row(r));
        modulate<V>(m, wide.row(r), wide.row(r), D);
      }
      multiply<V, false>(wide, packed_panels(p.weight, D), rows, N, D, small.row(0), small.ld(), false);
      for (int64_t r = 0; r < rows; ++r) {
        float* y = small.row(r);
        for (int64_t n = 0; n < N; ++n) y[n] += bias.row(0)[n];
        p.video.scatter<T>((first + r) / S, (first + r) % S, y);
      }
    }
  }
};

template <int V, class T>
struct FinalBackward {
  static SORA_INLINE void run(const FinalParams& p, int64_t begin, int64_t end) {
    const int64_t S = p.shape.S, D = p.shape.D, N = p.N, G = p.shape.rows_per_modulation(), size = block_rows(D, N * D);
    const Chunking& c = *p.chunking;
    const Matrix dy = small_block<V>(size, N), xhat(size, D), h(size, wide_ld(D)), rstd(1, size), sums(4, D), dbias_block(1, N);
    ModulationRow m(p);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t group = c.parts > 1 ? chunk / c.parts : chunk * c.groups;
      const int64_t start = group * G + (c.parts > 1 ? chunk % c.parts * c.part_rows : 0);
      const int64_t stop = c.parts > 1 ? std::min(start + c.part_rows, (group + 1) * G)
                                       : std::min(group + c.groups, c.all_groups) * G;
      float* partials = p.partials + chunk * p.chunk_size;
      if (p.dbias) std::fill_n(partials + p.dbias_at(), N, 0.0f);
      std::fill_n(sums.row(0), 4 * sums.ld(), 0.0f);
      for (int64_t first = start; first < stop; first += size) {
        const int64_t rows = std::min(size, stop - first);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = first + r;
          rstd.row(0)[r] = normalise<V, T>(p, row, xhat.row(r));
          p.video.gather<T>(row / S, row % S, dy.row(r));
          if (p.dweight) m.load(row / G), modulate<V>(m, xhat.row(r), h.row(r), D);
        }
        if (p.dbias) add_columns(dy, rows, N, dbias_block.row(0), partials + p.dbias_at());
        if (p.dweight) {
          add_outer<V>(dy, row_panels(h.row(0), h.ld()), N, D, rows, partials, first > start);
        }
        if (!p.wants_dh()) continue;
        multiply<V, false>(dy, packed_panels(p.weight, N), rows, D, N, h.row(0), h.ld(), false);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = first + r;
          m.load(row / G);
          token(p, m, row, h.row(r), xhat.row(r), rstd.row(0)[r], sums);
          const bool last = row + 1 == stop || (row + 1) % G == 0;
          if (last || r + 1 == rows) flush(p, row / G, partials, sums, last);
        }
      }
    }
  }

  // sums: dshift and dscale of this block, then of the modulation row so far.
  static SORA_INLINE void token(const FinalParams& p, const ModulationRow& m, int64_t row, float* dh, const float* xhat,
                                float rstd, const Matrix& sums) {
    const int64_t D = p.shape.D;
    float *dshift = sums.row(0), *dscale = sums.row(1);
    const float* scale = m.scale;
    const auto totals = sora::sums<V, 2>(D, [=](auto at, auto& s) SORA_LAMBDA {
      const auto g = at(dh), dn = g * at(scale);
      at.put(dshift, at(dshift) + g), at.put(dscale, at(dscale) + g * at(xhat)), at.put(dh, dn);
      s[0] += dn, s[1] += dn * at(xhat);
    });
    if (!p.dx) return;
    const float c1 = p.rms ? 0.0f : totals.of[0] / static_cast<float>(D), c2 = totals.of[1] / static_cast<float>(D);
    T* dx = row_of<T>(p.dx, row / p.shape.S, row % p.shape.S);
    each<V>(D, [=](auto at) SORA_LAMBDA { at.put(dx, (at(dh) - c1 - at(xhat) * c2) * rstd); });
  }

  static SORA_INLINE void flush(const FinalParams& p, int64_t group, float* partials, const Matrix& sums, bool last) {
    const int64_t D = p.shape.D, F = p.shape.modulation_rows();
    for (int i = 0; i < 2; ++i) {
      float *block = sums.row(i), *sum = sums.row(2 + i);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) sum[d] += block[d], block[d] = 0.0f;
      if (!last) continue;
      if (p.chunking->parts > 1) {
        std::copy_n(sum, D, partials + (i ? p.dscale_at() : p.dshift_at()));
      } else {
        store(sum, i ? p.dscale : p.dshift, group / F, group % F, 0, D);
      }
      std::fill_n(sum, D, 0.0f);
    }
  }
};

// ---- arguments

void check_sizes(const char* name, const Tensor& t, const char* dims, const std::vector<int64_t>& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(i) == sizes[i];
  if (same) return;
  std::ostringstream expected;
  for (size_t i = 0; i < sizes.size(); ++i) expected << (i ? ", " : "") << sizes[i];
  SORA_CHECK(false, name, ": expected ", dims, " = (", expected.str(), "), got ", describe(t));
}

void check_dense(const char* name, const Tensor& t) {
  int64_t stride = 1;
  for (int64_t i = t.dim() - 1; i >= 0; stride *= t.size(i--)) {
    SORA_CHECK(t.numel() == 0 || t.size(i) == 1 || t.stride(i) == stride, name, ": expected a contiguous tensor, got ",
               describe(t));
  }
}

// The argument whose device all others share, and tokens and videos its dtype.
struct Like {
  const char* name;
  const Tensor& tensor;

  void check(const char* what, const Tensor& t, const char* dims, const std::vector<int64_t>& sizes) const {
    check_kind(what, t, tensor, name);
    check_sizes(what, t, dims, sizes);
  }

  void check_dtype(const char* what, const Tensor& t) const {
    SORA_CHECK(t.scalar_type() == tensor.scalar_type(), what, ": expected the dtype of ", name, ", got ", describe(t),
               "; ", name, " is ", describe(tensor));
  }

  Tokens tokens(const char* what, const Tensor& t, const Shape& shape) const {
    check(what, t, "(B, S, D)", {shape.B, shape.S, shape.D});
    check_dtype(what, t);
    SORA_CHECK(t.stride(2) == 1 || t.numel() == 0 || shape.D == 1, what, ": expected a last stride of 1, got ",
               describe(t));
    return {t.data_ptr(), t.stride(0), t.stride(1)};
  }

  Vector vector(const char* what, const OptionalTensor& t, int64_t length) const {
    if (!t) return {};
    check(what, *t, "(length,)", {length});
    check_dense(what, *t);
    return {t->data_ptr(), t->scalar_type()};
  }

  // One row per token, the same for all clips where B is 1.
  Rows token_rows(const char* what, const OptionalTensor& t, const Shape& shape) const {
    if (!t) return {};
    const int64_t B = t->dim() == 3 && t->size(0) == 1 ? 1 : shape.B;
    check(what, *t, "(1 or B, S, D)", {B, shape.S, shape.D});
    SORA_CHECK(t->stride(2) == 1 || t->numel() == 0 || shape.D == 1, what, ": expected a last stride of 1, got ",
               describe(*t));
    return {t->data_ptr(), t->scalar_type(), B == 1 ? 0 : t->stride(0), t->stride(1)};
  }
};

void check_three(const char* name, const std::vector<int64_t>& values) {
  SORA_CHECK(values.size() == 3 && *std::min_element(values.begin(), values.end()) > 0, name,
             ": expected three positive integers, got ", values.size(), " of them, or a smaller one");
}

std::vector<int64_t> video_sizes(int64_t B, int64_t C, const std::vector<int64_t>& grid,
                                 const std::vector<int64_t>& patch) {
  return {B, C, grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2]};
}

// The grid divides the video into patches, of which this is the size.
std::vector<int64_t> patch_of(const char* name, const Tensor& video, const std::vector<int64_t>& grid) {
  check_three("grid", grid);
  SORA_CHECK(video.dim() == 5, name, ": expected (B, C, T, H, W), got ", describe(video));
  std::vector<int64_t> patch;
  for (int i = 0; i < 3; ++i) {
    SORA_CHECK(video.size(2 + i) > 0 && video.size(2 + i) % grid[i] == 0, name, ": expected whole patches for a grid of ",
               grid[0], " x ", grid[1], " x ", grid[2], ", got ", describe(video));
    patch.push_back(video.size(2 + i) / grid[i]);
  }
  return patch;
}

void advise_huge_pages(const Tensor& t) {
  int64_t stride = 1;
  for (int64_t i = t.dim() - 1; i >= 0; stride *= t.size(i--)) {
    if (t.size(i) != 1 && t.stride(i) != stride) return;
  }
  sora::advise_huge_pages(t.data_ptr(), t.numel() * t.element_size());
}

// ---- the operations

EmbedParams embed_params(const Like& video, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& pos,
                         std::vector<int64_t>& patch) {
  const Tensor& v = video.tensor;
  SORA_CHECK(v.dim() == 5, "video: expected (B, C, T, H, W), got ", describe(v));
  SORA_CHECK(weight.dim() == 5 && weight.size(1) == v.size(1), "weight: expected (D, C, pt, ph, pw) with C = ",
             v.size(1), ", got ", describe(weight));
  check_kind("video", v, v, "video");
  check_kind("weight", weight, v, "video");
  check_dense("weight", weight);
  patch = {weight.size(2), weight.size(3), weight.size(4)};
  check_three("the patch of weight", patch);
  EmbedParams p;
  p.shape = {v.size(0), 1, weight.size(0)};
  for (int i = 0; i < 3; ++i) {
    SORA_CHECK(v.size(2 + i) % patch[i] == 0, "video: expected multiples of the patch (", patch[0], ", ", patch[1], ", ",
               patch[2], "), got ", describe(v));
    p.shape.S *= v.size(2 + i) / patch[i];
  }
  p.K = v.size(1) * patch[0] * patch[1] * patch[2];
  p.video = Patches(v, patch, Features::channels_first);
  p.bias = video.vector("bias", bias, p.shape.D);
  p.pos = video.token_rows("pos", pos, p.shape);
  return p;
}

bool has_pairs(const Tensor& video, const Tensor& weight) {
  const bool both = video.scalar_type() == ScalarType::BFloat16 && weight.scalar_type() == ScalarType::BFloat16;
  return both && has_bf16_products();
}

void patch_embed3d_fwd(const Tensor& video, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& pos,
                       const Tensor& out) {
  std::vector<int64_t> patch;
  const Like like{"video", video};
  EmbedParams p = embed_params(like, weight, bias, pos, patch);
  p.out = like.tokens("out", out, p.shape);
  if (p.shape.rows() * p.shape.D == 0) return;
  p.pairs = has_pairs(video, weight);
  const Scratch packed = pack(weight, p.K, p.shape.D, 1, p.K, p.pairs);
  p.weight = packed.row(0);
  advise_huge_pages(out);
  const int64_t size = block_rows(std::max(p.shape.D, p.K), p.K * p.shape.D);
  with_dtype(video.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(
        0, (p.shape.rows() + size - 1) / size, block_grain(size, p.K, p.shape.D),
        [&](int64_t begin, int64_t end) { dispatch_lanes<EmbedForward, decltype(t)>(p, begin, end); });
  });
}

void patch_embed3d_bwd(const Tensor& dout, const Tensor& video, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& pos, const OptionalTensor& dvideo, const OptionalTensor& dweight,
                       const OptionalTensor& dbias, const OptionalTensor& dpos) {
  std::vector<int64_t> patch;
  const Like like{"video", video};
  EmbedParams p = embed_params(like, weight, bias, pos, patch);
  const auto [B, S, D, F] = p.shape;
  const int64_t K = p.K;
  p.dout = like.tokens("dout", dout, p.shape);
  if (dvideo) {
    like.check("dvideo", *dvideo, "the shape of video", {B, video.size(1), video.size(2), video.size(3), video.size(4)});
    like.check_dtype("dvideo", *dvideo);
    p.dvideo = Patches(*dvideo, patch, Features::channels_first);
    advise_huge_pages(*dvideo);
  }
  if (dweight) {
    like.check("dweight", *dweight, "(D, C, pt, ph, pw)", {D, video.size(1), patch[0], patch[1], patch[2]});
    check_dense("dweight", *dweight);
    p.dweight = true;
  }
  const Vector bias_gradient = like.vector("dbias", dbias, D);
  p.dbias = static_cast<bool>(bias_gradient);
  p.clips_inside = pos && pos->size(0) < B;  // wanted or not: each gradient is the same bits with and without the others
  if (dpos) {
    SORA_CHECK(pos, "dpos: expected pos as well, got none");
    p.dpos = like.token_rows("dpos", dpos, p.shape);
    check_sizes("dpos", *dpos, "the shape of pos", {pos->size(0), S, D});
    check_dense("dpos", *dpos);
    advise_huge_pages(*dpos);
    if (B == 0) std::memset(dpos->data_ptr(), 0, dpos->numel() * dpos->element_size());
  }
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on

  p.chunk_rows = std::max(kMinRows, (p.shape.rows() + target_chunks(K, D) - 1) / target_chunks(K, D));
  if (p.clips_inside) p.chunk_rows = round_up(p.chunk_rows, B);
  const int64_t chunks = (p.shape.rows() + p.chunk_rows - 1) / p.chunk_rows;
  p.chunk_size = p.dbias_at() + (p.dbias ? round_up(D, 16) : 0);
  const Scratch partials(1, chunks * p.chunk_size);
  sora::advise_huge_pages(partials.row(0), chunks * p.chunk_size * static_cast<int64_t>(sizeof(float)));
  p.partials = partials.row(0);
  p.pairs = has_pairs(video, weight);
  const Scratch packed = dvideo ? pack(weight, D, K, K, 1, p.pairs) : Scratch(0, 0);
  p.weight = packed.row(0);
  with_dtype(video.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      dispatch_lanes<EmbedBackward, decltype(t)>(p, begin, end);
    });
  });
  if (dweight) {
    add_partials({p.partials, chunks, p.chunk_size, wide_ld(D), K, D, dweight->data_ptr(), dweight->scalar_type(), 1, K});
  }
  add_partials({p.partials + p.dbias_at(), chunks, p.chunk_size, 0, 1, D, bias_gradient.data, bias_gradient.dtype, 0, 1});
}

MoveParams move_params(const char* name, const Tensor& t, const char* video_name, const Tensor& video,
                       const std::vector<int64_t>& grid) {
  const std::vector<int64_t> patch = patch_of(video_name, video, grid);
  SORA_CHECK(t.dim() == 3, name, ": expected (B, S, features), got ", describe(t));
  const int64_t B = t.size(0), channels = video.size(1), features = patch[0] * patch[1] * patch[2] * channels;
  const Like like{name, t};
  like.check(name, t, "(B, S, features)", {B, grid[0] * grid[1] * grid[2], features});
  like.check(video_name, video, "(B, C, T, H, W)", video_sizes(B, channels, grid, patch));
  like.check_dtype(video_name, video);
  return {Patches(video, patch, Features::channels_last), grid[0], t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

template <bool kToVideo>
void move(const MoveParams& p, int64_t B, int64_t element_size) {
  const int64_t lines = B * p.T * p.video.H, grain = std::max<int64_t>(1, 32768 / (p.video.W * p.video.size()));
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    if (element_size == 4) return dispatch<Move<uint32_t, kToVideo>>(p, begin, end);
    dispatch<Move<uint16_t, kToVideo>>(p, begin, end);
  });
}

void unpatchify3d_fwd(const Tensor& tokens, int64_t T, int64_t H, int64_t W, const Tensor& out) {
  const MoveParams p = move_params("tokens", tokens, "out", out, {T, H, W});
  advise_huge_pages(out);
  move<true>(p, tokens.size(0), tokens.element_size());
}

void unpatchify3d_bwd(const Tensor& dout, int64_t T, int64_t H, int64_t W, const Tensor& dtokens) {
  const MoveParams p = move_params("dtokens", dtokens, "dout", dout, {T, H, W});
  advise_huge_pages(dtokens);
  move<false>(p, dtokens.size(0), dtokens.element_size());
}

void video_to_uint8_fwd(const Tensor& video, std::vector<int64_t> patch, const Tensor& out) {
  SORA_CHECK(video.dim() == 5, "video: expected (B, features, T, H, W), got ", describe(video));
  check_kind("video", video, video, "video");
  check_three("patch", patch);
  const int64_t cells = patch[0] * patch[1] * patch[2], C = video.size(1) / cells;
  SORA_CHECK(video.size(1) % cells == 0, "video: expected a multiple of ", cells, " features, got ", describe(video));
  SORA_CHECK(out.is_cpu() && out.scalar_type() == ScalarType::Byte, "out: expected uint8 on cpu, got ", describe(out));
  check_sizes("out", out, "(B, T pt, H ph, W pw, C)",
              {video.size(0), video.size(2) * patch[0], video.size(3) * patch[1], video.size(4) * patch[2], C});
  check_dense("out", out);
  if (out.numel() == 0) return;
  FrameParams p{.video = video.data_ptr(), .F = video.size(1), .T = video.size(2), .H = video.size(3),
                .W = video.size(4), .pt = patch[0], .ph = patch[1], .stride_b = video.stride(0),
                .stride_f = video.stride(1), .stride_t = video.stride(2), .stride_h = video.stride(3),
                .stride_w = video.stride(4), .out = static_cast<uint8_t*>(out.data_ptr())};
  if (cells == 1 && p.channels_last()) p.W *= p.F, p.F = 1, p.stride_w = 1;  // they lie as the bytes will
  for (int64_t n = 0; n < p.F; ++n) {
    const int64_t c = n % C, k = n / C % patch[2], j = n / C / patch[2] % patch[1], i = n / C / patch[2] / patch[1];
    p.features.push_back(((c * patch[0] + i) * patch[2] + k) * patch[1] + j);
  }
  advise_huge_pages(out);
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  const int64_t lines = video.size(0) * p.T * p.H, grain = std::max<int64_t>(1, 32768 / (p.W * p.F));
  with_dtype(video.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
      dispatch<Frames<decltype(t)>>(p, begin, end);
    });
  });
}

FinalParams final_params(const Like& like, const OptionalTensor& shift, const OptionalTensor& scale,
                         const Tensor& weight, const OptionalTensor& bias, const std::vector<int64_t>& grid, bool rms,
                         double eps, const char* video_name, const Tensor& video) {
  const Tensor& x = like.tensor;
  FinalParams p{.shape = shape_of("x", x), .rms = rms, .eps = static_cast<float>(eps)};
  const std::vector<int64_t> patch = patch_of(video_name, video, grid);
  const int64_t cells = patch[0] * patch[1] * patch[2];
  SORA_CHECK(grid[0] * grid[1] * grid[2] == p.shape.S, "grid: expected ", p.shape.S, " tokens as x has, got ", grid[0],
             " x ", grid[1], " x ", grid[2]);
  check_kind("weight", weight, x);
  SORA_CHECK(weight.dim() == 2 && weight.size(1) == p.shape.D && weight.size(0) > 0 && weight.size(0) % cells == 0,
             "weight: expected (a multiple of ", cells, ", ", p.shape.D, "), got ", describe(weight));
  check_dense("weight", weight);
  p.N = weight.size(0);
  p.x = like.tokens("x", x, p.shape);
  p.shift = rows("shift", shift, x, p.shape);
  p.scale = rows("scale", scale, x, p.shape);
  p.bias = like.vector("bias", bias, p.N);
  like.check(video_name, video, "(B, C, T, H, W)", video_sizes(p.shape.B, p.N / cells, grid, patch));
  like.check_dtype(video_name, video);
  p.video = Patches(video, patch, Features::channels_last);
  return p;
}

void final_layer_fwd(const Tensor& x, const OptionalTensor& shift, const OptionalTensor& scale, const Tensor& weight,
                     const OptionalTensor& bias, int64_t T, int64_t H, int64_t W, bool rms, double eps,
                     const Tensor& out) {
  FinalParams p = final_params({"x", x}, shift, scale, weight, bias, {T, H, W}, rms, eps, "out", out);
  if (p.shape.rows() == 0) return;
  const Scratch packed = pack(weight, p.shape.D, p.N, 1, p.shape.D);
  p.weight = packed.row(0);
  advise_huge_pages(out);
  const int64_t size = block_rows(p.shape.D, p.N * p.shape.D);
  with_dtype(x.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(
        0, (p.shape.rows() + size - 1) / size, block_grain(size, p.N, p.shape.D),
        [&](int64_t begin, int64_t end) { dispatch_lanes<FinalForward, decltype(t)>(p, begin, end); });
  });
}

void final_layer_bwd(const Tensor& dout, const Tensor& x, const OptionalTensor& shift, const OptionalTensor& scale,
                     const Tensor& weight, const OptionalTensor& bias, int64_t T, int64_t H, int64_t W, bool rms,
                     double eps, const OptionalTensor& dx, const OptionalTensor& dshift, const OptionalTensor& dscale,
                     const OptionalTensor& dweight, const OptionalTensor& dbias) {
  const Like like{"x", x};
  FinalParams p = final_params(like, shift, scale, weight, bias, {T, H, W}, rms, eps, "dout", dout);
  const int64_t D = p.shape.D, N = p.N;
  if (dx) p.dx = like.tokens("dx", *dx, p.shape), advise_huge_pages(*dx);
  p.dshift = row_gradients("dshift", dshift, x, p.shape);
  p.dscale = row_gradients("dscale", dscale, x, p.shape);
  if (dweight) {
    like.check("dweight", *dweight, "the shape of weight", {N, D});
    check_dense("dweight", *dweight);
    p.dweight = true;
  }
  const Vector bias_gradient = like.vector("dbias", dbias, N);
  p.dbias = static_cast<bool>(bias_gradient);
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on

  const bool empty = p.shape.rows() == 0;
  const Chunking chunking(p.shape, target_chunks(N, D), kMinRows);
  const int64_t chunks = empty ? 0 : chunking.chunks(), parts = empty ? 0 : chunking.parts;
  p.chunking = &chunking;
  p.chunk_size = p.dscale_at() + round_up(D, 16);
  const Scratch partials(1, chunks * p.chunk_size);
  sora::advise_huge_pages(partials.row(0), chunks * p.chunk_size * static_cast<int64_t>(sizeof(float)));
  p.partials = partials.row(0);
  const Scratch packed = p.wants_dh() ? pack(weight, N, D, D, 1) : Scratch(0, 0);
  p.weight = packed.row(0);
  with_dtype(x.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      dispatch_lanes<FinalBackward, decltype(t)>(p, begin, end);
    });
  });
  if (dweight) {
    add_partials({p.partials, chunks, p.chunk_size, wide_ld(D), N, D, dweight->data_ptr(), dweight->scalar_type(), D, 1});
  }
  add_partials({p.partials + p.dbias_at(), chunks, p.chunk_size, 0, 1, N, bias_gradient.data, bias_gradient.dtype, 0, 1});
  if (parts == 1) return;
  const Matrix sum(1, D);
  for (int64_t group = 0; group < chunking.all_groups; ++group) {
    const int64_t b = group / p.shape.modulation_rows(), f = group % p.shape.modulation_rows();
    for (const auto& [to, at] : {std::pair{p.dshift, p.dshift_at()}, std::pair{p.dscale, p.dscale_at()}}) {
      std::fill_n(sum.row(0), D, 0.0f);
      for (int64_t chunk = group * parts; chunk < (group + 1) * parts; ++chunk) {
        for (int64_t d = 0; d < D; ++d) sum.row(0)[d] += p.partials[chunk * p.chunk_size + at + d];
      }
      store(sum.row(0), to, b, f, 0, D);
    }
  }
}

}  // namespace
}  // namespace sora

STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CPU, m) {
  m.impl("_patch_embed3d_fwd_cpu", TORCH_BOX(&sora::patch_embed3d_fwd));
  m.impl("_patch_embed3d_bwd_cpu", TORCH_BOX(&sora::patch_embed3d_bwd));
  m.impl("_unpatchify3d_fwd_cpu", TORCH_BOX(&sora::unpatchify3d_fwd));
  m.impl("_unpatchify3d_bwd_cpu", TORCH_BOX(&sora::unpatchify3d_bwd));
  m.impl("_video_to_uint8_fwd_cpu", TORCH_BOX(&sora::video_to_uint8_fwd));
  m.impl("_final_layer_fwd_cpu", TORCH_BOX(&sora::final_layer_fwd));
  m.impl("_final_layer_bwd_cpu", TORCH_BOX(&sora::final_layer_bwd));
}
