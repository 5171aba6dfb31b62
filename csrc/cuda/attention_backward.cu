// spacetime_attention, backward, for sm_90a: what its kernels (attention_backward.cuh) are launched with, after a kernel
// that takes queries alone.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "cuda/attention_backward.cuh"

#include <cmath>

namespace sora {
namespace {

constexpr int kRowLanes = 8, kRowVectors = 2, kRowThreads = 128;  // of the kernel that takes queries alone
constexpr int kPadding = 192;  // of the queries of a head: whole tiles of 64 and of 96

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void attention_bwd_kernel(
    const __grid_constant__ CUtensorMap own_x, const __grid_constant__ CUtensorMap own_y,
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y, const __grid_constant__ CUtensorMap dx,
    const __grid_constant__ CUtensorMap dy, const __grid_constant__ BackwardParams p) {
  differentiate<Traits>({{own_x, own_x}, {own_y, own_y}, {x, x}, {y, y}}, dx, dy, p);
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void attention_plan_bwd_kernel(
    const __grid_constant__ CUtensorMap own_x, const __grid_constant__ CUtensorMap own_y,
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap y,
    const __grid_constant__ CUtensorMap own_x_run, const __grid_constant__ CUtensorMap own_y_run,
    const __grid_constant__ CUtensorMap x_run, const __grid_constant__ CUtensorMap y_run,
    const __grid_constant__ BackwardParams p) {
  differentiate<Traits>({{own_x, own_x_run}, {own_y, own_y_run}, {x, x_run}, {y, y_run}}, x, y, p);
}

struct RowsParams {
  const void *out, *dout;
  int64_t out_strides[3], dout_strides[3];  // of b, s, h
  const float *lse, *dlse;                  // [B, H, Sq]; dlse may be null
  float *base, *delta;                      // [B, H, padded]
  int padded, Sq, H, width;
  int blocks;  // of a head
};

// Eight lanes a query: base and delta; +inf and 0 beyond Sq, and +inf where a query saw nothing: p is then 0.
template <class T>
__global__ __launch_bounds__(kRowThreads) void attention_bwd_rows_kernel(const __grid_constant__ RowsParams p) {
  constexpr int kRows = kRowThreads / kRowLanes;
  const int head = blockIdx.x / p.blocks, query = blockIdx.x % p.blocks * kRows + threadIdx.x / kRowLanes;
  const int lane = threadIdx.x % kRowLanes, column = lane * Vec<T>::kSize;
  const bool real = query < p.Sq;
  float sum = 0.0f;
  if (real) {
    const int b = head / p.H, h = head % p.H;
    const auto at = [&](const void* heads, const int64_t (&strides)[3]) {
      return static_cast<const T*>(heads) + b * strides[0] + query * strides[1] + h * strides[2] + column;
    };
    const T *out = at(p.out, p.out_strides), *dout = at(p.dout, p.dout_strides);
    Vec<T> left[kRowVectors] = {}, right[kRowVectors] = {};
#pragma unroll
    for (int n = 0; n < kRowVectors; ++n) {
      const int further = n * kRowLanes * Vec<T>::kSize;
      if (column + further < p.width) left[n] = load_streaming(out + further), right[n] = load_streaming(dout + further);
    }
#pragma unroll
    for (int n = 0; n < kRowVectors; ++n)
#pragma unroll
      for (int i = 0; i < Vec<T>::kSize; ++i) sum = fmaf(to_float(left[n].values[i]), to_float(right[n].values[i]), sum);
  }
#pragma unroll
  for (int offset = kRowLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane != 0) return;
  float base = INFINITY;
  if (real) {
    const int64_t row = int64_t{head} * p.Sq + query;
    const float lse = p.lse[row];
    if (lse != -INFINITY) base = lse * 1.4426950408889634f;
    if (p.dlse) sum -= p.dlse[row];
  }
  const int64_t row = int64_t{head} * p.padded + query;
  p.base[row] = base, p.delta[row] = sum;
}

void check_device(const Tensor& q) {
  int major = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, q.get_device_index()));
  SORA_CHECK(major == 9, "expected a GPU of compute capability 9.0, got ", major, ".x");
}

void check_sums(const char* name, const Tensor& t, const Tensor& q) {
  check_kind(name, t, q, "q");
  SORA_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == q.size(0) * q.size(2) * q.size(1),
             name, ": expected a contiguous float32 (B, H, Sq), got ", describe(t));
}

