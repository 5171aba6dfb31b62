// The gradients of modulation. Of
//
//   x_new = x + G * y, or of yhat, the norm of y;   out = n * F + shift + shift_table,   n = xhat * weight + bias
//
// with xhat the norm of x_new (where there is no y, of x), G = gate + gate_table, F = 1 + scale + scale_table, g = dout
// and d the gradient that reaches x_new from both results, three sums over the tokens of a modulation row and of a column
// are enough for all gradients but dx = d and dy = G * d, or what a norm of y makes of that:
//
//   A = sum g,  B = sum g * xhat,  C = sum d * y      dshift = A,  dscale = weight * B + bias * A,  dgate = C,
//                                                     dweight = F * B,  dbias = F * A
//
// A program has rows of its own, one after the other, in the registers of as many warps as 16 columns a thread ask for.
// Each tensor is read or written once: of x and dout the next row while this one is at work, of dx_new and y when this
// one's are used up. A, B and C stay in registers, F * weight and G in shared memory, where a thread reads what it wrote.
// What is left of the sums is fp32 partials, at most kPrograms rows, which a second kernel adds up in a fixed order:
// every run gives the same bits.

#pragma once

#include "common/check.h"
#include "common/operands.h"
#include "common/packed.cuh"
#include "common/partials.cuh"
#include "common/reduce.cuh"
#include "common/stream.cuh"
#include "common/vec.cuh"
#include "cuda/modulation.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace sora {
namespace {

constexpr int kPrograms = 512;  // in blocks: about 4 for each processor of a large GPU
constexpr int kRows = 3;        // gradients of rows: gate, shift, scale
constexpr int kTotals = 5;      // and, summed over all of them, of their tables, of weight and of bias

// A row has as many warps as it needs, at most kWarps. Values of 32 bits leave a thread room for 12 columns, of 16 bits for
// 16 and the next row of x and dout. kBranch: there is a y.
template <class T_, int kWarps_, bool kBranch_>
struct ModulationBackwardTraits : RowTraits<T_, kWarps_, sizeof(T_) == 4 ? 12 : 16> {
  using Row = RowTraits<T_, kWarps_, sizeof(T_) == 4 ? 12 : 16>;
  static constexpr bool kBranch = kBranch_, kAhead = sizeof(T_) == 2;
  static constexpr int kRegisters = 168;  // A, B, C, dout, x, dx_new, y, the next dout and x; twelve warps have as many
  static constexpr int kMinBlocks = 65536 / (kRegisters * Row::kThreads);

  static_assert(kMinBlocks >= 1, "a block must fit the register file");
};

struct ModulationBackwardParams {
  Tokens dout, dx_new, x, y, dx, dy;
  Rows gate, scale, gradients[kRows];  // gradients where a program has all tokens of a modulation row, else
  Vector weight, bias, gate_table, scale_table;
  float* partials[kRows];      // [B * F, chunks, D]
  float* totals[kTotals];      // [programs, D]
  int rows, S, D, F, tokens;   // tokens: of a modulation row
  int programs, chunks, chunk; // of one of so many chunks of a modulation row
  int span;                    // or of all tokens of so many modulation rows
  bool rms, y_normed, y_rms;
  float eps;

  __host__ __device__ constexpr int first_frame(int program) const { return program / chunks * span; }
};

// to = `least` and what row (b, f) and the table have in columns [d, d + N)
template <int N>
__device__ __forceinline__ void sum_of(const Rows& row, const Vector& table, float least, int64_t b, int64_t f, int d,
                                       float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = least;
  add_any(row.data, row.dtype, b * row.stride_b + f * row.stride_f + d, to);
  add_any(table.data, table.dtype, d, to);
}

template <int N>
__device__ __forceinline__ void gate_of(const ModulationBackwardParams& p, int64_t b, int64_t f, int d, float (&to)[N]) {
  sum_of(p.gate, p.gate_table, p.gate ? 0.0f : 1.0f, b, f, d, to);
}

template <int N>
__device__ __forceinline__ void scale_of(const ModulationBackwardParams& p, int64_t b, int64_t f, int d, float (&to)[N]) {
  sum_of(p.scale, p.scale_table, 1.0f, b, f, d, to);
}

// Values join those of a program's earlier modulation rows, where a thread reads what it wrote.
template <int N>
__device__ __forceinline__ void add_total(float* to, bool first, float (&values)[N]) {
  if (!first) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(to + i);
      values[i] += four.x, values[i + 1] += four.y, values[i + 2] += four.z, values[i + 3] += four.w;
    }
  }
  store_as(to, values);
}

