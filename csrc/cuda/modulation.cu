// norm_modulate, forward:  out = n * (1 + scale + scale_table) + shift + shift_table,  n = xhat * weight + bias.
//
// A row of x is read once, with 16-byte loads, and stays in the registers of one, four or sixteen warps; mean and
// variance are two passes over those registers. Rows too long for that, or not 16-byte aligned, take the looping kernel.

#include "common/check.h"
#include "common/library.h"
#include "common/reduce.cuh"
#include "common/stream.cuh"
#include "common/vec.cuh"
#include "cuda/modulation.cuh"

#include <algorithm>

namespace sora {
namespace {

template <class T_, int kWarps_, int kElements_>
struct NormModulateTraits : RowTraits<T_, kWarps_, kElements_> {
  using Row = RowTraits<T_, kWarps_, kElements_>;
  // The row in fp32 and 48 more. Left to itself, ptxas spills a word to reach the next step of occupancy.
  static constexpr int kRegisters = Row::kElements + 48;
  static constexpr int kMinBlocks = 65536 / (kRegisters * Row::kThreads);

  static_assert(Row::kElements <= 48, "more would spill");
  static_assert(Row::kThreads >= 128 && Row::kThreads <= 1024);
  static_assert(kMinBlocks >= 1, "a block must fit the register file");
};

struct NormModulateParams {
  Shape shape;
  Tokens x, out;
  Rows shift, scale;
  Vector weight, bias, shift_table, scale_table;
  bool rms;
  float eps;
};

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kMinBlocks) void norm_modulate_kernel(
    const __grid_constant__ NormModulateParams p) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec, kVecs = Traits::kVecs;
  __shared__ float shared[Traits::kWarps];

  const int D = static_cast<int>(p.shape.D), thread = threadIdx.x % Traits::kRowThreads;
  const int64_t row = int64_t{blockIdx.x} * Traits::kRowsPerBlock + threadIdx.x / Traits::kRowThreads;
  if (row >= p.shape.rows()) return;  // whole warps only; a row of several warps has its block to itself
  const int64_t b = row / p.shape.S, s = row % p.shape.S;
  const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride_b + s * p.x.stride_s;
  T* out = static_cast<T*>(p.out.data) + b * p.out.stride_b + s * p.out.stride_s;

  // Vector v of a thread is columns (v * kRowThreads + thread) * kVec onwards: neighbours read neighbouring 16 bytes.
  const auto column = [&](int v) { return (v * Traits::kRowThreads + thread) * kVec; };
  float values[kVecs][kVec];
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    Vec<T> vec{};
    if (column(v) < D) vec = load_streaming(x + column(v));
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[v][i] = to_float(vec.values[i]);
  }

  float mean;
  const float rstd = row_statistics(values, column, D, EachRowSum<Traits::kWarps>{shared}, p.rms, p.eps, mean);

  const int64_t f = s / p.shape.rows_per_modulation();
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    if (column(v) >= D) continue;
    normalise(values[v], mean, rstd);
    modulate(p, b, f, column(v), values[v]);
    Vec<T> vec;
#pragma unroll
    for (int i = 0; i < kVec; ++i) vec.values[i] = from_float<T>(values[v][i]);
    store_vec(out + column(v), vec);
  }
}

constexpr int kLoopWarps = 8;

