// norm_modulate, backward. Of out = n * (1 + scale + scale_table) + shift + shift_table, n = xhat * weight + bias, with
// g = dout, two sums over the tokens of a modulation row and of a column are enough for all gradients but dx:
//
//   A = sum g,  B = sum g * xhat      dshift = A,  dscale = weight * B + bias * A,
//                                     dweight = (1 + scale + scale_table) * B,  dbias = (1 + scale + scale_table) * A
//
// A program of one, four or sixteen warps has rows of its own, one after the other: x and dout are read once, the next
// row while this one is at work, dx is written once; A and B stay in registers. What is left of them is fp32 partials, at
// most kPrograms rows, which a second kernel adds up in a fixed order: every run gives the same bits.

#include "common/check.h"
#include "common/library.h"
#include "common/reduce.cuh"
#include "common/stream.cuh"
#include "common/vec.cuh"
#include "cuda/modulation.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace sora {
namespace {

constexpr int kPrograms = 512;  // in blocks: about 4 for each processor of a large GPU
constexpr int kTotals = 4;      // sums over all rows: of dshift_table, dscale_table, dweight, dbias

template <class T_, int kWarps_, int kElements_>
struct NormModulateBackwardTraits : RowTraits<T_, kWarps_, kElements_> {
  using Row = RowTraits<T_, kWarps_, kElements_>;
  static constexpr bool kAhead = sizeof(T_) == 2;  // the next row fits the registers, too
  static constexpr int kRegisters = Row::kWarps == 16 ? 128 : 168;  // x, dout, A, B
  static constexpr int kMinBlocks = 65536 / (kRegisters * Row::kThreads);

  static_assert(kRegisters <= 168, "sixteen warps have no more");
  static_assert(kMinBlocks >= 1, "a block must fit the register file");
};

struct NormModulateBackwardParams {
  Tokens dout, x, dx;
  Rows scale, dshift, dscale;  // gradients where a program has all tokens of a row, else
  float *dshift_partial, *dscale_partial;  // [B * F, chunks, D]
  Vector weight, bias, scale_table;
  float* totals[kTotals];      // [programs, D], of those that are wanted
  int rows, S, D, F, tokens;   // tokens: of a modulation row
  int programs, chunks, chunk; // of one of so many chunks of a modulation row
  int span;                    // or of all tokens of so many modulation rows
  bool rms;
  float eps;
};

// What a thread has of a row of x and of dout.
template <class Traits>
struct Pair {
  Vec<typename Traits::T> x[Traits::kVecs], g[Traits::kVecs];

