// spacetime_attention, forward, for sm_90a: what its kernels (attention_forward.cuh) are launched with.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "common/tma.cuh"
#include "cuda/attention_forward.cuh"

#include <algorithm>
#include <bit>
#include <vector>

namespace sora {
namespace {

using List = std::vector<int64_t>;

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

// Of x [B, S, heads, E], heads side by side, what a plan calls boxes: [B, T, H, W, heads * E] from token `start` on; for
// runs T and H are 1.
CUtensorMap tile_map(const char* name, const Tensor& x, int64_t start, const List& size, int columns, const List& box) {
  const int64_t b = x.stride(0), s = x.stride(1), H = size[1], W = size[2];
  return encode_boxes<5>(name, x, start * s, {x.size(2) * x.size(3), W, H, size[0], x.size(0)}, {1, s, W * s, H * W * s, b},
                         {columns, int(box[2]), int(box[1]), int(box[0]), 1});
}

// What the plan of a launch is; its tensors are null for dense attention.
struct Plan {
  const OptionalTensor &heads, &rows, &tiles, &reach;
  const List &own_box, &visit_box, &own_size, &visit_size;
  int64_t own_start, visit_start;
};

BoxShape box_shape(const char* name, const List& box, const List& size, int64_t start) {
  SORA_CHECK(box.size() == 3 && size.size() == 3 && box[0] * box[1] * box[2] == 128, name,
             ": expected three sides, powers of two, of a box of 128 tokens");
  const auto log = [&](int64_t side) { return std::countr_zero(static_cast<uint64_t>(side)); };
  return {log(box[2]), log(box[1]), log(box[0]), int(start), int(size[2]), int(size[1])};
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
    List half = plan.own_box;
    for (int64_t& side : half)
      if (side > 1) {
        side /= 2;
        break;
      }
    const auto boxes = [&](const char* name, const Tensor& x, int64_t start, const List& size, const List& box) {
      return tile_map(name, x, start, size, kColumns, box);
    };
    const auto runs = [&](const char* name, const Tensor& x, int rows) {
      return tile_map(name, x, 0, {1, 1, x.size(1)}, kColumns, {1, 1, rows});
    };
    const auto kernel = attention_plan_fwd_kernel<Traits>;
    SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    kernel<<<blocks, Traits::kThreads, kShared, stream>>>(
        boxes("q", q, plan.own_start, plan.own_size, half), boxes("k", k, plan.visit_start, plan.visit_size, plan.visit_box),
        boxes("v", v, plan.visit_start, plan.visit_size, plan.visit_box), runs("q", q, kQueries), runs("k", k, kKeys),
        runs("v", v, kKeys), p);
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

const int* table(const char* name, const OptionalTensor& t, const Tensor& q) {
  if (!t) return nullptr;
  SORA_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous() && t->get_device_index() == q.get_device_index(), name,
             ": expected a contiguous int32 table on the device of q, got ", describe(*t));
  return static_cast<const int*>(t->data_ptr());
}

PlanParams plan_params(const Plan& plan, const Tensor& q, const Tensor& k, const Tensor& out) {
  const int64_t Sq = q.size(1), E = q.size(3);
  SORA_CHECK(plan.rows && plan.tiles && plan.reach, "rows, tiles, reach: expected all tables of a plan");
  SORA_CHECK(plan.rows->dim() == 2 && plan.rows->size(1) == kPlanColumns && plan.reach->dim() == 2 &&
                 plan.reach->size(0) == 7 && plan.reach->size(1) == Sq,
             "rows, reach: expected (owners, ", kPlanColumns, ") and (7, ", Sq, "), got ", describe(*plan.rows), " and ",
             describe(*plan.reach));
  for (const Tensor* x : {&q, &k})
    SORA_CHECK(x->size(2) == 1 || x->stride(2) == E, "q, k, v: expected heads side by side, got ", describe(*x));
  PlanParams p{.rows = table("rows", plan.rows, q), .tiles = table("tiles", plan.tiles, q),
               .reach = table("reach", plan.reach, q), .heads = table("heads", plan.heads, q), .out = out.data_ptr()};
  p.owners = static_cast<int>(plan.rows->size(0)), p.Sq = static_cast<int>(Sq);
  p.chosen = static_cast<int>(plan.heads ? plan.heads->numel() : q.size(2));
  p.own = box_shape("own_box", plan.own_box, plan.own_size, plan.own_start);
  p.visit = box_shape("visit_box", plan.visit_box, plan.visit_size, plan.visit_start);
  const int periods[3] = {p.visit.w, p.visit.w + p.visit.h, 7};
  for (int i = 0; i < 3; ++i)  // of 2^n keys, of which a thread has a quarter
    p.repeat[i] = periods[i] < 3   ? 0xffu / ((1u << (1 << periods[i])) - 1)
                  : periods[i] < 7 ? 0xffffffffu / ((1u << (1 << (periods[i] - 2))) - 1)
                                   : 1;
  return p;
}

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& kv_lens,
                   const OptionalTensor& heads, const OptionalTensor& rows, const OptionalTensor& tiles,
                   const OptionalTensor& reach, List own_box, List visit_box, List own_size, List visit_size,
                   int64_t own_start, int64_t visit_start, double scale, const Tensor& out, const Tensor& lse) {
  SORA_CHECK(q.dim() == 4 && k.dim() == 4, "q, k: expected (B, S, H, E), got ", describe(q), " and ", describe(k));
  const int64_t Sq = q.size(1), Sk = k.size(1), H = q.size(2), Hk = k.size(2), E = q.size(3);
  SORA_CHECK(q.is_cuda() && (E == 64 || E == 96 || E == 128) && q.scalar_type() != ScalarType::Float,
             "q: expected bfloat16 or float16 heads of 64, 96 or 128 on a GPU, got ", describe(q));
  SORA_CHECK(q.numel() > 0 && k.numel() > 0 && H % Hk == 0, "k: expected keys, in a number of heads that divides ", H,
             ", got ", describe(k));
  SORA_CHECK(scale > 0, "scale: expected a number above 0, got ", scale);
  check_heads("q", q, q, Sq, H), check_heads("out", out, q, Sq, H);
  check_heads("k", k, q, Sk, Hk), check_heads("v", v, q, Sk, Hk);
  SORA_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.numel() == q.size(0) * H * Sq,
             "lse: expected a contiguous float32 (B, H, Sq), got ", describe(lse));
  SORA_CHECK(std::max(Sq, Sk) <= INT32_MAX / 2, "q, k: expected fewer than 2^30 tokens, got ", describe(q), " and ",
             describe(k));

