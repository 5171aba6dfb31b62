// fp32 matrix products of blocks that lie in cache, for kernels that make one operand as they go - gather patches,
// normalise rows - and would rather not write it to memory for a library to read again.
//
//   C [rows, columns] = A [rows, depth] B [depth, columns]  (+ C)
//
// A tile of kRows x kColumns results stays in registers while `depth` runs: each step loads two vectors of B and
// broadcasts kRows values of A. 16 vector registers hold 6 x 2 accumulators, the 32 of AVX-512 8 x 2; more would need
// fewer loads, but the row counts of real models divide by 8. After kDepth steps a tile is added to C, which bounds the
// rounding error of long sums and keeps kDepth x kColumns values of B in L1 for the tiles below. On an EPYC (Zen 4) with
// AVX-512 a block of 48 x 1536 x 64 runs at some 110 GFLOP/s a core, of 118 that its clock allows.

#pragma once

#include "common/lanes.h"

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

// sum += the two products of each pair. In assembly, because the intrinsic inlines only where the whole kernel asks for
// AVX512_BF16, and so that no arithmetic touches a pair as if it were a float.
template <int V, class Vector>
SORA_INLINE void add_pair_products([[maybe_unused]] Vector& sum, [[maybe_unused]] const float& pair,
                                   [[maybe_unused]] const Vector& b) {
#if SORA_ASSEMBLY
  if constexpr (V == 16) asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(pair));
#endif
}

template <int V, bool kTransposedA, bool kPairs>
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
      const float& value = kTransposedA ? a[k * lda + r] : a[r * lda + k];
      if constexpr (kPairs) {
        Vector s0 = sum[r][0], s1 = sum[r][1];  // an array element that assembly writes would live in memory
        add_pair_products<V>(s0, value, b0);
        add_pair_products<V>(s1, value, b1);
        sum[r][0] = s0, sum[r][1] = s1;
      } else {
        sum[r][0] += value * b0;
        sum[r][1] += value * b1;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    Memory *c0 = reinterpret_cast<Memory*>(c + r * ldc), *c1 = reinterpret_cast<Memory*>(c + r * ldc + V);
    *c0 = add ? *c0 + sum[r][0] : sum[r][0];
    *c1 = add ? *c1 + sum[r][1] : sum[r][1];
  }
}

// Whole tiles of C are written. `pairs`: A and B hold pairs of bf16 that follow each other in k, in the place of floats.
template <int V, bool kTransposedA>
SORA_INLINE void multiply(Block a, Panels b, int64_t rows, int64_t columns, int64_t depth, float* c, int64_t ldc,
                          bool add, bool pairs = false) {
  constexpr int64_t kRows = Tile<V>::kRows, kColumns = Tile<V>::kColumns;
  int64_t k = 0;
  do {  // a depth of zero writes zeros
    for (int64_t j = 0; j < columns; j += kColumns) {
      for (int64_t i = 0; i < rows; i += kRows) {
        const float* tile_a = a.data + (kTransposedA ? k * a.ld + i : i * a.ld + k);
        const float* tile_b = b.data + j * b.panel_step + k * b.ld;
        float* tile_c = c + i * ldc + j;
        const int64_t n = std::min(kDepth, depth - k);
        if (V == 16 && pairs) {
          multiply_tile<V, kTransposedA, true>(tile_a, a.ld, tile_b, b.ld, n, tile_c, ldc, add || k > 0);
        } else {
          multiply_tile<V, kTransposedA, false>(tile_a, a.ld, tile_b, b.ld, n, tile_c, ldc, add || k > 0);
        }
      }
    }
  } while ((k += kDepth) < depth);
}

}  // namespace sora