  __device__ __forceinline__ void load(const NormModulateBackwardParams& p, int row, int thread) {
    using T = typename Traits::T;
    const int64_t b = row / p.S, s = row % p.S;
    const T* x_row = static_cast<const T*>(p.x.data) + b * p.x.stride_b + s * p.x.stride_s;
    const T* g_row = static_cast<const T*>(p.dout.data) + b * p.dout.stride_b + s * p.dout.stride_s;
#pragma unroll
    for (int v = 0; v < Traits::kVecs; ++v) {
      const int column = (v * Traits::kRowThreads + thread) * Traits::kVec;
      x[v] = g[v] = {};
      if (column < p.D) x[v] = load_streaming(x_row + column), g[v] = load_streaming(g_row + column);
    }
  }
};

// 1 + scale + scale_table for columns [d, d + N) of modulation row (b, f)
template <int N>
__device__ __forceinline__ void factor_of(const NormModulateBackwardParams& p, int64_t b, int64_t f, int d, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = 1.0f;
  add_any(p.scale.data, p.scale.dtype, b * p.scale.stride_b + f * p.scale.stride_f + d, to);
  add_any(p.scale_table.data, p.scale_table.dtype, d, to);
}

// N floats to or from shared memory, 16 bytes at a time.
template <int N>
__device__ __forceinline__ void copy(float* to, const float (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) *reinterpret_cast<float4*>(to + i) = {from[i], from[i + 1], from[i + 2], from[i + 3]};
}

template <int N>
__device__ __forceinline__ void copy(float (&to)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// The end of a modulation row: what A and B give for columns [d, d + N). totals: a thread's own places, of all that are
// wanted, D floats apart.
template <int N>
__device__ __forceinline__ void finish(const NormModulateBackwardParams& p, int64_t b, int64_t f, int64_t partial,
                                       int d, const float (&A)[N], const float (&B)[N], float* totals) {
  float n[N], factor[N];  // n: sum of g * n
  if (p.weight) load_any(p.weight.data, p.weight.dtype, d, n);
#pragma unroll
  for (int i = 0; i < N; ++i) n[i] = p.weight ? n[i] * B[i] : B[i];
  if (p.bias) {
    load_any(p.bias.data, p.bias.dtype, d, factor);
#pragma unroll
    for (int i = 0; i < N; ++i) n[i] += factor[i] * A[i];
  }
  if (p.dshift_partial) store_as(p.dshift_partial + partial * p.D + d, A);
  if (p.dscale_partial) store_as(p.dscale_partial + partial * p.D + d, n);
  if (p.dshift) store_any(p.dshift.data, p.dshift.dtype, b * p.dshift.stride_b + f * p.dshift.stride_f + d, A);
  if (p.dscale) store_any(p.dscale.data, p.dscale.dtype, b * p.dscale.stride_b + f * p.dscale.stride_f + d, n);
  if (p.totals[2] || p.totals[3]) factor_of(p, b, f, d, factor);
#pragma unroll
  for (int k = 0; k < kTotals; ++k) {
    if (!p.totals[k]) continue;
    float sum[N];
    copy(sum, totals);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += k == 0 ? A[i] : k == 1 ? n[i] : factor[i] * (k == 2 ? B[i] : A[i]);
    copy(totals, sum);
    totals += p.D;
  }
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kMinBlocks) void norm_modulate_bwd_kernel(
    const __grid_constant__ NormModulateBackwardParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec, kVecs = Traits::kVecs;
  __shared__ float shared[Traits::kWarps];
  extern __shared__ __align__(16) float memory[];  // [kRowsPerBlock, wanted, D]

  const int thread = threadIdx.x % Traits::kRowThreads, sub = threadIdx.x / Traits::kRowThreads;
  const int program = blockIdx.x * Traits::kRowsPerBlock + sub;
  if (program >= p.programs) return;  // whole warps only; a program of several warps has its block to itself
  const int chunk = program % p.chunks, frame = program / p.chunks * p.span;
  const int first = frame * p.tokens + chunk * p.chunk;
  const int last = p.chunks > 1 ? min(first + p.chunk, (frame + 1) * p.tokens) : min(first + p.span * p.tokens, p.rows);

  int wanted = 0;
#pragma unroll
  for (int k = 0; k < kTotals; ++k) wanted += p.totals[k] != nullptr;
  float* totals = memory + sub * wanted * p.D;
  const auto column = [&](int v) { return (v * Traits::kRowThreads + thread) * kVec; };
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (column(v) >= p.D) continue;
    constexpr float kZeros[kVec] = {};
    for (int k = 0; k < wanted; ++k) copy(totals + k * p.D + column(v), kZeros);
  }

  for (int row = first; row < last;) {  // a modulation row after another
    const int of_row = row / p.tokens, b = of_row / p.F, f = of_row % p.F;
    const int end = min(last, (of_row + 1) * p.tokens);
    float A[kVecs][kVec] = {}, B[kVecs][kVec] = {};
    Pair<Traits> pair;
    pair.load(p, row, thread);
    for (; row < end; ++row) {
      float x[kVecs][kVec], g[kVecs][kVec];
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) x[v][i] = to_float(pair.x[v].values[i]), g[v][i] = to_float(pair.g[v].values[i]);
      }
      if (Traits::kAhead && row + 1 < end) pair.load(p, row + 1, thread);

      float sum = 0.0f;
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum += x[v][i];
      }
      float mean = p.rms ? 0.0f : row_sum<Traits::kWarps>(sum, shared) / p.D;
      float squares = 0.0f, left = 0.0f;
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        if (column(v) >= p.D) continue;  // beyond the row the zeros are not deviations
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float deviation = x[v][i] - mean;
          left += deviation, squares += deviation * deviation;
        }
      }
      const float rstd = corrected<Traits::kWarps>(left, squares, shared, p.D, p.rms, p.eps, mean);

      float shift = 0.0f, along = 0.0f;
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        if (column(v) >= p.D) continue;
        float factor[kVec];
        factor_of(p, b, f, column(v), factor);
        if (p.weight) {
          float weight[kVec];
          load_any(p.weight.data, p.weight.dtype, column(v), weight);
#pragma unroll
          for (int i = 0; i < kVec; ++i) factor[i] *= weight[i];
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          x[v][i] = (x[v][i] - mean) * rstd;
          A[v][i] += g[v][i], B[v][i] += g[v][i] * x[v][i];
          g[v][i] *= factor[i];
          shift += g[v][i], along += g[v][i] * x[v][i];
        }
      }
      if (p.dx) {
        along = row_sum<Traits::kWarps>(along, shared) / p.D;
        shift = p.rms ? 0.0f : row_sum<Traits::kWarps>(shift, shared) / p.D;
        T* dx = static_cast<T*>(p.dx.data) + int64_t{b} * p.dx.stride_b + int64_t{row - b * p.S} * p.dx.stride_s;
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
          if (column(v) >= p.D) continue;
          Vec<T> vec;
#pragma unroll
          for (int i = 0; i < kVec; ++i) vec.values[i] = from_float<T>((g[v][i] - shift - x[v][i] * along) * rstd);
          store_vec(dx + column(v), vec);
        }
      }
      if (!Traits::kAhead && row + 1 < end) pair.load(p, row + 1, thread);
    }
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if (column(v) >= p.D) continue;
      finish(p, b, f, int64_t{of_row} * p.chunks + chunk, column(v), A[v], B[v], totals + column(v));
    }
  }