  AttentionParams p{.lse = static_cast<float*>(lse.data_ptr())};
  if (kv_lens) {
    p.wide_lens = kv_lens->scalar_type() == ScalarType::Long;
    SORA_CHECK((p.wide_lens || kv_lens->scalar_type() == ScalarType::Int) && kv_lens->is_contiguous() &&
                   kv_lens->dim() == 1 && kv_lens->size(0) == q.size(0) && kv_lens->is_cuda() &&
                   kv_lens->get_device_index() == q.get_device_index(),
               "kv_lens: expected a contiguous int32 or int64 (B,) on the device of q, got ", describe(*kv_lens));
    p.kv_lens = kv_lens->data_ptr();
  }
  p.Sq = static_cast<int>(Sq), p.Sk = static_cast<int>(Sk), p.H = static_cast<int>(H);
  p.group = static_cast<int>(H / Hk);
  p.scale = static_cast<float>(scale), p.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  const Plan plan{heads, rows, tiles, reach, own_box, visit_box, own_size, visit_size, own_start, visit_start};
  const bool half = q.scalar_type() == ScalarType::Half;
  if (rows) {
    SORA_CHECK(v.size(2) == 1 || v.stride(2) == E, "v: expected heads side by side, got ", describe(v));
    SORA_CHECK(out.is_contiguous(), "out: expected a contiguous tensor, got ", describe(out));
    p.plan = plan_params(plan, q, k, out);
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
