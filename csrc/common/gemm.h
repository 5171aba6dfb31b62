// fp32 matrix products of blocks that lie in cache, for kernels that make one operand as they go - gather patches,
// normalise rows - and would rather not write it to memory for a library to read again.
//
//   C [rows, columns] = A [rows, depth] B [depth, columns]  (+ C)
//
// A tile of kRows x kColumns results stays in registers while `depth` runs: each step loads two vectors of B and
// broadcasts kRows values of A. 16 vector registers hold 6 x 2 accumulators, the 32 of AVX-512 8 x 2; more would need
// fewer loads, but the row counts of real models divide by 8. After kDepth steps a tile is added to C, which bounds the
// rounding error of long sums and keeps kDepth x kColumns values of B in L1 for the tiles below.

#pragma once

#include "common/simd.h"

#include <algorithm>
#include <cstdint>

namespace sora {

// V floats to a vector.
template <int V>
struct Tile {
  static constexpr int64_t kRows = V == 16 ? 8 : 6, kColumns = 2 * V;
};

constexpr int64_t kDepth = 128;

inline constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Floats of a vector of the instruction set that runs.
inline int64_t lanes() { return isa() == Isa::avx512 ? 16 : isa() == Isa::avx2 ? 8 : 4; }

// `dispatch` of simd.h for kernels that are written for V floats to a vector: Kernel<V, T>.
template <template <int, class> class Kernel, class T, class Params>
void dispatch_lanes(const Params& params, int64_t begin, int64_t end) {
  switch (isa()) {
    case Isa::avx512: return run_avx512<Kernel<16, T>>(params, begin, end);
    case Isa::avx2: return run_avx2<Kernel<8, T>>(params, begin, end);
    case Isa::baseline: return run_baseline<Kernel<4, T>>(params, begin, end);
  }
}

// An operand in memory. A [m, k] is read at data[m * ld + k], transposed at data[k * ld + m], and whole tiles are read:
// rows beyond the last must exist, whatever their values.
struct Block {
  const float* data;
  int64_t ld;
};

// B: panels of kColumns columns, column j of a panel's row k at data[panel * kColumns * panel_step + k * ld + j].
struct Panels {
  const float* data;
  int64_t panel_step, ld;
};

// Packed: [panel][k][kColumns]. Columns beyond the last are zeros.
inline Panels packed_panels(const float* data, int64_t depth) { return {data, depth, 2 * lanes()}; }
inline int64_t packed_size(int64_t depth, int64_t columns) { return depth * round_up(columns, 2 * lanes()); }

// B as rows in memory, of whole panels.
inline Panels row_panels(const float* data, int64_t ld) { return {data, 1, ld}; }

template <int V>
struct Lanes {
  typedef float Type __attribute__((vector_size(V * sizeof(float))));
  typedef float Unaligned __attribute__((vector_size(V * sizeof(float)), aligned(sizeof(float)), may_alias));
};

template <int V, bool kTransposedA>
SORA_INLINE void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                               int64_t ldc, bool add) {
  using Vector = typename Lanes<V>::Type;
  using Memory = typename Lanes<V>::Unaligned;
  constexpr int kRows = Tile<V>::kRows;
  Vector sum[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector b0 = *reinterpret_cast<const Memory*>(b + k * ldb);
    const Vector b1 = *reinterpret_cast<const Memory*>(b + k * ldb + V);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float value = kTransposedA ? a[k * lda + r] : a[r * lda + k];
      sum[r][0] += value * b0;
      sum[r][1] += value * b1;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    Memory *c0 = reinterpret_cast<Memory*>(c + r * ldc), *c1 = reinterpret_cast<Memory*>(c + r * ldc + V);
    *c0 = add ? *c0 + sum[r][0] : sum[r][0];
    *c1 = add ? *c1 + sum[r][1] : sum[r][1];
  }
}

// Whole tiles of C are written.
template <int V, bool kTransposedA>
SORA_INLINE void multiply(Block a, Panels b, int64_t rows, int64_t columns, int64_t depth, float* c, int64_t ldc,
                          bool add) {
  constexpr int64_t kRows = Tile<V>::kRows, kColumns = Tile<V>::kColumns;
  int64_t k = 0;
  do {  // a depth of zero writes zeros
    for (int64_t j = 0; j < columns; j += kColumns) {
      for (int64_t i = 0; i < rows; i += kRows) {
        multiply_tile<V, kTransposedA>(a.data + (kTransposedA ? k * a.ld + i : i * a.ld + k), a.ld,
                                       b.data + j * b.panel_step + k * b.ld, b.ld, std::min(kDepth, depth - k),
                                       c + i * ldc + j, ldc, add || k > 0);
      }
    }
  } while ((k += kDepth) < depth);
}

// Packs B from a weight of any dtype: element (k, n) at data[k * stride_k + n * stride_n].
struct PackParams {
  const void* data;
  int64_t depth, columns, stride_k, stride_n;
  float* packed;
};

template <class T>
struct Pack {
  static SORA_INLINE void run(const PackParams& p, int64_t begin, int64_t end) {  // panels
    const int64_t width = 2 * lanes();
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * width, n = std::min(width, p.columns - first);
      const T* from = static_cast<const T*>(p.data) + first * p.stride_n;
      float* to = p.packed + first * p.depth;
      for (int64_t k = 0; k < p.depth; ++k, to += width, from += p.stride_k) {
        for (int64_t j = 0; j < n; ++j) to[j] = to_float(from[j * p.stride_n]);
        for (int64_t j = n; j < width; ++j) to[j] = 0.0f;
      }
    }
  }
};

}  // namespace sora