#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (column(v) >= p.D) continue;
    const float* from = totals + column(v);
#pragma unroll
    for (int k = 0; k < kTotals; ++k) {
      if (!p.totals[k]) continue;
      float values[kVec];
      copy(values, from);
      store_as(p.totals[k] + int64_t{program} * p.D + column(v), values);
      from += p.D;
    }
  }
}

constexpr int kSumWarps = 8, kSumBlocks = 4;  // on a processor; left to itself, ptxas spills a word on sm_80 to fit more

// to[row] = the sum of partial [rows, count, D] over count: of each of eight warps every eighth, then those of the warps.
__global__ __launch_bounds__(kSumWarps* kWarp, kSumBlocks) void sum_partials_kernel(
    const float* partial, const Rows to, int F, int count, int D) {
  __shared__ float4 sums[kSumWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, blocks = (D + 4 * kWarp - 1) / (4 * kWarp);
  const int d = (blockIdx.x % blocks * kWarp + lane) * 4;
  const int64_t row = blockIdx.x / blocks;
  float4 sum = {};
  if (d < D) {
    for (int i = warp; i < count; i += kSumWarps) {
      const float4 value = __ldg(reinterpret_cast<const float4*>(partial + (row * count + i) * D + d));
      sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || d >= D) return;
#pragma unroll
  for (int i = 1; i < kSumWarps; ++i) {
    const float4 value = sums[i][lane];
    sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
  }
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
  store_any(to.data, to.dtype, row / F * to.stride_b + row % F * to.stride_f + d, values);
}

// ---- arguments

void sum_partials(const float* partial, const Rows& to, int64_t rows, int64_t F, int64_t count, int64_t D,
                  cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((D + 4 * kWarp - 1) / (4 * kWarp) * rows);
  sum_partials_kernel<<<blocks, kSumWarps * kWarp, 0, stream>>>(partial, to, static_cast<int>(F),
                                                                static_cast<int>(count), static_cast<int>(D));
}

// The programs of a call: chunks of the tokens of each modulation row, or whole modulation rows, in order.
template <class Traits>
void divide(NormModulateBackwardParams& p) {
  const auto ceil = [](int n, int d) { return (n + d - 1) / d; };
  const int frames = p.rows / p.tokens, programs = kPrograms * Traits::kRowsPerBlock;
  p.chunk = ceil(p.tokens, std::max(1, programs / frames));
  p.chunks = ceil(p.tokens, p.chunk);
  p.span = p.chunks == 1 ? ceil(frames, programs) : 1;
  p.programs = ceil(frames, p.span) * p.chunks;
}

struct Gradients {
  Rows dshift, dscale;
  Vector totals[kTotals];
};

template <class Traits>
bool launch_if_it_fits(NormModulateBackwardParams& p, const Gradients& to, const Tensor& x, cudaStream_t stream) {
  if (p.D > Traits::kMaxWidth) return false;
  divide<Traits>(p);
  const int64_t frames = p.rows / p.tokens;
  const int64_t of_frames = p.chunks > 1 ? (bool(to.dshift) + bool(to.dscale)) * frames * p.chunks : 0;
  int wanted = 0;
  for (const Vector& total : to.totals) wanted += bool(total);
  const int64_t rows = of_frames + int64_t{wanted} * p.programs;
  const Tensor workspace = torch::stable::new_empty(x, {std::max<int64_t>(rows, 1) * p.D}, ScalarType::Float);
  float* next = static_cast<float*>(workspace.data_ptr());
  const auto take = [&](int64_t count) { return next += count * p.D, next - count * p.D; };
  if (p.chunks > 1) {
    if (to.dshift) p.dshift_partial = take(frames * p.chunks);
    if (to.dscale) p.dscale_partial = take(frames * p.chunks);
  } else {
    p.dshift = to.dshift, p.dscale = to.dscale;
  }
  for (int k = 0; k < kTotals; ++k) p.totals[k] = to.totals[k] ? take(p.programs) : nullptr;

  const auto kernel = norm_modulate_bwd_kernel<Traits>;
  const int shared = Traits::kRowsPerBlock * wanted * p.D * static_cast<int>(sizeof(float));
  if (shared > 40960) {
    SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  }
  const int blocks = (p.programs + Traits::kRowsPerBlock - 1) / Traits::kRowsPerBlock;
  kernel<<<blocks, Traits::kThreads, shared, stream>>>(p);
  if (p.dshift_partial) sum_partials(p.dshift_partial, to.dshift, frames, p.F, p.chunks, p.D, stream);
  if (p.dscale_partial) sum_partials(p.dscale_partial, to.dscale, frames, p.F, p.chunks, p.D, stream);
  for (int k = 0; k < kTotals; ++k) {
    if (p.totals[k]) sum_partials(p.totals[k], {to.totals[k].data, to.totals[k].dtype}, 1, 1, p.programs, p.D, stream);
  }
  return true;
}

template <class T>
void launch(NormModulateBackwardParams& p, const Gradients& to, const Tensor& x, cudaStream_t stream) {
  const bool launched = p.D % Vec<T>::kSize == 0 &&
                        (launch_if_it_fits<NormModulateBackwardTraits<T, 1, 16>>(p, to, x, stream) ||
                         launch_if_it_fits<NormModulateBackwardTraits<T, 4, 16>>(p, to, x, stream) ||
                         launch_if_it_fits<NormModulateBackwardTraits<T, 16, 8>>(p, to, x, stream));
  SORA_CHECK(launched, "x: expected a width of at most 4096 in multiples of ", Vec<T>::kSize, ", got ", p.D);
  SORA_CUDA_CHECK(cudaGetLastError());
}

// t, or a dense copy of it where its rows do not start where 16-byte loads may.
Tensor readable(const Tensor& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) aligned &= t.stride(i) * size_of(t.scalar_type()) % 16 == 0;
  if (aligned) return t;
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  torch::stable::copy_(copy, t);
  return copy;
}

OptionalTensor readable(const OptionalTensor& t) { return t ? OptionalTensor(readable(*t)) : t; }

void norm_modulate_bwd(const Tensor& dout, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& scale_table, const OptionalTensor& index,
                       bool rms, double eps, const OptionalTensor& dx, const OptionalTensor& dshift,
                       const OptionalTensor& dscale, const OptionalTensor& dweight, const OptionalTensor& dbias,
                       const OptionalTensor& dshift_table, const OptionalTensor& dscale_table) {
  SORA_CHECK(!index, "index: expected none, got ", describe(*index));
  Shape shape = shape_of("x", x);
  const DeviceGuard guard(x.get_device_index());
  const Tensor own_dout = readable(dout), own_x = readable(x);
  const OptionalTensor own_scale = readable(scale), own_weight = readable(weight), own_bias = readable(bias),
                       own_table = readable(scale_table);
  NormModulateBackwardParams p{};
  Gradients to;
  p.dout = tokens("dout", own_dout, x), p.x = tokens("x", own_x, x), p.dx = tokens("dx", dx, x);
  p.scale = rows("scale", own_scale, x, shape);
  to.dshift = row_gradients("dshift", dshift, x, shape);
  to.dscale = row_gradients("dscale", dscale, x, shape);
  p.weight = vector("weight", own_weight, x), p.bias = vector("bias", own_bias, x);
  p.scale_table = vector("scale_table", own_table, x);
  const OptionalTensor* sums[] = {&dshift_table, &dscale_table, &dweight, &dbias};
  const char* names[] = {"dshift_table", "dscale_table", "dweight", "dbias"};
  for (int k = 0; k < kTotals; ++k) to.totals[k] = vector(names[k], *sums[k], x);
  SORA_CHECK(shape.rows() <= INT32_MAX / 2, "x: expected fewer than 2^30 rows, got ", describe(x));
  if (shape.rows() == 0 || shape.D == 0) {
    for (const OptionalTensor* t : {&dshift, &dscale, sums[0], sums[1], sums[2], sums[3]}) {
      if (*t && (*t)->numel()) {
        Tensor zeros = **t;
        torch::stable::zero_(zeros);
      }
    }
    return;
  }
  p.rows = static_cast<int>(shape.rows()), p.S = static_cast<int>(shape.S), p.D = static_cast<int>(shape.D);
  p.F = static_cast<int>(shape.modulation_rows()), p.tokens = static_cast<int>(shape.rows_per_modulation());
  p.rms = rms, p.eps = static_cast<float>(eps);

  const cudaStream_t stream = current_stream(x.get_device_index());
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return launch<__nv_bfloat16>(p, to, x, stream);
    case ScalarType::Half: return launch<__half>(p, to, x, stream);
    default: return launch<float>(p, to, x, stream);
  }
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_norm_modulate_bwd_cuda", TORCH_BOX(&sora::norm_modulate_bwd));
}
