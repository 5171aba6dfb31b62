// gate_residual and gate_residual_norm_modulate, forward:
//
//   x_new = x + (gate + gate_table) * y, or of y its norm
//   out   = norm(x_new) * (1 + scale + scale_table) + shift + shift_table, where there is one
//
// Rows of x and y are read once, with 16-byte loads that are all issued first, and stay in the registers of one, four or
// sixteen warps: x as it lies in memory, y in fp32, which becomes x_new. The norm sees x_new as it was stored.

#include "common/check.h"
#include "common/library.h"
#include "common/reduce.cuh"
#include "common/stream.cuh"
#include "common/vec.cuh"
#include "cuda/modulation.cuh"

#include <algorithm>
#include <optional>

namespace sora {
namespace {

template <class T_, int kWarps_, int kElements_>
struct GateResidualTraits : RowTraits<T_, kWarps_, kElements_> {
  using Row = RowTraits<T_, kWarps_, kElements_>;
  // y, x, and the rest
  static constexpr int kRegisters = std::min(Row::kElements + Row::kVecs * 4 + 72, 65536 / Row::kThreads);
  static constexpr int kMinBlocks = 65536 / (kRegisters * Row::kThreads);

  static_assert(kMinBlocks >= 1, "a block must fit the register file");
};

struct GateResidualParams {
  Shape shape;
  Tokens x, y, x_new, out;
  Rows gate, shift, scale;
  Vector weight, bias, gate_table, shift_table, scale_table;
  bool rms, y_normed, y_rms;
  float eps;
};

// As load_streaming, but not as constant memory: x_new may be written where x or y lies.
template <class T>
__device__ __forceinline__ Vec<T> load_once(const T* from) {
  uint4 raw;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(from)
               : "memory");
  return *reinterpret_cast<const Vec<T>*>(&raw);
}

template <class Traits, bool kNorm>
__global__ __launch_bounds__(Traits::kThreads, Traits::kMinBlocks) void gate_residual_kernel(
    const __grid_constant__ GateResidualParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec, kVecs = Traits::kVecs;
  __shared__ float shared[Traits::kWarps];
  const EachRowSum<Traits::kWarps> sums{shared};

  const int D = static_cast<int>(p.shape.D), thread = threadIdx.x % Traits::kRowThreads;
  const int64_t row = int64_t{blockIdx.x} * Traits::kRowsPerBlock + threadIdx.x / Traits::kRowThreads;
  if (row >= p.shape.rows()) return;  // whole warps only; a row of several warps has its block to itself
  const int64_t b = row / p.shape.S, s = row % p.shape.S, f = s / p.shape.rows_per_modulation();
  // Of vector v of a thread: where it lies, from its first on.
  constexpr auto between = [](int v) { return v * Traits::kRowThreads * kVec; };
  const auto column = [&](int v) { return between(v) + thread * kVec; };
  const auto row_of = [&](const Tokens& t) {
    return static_cast<T*>(t.data) + b * t.stride_b + s * t.stride_s + thread * kVec;
  };
  const T *from_x = row_of(p.x), *from_y = row_of(p.y);
  T* const to = row_of(p.x_new);
  const int64_t of_gate = b * p.gate.stride_b + f * p.gate.stride_f + thread * kVec;

  Vec<T> x[kVecs] = {}, y[kVecs] = {};
#pragma unroll
  for (int v = 0; v < kVecs; ++v)
    if (column(v) < D) y[v] = load_once(from_y + between(v));
#pragma unroll
  for (int v = 0; v < kVecs; ++v)
    if (column(v) < D) x[v] = load_once(from_x + between(v));
  float values[kVecs][kVec];
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[v][i] = to_float(y[v].values[i]);
  }
  if (p.y_normed) {
    float mean;
    const float rstd = row_statistics(values, column, D, sums, p.y_rms, p.eps, mean);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) normalise(values[v], mean, rstd);
  }
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (column(v) >= D) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[v][i] = 0.0f;
      continue;
    }
    if (p.gate) {
      float gate[kVec];
      load_any(p.gate.data, p.gate.dtype, of_gate + between(v), gate);
      add_any(p.gate_table.data, p.gate_table.dtype, column(v), gate);
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[v][i] = to_float(x[v].values[i]) + gate[i] * values[v][i];
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[v][i] += to_float(x[v].values[i]);
    }
    const Vec<T> vec = rounded<T>(values[v]);
    store_vec(to + between(v), vec);
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[v][i] = to_float(vec.values[i]);
  }
  if constexpr (kNorm) {
    float mean;
    const float rstd = row_statistics(values, column, D, sums, p.rms, p.eps, mean);
    T* const normed = row_of(p.out);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      if (column(v) >= D) continue;
      normalise(values[v], mean, rstd);
      modulate(p, b, f, column(v), values[v]);
      store_vec(normed + between(v), rounded<T>(values[v]));
    }
  }
}

