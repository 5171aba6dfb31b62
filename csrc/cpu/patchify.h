// What the two ends of the transformer share on a CPU: checks of arguments, blocks of tokens, sums over tokens.
//
// A video is a matrix of tokens by features: the element of token s of clip b and of feature n lies at
// token(b, s) + features[n], whatever the strides of the video. Patches are gathered straight into a product and results
// scattered straight out of one; a matrix of patches never exists in memory. Both ends are then made of three products
// of a block of tokens that lies in cache, `small` [rows, K] beside `wide` [rows, D], both fp32:
//
//   widen    wide  = small W     patch_embed3d forward     d norm of final_layer
//   narrow   small = wide Wt     final_layer forward       dvideo of patch_embed3d
//   outer    dW   += smallt wide both weight gradients

#pragma once

#include "common/check.h"
#include "common/gemm.h"
#include "common/memory.h"
#include "common/pack.h"
#include "common/rows.h"
#include "cpu/patchify_video.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <sstream>
#include <vector>

namespace sora {
namespace {

// ---- arguments

inline void check_sizes(const char* name, const Tensor& t, const char* dims, const std::vector<int64_t>& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(i) == sizes[i];
  if (same) return;
  std::ostringstream expected;
  for (size_t i = 0; i < sizes.size(); ++i) expected << (i ? ", " : "") << sizes[i];
  SORA_CHECK(false, name, ": expected ", dims, " = (", expected.str(), "), got ", describe(t));
}

inline void check_dense(const char* name, const Tensor& t) {
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

inline void check_three(const char* name, const std::vector<int64_t>& values) {
  SORA_CHECK(values.size() == 3 && *std::min_element(values.begin(), values.end()) > 0, name,
             ": expected three positive integers, got ", values.size(), " of them, or a smaller one");
}

inline std::vector<int64_t> video_sizes(int64_t B, int64_t C, const std::vector<int64_t>& grid,
                                 const std::vector<int64_t>& patch) {
  return {B, C, grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2]};
}

// The grid divides the video into patches, of which this is the size.
inline std::vector<int64_t> patch_of(const char* name, const Tensor& video, const std::vector<int64_t>& grid) {
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

inline void advise_huge_pages(const Tensor& t) {
  int64_t stride = 1;
  for (int64_t i = t.dim() - 1; i >= 0; stride *= t.size(i--)) {
    if (t.size(i) != 1 && t.stride(i) != stride) return;
  }
  sora::advise_huge_pages(t.data_ptr(), t.numel() * t.element_size());
}

// ---- blocks of tokens

// Tokens of a block: whole tiles of every instruction set, and a `wide` of some 400 KB, part of an L2. Weights that no L2
// holds are read, and their gradients added to, once per block: then blocks are as long as can be.
inline int64_t block_rows(int64_t length, int64_t weights) {
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
inline Matrix small_block(int64_t rows, int64_t K) {
  return Matrix(rows, round_up(K, Tile<V>::kColumns) + Tile<V>::kRows);
}

// An odd number of cache lines apart, so that the same columns of many rows do not compete for the same lines of L1.
inline int64_t wide_ld(int64_t D) { return round_up(D, 32) + 16; }

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

inline Scratch pack(const Tensor& weight, int64_t depth, int64_t columns, int64_t stride_k, int64_t stride_n,
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
inline int64_t block_grain(int64_t rows, int64_t K, int64_t D) {
  return std::max<int64_t>(1, 524288 / std::max<int64_t>(rows * K * D, 1));
}

// ---- sums over tokens
//
// A chunk of tokens leaves fp32 partial sums: a weight gradient [K, ld], and rows. A second pass adds those in the order
// of the chunks: the result is the same bits however many threads ran.

constexpr int64_t kMinRows = 64;  // of a chunk

// At most 32 chunks, of 64 MiB altogether, but no fewer than 4 to share among threads.
inline int64_t target_chunks(int64_t K, int64_t D) {
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

inline void add_partials(const Sums& p) {
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

}  // namespace
}  // namespace sora