// The end of a program's part of a modulation row: what A, B and C give for columns [d, d + N).
template <bool kBranch, int N>
__device__ __forceinline__ void finish(const ModulationBackwardParams& p, int program, int frame, int d,
                                       const float (&A)[N], const float (&B)[N], const float (&C)[N]) {
  const int64_t b = frame / p.F, f = frame % p.F, total = int64_t{program} * p.D + d;
  const bool first = frame == p.first_frame(program);
  const auto give = [&](int k, float(&sum)[N]) {
    if (p.partials[k]) store_as(p.partials[k] + (int64_t{frame} * p.chunks + program % p.chunks) * p.D + d, sum);
    const Rows& to = p.gradients[k];
    if (to) store_any(to.data, to.dtype, b * to.stride_b + f * to.stride_f + d, sum);
    if (p.totals[k]) add_total(p.totals[k] + total, first, sum);
  };
  float sum[N];
  if constexpr (kBranch) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = C[i];
    give(0, sum);
  }
  if (p.dout) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = A[i];
    give(1, sum);
    float parameter[N];
    if (p.weight) load_any(p.weight.data, p.weight.dtype, d, parameter);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = p.weight ? parameter[i] * B[i] : B[i];
    if (p.bias) {
      load_any(p.bias.data, p.bias.dtype, d, parameter);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += parameter[i] * A[i];
    }
    give(2, sum);
    if (p.totals[3] || p.totals[4]) {
      scale_of(p, b, f, d, parameter);
#pragma unroll
      for (int k = 3; k < kTotals; ++k) {
        if (!p.totals[k]) continue;
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] = parameter[i] * (k == 3 ? B[i] : A[i]);
        add_total(p.totals[k] + total, first, sum);
      }
    }
  }
}

// Means over a row of D values of what a norm takes away of a gradient: along xhat, and, of a layer norm, of all alike.
template <class Sums>
__device__ __forceinline__ void means_of(float (&along)[2], const Sums& sums, bool rms, int D) {
  if (rms) {
    float one[1] = {along[0]};
    sums(one);
    along[0] = one[0] / D, along[1] = 0.0f;
  } else {
    sums(along);
    along[0] /= D, along[1] /= D;
  }
}