template <class Traits>
bool launch_if_it_fits(const GateResidualParams& p, cudaStream_t stream) {
  if (p.shape.D > Traits::kMaxWidth) return false;
  const auto blocks = static_cast<unsigned>((p.shape.rows() + Traits::kRowsPerBlock - 1) / Traits::kRowsPerBlock);
  if (p.out)
    gate_residual_kernel<Traits, true><<<blocks, Traits::kThreads, 0, stream>>>(p);
  else
    gate_residual_kernel<Traits, false><<<blocks, Traits::kThreads, 0, stream>>>(p);
  return true;
}

template <class T>
void launch(const GateResidualParams& p, cudaStream_t stream) {
  constexpr int kVec = Vec<T>::kSize;
  const auto tokens = [&](const Tokens& t) { return !t || is_aligned(t, sizeof(T)); };
  const auto rows = [&](const Rows& r) { return !r || is_aligned(r, kVec); };
  const auto vector = [&](const Vector& v) { return !v || is_aligned(v, kVec); };
  SORA_CHECK(p.shape.D % kVec == 0 && tokens(p.x) && tokens(p.y) && tokens(p.x_new) && tokens(p.out) && rows(p.gate) &&
                 rows(p.shift) && rows(p.scale) && vector(p.weight) && vector(p.bias) && vector(p.gate_table) &&
                 vector(p.shift_table) && vector(p.scale_table),
             "expected rows of whole vectors of 16 bytes, each tensor's at multiples of 16 bytes; got D = ", p.shape.D);
  const bool launched = launch_if_it_fits<GateResidualTraits<T, 1, 16>>(p, stream) ||
                        launch_if_it_fits<GateResidualTraits<T, 1, 32>>(p, stream) ||
                        launch_if_it_fits<GateResidualTraits<T, 1, 48>>(p, stream) ||
                        launch_if_it_fits<GateResidualTraits<T, 4, 24>>(p, stream) ||
                        launch_if_it_fits<GateResidualTraits<T, 4, 48>>(p, stream) ||
                        launch_if_it_fits<GateResidualTraits<T, 16, 32>>(p, stream);
  SORA_CHECK(launched, "x: expected rows of at most 16384 values, got D = ", p.shape.D);
  SORA_CUDA_CHECK(cudaGetLastError());
}

void run(const Tensor& x, const Tensor& y, const OptionalTensor& index, int64_t host, std::optional<bool> y_rms, double eps,
         const Tensor& x_new, GateResidualParams& p) {
  SORA_CHECK(host == 0, "host: expected 0, for one rounding, got ", host);
  SORA_CHECK(!index, "index: expected none, got ", describe(*index));
  p.x = tokens("x", x, x), p.y = tokens("y", y, x), p.x_new = tokens("x_new", x_new, x);
  p.y_normed = y_rms.has_value(), p.y_rms = y_rms.value_or(false), p.eps = static_cast<float>(eps);
  SORA_CHECK(p.shape.rows() <= INT32_MAX, "x: expected at most 2^31 - 1 rows, got ", describe(x));
  if (p.shape.rows() == 0 || p.shape.D == 0) return;

  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x.get_device_index());
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return launch<__nv_bfloat16>(p, stream);
    case ScalarType::Half: return launch<__half>(p, stream);
    default: return launch<float>(p, stream);
  }
}

void gate_residual_fwd(const Tensor& x, const Tensor& y, const OptionalTensor& gate, const OptionalTensor& gate_table,
                       const OptionalTensor& index, std::optional<bool> y_rms, double eps, int64_t host,
                       const Tensor& out) {
  GateResidualParams p{.shape = shape_of("x", x)};
  p.gate = rows("gate", gate, x, p.shape), p.gate_table = vector("gate_table", gate_table, x);
  run(x, y, index, host, y_rms, eps, out, p);
}

void gate_residual_norm_modulate_fwd(const Tensor& x, const Tensor& y, const OptionalTensor& gate,
                                     const OptionalTensor& shift, const OptionalTensor& scale,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const OptionalTensor& gate_table, const OptionalTensor& shift_table,
                                     const OptionalTensor& scale_table, const OptionalTensor& index, bool rms,
                                     std::optional<bool> y_rms, double eps, int64_t host, const Tensor& x_new,
                                     const Tensor& out) {
  GateResidualParams p{.shape = shape_of("x", x)};
  p.gate = rows("gate", gate, x, p.shape), p.gate_table = vector("gate_table", gate_table, x);
  p.shift = rows("shift", shift, x, p.shape), p.scale = rows("scale", scale, x, p.shape);
  p.weight = vector("weight", weight, x), p.bias = vector("bias", bias, x);
  p.shift_table = vector("shift_table", shift_table, x), p.scale_table = vector("scale_table", scale_table, x);
  p.out = tokens("out", out, x), p.rms = rms;
  run(x, y, index, host, y_rms, eps, x_new, p);
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_gate_residual_fwd_cuda", TORCH_BOX(&sora::gate_residual_fwd));
  m.impl("_gate_residual_norm_modulate_fwd_cuda", TORCH_BOX(&sora::gate_residual_norm_modulate_fwd));
}