// The rows kernel reads vectors of 16 bytes; of the others box_map asks the same.
void check_vectors(const char* name, const Tensor& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis) aligned &= t.size(axis) <= 1 || t.stride(axis) % 8 == 0;
  SORA_CHECK(aligned, name, ": expected data and strides at multiples of 16 bytes, got ", describe(t));
}

// What query heads give to their key heads where these keep different rules.
void check_shares(const char* name, const Tensor& t, const Tensor& q, int64_t Sk) {
  check_kind(name, t, q, "q");
  SORA_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == 4 && t.size(0) == q.size(0) &&
                 t.size(1) == Sk && t.size(2) == q.size(2) && t.size(3) == q.size(3),
             name, ": expected the dtype and heads of k, or a contiguous float32 (", q.size(0), ", ", Sk, ", ", q.size(2),
             ", ", q.size(3), "), got ", describe(t));
}

// numbers [2, B, H, padded]; how many of them a head has.
int check_numbers(const Tensor& numbers, const Tensor& q) {
  check_kind("numbers", numbers, q, "q");
  const int64_t padded = (q.size(1) + kPadding - 1) / kPadding * kPadding;
  SORA_CHECK(numbers.scalar_type() == ScalarType::Float && numbers.is_contiguous() &&
                 numbers.numel() == 2 * q.size(0) * q.size(2) * padded && padded <= INT32_MAX,
             "numbers: expected a contiguous float32 (2, B, H, ", padded, "), got ", describe(numbers));
  return static_cast<int>(padded);
}

// Base and delta of every query, [2, B, H, padded].
void attention_bwd_rows(const Tensor& dout, const OptionalTensor& dlse, const Tensor& out, const Tensor& lse,
                        const Tensor& numbers) {
  const int64_t Sq = out.dim() == 4 ? out.size(1) : 0, H = out.dim() == 4 ? out.size(2) : 0;
  check_heads("out", out, out, Sq, H), check_heads("dout", dout, out, Sq, H);
  check_vectors("out", out), check_vectors("dout", dout);
  check_sums("lse", lse, out);
  if (dlse) check_sums("dlse", *dlse, out);
  const int padded = check_numbers(numbers, out);

  const DeviceGuard guard(out.get_device_index());
  const int64_t rows = out.size(0) * H * padded;
  RowsParams p{.out = out.data_ptr(), .dout = dout.data_ptr()};
  for (int axis = 0; axis < 3; ++axis) p.out_strides[axis] = out.stride(axis), p.dout_strides[axis] = dout.stride(axis);
  p.lse = static_cast<const float*>(lse.data_ptr());
  p.dlse = dlse ? static_cast<const float*>(dlse->data_ptr()) : nullptr;
  p.base = static_cast<float*>(numbers.data_ptr()), p.delta = p.base + rows;
  p.padded = padded, p.Sq = static_cast<int>(Sq), p.H = static_cast<int>(H), p.width = static_cast<int>(out.size(3));
  constexpr int kRows = kRowThreads / kRowLanes;
  static_assert(kPadding % kRows == 0, "a block has queries of one head");
  SORA_CHECK(p.width <= kRowLanes * kRowVectors * 8, "out: expected heads of up to 128, got ", describe(out));
  p.blocks = padded / kRows;
  const int64_t blocks = rows / kRows;
  SORA_CHECK(blocks <= INT32_MAX, "q: expected fewer than 2^34 queries of all heads, got ", describe(out));
  const auto kernel = out.scalar_type() == ScalarType::Half ? attention_bwd_rows_kernel<__half>
                                                            : attention_bwd_rows_kernel<__nv_bfloat16>;
  kernel<<<static_cast<unsigned>(blocks), kRowThreads, 0, current_stream(out.get_device_index())>>>(p);
  SORA_CUDA_CHECK(cudaGetLastError());
}