// The gradient of xhat -> that of x, by these means.
template <int N>
__device__ __forceinline__ void norm_gradient(float (&d)[N], const float (&xhat)[N], const float (&along)[2], float rstd) {
#pragma unroll
  for (int i = 0; i < N; ++i) d[i] = (d[i] - along[1] - xhat[i] * along[0]) * rstd;
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kMinBlocks) void modulation_bwd_kernel(
    const __grid_constant__ ModulationBackwardParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec, kVecs = Traits::kVecs;
  constexpr bool kBranch = Traits::kBranch, kAlone = Traits::kWarps == 1;
  using Own = float[kVecs][kVec];
  __shared__ RowSums<Traits::kWarps> shared;
  extern __shared__ __align__(16) float4 memory[];  // F * weight, then G: [vectors of a thread, threads] each
  shared.clear();
  int turn = 0;
  const auto sums = [&](auto& values) { shared.add(values, turn); };

  const int row_threads = kAlone ? kWarp : blockDim.x, thread = kAlone ? threadIdx.x % kWarp : threadIdx.x;
  const int program = blockIdx.x * Traits::kRowsPerBlock + (kAlone ? threadIdx.x / kWarp : 0);
  if (program >= p.programs) return;  // whole warps only; a program of several warps has its block to itself
  int frame = p.first_frame(program);
  const int first = frame * p.tokens + program % p.chunks * p.chunk;
  const int last = p.chunks > 1 ? min(first + p.chunk, (frame + 1) * p.tokens) : min(first + p.span * p.tokens, p.rows);

  const auto between = [&](int v) { return v * row_threads * kVec; };
  const auto column = [&](int v) { return between(v) + thread * kVec; };
  const auto load = [&](const T* from, uint4(&to)[kVecs]) {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) to[v] = load_packed(from + between(v), column(v) < p.D);
  };
  const auto widened = [](const uint4(&from)[kVecs], Own& to) {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) widen<T>(from[v], to[v]);
  };
  const auto store = [&](T* to, const Own& values) {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if (column(v) < p.D) store_vec(to + between(v), rounded<T>(values[v]));
    }
  };
  const auto place = [&](bool gate, int v, int i) -> float4& {
    return memory[((gate ? Traits::kElements / 4 : 0) + (v * kVec + i) / 4) * blockDim.x + threadIdx.x];
  };
  const auto keep = [&](bool gate, int v, const float(&values)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; i += 4) place(gate, v, i) = {values[i], values[i + 1], values[i + 2], values[i + 3]};
  };
  const auto kept = [&](bool gate, int v, float(&values)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      const float4 four = place(gate, v, i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  };

  int b = first / p.S, s = first % p.S;
  const auto row_of = [&](const Tokens& t, int clip, int token) {
    return static_cast<T*>(t.data) + clip * t.stride_b + token * t.stride_s + thread * kVec;
  };
  T *x_row = row_of(p.x, b, s), *g_row = row_of(p.dout, b, s), *d_row = row_of(p.dx_new, b, s), *y_row = row_of(p.y, b, s);
  T *dx_row = row_of(p.dx, b, s), *dy_row = row_of(p.dy, b, s);
  uint4 next_x[kVecs], next_g[kVecs], next_d[kVecs] = {}, next_y[kVecs];
  const auto load_normed = [&] {
    if (p.dout) load(x_row, next_x), load(g_row, next_g);
  };
  const auto load_branch = [&] {
    if (p.dx_new) load(d_row, next_d);
    load(y_row, next_y);
  };
  load_normed();
  if constexpr (kBranch) load_branch();

  Own A, B, C;
  int left = 0;  // tokens of this modulation row
  for (int row = first; row < last; ++row) {
    if (left == 0) {
      left = min((frame + 1) * p.tokens, last) - row;
      const int f = frame % p.F;
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) A[v][i] = B[v][i] = C[v][i] = 0.0f;
        if (column(v) >= p.D) continue;
        float values[kVec];
        if (p.dout) {
          scale_of(p, b, f, column(v), values);
          if (p.weight) {
            float weight[kVec];
            load_any(p.weight.data, p.weight.dtype, column(v), weight);
#pragma unroll
            for (int i = 0; i < kVec; ++i) values[i] *= weight[i];
          }
          keep(false, v, values);
        }
        if constexpr (kBranch) {
          gate_of(p, b, f, column(v), values);
          keep(true, v, values);
        }
      }
    }
    const bool more = row + 1 < last, clip_ends = s + 1 == p.S;
    Own d = {};
    if (p.dout) {
      Own x;
      widened(next_x, x), widened(next_g, d);
      if (clip_ends) {
        x_row = row_of(p.x, b + 1, 0), g_row = row_of(p.dout, b + 1, 0);
      } else {
        x_row += p.x.stride_s, g_row += p.dout.stride_s;
      }
      if (Traits::kAhead && more) load_normed();
      float mean, along[2] = {};
      const float rstd = row_statistics(x, column, p.D, sums, p.rms, p.eps, mean);
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        if (column(v) >= p.D) continue;
        float factor[kVec];
        kept(false, v, factor);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          x[v][i] = (x[v][i] - mean) * rstd;
          A[v][i] += d[v][i], B[v][i] += d[v][i] * x[v][i];
          d[v][i] *= factor[i];
          along[0] += d[v][i] * x[v][i], along[1] += d[v][i];
        }
      }
      if (kBranch || p.dx) {
        means_of(along, sums, p.rms, p.D);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) norm_gradient(d[v], x[v], along, rstd);
      }
    }
    if constexpr (kBranch) {
      Own y, more_d;
      widened(next_y, y), widened(next_d, more_d);
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) d[v][i] += more_d[v][i];
      }
      if (p.dx) store(dx_row, d);
      float rstd = 0.0f, along[2] = {};
      if (p.y_normed) {
        float mean;
        rstd = row_statistics(y, column, p.D, sums, p.y_rms, p.eps, mean);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) normalise(y[v], mean, rstd);
      }
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        if (column(v) >= p.D) continue;
        float gate[kVec];
        kept(true, v, gate);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          C[v][i] += d[v][i] * y[v][i];
          d[v][i] *= gate[i];
        }
      }
      if (p.y_normed) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
          if (column(v) >= p.D) continue;
#pragma unroll
          for (int i = 0; i < kVec; ++i) along[0] += d[v][i] * y[v][i], along[1] += d[v][i];
        }
        means_of(along, sums, p.y_rms, p.D);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) norm_gradient(d[v], y[v], along, rstd);
      }
      if (p.dy) store(dy_row, d);
      if (clip_ends) {
        d_row = row_of(p.dx_new, b + 1, 0), y_row = row_of(p.y, b + 1, 0);
        dx_row = row_of(p.dx, b + 1, 0), dy_row = row_of(p.dy, b + 1, 0);
      } else {
        d_row += p.dx_new.stride_s, y_row += p.y.stride_s, dx_row += p.dx.stride_s, dy_row += p.dy.stride_s;
      }
      if (more) load_branch();
    } else {
      if (p.dx) store(dx_row, d);
      dx_row = clip_ends ? row_of(p.dx, b + 1, 0) : dx_row + p.dx.stride_s;
    }
    if (!Traits::kAhead && more) load_normed();
    if (--left == 0) {
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        if (column(v) < p.D) finish<kBranch>(p, program, frame, column(v), A[v], B[v], C[v]);
      }
      ++frame;
    }
    b += clip_ends, s = clip_ends ? 0 : s + 1;
  }
}