// Any width and any alignment: three passes over the row, the second and third of which L2 serves.
template <class T>
__global__ __launch_bounds__(kLoopWarps* kWarp) void norm_modulate_loop_kernel(
    const __grid_constant__ NormModulateParams p) {
  __shared__ float shared[kLoopWarps];
  const int64_t D = p.shape.D, b = blockIdx.x / p.shape.S, s = blockIdx.x % p.shape.S;
  const int64_t f = s / p.shape.rows_per_modulation();
  const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride_b + s * p.x.stride_s;
  T* out = static_cast<T*>(p.out.data) + b * p.out.stride_b + s * p.out.stride_s;

  float sum = 0.0f, squares = 0.0f, left = 0.0f;
  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) sum += to_float(x[d]);
  float mean = p.rms ? 0.0f : row_sum<kLoopWarps>(sum, shared) / D;
  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    const float deviation = to_float(x[d]) - mean;
    left += deviation, squares += deviation * deviation;
  }
  const float rstd = corrected(squares, left, EachRowSum<kLoopWarps>{shared}, D, p.rms, p.eps, mean);

  const auto load_row = [&](const Rows& row, int64_t d) {
    return row ? load_any(row.data, row.dtype, b * row.stride_b + f * row.stride_f + d) : 0.0f;
  };
  const auto load_vector = [&](const Vector& vector, int64_t d, float missing) {
    return vector ? load_any(vector.data, vector.dtype, d) : missing;
  };
  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    const float n = (to_float(x[d]) - mean) * rstd * load_vector(p.weight, d, 1.0f) + load_vector(p.bias, d, 0.0f);
    const float scale = 1.0f + load_row(p.scale, d) + load_vector(p.scale_table, d, 0.0f);
    const float shift = load_row(p.shift, d) + load_vector(p.shift_table, d, 0.0f);
    out[d] = from_float<T>(n * scale + shift);
  }
}

// Every row of every tensor starts on a 16-byte boundary (8 for 16-bit modulation beside fp32 tokens).
bool rows_are_aligned(const NormModulateParams& p, int element_size) {
  const int vec = 16 / element_size;
  const auto vector = [&](const Vector& v) { return is_aligned(v, vec); };
  return p.shape.D % vec == 0 && is_aligned(p.x, element_size) && is_aligned(p.out, element_size) &&
         is_aligned(p.shift, vec) && is_aligned(p.scale, vec) && vector(p.weight) && vector(p.bias) &&
         vector(p.shift_table) && vector(p.scale_table);
}

template <class Traits>
bool launch_if_it_fits(const NormModulateParams& p, cudaStream_t stream) {
  if (p.shape.D > Traits::kMaxWidth) return false;
  const int64_t blocks = (p.shape.rows() + Traits::kRowsPerBlock - 1) / Traits::kRowsPerBlock;
  norm_modulate_kernel<Traits><<<static_cast<unsigned>(blocks), Traits::kThreads, 0, stream>>>(p);
  return true;
}

// The narrowest that holds the row: few idle lanes, and one warp per row (no barrier) up to 1536 columns.
template <class T>
void launch(const NormModulateParams& p, cudaStream_t stream) {
  const bool launched =
      rows_are_aligned(p, sizeof(T)) && (launch_if_it_fits<NormModulateTraits<T, 1, 16>>(p, stream) ||
                                         launch_if_it_fits<NormModulateTraits<T, 1, 32>>(p, stream) ||
                                         launch_if_it_fits<NormModulateTraits<T, 1, 48>>(p, stream) ||
                                         launch_if_it_fits<NormModulateTraits<T, 4, 24>>(p, stream) ||
                                         launch_if_it_fits<NormModulateTraits<T, 4, 48>>(p, stream) ||
                                         launch_if_it_fits<NormModulateTraits<T, 16, 32>>(p, stream));
  if (!launched) {
    norm_modulate_loop_kernel<T><<<static_cast<unsigned>(p.shape.rows()), kLoopWarps * kWarp, 0, stream>>>(p);
  }
  SORA_CUDA_CHECK(cudaGetLastError());
}

void norm_modulate_fwd(const Tensor& x, const OptionalTensor& shift, const OptionalTensor& scale,
                       const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& shift_table,
                       const OptionalTensor& scale_table, const OptionalTensor& index, bool rms, double eps,
                       int64_t host, const Tensor& out) {
  SORA_CHECK(host == 0, "host: expected 0, for one rounding, got ", host);
  SORA_CHECK(!index, "index: expected none, got ", describe(*index));
  NormModulateParams p{.shape = shape_of("x", x)};
  p.x = tokens("x", x, x);
  p.out = tokens("out", out, x);
  p.shift = rows("shift", shift, x, p.shape);
  p.scale = rows("scale", scale, x, p.shape);
  p.weight = vector("weight", weight, x);
  p.bias = vector("bias", bias, x);
  p.shift_table = vector("shift_table", shift_table, x);
  p.scale_table = vector("scale_table", scale_table, x);
  p.rms = rms;
  p.eps = static_cast<float>(eps);
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

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_norm_modulate_fwd_cuda", TORCH_BOX(&sora::norm_modulate_fwd));
}
