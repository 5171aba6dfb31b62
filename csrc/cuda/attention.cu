// spacetime_attention, forward, for sm_90a: what its kernels (attention_forward.cuh) are launched with.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "common/tma.cuh"
#include "cuda/attention_forward.cuh"

#include <algorithm>

namespace sora {
namespace {

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void attention_fwd_kernel(
    const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
    const __grid_constant__ CUtensorMap out, const __grid_constant__ AttentionParams p) {
  attend<Traits>({q, q}, {k, k}, {v, v}, out, p);
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void attention_plan_fwd_kernel(
    const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
    const __grid_constant__ CUtensorMap q_run, const __grid_constant__ CUtensorMap k_run,
    const __grid_constant__ CUtensorMap v_run, const __grid_constant__ AttentionParams p) {
  attend<Traits>({q, q_run}, {k, k_run}, {v, v_run}, q, p);
}

template <class Traits>
void launch(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, AttentionParams p, const Plan& plan) {
  constexpr int kQueries = Traits::kQueries, kKeys = Traits::kKeys, kColumns = Traits::kColumns;
  constexpr int kBlockQueries = Traits::kConsumers * kQueries, kShared = sizeof(AttentionShared<Traits>);
  p.query_tiles = (p.Sq + kBlockQueries - 1) / kBlockQueries;
  const int64_t tiles = q.size(0) * (Traits::kPlanned ? int64_t{p.plan.owners} * p.plan.chosen : int64_t{p.H} * p.query_tiles);
  SORA_CHECK(tiles <= INT32_MAX, "q: expected at most 2^31 - 1 tiles of ", kBlockQueries, " queries, got ", describe(q));
  p.tiles = static_cast<int>(tiles);

  const int32_t device = q.get_device_index();
  const DeviceGuard guard(device);
  int major = 0, processors = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  SORA_CHECK(major == 9, "expected a GPU of compute capability 9.0, got ", major, ".x");
  const int blocks = std::min(p.tiles, processors);
  const cudaStream_t stream = current_stream(device);
  if constexpr (Traits::kPlanned) {
    const auto visited = [&](const char* name, const Tensor& x) {
      return tile_map(name, x, plan.visit_start, plan.visit_size, kColumns, plan.visit_box);
    };
    const auto kernel = attention_plan_fwd_kernel<Traits>;
    SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    kernel<<<blocks, Traits::kThreads, kShared, stream>>>(
        tile_map("q", q, plan.own_start, plan.own_size, kColumns, half_box(plan.own_box)), visited("k", k), visited("v", v),
        run_map("q", q, kColumns, kQueries), run_map("k", k, kColumns, kKeys), run_map("v", v, kColumns, kKeys), p);
  } else {
    const auto kernel = attention_fwd_kernel<Traits>;
    SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    kernel<<<blocks, Traits::kThreads, kShared, stream>>>(
        head_map("q", q, kColumns, kQueries), head_map("k", k, kColumns, kKeys), head_map("v", v, kColumns, kKeys),
        head_map("out", out, kColumns, kQueries), p);
  }
  SORA_CUDA_CHECK(cudaGetLastError());
}

template <class T, bool kPlanned>
void launch_width(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const AttentionParams& p,
                  const Plan& plan) {
  switch (q.size(3)) {
    case 64: return launch<AttentionTraits<T, 64, kPlanned>>(q, k, v, out, p, plan);
    case 96: return launch<AttentionTraits<T, 96, kPlanned>>(q, k, v, out, p, plan);
    default: return launch<AttentionTraits<T, 128, kPlanned>>(q, k, v, out, p, plan);
  }
}

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& kv_lens,
                   const OptionalTensor& heads, const OptionalTensor& rows, const OptionalTensor& tiles,
                   const OptionalTensor& reach, Plan::Sides own_box, Plan::Sides visit_box, Plan::Sides own_size,
                   Plan::Sides visit_size, int64_t own_start, int64_t visit_start, double scale, const Tensor& out,
                   const Tensor& lse) {
  check_operands(q, k, scale);
  const int64_t Sq = q.size(1), Sk = k.size(1), H = q.size(2), Hk = k.size(2);
  check_heads("q", q, q, Sq, H), check_heads("out", out, q, Sq, H);
  check_heads("k", k, q, Sk, Hk), check_heads("v", v, q, Sk, Hk);
  SORA_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.numel() == q.size(0) * H * Sq,
             "lse: expected a contiguous float32 (B, H, Sq), got ", describe(lse));

  AttentionParams p{.lse = static_cast<float*>(lse.data_ptr()), .out = out.data_ptr(), .lengths = lengths_of(kv_lens, q)};
  p.Sq = static_cast<int>(Sq), p.Sk = static_cast<int>(Sk), p.H = static_cast<int>(H);
  p.group = static_cast<int>(H / Hk);
  p.scale = static_cast<float>(scale), p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  const Plan plan{heads, rows, tiles, reach, own_box, visit_box, own_size, visit_size, own_start, visit_start};
  const bool half = q.scalar_type() == ScalarType::Half;
  if (rows) {
    SORA_CHECK(out.is_contiguous(), "out: expected a contiguous tensor, got ", describe(out));
    p.plan = plan_params(plan, q, AttentionTraits<__half, 64, true>::kKeys);
    half ? launch_width<__half, true>(q, k, v, out, p, plan) : launch_width<__nv_bfloat16, true>(q, k, v, out, p, plan);
  } else {
    half ? launch_width<__half, false>(q, k, v, out, p, plan) : launch_width<__nv_bfloat16, false>(q, k, v, out, p, plan);
  }
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_spacetime_attention_fwd_cuda_launch", TORCH_BOX(&sora::attention_fwd));
}