struct Named {
  const char* name;
  const Tensor& tensor;
};

template <class Traits>
void launch(const Named& own_x, const Named& own_y, const Named& x, const Named& y, const OptionalTensor& dx,
            const OptionalTensor& dy, BackwardParams p, const Plan& plan, cudaStream_t stream) {
  constexpr int kColumns = Traits::kColumns, kOwn = Traits::kOwn, kVisited = Traits::kVisited;
  constexpr int kBlock = Traits::kConsumers * kOwn, kShared = sizeof(BackwardShared<Traits>);
  static_assert(kPadding % kVisited == 0, "a tile's numbers are one copy");
  const Tensor& owner = own_x.tensor;
  if constexpr (Traits::kPlanned) p.plan = plan_params(plan, owner, kVisited);
  p.own_tiles = static_cast<int>((owner.size(1) + kBlock - 1) / kBlock), p.own_heads = static_cast<int>(owner.size(2));
  p.dx = dx ? dx->data_ptr() : nullptr, p.dy = dy ? dy->data_ptr() : nullptr;
  const int64_t tiles = Traits::kPlanned ? int64_t{p.plan.owners} * p.plan.chosen : int64_t{p.own_heads} * p.own_tiles;
  const int64_t blocks = owner.size(0) * tiles;
  SORA_CHECK(blocks <= INT32_MAX, own_x.name, ": expected at most 2^31 - 1 tiles of ", kBlock, " tokens, got ",
             describe(owner));
  const unsigned grid = static_cast<unsigned>(blocks);
  if constexpr (Traits::kPlanned) {
    for (const auto* d : {&dx, &dy})
      SORA_CHECK(!*d || (*d)->is_contiguous(), "dq, dk, dv: expected contiguous tensors, got ", describe(**d));
    const auto own = [&](const Named& t) {
      return tile_map(t.name, t.tensor, plan.own_start, plan.own_size, kColumns, half_box(plan.own_box));
    };
    const auto seen = [&](const Named& t) {
      return tile_map(t.name, t.tensor, plan.visit_start, plan.visit_size, kColumns, plan.visit_box);
    };
    const auto run = [](const Named& t, int tokens) { return run_map(t.name, t.tensor, kColumns, tokens); };
    const auto kernel = attention_plan_bwd_kernel<Traits>;
    SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    kernel<<<grid, Traits::kThreads, kShared, stream>>>(own(own_x), own(own_y), seen(x), seen(y), run(own_x, kOwn),
                                                        run(own_y, kOwn), run(x, kVisited), run(y, kVisited), p);
  } else {
    const auto map = [](const Named& t, int rows) { return head_map(t.name, t.tensor, kColumns, rows); };
    const CUtensorMap to_x = map({"dx", dx ? *dx : *dy}, kOwn), to_y = map({"dy", dy ? *dy : *dx}, kOwn);
    const auto kernel = attention_bwd_kernel<Traits>;
    SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    kernel<<<grid, Traits::kThreads, kShared, stream>>>(map(own_x, kOwn), map(own_y, kOwn), map(x, kVisited),
                                                        map(y, kVisited), to_x, to_y, p);
  }
  SORA_CUDA_CHECK(cudaGetLastError());
}

struct Operands {
  const Tensor &dout, &q, &k, &v;
  const OptionalTensor &dq, &dk, &dv;
};