// ---- arguments

// Where the gradients of rows and those that are summed over all of them go.
struct Gradients {
  Rows rows[kRows];
  Vector totals[kTotals];
};

inline void set_shape(ModulationBackwardParams& p, const Shape& shape, const Tensor& x) {
  SORA_CHECK(shape.rows() <= INT32_MAX / 2, "x: expected fewer than 2^30 rows, got ", describe(x));
  p.rows = static_cast<int>(shape.rows()), p.S = static_cast<int>(shape.S), p.D = static_cast<int>(shape.D);
  p.F = static_cast<int>(shape.modulation_rows()), p.tokens = static_cast<int>(shape.rows_per_modulation());
}

// The programs of a call, at most so many: chunks of the tokens of each modulation row, or whole modulation rows, in
// order. Then its launch, between the allocation of the partials and their sums. Where programs are chunks, what a
// modulation row's gradient is the sum of serves its table's, too.
template <class Launch>
void reduce(ModulationBackwardParams& p, int programs, const Gradients& to, const Tensor& x, cudaStream_t stream,
            const Launch& launch) {
  const auto ceil = [](int n, int d) { return (n + d - 1) / d; };
  const int frames = p.rows / p.tokens;
  p.chunk = ceil(p.tokens, std::max(1, programs / frames));
  p.chunks = ceil(p.tokens, p.chunk);
  p.span = p.chunks == 1 ? ceil(frames, programs) : 1;
  p.programs = ceil(frames, p.span) * p.chunks;

  const bool split = p.chunks > 1;
  const auto wanted = [&](int k) { return to.totals[k] || (split && k < kRows && to.rows[k]); };
  int64_t rows = 0;
  for (int k = 0; k < kTotals; ++k) rows += wanted(k) ? p.programs : 0;
  const Tensor workspace = torch::stable::new_empty(x, {std::max<int64_t>(rows, 1) * p.D}, ScalarType::Float);
  float* next = static_cast<float*>(workspace.data_ptr());
  Sums sums{.count = 0, .D = p.D};
  for (int k = 0; k < kTotals; ++k) {
    if (!split && k < kRows) p.gradients[k] = to.rows[k];
    if (!wanted(k)) continue;
    (split && k < kRows ? p.partials[k] : p.totals[k]) = next;
    if (split && k < kRows) sums.add(next, to.rows[k], frames, p.F, p.chunks);
    sums.add(next, {to.totals[k].data, to.totals[k].dtype}, 1, 1, p.programs);
    next += int64_t{p.programs} * p.D;
  }
  launch();
  sum_partials(sums, stream);
  SORA_CUDA_CHECK(cudaGetLastError());
}

template <class Traits>
bool launch_if_it_fits(ModulationBackwardParams& p, const Gradients& to, const Tensor& x, cudaStream_t stream) {
  if (p.D > Traits::kMaxWidth) return false;
  reduce(p, kPrograms * Traits::kRowsPerBlock, to, x, stream, [&] {
    const auto kernel = modulation_bwd_kernel<Traits>;
    const int of_warp = kWarp * Traits::kElements, warps = Traits::kWarps == 1 ? 1 : (p.D + of_warp - 1) / of_warp;
    const int threads = warps * kWarp * Traits::kRowsPerBlock;
    const int shared = (1 + Traits::kBranch) * threads * Traits::kElements * static_cast<int>(sizeof(float));
    if (shared > 40960) {
      SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    }
    kernel<<<(p.programs + Traits::kRowsPerBlock - 1) / Traits::kRowsPerBlock, threads, shared, stream>>>(p);
  });
  return true;
}

template <class T, bool kBranch>
void launch_rows(ModulationBackwardParams& p, const Gradients& to, const Tensor& x, cudaStream_t stream) {
  using Most = ModulationBackwardTraits<T, 12, kBranch>;
  const bool launched =
      p.D % Vec<T>::kSize == 0 && (launch_if_it_fits<ModulationBackwardTraits<T, 1, kBranch>>(p, to, x, stream) ||
                                   launch_if_it_fits<ModulationBackwardTraits<T, 4, kBranch>>(p, to, x, stream) ||
                                   launch_if_it_fits<Most>(p, to, x, stream));
  SORA_CHECK(launched, "x: expected a width of at most ", Most::kMaxWidth, " in multiples of ", Vec<T>::kSize, ", got ", p.D);
}

}  // namespace
}  // namespace sora