template <class T, int kWidth, bool kPlanned>
void launch_sides(const Operands& o, const BackwardParams& p, const Plan& plan, cudaStream_t stream) {
  const Named q{"q", o.q}, k{"k", o.k}, v{"v", o.v}, dout{"dout", o.dout};
  if (o.dq) {
    launch<BackwardTraits<T, kWidth, false, kPlanned>>(q, dout, k, v, o.dq, OptionalTensor{}, p, plan, stream);
  } else {
    launch<BackwardTraits<T, kWidth, true, kPlanned>>(k, v, q, dout, o.dk, o.dv, p, plan, stream);
  }
}

template <class T, bool kPlanned>
void launch_width(const Operands& o, const BackwardParams& p, const Plan& plan, cudaStream_t stream) {
  switch (o.q.size(3)) {
    case 64: return launch_sides<T, 64, kPlanned>(o, p, plan, stream);
    case 96: return launch_sides<T, 96, kPlanned>(o, p, plan, stream);
    default: return launch_sides<T, 128, kPlanned>(o, p, plan, stream);
  }
}

// Of queries alone or of keys and values alone: plans have one side that owns.
void attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& numbers,
                   const OptionalTensor& kv_lens, const OptionalTensor& heads, const OptionalTensor& rows,
                   const OptionalTensor& tiles, const OptionalTensor& reach, Plan::Sides own_box, Plan::Sides visit_box,
                   Plan::Sides own_size, Plan::Sides visit_size, int64_t own_start, int64_t visit_start, double scale,
                   const OptionalTensor& dq, const OptionalTensor& dk, const OptionalTensor& dv) {
  check_operands(q, k, scale);
  const int64_t Sq = q.size(1), Sk = k.size(1), H = q.size(2), Hk = k.size(2);
  check_heads("q", q, q, Sq, H), check_heads("dout", dout, q, Sq, H);
  check_heads("k", k, q, Sk, Hk), check_heads("v", v, q, Sk, Hk);
  if (dq) check_heads("dq", *dq, q, Sq, H);
  const bool wide = rows && ((dk && dk->scalar_type() == ScalarType::Float) || (dv && dv->scalar_type() == ScalarType::Float));
  SORA_CHECK(!wide || heads, "heads: expected a table of the query heads that give shares of dk and dv");
  if (dk) wide ? check_shares("dk", *dk, q, Sk) : check_heads("dk", *dk, q, Sk, Hk);
  if (dv) wide ? check_shares("dv", *dv, q, Sk) : check_heads("dv", *dv, q, Sk, Hk);
  SORA_CHECK(dq.has_value() != (dk || dv), "dq, dk, dv: expected dq alone, or dk, dv or both");
  const int padded = check_numbers(numbers, q);

  const DeviceGuard guard(q.get_device_index());
  check_device(q);
  BackwardParams p{.base = static_cast<const float*>(numbers.data_ptr()), .lengths = lengths_of(kv_lens, q)};
  p.delta = p.base + q.size(0) * H * padded, p.padded = padded;
  p.Sq = static_cast<int>(Sq), p.Sk = static_cast<int>(Sk), p.H = static_cast<int>(H), p.wide = wide;
  p.group = static_cast<int>(wide ? 1 : H / Hk), p.shares = static_cast<int>(wide ? H / Hk : 1);
  p.scale = static_cast<float>(scale), p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  const Plan plan{heads, rows, tiles, reach, own_box, visit_box, own_size, visit_size, own_start, visit_start};
  const Operands o{dout, q, k, v, dq, dk, dv};
  const cudaStream_t stream = current_stream(q.get_device_index());
  if (q.scalar_type() == ScalarType::Half) {
    rows ? launch_width<__half, true>(o, p, plan, stream) : launch_width<__half, false>(o, p, plan, stream);
  } else {
    rows ? launch_width<__nv_bfloat16, true>(o, p, plan, stream) : launch_width<__nv_bfloat16, false>(o, p, plan, stream);
  }
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_spacetime_attention_bwd_rows_cuda_launch", TORCH_BOX(&sora::attention_bwd_rows));
  m.impl("_spacetime_attention_bwd_cuda_launch", TORCH_BOX(&sora::attention_bwd));
}
